"""Who may import whom: the table of the design, read as a literal against every import in the library."""

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A line may import from itself and from the lines above it, never from below.
TABLE = """
errors types memory seeds distributed images paths times shapes building digits files logs http_client
networks conditions derivatives optimizers
flow_map
analytic solvers sampling divergence reward preferences features
objectives backbones zoo metrics
finetuning steering
data modules callbacks reward_server prompt_writer
runs
report
config
commands
cli
"""

# Files that were split off for length stand beside the file they came from.
SPLIT_FROM = {
    "saving": "flow_map",
    "names": "runs",
    "provenance": "runs",
    "records": "runs",
    "checking": "config",
    "recipe_files": "config",
    "reward_adapters": "reward",
    "reward_algebra": "reward",
    "reward_check": "reward",
    "reward_plugins": "reward",
    "reward_wire": "reward",
    "shape_captions": "shapes",
    "shape_edits": "shapes",
}
LAYER = {name: number for number, line in enumerate(TABLE.strip().splitlines()) for name in line.split()}
LAYER |= {name: LAYER[origin] for name, origin in SPLIT_FROM.items()}

# The only calls upward: (file, function, part), imported inside that function.
UPWARD = {
    ("steerfm/flow_map.py", "from_pretrained", "backbones"),
    ("steerfm/flow_map.py", "from_zoo", "zoo"),
}

# Our own rewards have no privilege that a user's lack.
REWARDS_MAY_IMPORT = {"reward", "images", "features", "shapes", "shape_captions", "digits", "errors", "rewards"}
REWARDS_MAY_IMPORT |= {"http_client", "reward_wire"}  # for those that are scored elsewhere

THIRD_PARTY = {
    "lightning": {"data", "modules", "callbacks", "commands"},
    "pytorch_lightning": set(),
    "hydra": {"config"},
    "wandb": {"report", "callbacks"},
    "wandb_workspaces": {"report"},
    "diffusers": {"backbones"},
}


@dataclass(frozen=True)
class Import:
    """One import statement's target, and where it stands: the innermost function ("" outside), and when it runs."""

    target: str
    line: int
    function: str
    at_import: bool


def library_files() -> dict[str, str]:
    """Return path -> source of every Python file of steerfm/ and rewards/, links not followed."""
    found = {}
    for top in ("steerfm", "rewards"):
        for folder, _, names in os.walk(ROOT / top):
            for name in names:
                if name.endswith(".py"):
                    path = Path(folder, name)
                    found[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    return found


def module_name(path: str) -> str:
    """Return the dotted name that a file of the checkout installs as."""
    parts = list(Path(path).with_suffix("").parts)
    if parts[0] == "rewards":
        parts.insert(0, "steerfm")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: str, source: str) -> Iterator[Import]:
    """Yield every import of a file, inside functions and ``importlib`` calls with a literal name included."""
    package = module_name(path).split(".")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    yield from _visit(ast.parse(source, path), package)


def _visit(node: ast.AST, package: list[str], function: str = "", at_import: bool = True) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for target in _targets(child, package):
            yield Import(target, getattr(child, "lineno", 0), function, at_import)
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _visit(child, package, child.name, False)
        else:
            for_types_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _visit(child, package, function, at_import and not for_types_only)


