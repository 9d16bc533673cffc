"""Flow maps on disk: bitwise round trips, Lightning checkpoints, networks of one's own, and every kind of damage."""

import json
import logging
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from exact import NAMES, PATHS, mixture
from safetensors.torch import load_file
from tiny_encoders import save_t5
from torch import Tensor, nn

from steerfm.analytic import analytic_flow_map
from steerfm.building import remembered
from steerfm.conditions import CaptionWords, FrozenText, Labels, Pictures, SceneAttributes
from steerfm.errors import CheckpointError, ConfigError, RunError, TrustError
from steerfm.flow_map import FlowMap, Output
from steerfm.networks import MLP, SlotEncoder, TextEmbeddings, UNet, WordEncoder
from steerfm.networks.mlp import randomise
from steerfm.paths import Path, Trigonometric
from steerfm.saving import describe_flow_map
from steerfm.types import Condition

CLASSES = ["a handwritten zero", "a handwritten one"]


def made(kind: str = "mlp", conditional: bool = False, **options: Any) -> FlowMap:
    classes = len(CLASSES) if conditional else 0
    shape = (1, 4, 4)
    network = MLP(shape, width=8, depth=1, num_classes=classes)
    if kind == "unet":
        network = UNet(shape, channels=(8, 16), attention_heads=2, num_classes=classes)
    randomise(network)
    return FlowMap(network, conditioner=Labels(CLASSES) if conditional else None, **options)


def output_of(flow_map: FlowMap, n: int = 3) -> Tensor:
    x = torch.randn(n, *flow_map.data_shape, generator=torch.Generator().manual_seed(0)).to(flow_map.dtype)
    condition = flow_map.encode_prompts([CLASSES[0], CLASSES[1], ""][:n])
    with torch.no_grad():
        return flow_map.average_velocity(x, 0.9, 0.2, condition)


def saved(flow_map: FlowMap, folder: FilePath) -> FilePath:
    return flow_map.save(folder / "map")


# --- round trips ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["average_velocity", "denoised"])
@pytest.mark.parametrize("path", PATHS, ids=NAMES)
@pytest.mark.parametrize("kind", ["mlp", "unet"])
@pytest.mark.parametrize("conditional", [False, True], ids=["free", "conditional"])
def test_a_map_comes_back_bit_for_bit(kind: str, conditional: bool, path: Path, output: Output, tmp_path: FilePath):
    flow_map = made(kind, conditional, path=path, output=output, guidance_scale=1.5)
    back = FlowMap.load(saved(flow_map, tmp_path))
    assert torch.equal(output_of(back), output_of(flow_map))
    assert (back.path, back.output, back.guidance_scale, back.codec) == (path, output, 1.5, flow_map.codec)
    assert back.weights == "raw"
    assert not back.training


CAPTIONS = ["a red circle", "two blue squares", ""]


def told(kind: str, folder: FilePath) -> FlowMap:
    """Return a map whose network has a reader of texts inside, and its conditioner perhaps another conditioner."""
    parts: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "words": (WordEncoder(4, 3, 8, 1, 2), CaptionWords(["a", "red", "blue", "circle"], 3), {"patch": 2}),
        "attributes": (SlotEncoder(SceneAttributes.values, 8, 1, 2), SceneAttributes(), {}),
        "text": (TextEmbeddings(16, 8, 1, 2), FrozenText(str(folder / "t5"), 6), {"text_levels": 1}),
        "pictures": (None, Pictures(3, 4), {"picture_channels": 3}),
        "pictures and text": (
            TextEmbeddings(16, 8, 1, 2),
            Pictures(1, (4, 4), captions=FrozenText(str(folder / "t5"), 6)),
            {"picture_channels": 1, "patch": 2},
        ),
    }
    if "text" in kind:
        save_t5(folder / "t5")
    text, conditioner, options = parts[kind]
    network = UNet((1, 4, 4), channels=(8, 16), text=text, text_heads=2, **options)
    randomise(network, scale=0.3)
    return FlowMap(network, conditioner=conditioner, guidance_scale=1.5)


