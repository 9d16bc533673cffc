"""Flow-map trajectory tilting: a population of trajectories, pushed by the look-ahead's gradient and weighted.

Along the flow the look-ahead F(x, t, 0) does not change, so with potentials V_t(x) = alpha(t) r(F(x, t, 0))
only the factor alpha moves, and the log-weight of a trajectory is simply

    dA = r(F(x_t, t, 0)) d(alpha)        (linear path: r dtau)

whose total telescopes to r(x0): nothing is added at the end.

Reference: Sabour et al. 2025, arXiv 2511.22688.
"""

from __future__ import annotations

from dataclasses import dataclass

from steerfm.flow_map import as_times
from steerfm.sampling import sde_step
from steerfm.solvers import shares
from steerfm.steering.common import Outcome, Run, check_counts, check_temperature
from steerfm.steering.populations import Populations
from steerfm.times import time_grid
from steerfm.types import State, unsqueeze_like


@dataclass(frozen=True)
class FlowMapTilting(Populations):
    """Draw from p(x0) exp(r(x0) / temperature) with a weighted population a seed.

    particles: trajectories a seed. jumps: steps; each is a jump of the map, the drift g^2/2 (score + grad V)
    and noise g^2 = 2 sigma d (linear: 2 t); the last is a jump alone, whose end is the sample. Weights are
    carried, and resampled where they are too uneven. Exact as jumps and particles grow, if the map is exact and
    guidance_scale is 1; with classifier-free guidance it is approximate. Needs a differentiable reward.

    Returned: one sample a seed drawn by weight, all particles, their normalised log-weights, the effective
    sample size (by step in the trace), and the log of the mean weight, the evidence.
    """

    particles: int = 16
    jumps: int = 32
    temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(particles=self.particles, jumps=self.jumps)
        check_temperature(self.temperature)

    @property
    def needs_gradient(self) -> bool:
        return True

    def steer(self, run: Run) -> Outcome:
        """Carry the population from noise to data."""
        population = self.start(run, self.particles)
        for i, s, t in run.steps(time_grid(self.jumps)):
            clean, values, gradient = run.reward_gradient(
                population.x, lambda x, condition, s=s: run.flow_map.look_ahead(x, s, condition)
            )
            # Where alpha(1) is not quite 0 the first weights hold V_1 too, or the total would miss its share of r.
            gain = shares(run.flow_map.path, t)[0] - (shares(run.flow_map.path, s)[0] if i else 0.0)
            population.weigh(gain * values.double() / self.temperature)
            run.record(reward=population.mean(values), effective_sample_size=population.effective_sample_size)
            run.record(look_ahead=population.heaviest(clean))
            if t == 0:
                population.x = clean
            else:
                population.x = self._move(run, population.x, gradient, s, t, i)
                population.resample(run.seeds, i)
        return population.outcome(run.seeds, guidance_note(run))

    def _move(self, run: Run, x: State, gradient: State, s: float, t: float, step: int) -> State:
        """Jump from s to t, then add the step's drift g^2/2 (score + grad V) and its noise.

        V has alpha(t), where the weights are by now: with alpha(s) drift and noise would leave another distribution
        than the weighted one as it is, and the mode weights of a sharp reward would be further off.
        """
        times, path = as_times(s, x), run.flow_map.path
        g2 = path.gentle_noise(times)
        score = path.score(x, run.velocity(x, s), times)
        potential = shares(path, t)[0] / self.temperature * gradient
        drift = unsqueeze_like(g2 / 2, x) * (score + potential)
        return sde_step(run.jump(x, s, t), drift, g2, s - t, run.noise(self.particles, "step", step)).x_next


def guidance_note(run: Run) -> str:
    """Return what to know of a map that is sampled with classifier-free guidance and has not learnt the guided flow."""
    told = getattr(run.flow_map.network, "guidance_input", False)
    guided = run.flow_map.guidance_scale != 1 and run.task.condition is not None and not told
    return "approximate: the map's guidance_scale is not 1" if guided else ""
