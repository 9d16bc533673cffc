"""Callbacks through a real Trainer: what they average, log and draw, checked by hand."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader
from trainers import copied, digit_map, equal, point_map, trainer

from steerfm import EMA, Digits, FlowMapTraining, LossByInterval, Points, RewardFineTuning, SampleGrid
from steerfm.callbacks.sample_grid import histogram
from steerfm.data import Prompts
from steerfm.errors import ConfigError
from steerfm.objectives import Compositional
from steerfm.times import Triangle


class Watched(FlowMapTraining):
    """Keeps what its training steps gave, its weights after each of them, and its weights in validation."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.outputs: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.validated: list[dict[str, Tensor]] = []
        self.fail_in_validation = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        self.outputs.append(super().training_step(batch, batch_idx))
        return self.outputs[-1]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after.append(copied(self.state_dict()))

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated.append(copied(self.state_dict()))
        super().validation_step(batch, batch_idx)
        if self.fail_in_validation:
            raise RuntimeError("stopped in validation")


def watched(seed: int = 0) -> Watched:
    return Watched(point_map(seed), Compositional(), Triangle(0.5), optimizer=partial(SGD, lr=0.05))


def test_average_follows_its_recurrence(tmp_path: Path) -> None:
    module, ema = watched(), EMA(0.4)
    expected = copied(module.state_dict())
    trainer(tmp_path, 5, ema).fit(module, Points("ring", 16, validation_size=0))
    for step, weights in enumerate(module.after, start=1):
        decay = min(0.4, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * weights[name] for name in expected}
    assert ema.updates == 5
    assert all(torch.allclose(ema.average[name], expected[name], rtol=1e-6, atol=1e-7) for name in expected)
    with pytest.raises(ConfigError, match=r"decay must lie in \[0, 1\), got 1"):
        EMA(1.0)


def test_only_trainable_weights_are_averaged(tmp_path: Path) -> None:
    module, ema = watched(), EMA()
    module.flow_map.network.time.requires_grad_(False)  # type: ignore[union-attr,operator]
    trainer(tmp_path, 1, ema).fit(module, Points("ring", 8, validation_size=0))
    assert set(ema.average) == {name for name, p in module.named_parameters() if p.requires_grad}
    assert not any(".time." in name for name in ema.average)


def test_validation_sees_the_average_and_training_the_raw_weights(tmp_path: Path) -> None:
    module, ema = watched(), EMA(0.5)
    run = trainer(tmp_path, 2, ema, val_check_interval=2)
    run.fit(module, Points("ring", 16, validation_size=8))
    assert len(module.validated) == 1
    assert equal(module.validated[0], ema.average)
    assert equal(module.state_dict(), module.after[-1])
    assert not equal(module.state_dict(), ema.average)


def test_raw_weights_return_where_validation_fails(tmp_path: Path) -> None:
    module, ema = watched(), EMA(0.5)
    module.fail_in_validation = True
    with pytest.raises(RuntimeError, match="stopped in validation"):
        trainer(tmp_path, 2, ema, val_check_interval=2).fit(module, Points("ring", 16, validation_size=8))
    assert equal(module.validated[0], ema.average)
    assert equal(module.state_dict(), module.after[-1])


def test_average_does_not_leak_into_the_next_fit(tmp_path: Path) -> None:
    data, ema = Points("ring", 16, validation_size=0), EMA(0.9)
    trainer(tmp_path, 4, ema).fit(watched(1), data)
    again, alone = EMA(0.9), watched(2)
    trainer(tmp_path, 3, ema).fit(watched(2), data)
    trainer(tmp_path, 3, again).fit(alone, data)
    assert equal(ema.average, again.average)
    assert ema.updates == 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_by_interval_is_the_mean_of_each_band(accumulate: int, tmp_path: Path) -> None:
    module, logger = watched(), CSVLogger(tmp_path, name="", version="")
    run = trainer(
        tmp_path, 6, LossByInterval((0.3, 1.0)), logger=logger, log_every_n_steps=3, accumulate_grad_batches=accumulate
    )
    run.fit(module, Points("ring", 64, validation_size=0))
    with (tmp_path / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["loss"]]
    assert len(rows) == 2  # steps 3 and 6
    for i, row in enumerate(rows):
        outputs = module.outputs[3 * accumulate * i : 3 * accumulate * (i + 1)]
        losses, s, t = (torch.cat([output[name] for output in outputs]) for name in ("losses", "s", "t"))
        length = (s - t).abs()
        bands = {"diagonal": length == 0, "0-0.3": (length > 0) & (length <= 0.3), "0.3-1": length > 0.3}
        for name, chosen in bands.items():
            assert float(row[f"loss_by_interval/{name}"]) == pytest.approx(float(losses[chosen].mean()), rel=1e-5)