@pytest.mark.parametrize("kind", ["words", "attributes", "text", "pictures", "pictures and text"])
def test_a_map_with_readers_and_conditioners_inside_comes_back_bit_for_bit(kind: str, tmp_path: FilePath):
    flow_map = told(kind, tmp_path)
    x = torch.randn(3, 1, 4, 4)

    def output(flow_map: FlowMap) -> Tensor:
        with torch.no_grad():
            return flow_map.average_velocity(x, 0.9, 0.2, flow_map.encode_prompts(CAPTIONS))

    path = checkpoint(flow_map, averages(flow_map), tmp_path / "last.ckpt")
    for back in (FlowMap.load(saved(flow_map, tmp_path)), FlowMap.load(path, weights="raw")):
        assert torch.equal(output(back), output(flow_map))
        assert describe_flow_map(back) == describe_flow_map(flow_map)
    assert not torch.equal(output(FlowMap.load(path)), output(flow_map))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_map_comes_back_in_its_type(dtype: torch.dtype, tmp_path: FilePath):
    flow_map = made().to(dtype)
    back = FlowMap.load(saved(flow_map, tmp_path))
    assert back.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), flow_map.parameters(), strict=True))


def test_a_saved_map_is_two_plain_files(tmp_path: FilePath):
    folder = saved(made(conditional=True), tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["flow_map.json", "flow_map.safetensors"]
    data = json.loads((folder / "flow_map.json").read_text())
    assert data["format"] == 1
    assert data["flow_map"]["network"]["_target_"] == "steerfm.networks.mlp.MLP"


def test_a_run_folder_is_loaded_by_its_map(tmp_path: FilePath):
    flow_map = made()
    saved(flow_map, tmp_path / "run")
    assert torch.equal(output_of(FlowMap.load(tmp_path / "run")), output_of(flow_map))


def test_saving_again_replaces_and_a_label_stays(tmp_path: FilePath):
    flow_map = made()
    flow_map.weights = "ema"
    folder = saved(flow_map, tmp_path)
    assert FlowMap.load(folder).weights == "ema"
    assert FlowMap.load(folder, weights="ema").weights == "ema"
    with pytest.raises(CheckpointError, match="holds the ema weights only"):
        FlowMap.load(folder, weights="raw")
    randomise(flow_map.network, seed=1)
    saved(flow_map, tmp_path)
    assert torch.equal(output_of(FlowMap.load(folder)), output_of(flow_map))


def test_unwritable_folders_are_one_sentence(tmp_path: FilePath):
    (tmp_path / "map").write_text("a file")
    with pytest.raises(RunError, match="Cannot write"):
        saved(made(), tmp_path)


# --- networks of one's own ------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers that share a weight."""

    data_shape = (2,)

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, width), nn.Linear(2, width)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        return self.second(self.first(x)) + (s - t)[:, None]


@remembered
class Remembered(Tied):
    """The same, remembering its arguments."""


def points(flow_map: FlowMap) -> Tensor:
    return flow_map.look_ahead(torch.tensor([[0.3, -1.0], [2.0, 0.1]]), 1.0)


def test_a_network_of_ones_own_is_given_again(tmp_path: FilePath, caplog: pytest.LogCaptureFixture):
    flow_map = FlowMap(Tied())
    with caplog.at_level(logging.WARNING):
        folder = saved(flow_map, tmp_path)
    assert "Tied does not remember its arguments" in caplog.text
    assert "FlowMap.load(path, network=...)" in caplog.text
    with pytest.raises(CheckpointError, match=r"network of your own: FlowMap.load\(path, network=MyNet"):
        FlowMap.load(folder)
    assert torch.equal(points(FlowMap.load(folder, network=Tied())), points(flow_map))
    with pytest.raises(CheckpointError, match="do not fit the network"):
        FlowMap.load(folder, network=Tied(3))


