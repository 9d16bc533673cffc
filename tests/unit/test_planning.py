"""The memory that a recipe needs, counted on shapes alone, against what the same work really holds."""

import copy
import json
import resource
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from steerfm import FlowMap, UNet, config
from steerfm.cli import main
from steerfm.commands import plan_page
from steerfm.commands.plan import plan
from steerfm.commands.plan_counts import GRADIENTS, STATE, TRAINED
from steerfm.commands.plan_page import Plan, fit
from steerfm.commands.shapes import Peak, Shapes
from steerfm.reward_check import peak_memory

FEW = ("data.prompts_per_step=4", "callbacks=null")


def planned(*overrides: str) -> Plan:
    command = config.preview(overrides)["command"]
    return plan(config.compose(command, overrides))


def test_a_step_on_shapes_holds_what_a_real_one_holds():
    flow_map = FlowMap(UNet((3, 32, 32), channels=(16, 32), blocks=1))

    def step() -> None:
        flow_map.zero_grad()
        flow_map.look_ahead(torch.randn(16, 3, 32, 32), 0.7).square().mean().backward()

    step()
    real = peak_memory(step, torch.device("cpu"))
    with Shapes() as shapes:
        shapes.hold("weights", flow_map.parameters())
        shapes.hold("gradients", [p.grad for p in flow_map.parameters()])
        before, shapes.peak = shapes.alive, Peak()
        step()
    assert shapes.peak.size - before == pytest.approx(real, rel=0.03)  # blocks of 512 bytes


def test_optimisers_forward_mode_and_autocast_run_on_shapes():
    network = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256))
    size = sum(p.nbytes for p in network.parameters())
    with Shapes() as shapes:
        x = torch.randn(64, 256)
        tangent = torch.func.jvp(network, (x,), (x,))[1]
        tangent.square().mean().backward()
        optimizer = torch.optim.AdamW(network.parameters(), foreach=True)
        before = shapes.alive
        optimizer.step()
        state = [each for state in optimizer.state.values() for each in state.values()]
        assert shapes.hold("state", state) == pytest.approx(2 * size, rel=0.02)
        assert shapes.peak.size >= before + 3 * size  # two moments, and one whole set at once on its way
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert network(x).dtype == torch.bfloat16
        query = torch.randn(2, 4, 128, 32, requires_grad=True)
        functional.scaled_dot_product_attention(query, query, query).sum().backward()
        assert query.grad is not None and query.grad.shape == query.shape


@pytest.mark.parametrize("deterministic", [False, True])  # which fills memory that is asked for
def test_a_network_of_any_size_runs_in_no_memory(deterministic: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    before, was = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        _run_a_large_network()
    finally:
        torch.use_deterministic_algorithms(was)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300 * 1024  # KiB


def _run_a_large_network() -> None:
    with Shapes() as shapes:
        network = nn.Sequential(*(nn.Linear(2**15, 2**15, bias=False) for _ in range(8))).bfloat16()
        assert shapes.hold("weights", network.parameters()) == 8 * 2**31
        network(torch.randn(2**12, 2**15).bfloat16()).square().mean().backward()
        assert shapes.peak.size > 2 * 8 * 2**31  # 16 GiB of weights, and as many of gradients


def test_tensors_are_copied_and_types_are_those_of_the_moment():
    with Shapes() as shapes:
        table = torch.rand(300, 300)
        copied = copy.deepcopy(table)
        assert copied.shape == (300, 300) and shapes.alive >= 2 * table.nbytes
        made = []
        for dtype in (torch.bfloat16, torch.float32):
            torch.set_default_dtype(dtype)
            made.append(nn.Linear(200, 200).weight.dtype)
    assert made == [torch.bfloat16, torch.float32]


def test_quantised_weights_count_what_they_hold():
    torchao = pytest.importorskip("torchao.quantization")
    with Shapes() as shapes:
        model = nn.Linear(512, 1024, dtype=torch.bfloat16).requires_grad_(False)
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig(version=2))
        held = shapes.hold("weights", model.parameters())
        assert model(torch.zeros(100, 512, dtype=torch.bfloat16)).shape == (100, 1024)
    assert held == shapes.kinds["weights"]
    assert 512 * 1024 + 2 * 2 * 1024 <= held <= 512 * 1024 + 8 * 1024  # numbers of 8 bits, a scale a row, the bias


def test_questions_are_answered_as_a_healthy_run_does_and_small_tensors_have_values():
    with Shapes() as shapes:
        large, small = torch.randn(2**15), torch.linspace(0, 1, 5)
        assert bool(torch.isfinite(large).all()) and not (~torch.isfinite(large)).any()
        assert small.tolist() == [0, 0.25, 0.5, 0.75, 1.0] and bool((small > 0.6).any())
        assert float(large.mean()) == 1.0
        assert len(large[large > 0]) == len(large)  # the most that there can be
        assert float(shapes.unreal(small).sum()) == 1.0
        large.fill_(3.0)
        assert shapes.kinds["activations"] >= large.nbytes


