"""The sdist, its wheel and the editable install hold everything and work away from the checkout."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from installing import ROOT, Environment, copy_checkout, tracked_files

WHERE = """
import importlib.util, json
found = {}
for name in ("steerfm", "steerfm.rewards", "steerfm.recipes"):
    found[name] = importlib.util.find_spec(name).origin
print(json.dumps(found))
"""
COMPOSE = """
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
with initialize_config_module("steerfm.recipes", version_base=None):
    loader = GlobalHydra.instance().config_loader()
    print("\\n".join(loader.get_group_options("recipe")))
"""


def installed_name(tracked: str) -> str:
    """Return where a tracked file of the checkout lies in site-packages."""
    return f"steerfm/{tracked}" if tracked.startswith(("rewards/", "recipes/")) else tracked


def expected_files() -> dict[str, str]:
    """Return installed name -> tracked name of everything that the package must hold."""
    tops = ("steerfm/", "rewards/", "recipes/")
    names = [name for name in tracked_files() if name.startswith(tops) and not (ROOT / name).is_symlink()]
    return {installed_name(name): name for name in names}


def where(environment: Environment, at: Path) -> dict[str, Path]:
    """Return the file that each of our three packages is imported from."""
    return {name: Path(file) for name, file in json.loads(environment.run("python", "-c", WHERE, at=at)).items()}


def recipe_names() -> set[str]:
    """Return the recipes of the checkout, one name each, as their folder writes them."""
    folder = ROOT / "recipes" / "recipe"
    return {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")}


def test_the_sdist_holds_every_file(sdist_names: set[str]):
    assert sorted(set(expected_files().values()) - sdist_names) == []


def test_the_wheel_holds_every_file_and_nothing_else(distributions: tuple[Path, Path]):
    with zipfile.ZipFile(distributions[1]) as wheel:
        held = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {name: (ROOT / tracked).read_bytes() for name, tracked in expected_files().items()}
    assert sorted(held) == sorted(expected)
    assert [name for name in held if held[name] != expected[name]] == []


def test_the_installed_package_is_what_is_imported(installed: Environment, tmp_path: Path):
    found = where(installed, tmp_path)
    assert [str(path) for path in found.values() if not path.is_relative_to(installed.folder)] == []


def test_the_installed_rewards_and_recipes_are_the_tracked_ones(installed: Environment, tmp_path: Path):
    package = where(installed, tmp_path)["steerfm"].parent
    for top in ("rewards", "recipes"):
        tracked = {name for name in expected_files().values() if name.startswith(f"{top}/")}
        held = {path.relative_to(package).as_posix() for path in (package / top).rglob("*") if path.is_file()}
        assert {name for name in held if "__pycache__" not in name} == tracked
        assert [name for name in tracked if (package / name).read_bytes() != (ROOT / name).read_bytes()] == []


def test_hydra_finds_the_installed_recipes(installed: Environment, tmp_path: Path):
    top_level = {name for name in recipe_names() if "/" not in name}
    assert set(installed.run("python", "-c", COMPOSE, at=tmp_path).split()) == top_level


def test_the_installed_command_lists_the_recipes(installed: Environment, tmp_path: Path):
    listed = installed.run("steerfm", "recipes", "list", at=tmp_path)
    assert recipe_names()
    assert [name for name in sorted(recipe_names()) if name not in listed] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_installed_command_runs_the_demo(installed: Environment, tmp_path: Path):
    installed.run("steerfm", "demo", at=tmp_path, timeout=840)
    assert list(tmp_path.glob("runs/**/*.html"))


def test_the_editable_install_follows_the_checkout(make_environment: Callable[..., Environment], tmp_path: Path):
    source = copy_checkout(tmp_path / "checkout")
    environment = make_environment("--editable", source)
    found = where(environment, tmp_path)
    assert [str(path) for path in found.values() if not path.is_relative_to(source)] == []
    (source / "rewards" / "brand_new.py").write_text("SAID = 'new'\n", encoding="utf-8")
    said = environment.run("python", "-c", "import steerfm.rewards.brand_new as new; print(new.SAID)", at=tmp_path)
    assert said.strip() == "new"


def test_a_checkout_without_links_works(make_environment: Callable[..., Environment], tmp_path: Path):
    source = copy_checkout(tmp_path / "checkout", links=False)
    assert (source / "steerfm" / "rewards").is_file()
    environment = make_environment("--editable", source)
    for at in (tmp_path, source):
        found = where(environment, at)
        assert found["steerfm.rewards"] == source / "rewards" / "__init__.py"
        assert found["steerfm.recipes"] == source / "recipes" / "__init__.py"
    top_level = {name for name in recipe_names() if "/" not in name}
    assert set(environment.run("python", "-c", COMPOSE, at=tmp_path).split()) == top_level


@pytest.mark.parametrize("statement", ["import rewards", "import rewards.clip", "from rewards.simple import Redness"])
def test_our_rewards_are_refused_under_a_second_name(installed: Environment, tmp_path: Path, statement: str):
    shutil.copytree(ROOT / "rewards", tmp_path / "rewards")
    done = installed.attempt("python", "-c", statement, at=tmp_path)
    assert done.returncode == 1
    assert "ImportError: write steerfm.rewards.x" in done.stderr


def test_a_user_may_have_a_rewards_folder(installed: Environment, tmp_path: Path):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "mine.py").write_text("SAID = 'mine'\n", encoding="utf-8")
    code = "import steerfm.rewards, rewards.mine; print(rewards.mine.SAID)"
    assert installed.run("python", "-c", code, at=tmp_path).strip() == "mine"