def test_loss_by_interval_says_what_it_needs(tmp_path: Path) -> None:
    module = RewardFineTuning(point_map(), lambda points: points[:, 0])
    with pytest.raises(ConfigError, match=r"returns 'losses', 's' and 't'.* RewardFineTuning's does not: drop"):
        trainer(tmp_path, 1, LossByInterval()).fit(module, Prompts([""], 4))
    with pytest.raises(ConfigError, match=r"edges must rise and end at 1 or later, got \[0.5\]"):
        LossByInterval([0.5])


def pixels(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.tensor(list(picture.convert("L").tobytes())).reshape(picture.height, picture.width)


def test_grid_of_digits_shows_the_average_at_every_number_of_jumps(tmp_path: Path) -> None:
    grid, ema = SampleGrid(every=2, jumps=(1, 2), columns=3, scale=2), EMA(0.5)
    module = FlowMapTraining(digit_map(), Compositional(), optimizer=partial(SGD, lr=0.1))
    run = trainer(tmp_path, 5, ema, grid, accumulate_grad_batches=2)
    run.fit(module, Digits(8, validation_size=0))
    files = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in files] == ["step_0000002.png", "step_0000004.png", "step_0000005.png"]
    drawn = pixels(files[-1])
    assert drawn.shape == (
        2 * (2 * 9 + 1),
        2 * (3 * 9 + 1),
    )  # two rows, three columns, one pixel between, twice as large
    inner = drawn[2:18, 2:18].float()
    assert inner.std() > 10  # a picture, neither black nor flat
    for weights, same in ((ema.average, True), (copied(module.state_dict()), False)):
        module.load_state_dict(weights)
        expected = grid.sheet(module.flow_map)[0].mul(255).round().clamp(0, 255)
        assert torch.equal(drawn[::2, ::2].float(), expected) == same


def test_grid_of_points_is_a_histogram(tmp_path: Path) -> None:
    module = FlowMapTraining(point_map(), Compositional())
    trainer(tmp_path, 2, SampleGrid(every=2, jumps=(1, 2), limit=4.0)).fit(module, Points("ring", 8, validation_size=0))
    (path,) = (tmp_path / "pictures").iterdir()
    drawn = pixels(path)
    assert drawn.shape == (4 * 66, 4 * 131)
    assert 0 < (drawn[4:260, 4:260] > 40).float().mean() < 0.5


def test_histogram_puts_points_where_they_lie() -> None:
    sheet = histogram(torch.tensor([[0.9, 0.9], [0.9, 0.9], [-0.9, 0.9]]), limit=1.0, bins=2)
    assert sheet[0].tolist() == [
        [pytest.approx(0.5**0.5), 1.0],
        [0.0, 0.0],
    ]  # up is up, right is right, root of density


def test_grid_reaches_wandb_with_pixels_to_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")  # the logger overwrites it, and this puts it back
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    module = FlowMapTraining(digit_map(), Compositional())
    trainer(tmp_path, 1, SampleGrid(columns=4), logger=logger).fit(module, Digits(8, validation_size=0))
    logger.experiment.finish()
    (path,) = tmp_path.rglob("media/images/*.png")
    assert pixels(path)[1:9, 1:9].float().std() > 10


def test_grid_says_what_it_needs(tmp_path: Path) -> None:
    class Other(lightning.LightningModule):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> SGD:
            self.layer = torch.nn.Linear(1, 1)
            return SGD(self.layer.parameters(), lr=0.1)

    with pytest.raises(ConfigError, match=r"SampleGrid draws a module's flow_map, and Other has none: drop it"):
        trainer(tmp_path, 1, SampleGrid()).fit(Other(), DataLoader([torch.ones(1)]))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="every counts steps and must be at least 1, got 0"):
        SampleGrid(every=0)
