"""How sampling is moved toward a reward: one method, one file, one interface, nothing trained."""

from steerfm.steering.beam_search import BeamSearch, PathSearch
from steerfm.steering.best_of_n import BestOfN
from steerfm.steering.common import Budget, Progress, Steering, Watch
from steerfm.steering.control import FlowMapControl
from steerfm.steering.guidance import LookAheadGuidance
from steerfm.steering.monte_carlo import SequentialMonteCarlo
from steerfm.steering.noise_optimisation import NoiseOptimisation
from steerfm.steering.noise_sampling import NoiseSampling
from steerfm.steering.posterior import Glass, Renoised, Sighted
from steerfm.steering.posterior_guidance import PosteriorDrawGuidance
from steerfm.steering.successive_halving import SuccessiveHalving
from steerfm.steering.tilting import FlowMapTilting
from steerfm.steering.zero_order_search import ZeroOrderSearch

__all__ = [
    "BeamSearch",
    "BestOfN",
    "Budget",
    "FlowMapControl",
    "FlowMapTilting",
    "Glass",
    "LookAheadGuidance",
    "NoiseOptimisation",
    "NoiseSampling",
    "PathSearch",
    "PosteriorDrawGuidance",
    "Progress",
    "Renoised",
    "SequentialMonteCarlo",
    "Sighted",
    "Steering",
    "SuccessiveHalving",
    "Watch",
    "ZeroOrderSearch",
]