def test_a_remembered_network_is_trusted_by_its_package_or_given(tmp_path: FilePath):
    flow_map = FlowMap(Remembered(2))
    folder = saved(flow_map, tmp_path)
    package = Remembered.__module__.split(".")[0]
    with pytest.raises(TrustError, match=rf"--trust {package} .*network=MyNet"):
        FlowMap.load(folder)
    assert torch.equal(points(FlowMap.load(folder, trusted=[package])), points(flow_map))
    assert torch.equal(points(FlowMap.load(folder, network=Remembered())), points(flow_map))


def test_a_compiled_network_is_saved_as_what_it_was(tmp_path: FilePath):
    flow_map = made()
    compiled = FlowMap(torch.compile(flow_map.network, backend="eager"))  # type: ignore[arg-type]
    assert torch.equal(output_of(FlowMap.load(saved(compiled, tmp_path))), output_of(flow_map))
    path = checkpoint(compiled, averages(compiled), tmp_path / "last.ckpt")
    assert torch.equal(output_of(FlowMap.load(path, weights="raw")), output_of(flow_map))
    assert not torch.equal(output_of(FlowMap.load(path)), output_of(flow_map))


def test_an_exact_map_is_given_its_network_again(tmp_path: FilePath):
    flow_map = analytic_flow_map(mixture(), Trigonometric())
    back = FlowMap.load(saved(flow_map, tmp_path), network=analytic_flow_map(mixture(), Trigonometric()).network)
    x = torch.randn(3, 2, dtype=torch.float64)
    assert torch.equal(back.look_ahead(x, 1.0), flow_map.look_ahead(x, 1.0))


# --- trust ----------------------------------------------------------------------------------------------------

EVIL = {
    "os.system": {"command": "touch {mark}"},
    "subprocess.Popen": {"args": ["touch", "{mark}"]},
    "builtins.eval": {"source": "1"},
    "steerfm.saving.os.system": {"command": "touch {mark}"},
    "steerfm.flow_map.os.system": {"command": "touch {mark}"},
    "steerfm.building.functools.partial": {},
    "functools.partial": {},
    "steerfm.networks.mlp._Block": {"width": 1, "hidden": 1},
    "sentinel_module.Net": {},
    "steerfm.FlowMap.load": {"path": "."},
    "steerfm.files.write_atomic": {"path": "{mark}", "data": ""},
}