def _targets(node: ast.AST, package: list[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        module = ".".join(base + ([node.module] if node.module else []))
        return [f"{module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
            return [node.args[0].value]
    return []


def findings(files: dict[str, str]) -> list[str]:
    """Return one sentence for each import that the table forbids."""
    found = []
    for path, source in files.items():
        part = path.split("/")[1].removesuffix(".py") if path.startswith("steerfm/") else "rewards"
        if part == "__init__":  # the public names, lazily: what it imports eagerly is test_light_import's matter
            continue
        if part != "rewards" and part not in LAYER:
            found.append(f"{path}: '{part}' has no line in the table; add it to the design and to TABLE")
            continue
        for item in imports(path, source):
            complaint = _complaint(path, part, item)
            if complaint:
                found.append(f"{path}:{item.line}: {complaint}")
    return found


def _complaint(path: str, part: str, item: Import) -> str:
    names = item.target.split(".")
    if names[0] != "steerfm":
        allowed = THIRD_PARTY.get(names[0])
        where = "/".join(sorted(allowed)) if allowed else "nowhere"
        return "" if allowed is None or part in allowed else f"{names[0]} may be imported in {where} only"
    target = names[1] if len(names) > 1 else ""
    if target.startswith("__"):
        return ""
    if part == "rewards":
        return "" if target in REWARDS_MAY_IMPORT else f"a reward may not import steerfm.{target}"
    if target == "rewards":
        return "the library never imports steerfm.rewards by name"
    if target not in LAYER:
        return f"write the module that '{item.target}' comes from, not the lazy name"
    if LAYER[target] <= LAYER[part] or (path, item.function, target) in UPWARD:
        return ""
    return f"{part} may not import {target}, which is below it in the table"


def cycles(files: dict[str, str]) -> list[list[str]]:
    """Return the loops among imports that run when a module is imported."""
    modules = {module_name(path): path for path in files if path != "steerfm/__init__.py"}

    def imported(name: str) -> set[str]:
        targets = {item.target for item in imports(modules[name], files[modules[name]]) if item.at_import}
        return {target if target in modules else target.rpartition(".")[0] for target in targets} & modules.keys()

    graph = {name: imported(name) - {name} for name in modules}
    loops: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> None:
        if name in trail:
            loops.append([*trail[trail.index(name) :], name])
        elif name not in done:
            for target in sorted(graph[name]):
                walk(target, [*trail, name])
            done.add(name)

    for name in graph:
        walk(name, [])
    return loops


def test_every_import_obeys_the_table():
    found = findings(library_files())
    assert not found, "\n".join(found)


def test_no_import_loops():
    loops = cycles(library_files())
    assert not loops, "\n".join(" -> ".join(loop) for loop in loops)


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("steerfm/paths.py", "from steerfm.flow_map import FlowMap", "below it"),
        ("steerfm/paths.py", "from steerfm import flow_map", "below it"),
        ("steerfm/paths.py", "from . import flow_map", "below it"),
        ("steerfm/networks/mlp.py", "from ..flow_map import FlowMap", "below it"),
        ("steerfm/paths.py", "def f():\n    import steerfm.modules.training", "below it"),
        ("steerfm/paths.py", "import importlib\nimportlib.import_module('steerfm.cli')", "below it"),
        ("steerfm/flow_map.py", "class A:\n    def other(self):\n        from steerfm.zoo import load", "below it"),
        ("steerfm/flow_map.py", "from steerfm.zoo import load", "below it"),
        ("steerfm/sampling.py", "from steerfm import FlowMap", "lazy name"),
        ("steerfm/commands/train.py", "import steerfm.rewards.clip", "by name"),
        ("steerfm/sampling.py", "def f():\n    import lightning.pytorch", "lightning may be imported"),
        ("steerfm/commands/train.py", "from hydra.utils import instantiate", "hydra may be imported"),
        ("steerfm/runs.py", "import wandb", "wandb may be imported"),
        ("steerfm/flow_map.py", "from diffusers import UNet2DModel", "diffusers may be imported"),
        ("rewards/clip.py", "from steerfm.flow_map import FlowMap", "a reward may not"),
        ("rewards/clip.py", "import wandb", "wandb may be imported"),
        ("steerfm/brand_new.py", "", "no line in the table"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str, said: str):
    assert [said in finding for finding in findings({path: source})] == [True]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("steerfm/flow_map.py", "class A:\n    def from_zoo(cls):\n        from steerfm.zoo import load"),
        ("steerfm/sampling.py", "from steerfm import seeds\nfrom steerfm.reward import Reward\nimport torch"),
        ("steerfm/data/points.py", "from lightning.pytorch import LightningDataModule"),
        ("steerfm/report/wandb.py", "import wandb\nfrom steerfm.runs import read"),
        ("steerfm/runs.py", "from steerfm import __version__"),
        ("rewards/clip.py", "from steerfm.reward import Reward\nfrom steerfm.images import resize\nimport open_clip"),
    ],
)
def test_an_allowed_import_is_let_pass(path: str, source: str):
    assert findings({path: source}) == []


def test_a_loop_of_types_only_is_none():
    split = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from steerfm.flow_map import FlowMap"
    assert cycles({"steerfm/saving.py": split, "steerfm/flow_map.py": "from steerfm.saving import save"}) == []


def test_a_package_that_collects_its_files_is_no_loop():
    files = {"steerfm/report/__init__.py": "from steerfm.report.page import write", "steerfm/report/charts.py": ""}
    assert cycles(files | {"steerfm/report/page.py": "from steerfm.report import charts"}) == []


def test_a_loop_is_found():
    files = {"steerfm/types.py": "import steerfm.errors", "steerfm/errors.py": "from steerfm import types"}
    assert cycles(files) == [["steerfm.types", "steerfm.errors", "steerfm.types"]]
