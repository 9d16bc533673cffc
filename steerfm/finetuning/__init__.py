"""How a flow map is moved toward a reward: one method, one file."""

from steerfm.finetuning.direct import DirectBackprop

__all__ = ["DirectBackprop"]
