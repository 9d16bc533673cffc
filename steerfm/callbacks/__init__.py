"""Lightning callbacks: weight averages, pictures as training goes, loss by interval, guard rails, checkpoints."""

from steerfm.callbacks.checkpoints import DurableCheckpoints, RandomState
from steerfm.callbacks.ema import EMA
from steerfm.callbacks.guard_rails import GuardRails
from steerfm.callbacks.loss_by_interval import LossByInterval
from steerfm.callbacks.sample_grid import SampleGrid

__all__ = ["EMA", "DurableCheckpoints", "GuardRails", "LossByInterval", "RandomState", "SampleGrid"]
