"""The trust rule, and objects as plain descriptions: what may be named, what is imported, what comes back."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import steerfm
from steerfm.building import build, check_arguments, describe, is_trusted, remembered, resolve
from steerfm.conditions import Labels
from steerfm.errors import CheckpointError, ConfigError, SteerfmError, TrustError
from steerfm.flow_map import FlowMap, Identity
from steerfm.networks import MLP
from steerfm.paths import Trigonometric, VariancePreserving

UNTRUSTED = ["os.system", "subprocess.Popen", "builtins.eval", "functools.partial", "torch.load", "torch.nn.Linear"]

ROUTES = [  # out of steerfm, through what its modules import
    "steerfm.building.importlib.import_module",
    "steerfm.building.functools.partial",
    "steerfm.flow_map.os.system",
    "steerfm.flow_map.torch.load",
    "steerfm.flow_map.nn.Linear",
    "steerfm.reward_plugins.Path",
    "steerfm.sampling.replace",
    "steerfm.types.Tensor",
    "torch.optim.lr_scheduler.partial",
    "torch.optim.lr_scheduler.warnings.warn",
]

PRIVATE = [
    "steerfm.networks.mlp._Block",
    "steerfm.FlowMap.__init__",
    "__main__.Net",
    "steerfm..x",
    "",
    "a b.c",
    "steerfm.x-y",
]


@pytest.fixture
def sentinel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that the importable module `sentinel_module` would write if anything imported it."""
    mark = tmp_path / "imported"
    (tmp_path / "sentinel_module.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Net: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sentinel_module", raising=False)
    return mark


@pytest.mark.parametrize("dotted", UNTRUSTED)
def test_foreign_names_are_refused_with_what_to_paste(dotted: str):
    assert not is_trusted(dotted)
    with pytest.raises(TrustError, match=rf"'{dotted}' is not on the list.*--trust {dotted.split('.')[0]}$"):
        resolve(dotted)


@pytest.mark.parametrize("dotted", ROUTES)
def test_no_route_leads_out_through_what_a_module_imports(dotted: str):
    with pytest.raises(TrustError, match=r"leads out of trusted code|only borrowed from|not on the list"):
        resolve(dotted)


@pytest.mark.parametrize("dotted", PRIVATE)
def test_private_names_are_refused_even_where_trusted(dotted: str):
    with pytest.raises(TrustError, match="private or no name, and such a path is never imported"):
        resolve(dotted, trusted=["steerfm", "__main__", "a b", ""])


def test_nothing_is_imported_before_it_is_trusted(sentinel: Path):
    for dotted in ("sentinel_module.Net", "sentinel_module", "sentinel_module.sub.Net"):
        with pytest.raises(TrustError):
            resolve(dotted)
        with pytest.raises(TrustError):
            build({"_target_": "steerfm.MLP", "data_shape": {"_target_": dotted}})
    assert not sentinel.exists()
    assert resolve("sentinel_module.Net", trusted=["sentinel_module"]).__name__ == "Net"
    assert sentinel.exists()


def test_what_is_public_and_what_is_listed_resolves():
    assert resolve("steerfm.FlowMap") is FlowMap
    assert resolve("steerfm.flow_map.FlowMap") is FlowMap
    assert resolve("steerfm.FlowMap.load") == FlowMap.load
    assert resolve("torch.optim.AdamW") is torch.optim.AdamW
    assert resolve("torch.optim.lr_scheduler.LambdaLR") is torch.optim.lr_scheduler.LambdaLR
    assert resolve("steerfm.MLP") is MLP


def test_every_public_name_has_a_home():
    public = {name for names in steerfm._HOMES.values() for name in names}
    assert public == set(steerfm.__all__)


