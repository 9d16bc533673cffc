"""What is done about a scheduler's signals: the step is finished and saved, and a SLURM job asks to be run again."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from steerfm.callbacks.checkpoints import end_after_saving

log = logging.getLogger(__name__)

SIGNALS = ("SIGTERM", "SIGUSR1")


class StopOnSignal(Callback):
    """Save and stop at the end of the step in which SIGTERM or SIGUSR1 comes to any of the processes.

    Stopping is raising KeyboardInterrupt, as Ctrl-C does, which saves nothing and waits for no step. Under SLURM,
    SIGUSR1 also puts the job back into the queue (scontrol requeue), where the same command finds its run again by its
    name: `#SBATCH --requeue --signal=SIGUSR1@120`, run by srun. SIGTERM does not: it comes with scancel too, and where
    SLURM itself preempts a job it requeues it.

    This takes the place of Lightning's own handling of both, which it switches off: that saves in the middle of a step,
    in a file of another place and name, and does not save on SIGTERM. Handlers of before are back when the fit ends.
    """

    def __init__(self) -> None:
        self.caught: set[str] = set()
        self.step = 0  # the optimiser step that was looked at last

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.caught, self.step = set(), trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                if hasattr(signal, name):  # Lightning has kept what was there, and puts it back
                    signal.signal(getattr(signal, name), self._catch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:  # the batch was accumulated
            return
        self.step = trainer.global_step
        anywhere = partial(trainer.strategy.reduce_boolean_decision, all=False)
        if not anywhere(bool(self.caught)) or trainer.global_step == trainer.max_steps:  # nothing is left to be stopped
            return
        name = "SIGUSR1" if anywhere("SIGUSR1" in self.caught) else "SIGTERM"
        end_after_saving(trainer, lambda path: _leave(trainer, path, name))

    def _catch(self, number: int, frame: Any) -> None:
        self.caught.add(signal.Signals(number).name)


def _leave(trainer: Trainer, path: Path | None, name: str) -> None:
    saved = "" if path is None else f", saved in {path}"
    log.warning("%s: stopping after step %d%s.", name, trainer.global_step, saved)
    if name == "SIGUSR1" and trainer.is_global_zero:
        _requeue()
    raise KeyboardInterrupt


def _requeue() -> None:
    """Put the SLURM job that this is back into the queue; nothing outside of one."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID", "")
    job = f"{job}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}" if job else os.environ.get("SLURM_JOB_ID", "")
    if not job:
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
        problem = done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        log.warning("SLURM does not requeue job %s (%s): submit the same script again.", job, problem)
    else:
        log.warning("SLURM will run job %s again.", job)
