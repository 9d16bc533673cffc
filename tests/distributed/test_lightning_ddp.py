"""One real DDP run of Lightning on two processes: training, fine-tuning and sampling (lightning_pair.py)."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import lightning_pair
from distributed.lightning_pair import STEPS
from ports import with_port
from safetensors.torch import load_file
from torch import Tensor

from steerfm import FlowMap

pytestmark = pytest.mark.timeout(600)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run, made once."""
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, str(HERE / "lightning_pair.py"), str(folder)]
    done = subprocess.run(command, env=with_port(), capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]


def test_weights_agree_over_ranks(ranks: list[dict[str, Tensor]]) -> None:
    names = [name for name in ranks[0] if not name.startswith("own/")]
    assert len(names) > 30
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in names)


@pytest.mark.parametrize("kind", ["training", "tuning", "distilling"])
def test_weights_are_those_of_one_process(
    kind: str, folder: Path, ranks: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    """The same steps by one process, with the whole batch: the same noise, rows on the diagonal and weights."""
    module = getattr(lightning_pair, kind)()
    data = lightning_pair.prompts() if kind == "tuning" else lightning_pair.data()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    lightning_pair.trainer(tmp_path, kind, devices=1).fit(module, data)
    for name, tensor in module.state_dict().items():
        assert torch.allclose(tensor, ranks[0][f"{kind}/{name}"], rtol=1e-9, atol=1e-12), name
        assert name.startswith("flow_map.conditioner") or not torch.equal(tensor, before[name]), name
    mine, theirs = (_rows(each / kind / "metrics.csv") for each in (tmp_path, folder))
    for name in ("loss", "reward", "held_out/brightness"):
        values = [[float(row[name]) for row in rows if row.get(name)] for rows in (mine, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-6), name  # of all rows, not of rank zero's


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_guard_rails_see_what_one_process_sees(folder: Path, ranks: list[dict[str, Tensor]], tmp_path: Path) -> None:
    """Brightness held out and optimised alike is best at the end: both processes keep those weights, and measure them.

    keep="best" has put them into the map, where they are measured again here, on one process.
    """
    with (folder / "tuning" / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["guard/reward"]]
    assert [int(row["step"]) for row in rows] == [0, 2, STEPS]
    module, guard = lightning_pair.tuning(), lightning_pair.rails()
    module.load_state_dict({name[7:]: tensor for name, tensor in ranks[1].items() if name.startswith("tuning/")})
    assert all(torch.equal(p, ranks[1][f"guard/{name}"]) for name, p in module.named_parameters())
    drawn = guard.fixed.draw(module.flow_map, module.reward, module.held_out)
    assert drawn.reward is not None
    assert float(rows[-1]["guard/reward"]) == pytest.approx(float(drawn.reward.total.mean()), rel=1e-12)
    inner = guard.fixed.of_map(module.flow_map, module.reference, drawn, drawn)
    assert float(rows[-1]["guard/semigroup_defect"]) == pytest.approx(inner["semigroup_defect"], rel=1e-9)
    assert (folder / "pictures" / f"guard_{STEPS:07d}.png").exists()


def test_losses_by_interval_and_pictures_come_from_rank_zero(folder: Path) -> None:
    with (folder / "training" / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["loss"]]
    assert len(rows) == STEPS
    assert all(row["loss_by_interval/diagonal"] for row in rows)
    assert sorted(path.name for path in (folder / "pictures").glob("step_*")) == [
        "step_0000002.png",
        "step_0000003.png",
    ]


def test_shared_out_weights_are_those_of_replicas(folder: Path, ranks: list[dict[str, Tensor]]) -> None:
    """FSDP2, stopped and resumed, clipped and averaged, of training and of fine-tuning; and the map that is saved."""
    names = [name for name in ranks[0] if name.startswith("sharded_")]
    assert len(names) > 20
    for name in names:
        expected = ranks[0][name.removeprefix("sharded_")]
        assert all(torch.allclose(found[name], expected, rtol=1e-9, atol=1e-12) for found in ranks), name
    saved = FlowMap.load(folder / "sharded_map")
    for name, tensor in saved.named_parameters():
        assert torch.allclose(tensor, ranks[0][f"ema/flow_map.{name}"], rtol=1e-9, atol=1e-12), name


def test_steered_samples_of_two_processes_are_those_of_one(folder: Path) -> None:
    assert lightning_pair.steer(folder, "one") == 0
    runs = [folder / "runs" / name for name in ("one", "two")]
    assert not any((run / "parts").exists() for run in runs)
    rows = [[json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()] for run in runs]
    assert [row["seed"] for row in rows[0]] == [0, 1, 2, 3, 4]
    for mine, theirs in zip(*rows, strict=True):
        for row in (mine, theirs):
            row["cost"].pop("seconds")
        assert mine.pop("log_weight") == pytest.approx(theirs.pop("log_weight"), rel=1e-9)
        assert {name: value for name, value in mine.items() if name not in ("reward", "parts")} == {
            name: value for name, value in theirs.items() if name not in ("reward", "parts")
        } | {"effective_sample_size": pytest.approx(theirs["effective_sample_size"], rel=1e-9)}
        assert mine["reward"] == pytest.approx(theirs["reward"], rel=1e-9)
    x0 = [load_file(run / "samples.safetensors")["x0"] for run in runs]
    assert torch.allclose(*x0, rtol=0, atol=1e-6)
