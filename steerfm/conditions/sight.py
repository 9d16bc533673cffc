"""Sights: a network is told a noisy state x_t, and then maps fresh noise to draws of x0 given x_t.

So told, a flow map is a stochastic one: each noise is carried to another draw of the posterior p(x0 | x_t), in one
jump. Reference: Potaptchik et al. 2026, arXiv 2601.14430 (Meta Flow Maps).
"""

from __future__ import annotations

import torch

from steerfm.conditions.pictures import joined
from steerfm.paths import Path
from steerfm.types import Condition, State, Times, unsqueeze_like


def sight(path: Path, x: State, t: Times, condition: Condition | None = None) -> Condition:
    """Return the condition with "picture", (B, C + 1, ...): alpha x_t, and alpha, which says how much is seen of x0.

    At t = 1 both are zero, as where there is no picture, and the posterior is the data's whole law. Networks read it
    as `UNet(picture_channels=C)` does. Raises ConfigError where the condition has a picture already.
    """
    seen = unsqueeze_like(path.alpha(t), x)
    sighted = Condition({"picture": torch.cat([seen * x, seen.expand_as(x[:, :1])], 1)})
    return sighted if condition is None else joined(condition, sighted)
