"""Learning a reward from preferences on a tiny random CLIP: what is learnt, what is not touched, and what is saved."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from tiny_encoders import save_open_clip
from torch import Tensor
from torch.utils.data import DataLoader
from trainers import copied, equal, trainer

from steerfm.callbacks import EMA
from steerfm.data.batches import StepBatches, StepDataModule
from steerfm.errors import CheckpointError, ConfigError, RewardError, TrainingError
from steerfm.modules.preference_training import PreferenceTraining
from steerfm.reward import check
from steerfm.rewards.clip import CLIPScore
from steerfm.rewards.preference import LowRank, Preference, PreferenceNetwork
from steerfm.seeds import torch_generator

PROMPTS = ("a red circle", "two boats", "snow", "a city at night", "it is small")
TUNED = ("head", "lora", "full")


class Redder(StepDataModule):
    """Pairs of noise on one colour each, of which a judge prefers the redder with known odds."""

    def __init__(self, held_out: int = 2, sharpness: float = 8.0) -> None:
        super().__init__()
        self.held_out, self.sharpness = held_out, sharpness

    def pairs(self, stream: str, step: int, count: int = 64) -> dict[str, Any]:
        g = torch_generator(0, stream, step)
        pictures = torch.rand(2, count, 3, 1, 1, generator=g).expand(-1, -1, -1, 8, 8)
        pictures = (0.9 * pictures + 0.1 * torch.rand(2, count, 3, 8, 8, generator=g)).contiguous()
        red = (pictures[:, :, 0] - pictures[:, :, 1:].mean(2)).mean((2, 3))
        odds = torch.sigmoid(self.sharpness * (red[0] - red[1]))
        prompts = [PROMPTS[int(i)] for i in torch.randint(len(PROMPTS), (count,), generator=g)]
        preferred = torch.bernoulli(odds, generator=g)
        return {"image_a": pictures[0], "image_b": pictures[1], "prompt": prompts, "preferred": preferred, "odds": odds}

    def batch(self, step: int) -> dict[str, Any]:
        return self.pairs("data", step)

    def val_dataloader(self) -> DataLoader | list:
        return DataLoader(StepBatches(lambda i: self.pairs("validation", i, 256), self.held_out), batch_size=None)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_open_clip(tmp_path_factory.mktemp("clip") / "small")


def network(clip: Path, tune: str = "head", **more: Any) -> PreferenceNetwork:
    torch.manual_seed(0)
    return PreferenceNetwork(str(clip), tune=tune, rank=2, **more)


def training(clip: Path, tune: str = "head", lr: float = 0.02, **more: Any) -> PreferenceTraining:
    options = {key: more.pop(key) for key in ("hidden",) if key in more}
    return PreferenceTraining(network(clip, tune, **options), partial(torch.optim.AdamW, lr=lr), **more)


def fit(module: PreferenceTraining, folder: Path, steps: int = 4, *callbacks: Any, **more: Any) -> PreferenceTraining:
    """Fit for so many steps; validate at the last one, unless told otherwise."""
    data = more.pop("data", None) or Redder()
    path = more.pop("ckpt_path", None)
    options = {"val_check_interval": steps, "check_val_every_n_epoch": None} | more
    trainer(folder, steps, *callbacks, **options).fit(module, data, ckpt_path=path, weights_only=True)
    return module


def pictures(count: int = 6, side: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


# The network


def test_it_starts_as_the_scaled_cosine_of_clip(clip: Path) -> None:
    expected = CLIPScore(str(clip), scaled=True)(pictures(5), PROMPTS).total
    for tune in TUNED:
        assert torch.allclose(network(clip, tune)(pictures(5), PROMPTS), expected, atol=1e-5)
    assert torch.allclose(network(clip, hidden=4)(pictures(5), PROMPTS), expected, atol=1e-5)


def test_the_head_is_what_its_formula_says(clip: Path) -> None:
    head = network(clip, hidden=4).head
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    x, y = torch.randn(2, 3, 8)
    assert head.m is not None
    for i in range(3):
        bent = head.m(torch.cat([x[i], y[i], x[i] * y[i]]))
        inner = sum((1 + head.v[d]) * x[i, d] * y[i, d] + head.w[d] * x[i, d] for d in range(8)) + bent
        expected = head.scale * head.gain.exp() * inner + head.bias
        assert torch.allclose(head(x, y)[i], expected.squeeze(), rtol=1e-4)


def test_low_rank_changes_reach_every_matrix_of_the_tower_and_merging_keeps_the_rewards(clip: Path) -> None:
    """Attention reads its layers' weights without calling them, so that its changes are tried one by one."""
    net = network(clip, "lora")
    before = net(pictures(), PROMPTS[:1] * 6).detach()
    changes = {name: module for name, module in net.named_modules() if isinstance(module, LowRank)}
    assert len(changes) == 4  # attention's in and out, and two layers behind it
    for change in changes.values():
        torch.nn.init.normal_(change.up)
        changed = net(pictures(), PROMPTS[:1] * 6).detach()
        assert (changed - before).abs().max() > 1e-4
        before = changed
    with torch.no_grad():
        expected = net(pictures(), PROMPTS[:1] * 6)
        net.merge()
        assert torch.equal(net(pictures(), PROMPTS[:1] * 6), expected)
    assert not any(isinstance(module, LowRank) for module in net.modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tune": "lorra"}, "tune is one of head, lora, full, got 'lorra'; did you mean 'lora'"),
        ({"hidden": -1}, "hidden is at least 0"),
        ({"rank": 0}, "rank at least 1, got 0 and 0"),
    ],
)
def test_wrong_options_are_said(options: dict[str, Any], said: str, clip: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        PreferenceNetwork(str(clip), **options)


# Training


def test_a_known_preference_is_learnt_and_calibrated(clip: Path, tmp_path: Path) -> None:
    """Red is linear in what the random tower sees, nearly: the best accuracy that the odds allow is all but reached."""
    data = Redder(held_out=4)
    best = torch.cat([data.pairs("validation", i, 256)["odds"] for i in range(4)])
    best_accuracy = float(torch.maximum(best, 1 - best).mean())
    module = fit(training(clip, lr=0.05), tmp_path, 150, data=data)
    figures = module.best["held_out"]
    sampling = (best_accuracy * (1 - best_accuracy) / 1024) ** 0.5
    assert figures["accuracy"] > best_accuracy - 4 * sampling
    assert figures["calibration_error"] < 0.06
    assert (figures["step"], figures["pairs"]) == (150, 1024)
    assert module.trainer.callback_metrics["validation/accuracy"] == pytest.approx(figures["accuracy"])


@pytest.mark.parametrize("tune", TUNED)
def test_what_is_frozen_stays_bit_for_bit_and_what_is_tuned_moves(tune: str, clip: Path, tmp_path: Path) -> None:
    module = training(clip, tune, hidden=3, centring=0.01)
    before = copied(module.network.state_dict())
    learnt = set(module.network.learnt())
    fit(module, tmp_path)
    after = module.network.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved <= learnt
    still = {name for name in learnt - moved if "position" not in name}
    assert not still
    towers = {name for name in moved if name.startswith("clip.")}
    expected = {"head": lambda name: False, "lora": lambda name: name.endswith((".up", ".down"))}
    assert all(expected.get(tune, lambda name: ".visual." in name)(name) for name in towers)
    assert bool(towers) == (tune != "head")


def test_centring_puts_the_zero_where_the_pairs_are(clip: Path, tmp_path: Path) -> None:
    def mean(module: PreferenceTraining) -> float:
        with torch.no_grad():
            a, b = module.rewards(Redder().pairs("validation", 0, 256))
        return abs(float((a + b).mean()))

    open_ended, centred = training(clip), training(clip, centring=0.1)
    open_ended.network.head.bias.data.fill_(5.0)
    centred.network.head.bias.data.fill_(5.0)
    start = mean(centred)
    assert mean(fit(open_ended, tmp_path, 60)) > 0.7 * start
    assert mean(fit(centred, tmp_path, 60, data=Redder())) < 0.85 * start


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_resuming_is_as_if_it_had_never_stopped(tune: str, clip: Path, tmp_path: Path) -> None:
    every = {"val_check_interval": 2}
    whole = fit(training(clip, tune), tmp_path / "whole", 6, EMA(0.9), **every)
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=4)
    fit(training(clip, tune), tmp_path / "first", 4, EMA(0.9), keep, **every)
    again = training(clip, tune)
    again.network.load_state_dict(training(clip, tune, lr=1.0).network.state_dict())
    fit(again, tmp_path / "second", 6, EMA(0.9), ckpt_path=tmp_path / "kept" / "last.ckpt", **every)
    assert equal(again.network.state_dict(), whole.network.state_dict())
    assert again.best["held_out"] == whole.best["held_out"]
    assert equal(again.best["learnt"], whole.best["learnt"])
    stored = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)
    assert set(stored["state_dict"]) == {f"network.{name}" for name in whole.network.learnt()}


