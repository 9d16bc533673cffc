"""Flow maps and rewards whose right answers are known, shared by the tests of steering and fine-tuning."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steerfm.analytic import GaussianMixture, QuadraticReward, analytic_flow_map
from steerfm.distributed import draw_ancestors
from steerfm.flow_map import FlowMap
from steerfm.metrics.sliced_wasserstein import sliced_wasserstein
from steerfm.types import Condition

MEANS = ((-3.0, -3.0), (0.0, 0.0), (3.0, 3.0))
VARIANCE = 0.5


def mixture() -> GaussianMixture:
    """Return the mixture of MATHS.md section 6."""
    return GaussianMixture(MEANS, [VARIANCE] * 3)


def mixture_map(steps: int = 3, order: int = 3) -> FlowMap:
    """Return its flow map, in float64; 3 steps of order 6 are within 0.02 of the exact one (a test says so)."""
    return analytic_flow_map(mixture(), steps=steps, order=order)


def mixture_reward(sigma: float) -> QuadraticReward:
    """Return the reward of MATHS.md section 6, -(y - a . x)^2 / (2 sigma^2)."""
    return QuadraticReward.rank_one([1.2, -0.8], -1.0, sigma)


def distance_to_tilt(points: Tensor, log_weights: Tensor, tilt: GaussianMixture, seed: int) -> float:
    """Return section 6's sliced W2: weights resampled systematically, against as many exact draws."""
    ancestors = draw_ancestors(log_weights[None], torch.tensor([[0.5]], dtype=torch.float64))[0]
    return sliced_wasserstein(points[ancestors], tilt.sample(len(points), torch.Generator().manual_seed(1000 + seed)))


class GaussianNetwork(nn.Module):
    """The exact u of N(mean, scale^2 I) on the linear path, with mean and scale to be trained.

    F(x, s, t) = (1-t) m + (sigma_t / sigma_s) (x - (1-s) m), and the ratio's gap is divided by t - s on paper:
    (sigma_t - sigma_s) / (t - s) = (t + s - c^2 (2 - t - s)) / (sigma_t + sigma_s).
    """

    def __init__(self, mean: Sequence[float], scale: float) -> None:
        super().__init__()
        self.data_shape = (len(mean),)
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x: Tensor, s: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        c2 = self.scale**2
        sigma_s, sigma_t = (((1 - time) ** 2 * c2 + time**2).sqrt() for time in (s, t))
        rate = (t + s - c2 * (2 - t - s)) / ((sigma_t + sigma_s) * sigma_s)
        return rate[:, None] * (x - (1 - s)[:, None] * self.mean) - self.mean


def gaussian_map(mean: Sequence[float], scale: float) -> FlowMap:
    """Return the exact flow map of N(mean, scale^2 I), in float64, trainable."""
    return FlowMap(GaussianNetwork(mean, scale))
