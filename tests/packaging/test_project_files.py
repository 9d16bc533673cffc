"""The lists that are written by hand agree with what they list."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import steerfm

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PIN = re.compile(r"[a-z0-9][a-z0-9-]*==[0-9][\w.]*")


def pins() -> dict[str, str]:
    """Return name -> version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def requirements() -> list[Requirement]:
    """Return every requirement of pyproject.toml: core, extras and build."""
    project = PROJECT["project"]
    listed = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    found = [Requirement(line) for line in listed + PROJECT["build-system"]["requires"]]
    return [requirement for requirement in found if requirement.name != "steerfm"]


def test_every_package_folder_is_listed():
    folders = [path.parent for path in (ROOT / "steerfm").glob("**/__init__.py") if not path.parent.is_symlink()]
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(
        expected | {"steerfm.rewards", "steerfm.recipes"}
    )


def test_every_python_file_is_in_a_package():
    files = [path for path in (ROOT / "steerfm").rglob("*.py") if not (path.parent / "__init__.py").exists()]
    assert files == [], "a folder without __init__.py is left out of the wheel"


def test_rewards_hold_no_folders():
    inner = [path for path in (ROOT / "rewards").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert inner == [], "one reward a file: a folder in rewards/ needs its own line in pyproject.toml's packages"


def test_constraints_are_plain_pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#") and not PIN.fullmatch(line)] == []


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_requirement_is_pinned_within_its_bounds(requirement: Requirement):
    assert requirement.specifier.contains(pins()[requirement.name])


def imported_modules() -> dict[str, str]:
    """Return the outside modules that the library imports anywhere -> one file that does."""
    found = {}
    for top in ("steerfm", "rewards"):
        for path in sorted((ROOT / top).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module or ""]
                found |= {name.split(".")[0]: path.relative_to(ROOT).as_posix() for name in names}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | {"steerfm"}}


def test_every_imported_package_is_declared():
    dev = {Requirement(line).name for line in PROJECT["project"]["optional-dependencies"]["dev"]}
    declared = {requirement.name for requirement in requirements() if requirement.name not in dev}
    owners = packages_distributions()
    missing = {
        f"{name} in {path}"
        for name, path in imported_modules().items()
        if not declared & {canonicalize_name(owner) for owner in owners.get(name, [name])}
    }
    assert sorted(missing) == []


def test_the_build_uses_the_pinned_setuptools():
    pinned = PROJECT["tool"]["uv"]["build-constraint-dependencies"]
    assert pinned == [f"setuptools=={pins()['setuptools']}"]


def test_the_version_is_the_same_everywhere():
    version = PROJECT["project"]["version"]
    assert steerfm.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["rewards", "recipes"])
def test_the_links_are_relative(name: str):
    link = ROOT / "steerfm" / name
    if not link.is_symlink():
        pytest.skip("this checkout has no links")
    assert link.readlink() == Path("..", name)
