"""`steerfm steer`: news of the steps, a budget, a picture of the look-aheads."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from trainers import digit_map

from steerfm.cli import main
from steerfm.commands import generation
from steerfm.commands.generation import News, told, trace_sheet
from steerfm.errors import ConfigError
from steerfm.modules import SteeredSampling
from steerfm.runs import Run
from steerfm.sampling import Unsteered
from steerfm.steering import Budget, Progress, Watch
from steerfm.types import Cost


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    digit_map().save("map")
    return tmp_path


def steer(*more: str) -> int:
    lines = ["recipe=digits_steer", "map=map", "reward=brightness", "name=out", "seeds=3", "held_out={}"]
    return main(["steer", *lines, "reference=null", *more])


def test_a_traced_run_within_a_budget(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steer("--trace", "method=tilting", "method.particles=4", "method.jumps=9", "cost.network_calls=80") == 0
    run = Run.open("out")
    costs = [row["cost"]["network_calls"] for row in run.read_samples().rows]
    assert max(costs) <= 80
    assert "trace.png" in capsys.readouterr().out
    with Image.open(run.folder / "trace.png") as picture:
        assert picture.height == 4 * (3 * 9 + 1)  # three samples of 8 pixels, a line between
        assert picture.width == 4 * (
            4 * 9 + 1
        )  # 80 calls bear three steps of 20 and the last jump, of 12, not another step
    assert run.config["trace"] is True


def test_a_plain_sampler_has_neither_budget_nor_trace(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ("cost.seconds=5", "trace=true"):
        assert steer("method=unsteered", more, f"name={more[:4]}") == 2
        assert "Unsteered does not steer: set its steps, or choose another method" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="Unsteered does not steer"):
        SteeredSampling(digit_map(), Unsteered(), watch=Watch(Budget(network_calls=5)))
    assert steer("method=unsteered", "name=plain") == 0
    assert not Path("runs/plain/trace.png").exists()


def test_news_are_one_line_with_the_means() -> None:
    values = {"reward": torch.tensor([0.25, 0.75]), "effective_sample_size": torch.tensor([3.0, 5.0])}
    line = told(Progress(3, 12, 0.75, Cost(network_calls=24.0), values))
    assert line == "step 3 of 12, t = 0.75: reward 0.5, effective sample size 4, 24 network calls a sample"


def test_news_come_at_most_once_a_pause(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 0.4, 0.9, 1.3, 1.5, 2.4])
    monkeypatch.setattr(generation.time, "monotonic", lambda: next(clock))
    news = News(pause=1.0)
    for done in range(1, 6):
        news(Progress(done, 5, 0.0, Cost(), {}))
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["3", "5"]


def test_a_trace_has_a_row_a_sample_and_time_from_left_to_right() -> None:
    shades = torch.linspace(0, 1, 30).reshape(1, 30, 1, 1, 1).expand(2, 30, 1, 4, 4)
    sheet = trace_sheet(shades, columns=5)
    assert sheet.shape == (1, 2 * 5 + 1, 5 * 5 + 1)
    row = sheet[0, 2, 2::5][:5]
    assert torch.allclose(row, shades[0, [0, 7, 14, 22, 29], 0, 0, 0])
