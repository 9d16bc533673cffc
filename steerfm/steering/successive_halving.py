"""Successive halving: judge many noises by few jumps, and ever fewer by ever more."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from steerfm.sampling import few_jumps
from steerfm.steering.argmax import Argmax, best_rows, found
from steerfm.steering.common import Outcome, Run, check_counts
from steerfm.types import Condition, State


@dataclass(frozen=True)
class SuccessiveHalving(Argmax):
    """Draw n noises a pair; carry them to data, keep the better half, and again in twice the jumps, until one is left.

    n: noises a pair. jumps: of the first rung; the next has half of the noises and twice the jumps, so that all rungs
    cost the same, n * jumps network calls. What is returned was made in the last rung's many jumps. It pays where more
    jumps make better samples of the same noise: with an exact map the jumps change nothing, and it equals the best of
    n. Needs no gradient. A budget bounds the rungs. Reference: Jamieson, Talwalkar 2016, arXiv 1502.07943 (the rule).
    """

    n: int = 16
    jumps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(n=self.n, jumps=self.jumps)

    def steer(self, run: Run) -> Outcome:
        """Halve the noises rung by rung."""
        z = run.noise(self.n)
        x0, pairs = z, len(run.seeds)
        for rung in run.rounds(1 + (self.n - 1).bit_length()):
            x0 = run.rows(partial(_carry, run, self.jumps * 2**rung), z)
            values = run.rewards(x0).reshape(pairs, -1)
            kept = best_rows(values, -(-values.shape[1] // 2))
            z, x0 = z[kept], x0[kept]
            best = x0[:: len(x0) // pairs]
            run.record(reward=values.max(1).values, look_ahead=best)
        return found(x0[:: len(x0) // pairs])


def _carry(run: Run, jumps: int, z: State, condition: Condition | None) -> State:
    return few_jumps(run.flow_map, z, jumps, condition)
