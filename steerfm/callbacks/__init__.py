"""Lightning callbacks: weight averages, pictures as training goes, loss by interval."""

from steerfm.callbacks.ema import EMA
from steerfm.callbacks.loss_by_interval import LossByInterval
from steerfm.callbacks.sample_grid import SampleGrid

__all__ = ["EMA", "LossByInterval", "SampleGrid"]