def test_trust_reaches_a_package_and_no_further(sentinel: Path):
    assert resolve("torch.nn.Linear", trusted=["torch"]) is nn.Linear
    assert resolve("torch.nn.Linear", trusted=["torch.nn"]) is nn.Linear
    with pytest.raises(TrustError):
        resolve("torch.load", trusted=["torch.nn"])
    with pytest.raises(TrustError):
        resolve("sentinel_module.Net", trusted=["sentinel"])  # a longer name is another package
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("dotted", "message"),
    [
        ("steerfm.networks.mlp.MLPP", r"has no 'MLPP' .*did you mean 'MLP'"),
        ("steerfm.nothing", "'steerfm' has no 'nothing'"),
        ("steerfm.networks", "names module, and a class or function is needed"),
        ("no_such_package.Net", "No module named 'no_such_package'"),
    ],
)
def test_a_missing_name_is_one_sentence(dotted: str, message: str):
    with pytest.raises(ConfigError, match=message):
        resolve(dotted, trusted=["no_such_package"])


# --- descriptions ---------------------------------------------------------------------------------------------


@remembered
class Net(nn.Module):
    """A network of a user's own, with every kind of argument."""

    def __init__(self, width: int, *, depth: int = 2, **more: Any) -> None:
        super().__init__()
        self.made_of = (width, depth, more)


@remembered
class Stars:
    """A class whose arguments have no names."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes


@dataclass(frozen=True)
class Plain:
    """A dataclass that holds another object and a list."""

    path: Any
    sizes: tuple[int, ...] = (1, 2)


def there_and_back(obj: Any) -> Any:
    return build(json.loads(json.dumps(describe(obj))), trusted=[__name__.split(".")[0]])


def test_objects_come_back_with_their_arguments():
    network = there_and_back(MLP((1, 4, 4), 16, depth=1, num_classes=3))
    assert network.data_shape == (1, 4, 4)
    assert network._arguments == {"data_shape": [1, 4, 4], "width": 16, "depth": 1, "num_classes": 3}
    assert there_and_back(Labels(["one", "two"])).classes == ["one", "two"]
    assert there_and_back(VariancePreserving(0.2, 7.0)) == VariancePreserving(0.2, 7.0)
    assert there_and_back([Trigonometric(), {"a": Identity()}, None, 1.5, "x", True]) == [
        Trigonometric(), {"a": Identity()}, None, 1.5, "x", True,
    ]  # fmt: skip
    assert there_and_back(Plain(Trigonometric(), (3, 4))).path == Trigonometric()
    assert describe(torch.tensor([[1.0, 2.0]])) == [[1.0, 2.0]]


def test_named_arguments_are_remembered_whatever_way_they_came():
    assert there_and_back(Net(3, colour="red", size=2)).made_of == (3, 2, {"colour": "red", "size": 2})
    assert there_and_back(Net(width=3, depth=5)).made_of == (3, 5, {})


def test_a_subclass_does_not_pass_for_what_its_parent_remembers():
    class Wider(MLP):
        pass

    for obj in (Wider((2,)), Stars(1, 2), nn.Linear(1, 1), object()):
        with pytest.raises(CheckpointError, match=rf"{type(obj).__name__} does not remember its arguments"):
            describe(obj)


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ConfigError, match="takes no argument 'widht'; did you mean 'width'"):
        build({"_target_": "steerfm.MLP", "data_shape": [2], "widht": 3})
    check_arguments(Net, {"anything": 1}, "Net")  # it takes whatever it is given


@pytest.mark.parametrize(
    "target",
    ["steerfm.FlowMap.load", "steerfm.reward.load_reward", "steerfm.building.resolve", "steerfm.files.write_atomic"],
)
def test_a_description_names_classes_only(target: str):
    with pytest.raises(TrustError, match="is not a class, and saved data may only name classes"):
        build({"_target_": target})


def test_building_runs_nothing_of_what_it_refuses(sentinel: Path, monkeypatch: pytest.MonkeyPatch):
    def called(*arguments: Any, **named: Any) -> None:
        raise AssertionError("ran")

    monkeypatch.setattr("os.system", called)
    monkeypatch.setattr(subprocess, "Popen", called)
    monkeypatch.setattr("builtins.eval", called)
    for target in (*UNTRUSTED, *ROUTES, *PRIVATE, "sentinel_module.Net"):
        with pytest.raises(SteerfmError):
            build({"_target_": target, "args": [f"touch {sentinel}"]})
    assert not sentinel.exists()