def test_the_tower_learns_more_slowly_than_the_head(clip: Path) -> None:
    """With plain gradient descent a step is the rate times the gradient, exactly."""
    module = PreferenceTraining(network(clip, "full"), partial(torch.optim.SGD, lr=0.5), tower_rate=0.125)
    optimizer = module.configure_optimizers()
    module.rewards(Redder().batch(0))[0].square().mean().backward()
    before = copied(module.network.learnt())
    optimizer.step()
    for name, parameter in module.network.named_parameters():
        if parameter.requires_grad:
            rate = 0.5 if name.startswith("head.") else 0.0625
            assert parameter.grad is not None
            assert torch.equal(parameter.data, before[name].add(parameter.grad, alpha=-rate))


def test_the_best_on_held_out_pairs_is_kept_and_saved(clip: Path, tmp_path: Path) -> None:
    """A rate that throws everything away after a good start: what is saved is the start."""
    module = fit(training(clip, lr=0.05), tmp_path, 30)
    good = copied(module.network.learnt())
    for tensor in module.network.learnt().values():
        tensor.add_(torch.randn_like(tensor) * 3)
    bad = trainer(tmp_path, 1)
    bad.validate(module, Redder(), verbose=False)
    assert equal(module.best["learnt"], good)
    assert equal(load_file(module.save(tmp_path / "saved") / "preference.safetensors"), good)
    assert not equal(module.network.learnt(), good)
    figures = json.loads((tmp_path / "saved" / "preference.json").read_text())["held_out"]
    assert figures == module.best["held_out"]


