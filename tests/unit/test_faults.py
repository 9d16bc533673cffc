"""Faults in the middle of training: losses and gradients that are not finite, memory, rewards that hang, signals."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, Dataset
from trainers import copied, digit_map, equal, trainer

from steerfm import (
    EMA,
    BestOfN,
    Digits,
    DirectBackprop,
    FlowMap,
    FlowMapTraining,
    Lagrangian,
    NegativeAware,
    Points,
    Prompts,
    RewardFineTuning,
    Triangle,
)
from steerfm.callbacks import Checkpoints, RandomState, SkipNonFinite, StopOnSignal
from steerfm.callbacks.checkpoints import newest_first
from steerfm.commands.common import in_one_sentence
from steerfm.errors import ConfigError, RewardError, TrainingError
from steerfm.memory import in_micro_batches, out_of_memory
from steerfm.objectives import SelfAverage
from steerfm.reward_algebra import TimeLimit
from steerfm.steering.guidance import LookAheadGuidance


class Sick(nn.Module):
    """A network that gives NaN, or a finite value with a gradient of NaN, at some of its forward passes."""

    def __init__(self, at: set[int], kind: str = "value") -> None:
        super().__init__()
        self.data_shape = (2,)
        self.layer = nn.Linear(2, 2)
        self.at, self.kind, self.calls = at, kind, 0

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        self.calls += 1
        out = self.layer(x)
        if self.calls - 1 not in self.at:
            return out
        if self.kind == "value":
            return out * torch.nan
        return out + (0 * out).abs().sqrt()  # zero, with a slope of infinity times zero


class Watch(SkipNonFinite):
    """Note weights and optimiser state after every step."""

    def __init__(self, limit: int = 5) -> None:
        super().__init__(limit)
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        states = trainer.optimizers[0].state_dict()["state"]
        flat = {f"{i}/{name}": value for i, state in states.items() for name, value in state.items()}
        self.seen.append(copied(pl_module.state_dict() | flat))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def sick(at: set[int], kind: str = "value") -> FlowMapTraining:
    torch.manual_seed(0)
    optimizer = partial(AdamW, lr=1e-2, weight_decay=0.5)
    return FlowMapTraining(FlowMap(Sick(at, kind)), times=Triangle(1.0), optimizer=optimizer)


def ring() -> Points:
    return Points("ring", 8, validation_size=0)


@pytest.mark.parametrize("kind", ["value", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, watch, ema = sick({2, 3, 5}, kind), Watch(), EMA(0.5)
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, 7, ema, watch, gradient_clip_val=1.0).fit(module, ring())
    moved = [not equal(before, after) for before, after in zip(watch.seen, watch.seen[1:], strict=False)]
    assert moved == [True, False, False, True, False, True]  # weights, momenta and their count of steps
    assert all(torch.isfinite(value).all() for value in (watch.seen[-1] | ema.average).values())
    assert (watch.total, watch.in_a_row) == (3, 0)
    assert float(module.trainer.callback_metrics["skipped_steps"]) == 3
    told = [text for text in caplog.messages if "skipped" in text]
    what = "The loss 'flow_matching' is nan at step 3 for" if kind == "value" else "A gradient is not finite at step 3"
    assert len(told) == 3
    assert told[1].startswith(what)
    assert told[1].endswith("The step is skipped, 2 in a row and 2 in all.")


def test_several_in_a_row_stop_with_the_last_good_state(tmp_path: Path) -> None:
    module, watch, keep = sick({2, 4, 5, 6, 7, 8}), Watch(3), Checkpoints(tmp_path / "kept", 100)
    with pytest.raises(TrainingError, match=r"step 6 .*3 steps in a row were skipped: lower the .*step=00000007.ckpt"):
        trainer(tmp_path, 20, watch, keep).fit(module, ring())
    saved = torch.load(newest_first(tmp_path / "kept")[0], weights_only=True)
    before = {name: value for name, value in watch.seen[3].items() if name in saved["state_dict"]}
    assert equal(saved["state_dict"], before)
    again = Watch(3)
    trainer(tmp_path, 9, again, Checkpoints(tmp_path / "kept", 100)).fit(
        sick(set()), ring(), ckpt_path=newest_first(tmp_path / "kept")[0], weights_only=True
    )
    assert (again.total, again.in_a_row) == (4, 0)


def test_counts_are_resumed_so_that_it_stops_where_it_would_have(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="3 steps in a row"):
        trainer(tmp_path, 20, Watch(3), Checkpoints(tmp_path / "a", 1, keep=9)).fit(sick({4, 5, 6}), ring())
    middle = tmp_path / "a" / "step=00000006.ckpt"  # two have been skipped
    with pytest.raises(TrainingError, match=r"at step 6 .*3 steps in a row"):
        trainer(tmp_path, 20, Watch(3), Checkpoints(tmp_path / "b", 9)).fit(
            sick({0}), ring(), ckpt_path=middle, weights_only=True
        )


def test_accumulated_batches_are_skipped_together(tmp_path: Path) -> None:
    watch = Watch()
    trainer(tmp_path, 3, watch, accumulate_grad_batches=2).fit(sick({2}), ring())
    assert watch.total == 1
    assert [not equal(a, b) for a, b in zip(watch.seen[1::2], watch.seen[3::2], strict=False)] == [False, True]


def test_a_huge_gradient_would_break_the_second_moment_and_is_skipped(tmp_path: Path) -> None:
    module, watch = sick(set()), Watch()
    module.weighting = lambda losses, s, t: losses * (1e22 if module.global_step == 1 else 1.0)
    trainer(tmp_path, 3, watch).fit(module, ring())
    assert watch.total == 1
    assert all(torch.isfinite(value).all() for value in watch.seen[-1].values())


def test_no_checkpoint_holds_what_is_not_finite(tmp_path: Path) -> None:
    module = sick(set())
    module.optimizer = partial(SGD, lr=1e-2)

    def spoil(*_: Any, **__: Any) -> None:
        if module.global_step == 3:
            module.flow_map.network.layer.bias.data[0] = torch.inf  # type: ignore[union-attr,index,operator]

    module.on_before_zero_grad = spoil  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"would hold weights 'flow_map.network.layer.bias' .*step=00000003\.ckpt"):
        trainer(tmp_path, 9, SkipNonFinite(), Checkpoints(tmp_path / "kept", 1)).fit(module, ring())
    kept = newest_first(tmp_path / "kept")
    assert [path.name for path in kept] == ["step=00000003.ckpt", "step=00000002.ckpt"]
    assert all(torch.isfinite(value).all() for value in torch.load(kept[0], weights_only=True)["state_dict"].values())


def test_weights_that_went_too_far_stop_at_once(tmp_path: Path) -> None:
    module = sick({4})
    module.on_before_zero_grad = lambda *_, **__: (  # type: ignore[method-assign]
        module.flow_map.network.layer.bias.data.fill_(torch.nan) if module.global_step == 2 else None  # type: ignore
    )
    with pytest.raises(TrainingError, match=r"weights 'flow_map.network.layer.bias' are not finite .*step=00000002"):
        trainer(tmp_path, 9, SkipNonFinite(), Checkpoints(tmp_path / "kept", 2)).fit(module, ring())


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="limit is a number of skipped steps in a row"):
        SkipNonFinite(0)
    with pytest.raises(ConfigError, match="every=0 and keep=2"):
        Checkpoints("kept", 0)
    with pytest.raises(ConfigError, match="positive number of seconds, got 0"):
        TimeLimit(brightness, 0)


# ---- resuming ----


def averaging() -> FlowMapTraining:
    torch.manual_seed(0)
    objective = Lagrangian(teacher=SelfAverage(0.5))
    return FlowMapTraining(digit_map(), objective, Triangle(0.5), optimizer=partial(AdamW, lr=1e-2))


def rounds() -> RewardFineTuning:
    method = NegativeAware(0.3, 2.0, rounds=2, every=2, jumps=1)
    return RewardFineTuning(digit_map(), brightness, method, jumps=1, optimizer=partial(AdamW, lr=1e-2))


def brightness(images: Tensor, prompts: Any) -> Tensor:
    return images.mean((1, 2, 3))


RESUMED = {
    "an average of its own weights": (averaging, lambda: Digits(16, validation_size=8), 4, {"val_check_interval": 2}),
    "a method of rounds": (rounds, lambda: Prompts(["a handwritten two"], 4), 50, {}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_from_every_checkpoint_it_ends_as_if_never_stopped(name: str, tmp_path: Path) -> None:
    """What follows the weights is as far as they are, and no step is made after the last."""
    make, data, steps, more = RESUMED[name]

    def fit(folder: str, resume: Path | None = None) -> Any:
        module, validated = make(), []
        module.on_validation_epoch_start = lambda: validated.append(module.global_step)

        class NotingCheckpoints(Checkpoints):
            def save(self, trainer: Any) -> Path:
                path = super().save(trainer)
                before[path] = len(validated)
                return path

        callbacks = [EMA(0.9), RandomState(), NotingCheckpoints(tmp_path / folder, 1, keep=99)]
        run = trainer(tmp_path, steps, *callbacks, check_val_every_n_epoch=None, **more)
        run.fit(module, data(), ckpt_path=resume, weights_only=True)
        return module, validated

    before: dict[Path, int] = {}  # validations that had been made when a checkpoint was written
    whole, validated = fit("whole")
    for path in newest_first(tmp_path / "whole"):
        again, later = fit("again", path)
        assert equal(again.state_dict(), whole.state_dict()), path.name
        assert again.global_step == whole.global_step
        assert later == validated[before[path] :], path.name  # none left out, none made twice


def test_the_newest_checkpoint_is_told_by_its_step_whatever_the_clock_says(tmp_path: Path) -> None:
    trainer(tmp_path, 5, Checkpoints(tmp_path, 1, keep=3)).fit(sick(set()), ring())
    for i, step in enumerate((5, 4, 3)):
        os.utime(tmp_path / f"step={step:08d}.ckpt", (1e9 + i, 1e9 + i))  # a clock that ran backwards
    (tmp_path / "mine.ckpt").write_bytes(b"")
    names = [path.name for path in newest_first(tmp_path)]
    assert names == [*(f"step={step:08d}.ckpt" for step in (5, 4, 3)), "mine.ckpt"]
    assert (tmp_path / "last.ckpt").resolve().name == "step=00000005.ckpt"
    trainer(tmp_path, 7, Checkpoints(tmp_path, 7)).fit(
        sick(set()), ring(), ckpt_path=tmp_path / names[0], weights_only=True
    )
    kept = {"step=00000007.ckpt", "step=00000005.ckpt", "last.ckpt", "mine.ckpt"}
    assert {path.name for path in tmp_path.glob("*.ckpt")} == kept


# ---- signals ----


class Sending(Points):
    """Points that send this process a signal before a batch."""

    def __init__(self, number: int, at: int) -> None:
        super().__init__("ring", 8, validation_size=0)
        self.number, self.at = number, at

    def batch(self, step: int) -> Any:
        if step == self.at:
            os.kill(os.getpid(), self.number)
        return super().batch(step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_end_of_the_step_and_stops(number: int, tmp_path: Path) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    whole = sick(set())
    trainer(tmp_path, 8).fit(whole, ring())
    keep = [StopOnSignal(), Checkpoints(tmp_path / "kept", 100)]
    try:
        with pytest.raises(SystemExit):
            trainer(tmp_path, 8, *keep).fit(sick(set()), Sending(number, 4))
    finally:
        signal.signal(signal.SIGINT, before[signal.SIGINT])  # which Lightning switches off while it shuts down
    assert {each: signal.getsignal(each) for each in before} == before
    (path,) = newest_first(tmp_path / "kept")
    assert path.name == "step=00000005.ckpt"
    again = sick(set())
    keep = [StopOnSignal(), Checkpoints(tmp_path / "kept", 100)]
    trainer(tmp_path, 8, *keep).fit(again, Sending(number, 7), ckpt_path=path, weights_only=True)  # in the last step
    assert again.global_step == 8
    assert equal(again.state_dict(), whole.state_dict())


SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "mine", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 0), (signal.SIGUSR1, 1), (signal.SIGTERM, 0)])
def test_under_slurm_sigusr1_asks_for_the_job_to_be_run_again(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexit {code}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            trainer(tmp_path, 8, StopOnSignal(), Checkpoints(tmp_path / "kept", 100)).fit(
                sick(set()), Sending(number, 2)
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in newest_first(tmp_path / "kept")] == ["step=00000003.ckpt"]
    assert not list(tmp_path.glob("hpc_ckpt*"))  # Lightning's own way of doing this
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == ("requeue 4711\n" if number == signal.SIGUSR1 else "")
    if asked:
        assert ("SLURM will run job 4711 again" if code == 0 else "submit the same script again") in caplog.text


# ---- rewards that hang ----


def sleeping(images: Tensor, prompts: Any) -> Tensor:
    time.sleep(60)
    return brightness(images, prompts)


def busy(images: Tensor, prompts: Any) -> Tensor:
    while True:
        images = images + 0


@pytest.mark.parametrize("hanging", [sleeping, busy])
def test_a_reward_that_hangs_is_named_after_its_time_and_nothing_is_lost(hanging: Any, tmp_path: Path) -> None:
    def moody(images: Tensor, prompts: Any) -> Tensor:
        return (hanging if hang and module.global_step == 3 else brightness)(images, prompts)

    def tuning() -> RewardFineTuning:
        method = DirectBackprop(2)
        return RewardFineTuning(digit_map(), moody, method, monitor_every=99, reward_timeout=2.0)

    data = partial(Prompts, ["a handwritten two"], 4)
    hang, module = False, tuning()
    trainer(tmp_path, 6).fit(module, data())
    ends = copied(module.state_dict())
    handler, started = signal.getsignal(signal.SIGALRM), time.monotonic()
    hang, module = True, tuning()
    with pytest.raises(RewardError, match="'moody' gave no answer within 2 s: find out what it waits for"):
        trainer(tmp_path, 6, Checkpoints(tmp_path / "kept", 2)).fit(module, data())
    assert time.monotonic() - started < 40
    assert signal.getsignal(signal.SIGALRM) is handler
    hang, module = False, tuning()
    path = newest_first(tmp_path / "kept")[0]
    trainer(tmp_path, 6).fit(module, data(), ckpt_path=path, weights_only=True)
    assert path.name == "step=00000002.ckpt"
    assert equal(module.state_dict(), ends)


def test_limits_inside_each_other_and_other_alarms_go_on() -> None:
    images, prompts = torch.rand(2, 3, 4, 4), ["", ""]
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    left = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        both = TimeLimit(brightness, 5.0) + TimeLimit(lambda x: x.amax((1, 2, 3)), 4.0)
        TimeLimit(both, 9.0)(images, prompts)
        time.sleep(0.5)
        assert rung == [signal.SIGALRM]
        with pytest.raises(RewardError, match=r"'sleeping' gave no answer within 0.2 s"):
            TimeLimit(brightness + TimeLimit(sleeping, 0.2), 9.0)(images, prompts)
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *left)
    refused: list[str] = []

    def elsewhere() -> None:
        try:
            TimeLimit(brightness, 5.0)(images, prompts)
        except RewardError as error:
            refused.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "needs the main thread" in refused[0]


STUCK = """\
import itertools, torch, steerfm.reward_algebra as algebra
algebra.GRACE = 1.0
def deaf(images): return sum(itertools.repeat(0))  # in C, where no signal is looked at
algebra.TimeLimit(deaf, 0.5)(torch.rand(1, 3, 4, 4), [""])
"""


def test_a_call_that_no_signal_reaches_ends_the_process_and_says_where() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Timeout (0:00:01.5" in done.stderr
    assert "in deaf" in done.stderr


# ---- memory ----


def bounded(most: int, function: Any, error: type[Exception] = torch.OutOfMemoryError) -> Any:
    """Return a function of rows that has memory for so many of them."""

    def narrow(images: Tensor, prompts: Any) -> Tensor:
        sizes.append(len(images))
        if len(images) > most:
            text = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes. Error"
            raise error(text if error is RuntimeError else "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
        return function(images, prompts)

    sizes: list[int] = []
    narrow.sizes = sizes  # type: ignore[attr-defined]
    return narrow


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_rewards_are_tuned_in_smaller_micro_batches_where_memory_runs_out(
    error: type[Exception], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def tuned(reward: Any, micro_batch: int | None = None) -> dict[str, Tensor]:
        module = RewardFineTuning(
            digit_map(), reward, DirectBackprop(2), monitor_every=99, micro_batch=micro_batch,
            optimizer=partial(SGD, lr=0.1),
        )  # fmt: skip
        trainer(tmp_path, 2).fit(module, Prompts(["a handwritten two"], 8))
        return copied(module.state_dict())

    narrow = bounded(3, brightness, error)
    found, expected, plain = tuned(narrow), tuned(brightness, 2), tuned(brightness)
    assert equal(found, expected)
    assert all(torch.allclose(found[name], plain[name], atol=1e-6) for name in found)
    assert narrow.sizes[:3] == [8, 4, 2]
    assert max(narrow.sizes[3:]) == 2  # the next step goes on with what fitted
    asked = "ried to allocate 2.00 GiB" if error is not RuntimeError else "tried to allocate 80 bytes"
    assert f"{asked}): going on with 4, as micro_batch=4 does from the start" in caplog.text


@pytest.mark.parametrize("method", [BestOfN(6, 2), LookAheadGuidance(steps=3)])
def test_steering_goes_on_in_smaller_micro_batches(method: Any) -> None:
    prompts, seeds = ["", ""], [1, 2]
    flow_map, narrow = digit_map(), bounded(2, brightness)  # the two samples are scored together at the end
    found = method(flow_map, narrow, prompts=prompts, seeds=seeds)
    expected = method(flow_map, brightness, prompts=prompts, seeds=seeds)
    assert torch.allclose(found.x0, expected.x0, atol=1e-5)
    assert found.cost.reward_calls == expected.cost.reward_calls


class CutOff(Dataset[Tensor]):
    """Rows of a process whose connection for the first is gone when the second is made, though it lives."""

    def __init__(self, gone: Path) -> None:
        self.gone = gone

    def __getitem__(self, index: int) -> Tensor:
        if index == 1:
            while not vars(resource_sharer)["_resource_sharer"]._cache:  # the first is on offer
                time.sleep(0.01)
            resource_sharer.stop()
            self.gone.touch()
        return torch.zeros(2)

    def __len__(self) -> int:
        return 2


def test_a_connection_cut_by_a_data_worker_is_told_as_its_death(tmp_path: Path) -> None:
    rows = iter(DataLoader(CutOff(tmp_path / "gone"), batch_size=None, num_workers=1))
    while not (tmp_path / "gone").exists():
        time.sleep(0.01)
    with pytest.raises((OSError, EOFError)) as cut:
        next(rows)
    told = in_one_sentence(cut.value, {})
    assert told is not None
    assert "A process that reads data has died (" in str(told)
    with pytest.raises(FileNotFoundError) as other:
        (tmp_path / "nothing").read_bytes()
    assert in_one_sentence(other.value, {}) is None


def test_one_row_that_is_too_much_and_other_errors_are_told() -> None:
    def failing(error: Exception) -> Any:
        def attempt(start: int, stop: int) -> None:
            raise error

        return attempt

    with pytest.raises(torch.OutOfMemoryError):
        in_micro_batches(failing(torch.OutOfMemoryError("CUDA out of memory.")), 4, None, "scoring")
    with pytest.raises(RuntimeError, match="shapes"):
        in_micro_batches(failing(RuntimeError("shapes")), 4, None, "scoring")
    assert not out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))
    assert out_of_memory(MemoryError())
