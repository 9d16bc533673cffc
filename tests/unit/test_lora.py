"""LoRA and chosen layers: what trains, what is shared, what is bitwise the base, and what comes back from disk."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW
from trainers import copied, digit_map, equal, trainer

from steerfm import EMA, MLP, AdjointMatching, DirectBackprop, DiT, FlowMap, Prompts, RewardFineTuning, UNet, config
from steerfm.backbones import ChosenLayers, LoRA, load_adapter, merged, save_adapter, with_scale, without_lora
from steerfm.backbones.lora import LoRANetwork, lora_of
from steerfm.conditions import Labels
from steerfm.derivatives import directional_derivative
from steerfm.digits import CAPTIONS
from steerfm.errors import CheckpointError, ConfigError
from steerfm.finetuning import FineTuning
from steerfm.networks.mlp import PlainMLP, randomise
from steerfm.networks.sharing import copy_around
from steerfm.recipe_files import Library

SHAPE = (1, 8, 8)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP(SHAPE, width=16, depth=1, frequencies=4, num_classes=10),
    "unet": lambda: UNet(SHAPE, channels=(8, 16), attention_heads=2, frequencies=4, num_classes=10),
    "dit": lambda: DiT(SHAPE, patch=4, width=16, depth=2, heads=2, frequencies=4, num_classes=10),
}
SEVEN = "a handwritten seven"


def made(kind: str = "mlp", dtype: torch.dtype = torch.float32) -> FlowMap:
    network = NETWORKS[kind]()
    randomise(network, scale=0.2)
    return FlowMap(network, conditioner=Labels(CAPTIONS)).eval().to(dtype)


def moved(flow_map: FlowMap, adapter: LoRA | None = None, scale: float = 0.3) -> FlowMap:
    """Return the map with LoRA whose B is no longer zero."""
    tuned, generator = (adapter or LoRA(rank=2, alpha=3.0))(flow_map), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_of(tuned).additions():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    return tuned


def output(flow_map: FlowMap) -> Tensor:
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)).to(flow_map.dtype)
    condition = flow_map.encode_prompts([SEVEN, CAPTIONS[2], ""])
    with torch.no_grad():
        return flow_map.average_velocity(x, 0.9, 0.2, condition)


def trainable(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


# --- the map ---


@pytest.mark.parametrize("kind", NETWORKS)
def test_additions_alone_train_and_start_at_nothing(kind: str) -> None:
    flow_map = made(kind)
    before, start = output(flow_map), copied(flow_map.state_dict())
    tuned = LoRA(rank=2)(flow_map)
    assert torch.equal(output(tuned), before)
    assert trainable(tuned) and all(".lora_" in name for name in trainable(tuned))
    kinds = {type(flow_map.network.get_submodule(name)) for name in lora_of(tuned).adapted}
    assert kinds == {nn.Linear, *([] if kind == "mlp" else [nn.Conv2d])}
    assert len(lora_of(tuned).adapted) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in flow_map.modules())
    changed = moved(flow_map)
    assert not torch.equal(output(changed), before)
    assert equal(flow_map.state_dict(), start)  # what was given is what it was
    assert torch.equal(output(flow_map), before)
    places = {p.data_ptr() for p in flow_map.parameters()}
    assert places == {p.data_ptr() for name, p in tuned.named_parameters() if ".lora_" not in name}  # and held once


@pytest.mark.parametrize("kind", NETWORKS)
def test_scale_zero_is_the_base_bitwise_and_merging_is_adding(kind: str) -> None:
    flow_map = made(kind, torch.float64)
    tuned = moved(flow_map)
    assert torch.equal(output(with_scale(tuned, 0.0)), output(flow_map))
    assert torch.equal(output(without_lora(tuned)), output(flow_map))
    assert torch.equal(output(with_scale(tuned, 1.0)), output(tuned))
    assert torch.equal(output(with_scale(with_scale(tuned, 0.5), 2.0)), output(tuned))
    for scale in (1.0, 0.5):
        view = with_scale(tuned, scale)
        whole = merged(view)
        torch.testing.assert_close(output(whole), output(view), rtol=0, atol=1e-12)
        assert not torch.allclose(output(whole), output(flow_map), atol=1e-2)
        assert type(whole.network) is type(flow_map.network)
        assert set(whole.state_dict()) == set(flow_map.state_dict())
        assert trainable(whole) == trainable(made(kind))
    assert torch.equal(output(without_lora(tuned)), output(flow_map))  # merging has left the map alone


@pytest.mark.parametrize("kind", NETWORKS)
def test_forward_mode_passes_the_additions(kind: str) -> None:
    """The derivative in t of the tuned map is that of the merged one."""
    tuned = moved(made(kind, torch.float64))
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s, t = (torch.full((2,), time, dtype=torch.float64) for time in (0.9, 0.2))
    condition = tuned.encode_prompts([SEVEN, ""])

    def rate(flow_map: FlowMap) -> Tensor:
        jump = partial(flow_map.average_velocity, x, s, condition=condition)
        return directional_derivative(jump, [t], [torch.ones_like(t)])[1]

    torch.testing.assert_close(rate(tuned), rate(merged(tuned)), rtol=0, atol=1e-11)


def test_the_scale_is_alpha_over_rank() -> None:
    tuned = moved(made(), LoRA(rank=4, alpha=2.0, targets="enter"))
    layer = lora_of(tuned).layers()["enter"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight + 0.5 * b @ a
    torch.testing.assert_close(merged(tuned).network.enter.weight, expected)  # type: ignore[union-attr]


def test_the_first_values_are_those_of_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    one, same, other = (LoRA(2, seed=seed)(made()) for seed in (0, 0, 1))
    assert equal(one.state_dict(), same.state_dict())
    assert not equal(one.state_dict(), other.state_dict())
    made()  # a network of ours draws from the global generator, and LoRA does not
    torch.random.set_rng_state(state)
    expected = [made() for _ in range(3)][-1].state_dict()
    assert equal(without_lora(one).state_dict(), expected)
    torch.random.set_rng_state(state)
    flow_map = made()
    after = torch.random.get_rng_state()
    LoRA(2)(flow_map)
    assert torch.equal(torch.random.get_rng_state(), after)


def test_targets_are_exact_names_and_patterns() -> None:
    names = [f"attention.attention.{name}" for name in ("query", "key_value", "leave")]
    for targets, expected in (("leave", ["leave"]), (["*attention*", "leave"], [*names, "leave"])):
        network = lora_of(LoRA(2, targets=targets)(made("unet")))
        assert network.adapted == tuple(expected)
        found = [name for name, _ in network.network.named_modules() if name.endswith(".lora_A")]
        assert found == [f"{name}.lora_A" for name in expected]  # "leave" is not attention.attention.leave
    with pytest.raises(ConfigError, match=r"No linear or convolution layer is called 'leaves'; did you mean 'leave'\?"):
        LoRA(2, targets=["enter", "leaves"])(made())
    with pytest.raises(ConfigError, match="No linear or convolution layer was chosen"):
        LoRA(2, targets=[])(made())
    with pytest.raises(ConfigError, match="The rank of LoRA is 1 or more, got 0"):
        LoRA(0)


def test_layers_that_are_never_called_take_no_additions() -> None:
    class Attending(PlainMLP):
        def __init__(self) -> None:
            super().__init__((4,), width=8, depth=1)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.encoder = nn.TransformerEncoderLayer(4, 2, 8)

    assert lora_of(LoRA(2)(FlowMap(Attending()))).adapted == ("hidden.0", "leave")


def test_a_map_goes_on_with_its_own_additions() -> None:
    tuned = moved(made(), LoRA(2, targets=["blocks.*", "enter"]))
    again = LoRA(2, targets=["enter", "blocks.*"])(tuned)
    assert torch.equal(output(again), output(tuned))
    assert trainable(again) == trainable(tuned)
    for other in (
        LoRA(4, targets=["blocks.*", "enter"]),
        LoRA(2, 4.0, ["blocks.*", "enter"]),
        LoRA(2),
        LoRA(2, targets="enter"),
    ):
        with pytest.raises(ConfigError, match=r"The map has LoRA of rank 2 and alpha 2 on 4 layers"):
            other(tuned)
    with pytest.raises(ConfigError, match=r"This map has no LoRA, its network is a MLP"):
        merged(made())


def test_a_small_type_keeps_additions_in_float32(tmp_path: Path) -> None:
    base = made(dtype=torch.bfloat16)
    tuned = moved(base)
    types = {name: p.dtype for name, p in tuned.named_parameters()}
    assert all(dtype == (torch.float32 if ".lora_" in name else torch.bfloat16) for name, dtype in types.items())
    assert tuned.dtype == output(tuned).dtype == torch.bfloat16
    assert torch.equal(output(with_scale(tuned, 0.0)), output(base))
    values = copied(dict(tuned.named_parameters()))
    assert equal(dict(tuned.to(torch.bfloat16).named_parameters()), values)  # as Lightning's bf16-true does
    back = FlowMap.load(tuned.save(tmp_path / "map"))
    assert {name: p.dtype for name, p in back.named_parameters()} == types
    assert torch.equal(output(back), output(tuned))
    assert torch.equal(output(load_adapter(base, save_adapter(tuned, tmp_path / "lora"))), output(tuned))
    gap = (output(merged(tuned)) - output(tuned)).abs().max()
    assert gap <= 0.03 * output(tuned).abs().max()  # bfloat16 rounds by 0.4% an operation
    wide = moved(made(dtype=torch.float64))
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


# --- files ---


@pytest.mark.parametrize("kind", NETWORKS)
def test_saved_and_loaded_equals(kind: str, tmp_path: Path) -> None:
    flow_map = made(kind)
    tuned = moved(flow_map)
    back = FlowMap.load(tuned.save(tmp_path / "map"))
    assert torch.equal(output(back), output(tuned))
    assert torch.equal(output(with_scale(back, 0.0)), output(flow_map))
    assert torch.equal(output(FlowMap.load(merged(tuned).save(tmp_path / "merged"))), output(merged(tuned)))
    half = with_scale(tuned, 0.5)
    assert torch.equal(output(FlowMap.load(half.save(tmp_path / "half"))), output(half))


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_additions_alone_load_here_and_in_peft(kind: str, tmp_path: Path) -> None:
    flow_map = made(kind)
    tuned = with_scale(moved(flow_map, LoRA(2, targets=["*leave", "enter"])), 0.7)
    folder = save_adapter(tuned, tmp_path)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert torch.equal(output(load_adapter(made(kind), folder)), output(tuned))
    peft = FlowMap(made(kind).network, conditioner=Labels(CAPTIONS))
    wrapped = PeftModel.from_pretrained(peft.network, str(folder)).eval()  # type: ignore[arg-type]
    wrapped.data_shape = SHAPE  # type: ignore[assignment]
    assert torch.equal(output(FlowMap(wrapped, conditioner=peft.conditioner)), output(tuned))


def test_additions_that_peft_has_saved_load_here(tmp_path: Path) -> None:
    network = made("unet").network
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["query", "conv1"], init_lora_weights=False)
    theirs = get_peft_model(network, config).eval()  # type: ignore[arg-type]
    theirs.save_pretrained(str(tmp_path))
    theirs.data_shape = SHAPE  # type: ignore[assignment]
    tuned = load_adapter(made("unet"), tmp_path)
    assert torch.equal(output(tuned), output(FlowMap(theirs, conditioner=Labels(CAPTIONS))))
    assert not torch.equal(output(tuned), output(made("unet")))


def test_files_that_are_no_plain_additions_are_refused(tmp_path: Path) -> None:
    tuned = moved(made())
    with pytest.raises(ConfigError, match="The map has LoRA already"):
        load_adapter(tuned, save_adapter(tuned, tmp_path))
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    text, data = config.read_text(), weights.read_bytes()
    for change, said in {
        "use_dora": "LoRA with use_dora, and plain LoRA alone",
        "alpha_pattern": "LoRA with alpha_pattern",
        "a_later_invention": "LoRA with a_later_invention",
    }.items():
        config.write_text(json.dumps(json.loads(text) | {change: {"enter": 1}}))
        with pytest.raises(CheckpointError, match=said):
            load_adapter(made(), tmp_path)
    config.write_text(json.dumps(json.loads(text) | {"peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match="holds IA3"):
        load_adapter(made(), tmp_path)
    for broken in ("{", "[]"):
        config.write_text(broken)
        with pytest.raises(CheckpointError, match=r"adapter_config.json is damaged"):
            load_adapter(made(), tmp_path)
    config.write_text(text)
    weights.write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is damaged"):
        load_adapter(made(), tmp_path)
    weights.write_bytes(data)
    one = load_file(weights)
    save_file({name: tensor for name, tensor in one.items() if "enter.lora_B" not in name}, weights)
    with pytest.raises(CheckpointError, match="do not fit the network"):
        load_adapter(made(), tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors"):
        load_adapter(made(), tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no LoRA: there is no adapter_config.json"):
        load_adapter(made(), tmp_path / "nowhere")


# --- fine-tuning ---


def brightness(images: Tensor, prompts: Any) -> Tensor:
    return images.square().mean((1, 2, 3))


def tuning(flow_map: FlowMap, adapter: Any, method: FineTuning | None = None) -> RewardFineTuning:
    return RewardFineTuning(
        flow_map,
        brightness,
        method or DirectBackprop(2),
        optimizer=partial(AdamW, lr=1e-2),
        adapter=adapter,
        monitor_every=2,
    )


DATA = Prompts([SEVEN, CAPTIONS[2], ""], 4)
METHODS = {
    "direct": DirectBackprop(2),
    "checkpointed": DirectBackprop(2, checkpointing=True),
    "adjoint_matching": AdjointMatching(sde_steps=2),
}


@pytest.mark.parametrize("method", METHODS)
def test_fine_tuning_moves_the_additions_alone(method: str, tmp_path: Path) -> None:
    flow_map = made()
    start, before = copied(flow_map.state_dict()), output(flow_map)
    module = tuning(flow_map, LoRA(2), METHODS[method])
    additions = copied(dict(module.flow_map.named_parameters()))
    trainer(tmp_path, 3).fit(module, DATA)
    for name, parameter in module.flow_map.named_parameters():
        assert torch.equal(parameter, additions[name]) == (".lora_" not in name), name
    reference: Any = module._reference.module
    assert equal(reference.state_dict(), start)
    assert torch.equal(output(reference), before)
    assert not torch.equal(output(module.flow_map.eval()), before)
    places = {p.data_ptr() for p in reference.parameters()}
    assert places <= {p.data_ptr() for p in module.flow_map.parameters()}  # nothing is held twice
    assert len(trainer_parameters(module)) == len(lora_of(module.flow_map).additions())
    trainer(tmp_path, 2, precision="bf16-mixed").fit(module, DATA)
    assert all(torch.isfinite(p).all() for p in module.flow_map.parameters())


def trainer_parameters(module: RewardFineTuning) -> list[nn.Parameter]:
    return [p for group in module.trainer.optimizers[0].param_groups for p in group["params"]]


def test_a_reference_on_shared_weights_is_one_of_its_own(tmp_path: Path) -> None:
    """Three steps against a reference that holds copies, and three against one that shares, are bitwise the same."""
    ends = []
    for shared in (True, False):
        module = tuning(made(), LoRA(2), DirectBackprop(2, checkpointing=shared))
        if not shared:
            module._reference.module = module._reference.module.frozen_copy()  # type: ignore[operator]
        trainer(tmp_path, 3).fit(module, DATA)
        ends.append(copied(module.flow_map.state_dict()))
    assert equal(*ends)


@pytest.mark.parametrize("adapter", [LoRA(2), ChosenLayers("blocks.*")], ids=["lora", "chosen"])
def test_resuming_equals_never_having_stopped(adapter: Any, tmp_path: Path) -> None:
    def fit(folder: str, steps: int, resume: Path | None = None) -> tuple[RewardFineTuning, EMA]:
        module, ema = tuning(made(), adapter), EMA(0.9)
        keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=2, save_top_k=-1, monitor=None)
        trainer(tmp_path, steps, ema, keep).fit(module, DATA, ckpt_path=resume, weights_only=True)
        return module, ema

    straight, straight_ema = fit("straight", 4)
    checkpoint = tmp_path / "straight" / "step=2.ckpt"
    module, ema = fit("resumed", 4, checkpoint)
    assert equal(module.state_dict(), straight.state_dict())
    assert equal(ema.average, straight_ema.average)
    assert {name.removeprefix("flow_map.") for name in ema.average} == trainable(module.flow_map)
    last = tmp_path / "straight" / "step=4.ckpt"
    raw, average = FlowMap.load(last, weights="raw"), FlowMap.load(last)
    assert torch.equal(output(raw), output(straight.flow_map.eval()))
    saved = FlowMap.load(straight.save(tmp_path / "map"))
    assert (saved.weights, average.weights) == ("ema", "ema")
    assert torch.equal(output(saved), output(average))
    assert not torch.equal(output(saved), output(raw))


@pytest.mark.parametrize("network", [MLP((2,)), UNet((1, 8, 8)), DiT((1, 8, 8))], ids=["MLP", "UNet", "DiT"])
def test_the_recipe_of_chosen_layers_fits_our_networks(network: nn.Module) -> None:
    composed = config.compose("finetune", ["recipe=shapes_finetune", "+adapter=chosen"])
    flow_map = config.instantiate(composed.values["module"]["adapter"])(FlowMap(network))
    assert 0.2 < len(trainable(flow_map)) / len(list(flow_map.parameters())) < 1


def test_chosen_layers_train_and_the_rest_is_held_once(tmp_path: Path) -> None:
    flow_map = digit_map()
    start = copied(flow_map.state_dict())
    module = tuning(flow_map, ChosenLayers(["blocks.*.up.*", "leave.bias"]))
    chosen = {"network.blocks.0.up.weight", "network.blocks.0.up.bias", "network.leave.bias"}
    assert module.flow_map is flow_map
    assert trainable(flow_map) == chosen
    reference: Any = module._reference.module
    own = dict(flow_map.named_parameters())
    once = {name for name, p in reference.named_parameters() if p.data_ptr() == own[name].data_ptr()}
    assert once == set(own) - chosen
    trainer(tmp_path, 2).fit(module, DATA)
    assert equal(reference.state_dict(), start)
    assert {name for name, tensor in flow_map.state_dict().items() if not torch.equal(tensor, start[name])} == chosen
    with pytest.raises(ConfigError, match=r"No parameter is called 'block.*.up'; did you mean|No parameter is called"):
        ChosenLayers("block.*.up")(flow_map)


class OfTwoTypes(PlainMLP):
    """A network whose last weight is of a larger type."""

    def __init__(self) -> None:
        super().__init__((2,), width=8, depth=1)
        self.large = nn.ParameterList([torch.ones(2, dtype=torch.float64)])

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        return (super().forward(x, s, t) * self.large[0]).to(x)


def test_sharing_leaves_the_types_of_the_map_alone(tmp_path: Path) -> None:
    def square(points: Tensor, prompts: Any) -> Tensor:
        return points.square().sum(1)

    module = RewardFineTuning(FlowMap(OfTwoTypes()), square, adapter=LoRA(2))
    trainer(tmp_path, 2).fit(module, Prompts([""], 4))
    assert lora_of(module.flow_map).network.large[0].dtype == torch.float64  # type: ignore[index,union-attr]


def test_the_reference_follows_the_trainers_precision(tmp_path: Path) -> None:
    for adapter in (None, LoRA(2), ChosenLayers("blocks.*")):
        module = tuning(made(), adapter)
        trainer(tmp_path, 2, precision="64-true").fit(module, DATA)
        assert {p.dtype for p in module._reference.module.parameters()} == {torch.float64}


def test_shared_parameters_move_with_their_module() -> None:
    flow_map = made("dit")
    view = copy_around(flow_map)
    assert all(a is b for a, b in zip(view.parameters(), flow_map.parameters(), strict=True))
    assert not any(a is b for a, b in zip(view.buffers(), flow_map.buffers(), strict=True))
    flow_map.double()
    assert {p.dtype for p in view.parameters()} == {torch.float64}
    assert torch.equal(output(view.double()), output(flow_map))


def test_a_network_is_rebuilt_from_its_description(tmp_path: Path) -> None:
    tuned = moved(made(), LoRA(2, targets=["blocks.*"]))
    network = FlowMap.load(tuned.save(tmp_path)).network
    assert isinstance(network, LoRANetwork)
    assert (network.rank, network.alpha, network.adapted) == (2, 2.0, lora_of(tuned).adapted)
    assert trainable(network) == trainable(lora_of(tuned))


@pytest.mark.parametrize("option", sorted(Library().options("adapter")))
def test_every_adapter_is_a_choice_of_fine_tuning_recipes(option: str) -> None:
    composed = config.compose("finetune", ["recipe=digits_finetune", "map=m", "clip=c", f"+adapter={option}"])
    assert isinstance(config.instantiate(composed.values["module"]["adapter"]), LoRA | ChosenLayers)