@pytest.mark.parametrize("place", ["network", "conditioner", "path", "inside the network"])
@pytest.mark.parametrize("target", list(EVIL))
def test_a_map_that_names_foreign_code_is_refused_and_nothing_runs(
    target: str, place: str, tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
):
    mark = tmp_path / "ran"
    (tmp_path / "sentinel_module.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Net: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = saved(made(), tmp_path)
    data = json.loads((folder / "flow_map.json").read_text())
    evil = {"_target_": target, **json.loads(json.dumps(EVIL[target]).replace("{mark}", str(mark)))}
    if place == "inside the network":
        data["flow_map"]["network"]["data_shape"] = evil
    else:
        data["flow_map"][place] = evil
    (folder / "flow_map.json").write_text(json.dumps(data))
    with pytest.raises((TrustError, CheckpointError)) as caught:
        FlowMap.load(folder)
    assert isinstance(caught.value, TrustError) or "has no" in str(caught.value)  # some modules no longer import os
    assert not mark.exists()


# --- damage ---------------------------------------------------------------------------------------------------


def whole(flow_map: Any) -> str:
    return json.dumps({"flow_map": flow_map, "weights": "raw", "format": 1})


def network(target: Any, **arguments: Any) -> str:
    return whole({"network": {"_target_": target, **arguments}})


DAMAGED = {
    "empty": "",
    "cut": "{",
    "bytes": "\xff\x00",
    "list": "[]",
    "number": "3",
    "nothing in it": "{}",
    "no weights": '{"flow_map": {}, "format": 1}',
    "too deep": "[" * 100_000,
    "description a number": whole(3),
    "description empty": whole({}),
    "network a list": whole({"network": [1]}),
    "target a number": network(5),
    "argument missing": network("steerfm.MLP"),
    "argument unknown": network("steerfm.MLP", data_shape=[2], a=1),
    "argument impossible": network("steerfm.MLP", data_shape=[-2]),
    "class unknown": network("steerfm.MLPP"),
    "class of another kind": network("steerfm.Linear"),
    "part unknown": whole({"network": {"_target_": "steerfm.MLP", "data_shape": [2]}, "a": 1}),
}


@pytest.mark.parametrize("text", list(DAMAGED.values()), ids=list(DAMAGED))
def test_a_damaged_description_is_one_sentence(text: str, tmp_path: FilePath):
    folder = saved(made(), tmp_path)
    (folder / "flow_map.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError) as caught:
        FlowMap.load(folder)
    one_sentence(caught.value)


def test_a_newer_format_asks_for_an_upgrade(tmp_path: FilePath):
    folder = saved(made(), tmp_path)
    text = (folder / "flow_map.json").read_text().replace('"format": 1', '"format": 2')
    (folder / "flow_map.json").write_text(text)
    with pytest.raises(CheckpointError, match="written by a newer steerfm: upgrade steerfm"):
        FlowMap.load(folder)


@pytest.mark.parametrize("size", [0, 4, 100, -10])
def test_truncated_weights_are_one_sentence(size: int, tmp_path: FilePath):
    folder = saved(made(), tmp_path)
    whole = (folder / "flow_map.safetensors").read_bytes()
    (folder / "flow_map.safetensors").write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match=r"flow_map.safetensors is damaged") as caught:
        FlowMap.load(folder)
    one_sentence(caught.value)


def test_missing_files_are_one_sentence(tmp_path: FilePath):
    with pytest.raises(CheckpointError, match="There is no flow map at"):
        FlowMap.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no flow map: neither flow_map.json nor map/flow_map.json"):
        FlowMap.load(tmp_path)
    folder = saved(made(), tmp_path)
    (folder / "flow_map.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no flow_map.safetensors: copy it beside flow_map.json"):
        FlowMap.load(folder)


def test_weights_of_another_network_are_one_sentence(tmp_path: FilePath):
    folder = saved(made(), tmp_path)
    other = saved(made("unet"), tmp_path / "other")
    (other / "flow_map.safetensors").replace(folder / "flow_map.safetensors")
    with pytest.raises(CheckpointError, match="do not fit the network") as caught:
        FlowMap.load(folder)
    one_sentence(caught.value)


def test_an_unknown_choice_of_weights_is_refused(tmp_path: FilePath):
    with pytest.raises(ConfigError, match="weights is 'ema', 'raw' or None, got 'EMA'"):
        FlowMap.load(saved(made(), tmp_path), weights="EMA")  # type: ignore[arg-type]


def one_sentence(error: Exception) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 700
    assert str(error).endswith((".", ")"))


# --- Lightning checkpoints ------------------------------------------------------------------------------------


def checkpoint(flow_map: FlowMap, average: dict[str, Tensor] | None, path: FilePath) -> FilePath:
    """Write what FlowMapTraining and EMA leave in a Lightning checkpoint: plain data and tensors."""
    data: dict[str, Any] = {
        "state_dict": {f"flow_map.{name}": tensor for name, tensor in flow_map.state_dict().items()},
        "flow_map": describe_flow_map(flow_map),
        "callbacks": {} if average is None else {"EMA": {"average": average, "updates": 3}},
        "global_step": 3,
    }
    data["state_dict"]["other.weight"] = torch.zeros(2)
    torch.save(data, path)
    return path


def averages(flow_map: FlowMap) -> dict[str, Tensor]:
    return {f"flow_map.{name}": p.detach() / 2 for name, p in flow_map.named_parameters()}


def test_a_checkpoint_gives_the_average_by_default_and_says_so(tmp_path: FilePath, caplog: pytest.LogCaptureFixture):
    flow_map = made("unet", conditional=True)
    path = checkpoint(flow_map, averages(flow_map), tmp_path / "last.ckpt")
    with caplog.at_level(logging.INFO, logger="steerfm"):
        loaded = FlowMap.load(path)
    assert "Loaded the ema weights of" in caplog.text
    raw = FlowMap.load(path, weights="raw")
    assert (loaded.weights, FlowMap.load(path, weights="ema").weights, raw.weights) == ("ema", "ema", "raw")
    assert torch.equal(output_of(raw), output_of(flow_map))
    halves = zip(loaded.parameters(), flow_map.parameters(), strict=True)
    assert all(torch.equal(a, b / 2) for a, b in halves)


@pytest.mark.parametrize("average", [None, {}])
def test_a_checkpoint_without_an_average_gives_the_raw_weights(average: dict[str, Tensor] | None, tmp_path: FilePath):
    flow_map = made()
    path = checkpoint(flow_map, average, tmp_path / "last.ckpt")
    loaded = FlowMap.load(path)
    assert loaded.weights == "raw"
    assert torch.equal(output_of(loaded), output_of(flow_map))
    with pytest.raises(CheckpointError, match="holds no EMA weights: train with the EMA callback"):
        FlowMap.load(path, weights="ema")


def test_a_checkpoint_that_is_no_flow_map_is_refused(tmp_path: FilePath):
    for data in ({"state_dict": {}}, torch.zeros(3), [1], {"flow_map": {}}):
        torch.save(data, tmp_path / "other.ckpt")
        with pytest.raises(CheckpointError, match="holds no flow map"):
            FlowMap.load(tmp_path / "other.ckpt")
    for data in ({"flow_map": 3, "state_dict": {}}, {"flow_map": {}, "state_dict": 3}):
        torch.save(data, tmp_path / "other.ckpt")
        with pytest.raises(CheckpointError, match="is damaged"):
            FlowMap.load(tmp_path / "other.ckpt")


def test_truncated_checkpoints_are_one_sentence(tmp_path: FilePath):
    whole = checkpoint(made(), None, tmp_path / "last.ckpt").read_bytes()
    for size in (0, 1, 10, 1000, len(whole) // 2, len(whole) - 1, len(whole) - 30):
        (tmp_path / "cut.ckpt").write_bytes(whole[:size])
        with pytest.raises(CheckpointError) as caught:
            FlowMap.load(tmp_path / "cut.ckpt")
        one_sentence(caught.value)


class Payload:
    """An object whose unpickling would run a command."""

    def __init__(self, mark: FilePath) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, (f"touch {self.mark}",)


def test_a_checkpoint_with_code_in_it_is_refused_and_nothing_runs(tmp_path: FilePath):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "flow_map": Payload(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError, match="is damaged or no checkpoint of steerfm"):
        FlowMap.load(path)
    assert not (tmp_path / "ran").exists()


def test_a_map_saved_in_half_precision_loads_in_its_own_type(tmp_path: FilePath) -> None:
    flow_map = FlowMap(MLP((2,), width=8, depth=1)).double()
    flow_map.save(tmp_path / "half", torch.float16)
    flow_map.save(tmp_path / "whole")
    assert {t.dtype for t in load_file(tmp_path / "half" / "flow_map.safetensors").values()} == {torch.float16}
    half, whole = FlowMap.load(tmp_path / "half"), FlowMap.load(tmp_path / "whole")
    assert half.dtype == whole.dtype == torch.float64
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(half.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_an_unknown_floating_type_in_the_json_is_damage(tmp_path: FilePath) -> None:
    FlowMap(MLP((2,), width=8, depth=1)).save(tmp_path, torch.float16)
    path = tmp_path / "flow_map.json"
    path.write_text(path.read_text().replace('"float32"', '"float31"'))
    with pytest.raises(CheckpointError, match="is damaged"):
        FlowMap.load(tmp_path)
