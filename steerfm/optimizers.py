"""Muon: matrices and filters move along the nearest orthogonal matrix, all other parameters by Adam."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from steerfm.errors import ConfigError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration, from Jordan 2024


class Muon(Optimizer):
    """Optimise parameters of two or more dimensions with Muon and the others with Adam, both at the rate `lr`.

    A filter (out, in, h, w) is the matrix (out, in h w). A matrix with a side above `longest` is taken for the
    embeddings of a large vocabulary, of which a step sees few rows, and moves by Adam too. An update is scaled so that
    its entries are as large as Adam's usually are, so that one rate serves both. weight_decay is decoupled, as in
    AdamW. torch.optim.Muon takes matrices only, and no parameters of another kind beside them; on matrices this one
    agrees with it. On a CPU the shapes32 map needs less than half the time with it that it needs with AdamW
    (docs/benchmarks.md). Give `cycle_momentum: false` to a OneCycleLR.

    Reference: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the scale is from Liu et
    al. 2025, arXiv 2502.16982, eq. (4).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        iterations: int = 5,
        longest: int = 4096,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or not all(0 <= beta < 1 for beta in betas) or iterations < 1:
            raise ConfigError(
                "Muon needs a rate of at least 0, momentum and betas in [0, 1) and at least one iteration: got "
                f"lr={lr}, momentum={momentum}, betas={tuple(betas)}, iterations={iterations}."
            )
        options: dict[str, Any] = {"lr": lr, "momentum": momentum, "adam_betas": tuple(betas), "eps": eps}
        super().__init__(params, options | {"weight_decay": weight_decay, "iterations": iterations})
        self._longest = longest

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            for p in moved:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            matrices = [p.ndim >= 2 and max(p.flatten(1).shape) <= self._longest for p in moved]
            self._step_matrices(list(itertools.compress(moved, matrices)), group)
            for p in itertools.compress(moved, [not each for each in matrices]):
                self._step_adam(p, group)
        return loss

    def _step_matrices(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Move matrices; those of one shape are made orthogonal together, which is faster."""
        alike = defaultdict(list)
        for p in parameters:
            alike[p.flatten(1).shape, p.device].append(p)
        for (shape, _), members in alike.items():
            updates = orthogonal(
                torch.stack([self._momentum(p, group).flatten(1) for p in members]), group["iterations"]
            )
            rate = 0.2 * math.sqrt(max(shape)) * group["lr"]
            for p, update in zip(members, updates, strict=True):
                p.add_(update.view_as(p), alpha=-rate)

    def _momentum(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Return the gradient looked ahead along its running mean, after Nesterov."""
        gradient, state = p.grad, self.state[p]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(state["momentum_buffer"], group["momentum"])

    def _step_adam(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state = p.grad, self.state[p]
        assert gradient is not None
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        (first, second), mean, square = group["adam_betas"], state["exp_avg"], state["exp_avg_sq"]
        state["step"] += 1
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        spread = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        p.addcdiv_(mean, spread, value=-group["lr"] / (1 - first ** state["step"]))


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Return U S V^T for matrices U D V^T, (N, A, B): about orthogonal, S between 0.7 and 1.2 after five iterations.

    It takes matrix products alone: in bfloat16 on a GPU, in float32 elsewhere.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
