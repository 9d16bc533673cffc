"""The sdist, the wheel and environments that see them, each made once."""

import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from installing import Environment, copy_checkout


@pytest.fixture(scope="session")
def make_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Environment]:
    """Return a function that installs one thing, without its dependencies, into a fresh environment."""

    def make(*install: str | Path) -> Environment:
        environment = Environment(tmp_path_factory.mktemp("environment") / "venv")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment.folder], check=True)
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(environment.run("python", "-c", query, at=environment.folder).strip())
        # A plain line adds the folder and none of its .pth files, so an editable steerfm there stays unseen.
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (site / "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n", encoding="utf-8")
        options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
        environment.run(
            "python", "-m", "pip", "install", "--ignore-installed", *options, *install, at=environment.folder
        )
        return environment

    return make


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the sdist of the checkout, and the wheel that is built from that sdist and nothing else."""
    source = copy_checkout(tmp_path_factory.mktemp("checkout"))
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def sdist_names(distributions: tuple[Path, Path]) -> set[str]:
    """Return the names in the sdist, without its leading folder."""
    with tarfile.open(distributions[0]) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="session")
def installed(distributions: tuple[Path, Path], make_environment: Callable[..., Environment]) -> Environment:
    """Return an environment that holds the wheel."""
    return make_environment(distributions[1])
