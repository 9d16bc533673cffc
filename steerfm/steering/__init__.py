"""How sampling is moved toward a reward: one method, one file, one interface, nothing trained."""

from steerfm.steering.best_of_n import BestOfN
from steerfm.steering.common import Budget, Progress, Steering, Watch
from steerfm.steering.guidance import LookAheadGuidance
from steerfm.steering.monte_carlo import SequentialMonteCarlo
from steerfm.steering.tilting import FlowMapTilting

__all__ = [
    "BestOfN",
    "Budget",
    "FlowMapTilting",
    "LookAheadGuidance",
    "Progress",
    "SequentialMonteCarlo",
    "Steering",
    "Watch",
]