def test_a_loss_that_is_not_finite_stops_training(clip: Path, tmp_path: Path) -> None:
    module = training(clip)
    module.network.head.w.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="loss of preferences is nan at step 0: lower the learning rate"):
        fit(module, tmp_path)
    with pytest.raises(ConfigError, match=r"tower_rate is a positive share of the head's learning rate, got 0\."):
        training(clip, tower_rate=0)
    with pytest.raises(ConfigError, match=r"centring is a coefficient of at least 0, got -1\."):
        training(clip, centring=-1.0)


# Saving


@pytest.fixture(scope="module", params=TUNED)
def saved(request: pytest.FixtureRequest, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a trained network, without held-out pairs, and the folder in which it was saved."""
    folder = tmp_path_factory.mktemp("saved")
    module = training(clip, request.param, hidden=3)
    options = {"limit_val_batches": 0}
    fit(module, folder, 3, **options)
    return module.network, module.save(folder / "preference")


def test_what_is_loaded_gives_the_same_bits_and_holds_no_more_than_what_was_learnt(saved: Any) -> None:
    net, folder = saved
    with torch.no_grad():
        expected = net(pictures(5), PROMPTS)
    reward = Preference(folder)
    assert torch.equal(reward(pictures(5), PROMPTS).total, expected)
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert set(load_file(folder / "preference.safetensors")) == set(net.learnt())
    assert {path.name for path in folder.iterdir()} == {"preference.json", "preference.safetensors"}


def test_it_is_a_reward_like_any_other(saved: Any) -> None:
    _, folder = saved
    assert check(Preference(folder), pictures(5, 12), PROMPTS) == []
    leaf = pictures(5).requires_grad_(True)
    Preference(folder)(leaf, PROMPTS).total.sum().backward()
    assert leaf.grad is not None and bool((leaf.grad.abs().sum((1, 2, 3)) > 0).all())
    fixed = Preference(folder, prompt="snow")
    assert torch.allclose(fixed(pictures(5), PROMPTS).total, Preference(folder)(pictures(5), ["snow"] * 5).total)


def damaged(folder: Path, copy: Path, name: str, change: Any) -> Path:
    """Copy a saved reward with one file changed; None removes it."""
    copy.mkdir()
    for path in folder.iterdir():
        data = change(path.read_bytes()) if path.name == name else path.read_bytes()
        if data is not None:
            (copy / path.name).write_bytes(data)
    return copy


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("preference.json", lambda data: None, r"has no preference\.json: give the folder"),
        ("preference.safetensors", lambda data: None, r"has no preference\.safetensors: give the folder"),
        ("preference.json", lambda data: data[:50], r"preference\.json is damaged \(.*\): copy or save it again"),
        ("preference.json", lambda data: b"{}", "is damaged"),
        ("preference.json", lambda data: data.replace(b'"format": 1', b'"format": 9'), "newer steerfm: upgrade"),
        ("preference.safetensors", lambda data: data[:200], r"preference\.safetensors is damaged \(.*\): copy or"),
        (
            "preference.json",
            lambda data: data.replace(b'"hidden": 3', b'"hidden": 2'),
            "does not fit the network: 'head",
        ),
        (
            "preference.json",
            lambda data: data.replace(b'"hidden": 3', b'"hidden": 0'),
            "does not fit the network: 'head",
        ),
    ],
)
def test_damaged_folders_are_refused(name: str, change: Any, said: str, saved: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        Preference(damaged(saved[1], tmp_path / "copy", name, change))


def test_another_clip_is_refused_and_a_moved_one_is_found(saved: Any, clip: Path, tmp_path: Path) -> None:
    net, folder = saved
    other = save_open_clip(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"learnt on another CLIP than '.*other' is now: pass model="):
        Preference(folder, str(other))
    moved = save_open_clip(tmp_path / "moved")
    lost = damaged(folder, tmp_path / "lost", "preference.json", lambda data: data.replace(str(clip).encode(), b"gone"))
    with pytest.raises(RewardError, match="No CLIP model 'gone'"):
        Preference(lost)
    with torch.no_grad():
        assert torch.equal(Preference(lost, str(moved))(pictures(5), PROMPTS).total, net(pictures(5), PROMPTS))


def test_a_saved_reward_that_gives_other_values_is_not_reported_as_success(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if loading left the learnt changes out, which is a known fault of others' adapters."""
    module = fit(training(clip, "lora", lr=0.1), tmp_path, 3)
    monkeypatch.setattr(PreferenceNetwork, "load", classmethod(lambda cls, folder: network(clip, "lora")))
    with pytest.raises(CheckpointError, match="gives other rewards than what was trained, by up to"):
        module.save(tmp_path / "saved")