def test_the_parts_of_a_fine_tuning_step_are_told_apart():
    made = planned("recipe=shapes_finetune", *FEW)
    weights = sum(p.nbytes for p in FlowMap.from_zoo("shapes32").parameters())
    kinds = made.peak.kinds
    for kind, times in ((TRAINED, 1), (GRADIENTS, 1), ("reference", 1), (STATE, 2)):
        assert kinds[kind] == pytest.approx(times * weights, rel=0.01), kind
    assert sum(kinds.values()) == made.peak.size
    assert {"network", "decode", "reward", "backward", "optimiser"} <= set(made.phases)
    assert any("'judge'" in note for note in made.notes)  # it counts colours


@pytest.mark.slow
def test_what_a_plan_says_to_lower_lowers_the_peak():
    recipe = ("recipe=shapes_finetune", *FEW, "data.prompts_per_step=12", "method.last=null")
    more, less = planned(*recipe), planned(*recipe, "method.checkpointing=true")
    assert any("last=1" in remedy for remedy in more.remedies)
    assert any("method.checkpointing=true" in remedy for remedy in more.remedies)
    assert not any("method.checkpointing=true" in remedy for remedy in less.remedies)
    assert less.peak.kinds["activations"] < 0.6 * more.peak.kinds["activations"]


def test_a_batch_of_steered_samples_is_planned_and_a_black_box_too():
    one, two = (
        planned("recipe=shapes_steer", "method=best_of_n", f"method.n={n}", "method.jumps=1", "reward=jpeg_size")
        for n in (2, 4)
    )
    assert one.what == "a batch of samples" and "backward" not in one.phases
    assert two.peak.kinds["activations"] == pytest.approx(2 * one.peak.kinds["activations"], rel=0.1)


def test_devices_share_the_batch_and_what_stays_beside_the_weights_is_counted():
    alone = planned("recipe=moons")
    shared = planned("recipe=moons", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
    assert alone.peak.kinds["moving average"] == pytest.approx(alone.peak.kinds[TRAINED], rel=0.01)
    assert shared.processes == 2
    assert shared.peak.kinds["DDP's buckets"] == pytest.approx(alone.peak.kinds[TRAINED], rel=0.05)
    assert shared.phases["forward"] < alone.phases["forward"]


def test_the_command_prints_the_plan_and_says_what_it_cannot(capsys: pytest.CaptureFixture[str]):
    assert main(["env", "--plan", "recipe=moons", "trainer=gpu"]) == 0
    printed = capsys.readouterr().out
    assert "peak" in printed and "optimiser's state" in printed and "forward" in printed
    assert main(["env", "recipe=moons"]) == 2
    assert "steerfm env --plan" in capsys.readouterr().err
    assert main(["env", "--plan", "recipe=compare", "runs=[a,b]"]) == 2
    assert "train, finetune, sample or steer" in " ".join(capsys.readouterr().err.split())


def test_what_does_not_fit_says_what_to_lower_first(monkeypatch: pytest.MonkeyPatch):
    made = Plan("a step", Peak(2**40, "backward", {}), {}, remedies=("method.checkpointing=true", "a smaller batch"))
    monkeypatch.setattr(plan_page, "machine_memory", lambda: 2**34)
    assert fit(made, on_gpu=False) == (
        "It does not fit: 16.00 GiB is this machine's memory. Lower first: method.checkpointing=true; then a smaller "
        "batch."
    )
    monkeypatch.setattr(plan_page, "machine_memory", lambda: 2**41)
    assert fit(made, on_gpu=False).startswith("It fits")


@pytest.mark.slow
def test_no_weight_of_a_pretrained_pipeline_is_read(tmp_path: Path):
    pytest.importorskip("diffusers")
    from tiny_pipelines import save

    folder = save("sd-turbo", tmp_path / "pipeline")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    size = sum(-(-2 * count // 512) * 512 for count in numbers(weights))  # in bfloat16, in whole blocks
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"nothing")
    made = planned(
        "recipe=pretrained_finetune", f"map={folder}", "reward=brightness", "prompts=[a red circle]",
        "module.flow_map.dtype=bfloat16", "data.prompts_per_step=2",
    )  # fmt: skip
    assert made.peak.kinds["weights, frozen"] == pytest.approx(size, rel=0.1)
    assert made.peak.kinds["autoencoder"] > 0 and made.peak.kinds["text encoders"] > 0


def numbers(path: Path) -> list[int]:
    """Return how many numbers each tensor of a safetensors file has."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [torch.Size(each["shape"]).numel() for name, each in header.items() if name != "__metadata__"]
