"""Lightning callbacks: weight averages, pictures as training goes, loss by interval, guard rails, checkpoints."""

from steerfm.callbacks.checkpoints import Checkpoints, DurableCheckpoints, RandomState
from steerfm.callbacks.ema import EMA
from steerfm.callbacks.guard_rails import GuardRails
from steerfm.callbacks.loss_by_interval import LossByInterval
from steerfm.callbacks.sample_grid import SampleGrid
from steerfm.callbacks.skip_non_finite import SkipNonFinite
from steerfm.callbacks.stop_on_signal import StopOnSignal

__all__ = [
    "EMA",
    "Checkpoints",
    "DurableCheckpoints",
    "GuardRails",
    "LossByInterval",
    "RandomState",
    "SampleGrid",
    "SkipNonFinite",
    "StopOnSignal",
]
