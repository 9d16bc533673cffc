"""What the steering methods share: one interface, calls in micro-batches, a budget, and news of every step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from steerfm import seeds as seeding
from steerfm.distributed import effective_sample_size, gather, shard, world
from steerfm.errors import ConfigError, RewardError
from steerfm.flow_map import FlowMap
from steerfm.memory import in_micro_batches
from steerfm.reward import Reward, as_reward
from steerfm.sampling import Task, decoded, finish, measure, prepare
from steerfm.types import Condition, Cost, Samples, State, Values

T = TypeVar("T")


@dataclass(frozen=True)
class Budget:
    """Limit what one returned sample may cost, in the units of `Cost`; None is no limit.

    A method that has spent it jumps to data from where it stands, or draws no further candidates. Costs are known
    once they are met, so two steps (one candidate) are always taken. Seconds depend on the machine, and so then do
    the samples.
    """

    network_calls: float | None = None
    reward_calls: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            limit = getattr(self, each.name)
            if limit is not None and not limit > 0:
                raise ConfigError(f"A budget of {each.name} must be positive, got {limit}; null is no limit.")

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return any(getattr(self, each.name) is not None for each in fields(self))

    def bears(self, cost: Cost) -> bool:
        """Return whether a cost is within every limit."""
        limits = [(getattr(cost, each.name), getattr(self, each.name)) for each in fields(self)]
        return all(limit is None or spent <= limit for spent, limit in limits)


class Progress(NamedTuple):
    """What is known after a step: how many are done of how many, the time reached, cost so far, and what was traced."""

    done: int
    of: int
    t: float
    cost: Cost
    values: dict[str, Tensor]


@dataclass(frozen=True)
class Watch:
    """Say what a caller wants of a run beside its samples.

    budget: where to stop. on_step: called with the `Progress` after every step. look_aheads: keep each step's clean
    prediction, of the heaviest particle, as trace["look_ahead"], (B, steps, *dim).
    """

    budget: Budget = Budget()
    on_step: Callable[[Progress], None] | None = None
    look_aheads: bool = False


class Outcome(NamedTuple):
    """What a method found: x0 (B, *dim), and for P particles their normalised log-weights (B, P) and themselves."""

    x0: State
    log_weights: Tensor | None = None
    particles: Tensor | None = None
    log_evidence: Values | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Steering:
    """Sample toward a reward: `method(flow_map, reward, prompts=..., seeds=...)` returns Samples; see `__call__`.

    micro_batch: rows that go through map and reward at once, which bounds memory; all of them by default. A method
    overrides `steer`.
    """

    micro_batch: int | None = None

    @property
    def needs_gradient(self) -> bool:
        """Whether the reward must have a gradient."""
        return False

    @property
    def maps(self) -> Sequence[FlowMap]:
        """Flow maps of its own, beside the one that is steered; none for most."""
        return ()

    def __post_init__(self) -> None:
        check_counts(**({} if self.micro_batch is None else {"micro_batch": self.micro_batch}))

    @torch.no_grad()
    def __call__(
        self,
        flow_map: FlowMap,
        reward: Any = None,
        *,
        prompts: Sequence[str] = ("",),
        seeds: Sequence[int] = (0,),
        condition: Condition | None = None,
        watch: Watch | None = None,
    ) -> Samples:
        """Return one sample for each (prompt, seed) pair; either list may have length one.

        condition: given instead of encoding the prompts, one row a pair. The sample of a pair depends on its own
        seed, prompt and reward, not on its batch. Raises RewardError where the reward is missing or has no gradient
        and the method needs it, ConfigError where lengths do not fit.
        """
        reward = ready_reward(reward, self)
        task = prepare(flow_map, prompts, seeds, condition)
        others = [each.to(flow_map.device).eval() for each in self.maps]
        with measure(flow_map, reward, len(task.seeds), others) as cost:
            run = Run(flow_map, reward, task, cost, watch or Watch(), self.micro_batch, getattr(self, "split", False))
            found = self.steer(run)
            spent = run.spent()
        sizes = None if found.log_weights is None else effective_sample_size(found.log_weights)
        return finish(
            flow_map,
            task,
            found.x0,
            reward,
            spent,
            log_weights=found.log_weights,
            effective_sample_size=sizes,
            particles=found.particles,
            log_evidence=found.log_evidence,
            trace=run.traced(),
            note=found.note,
        )

    def steer(self, run: Run) -> Outcome:
        """Carry a run's particles from noise to data."""
        raise NotImplementedError(f"{type(self).__name__} needs a method steer(self, run) -> Outcome.")


@dataclass
class Run:
    """Hold what a method works with: the map, the reward and the (prompt, seed) pairs, B of them.

    Calls take k rows a pair, neighbours, so that row i belongs to pair i // k; k is read off the number of rows. They
    go through map and reward `micro_batch` at a time. split: the particles of every pair are divided among the
    processes, and this one holds its share.
    """

    flow_map: FlowMap
    reward: Reward
    task: Task
    cost: Callable[[], Cost]
    watch: Watch
    micro_batch: int | None = None
    split: bool = False
    trace: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """The seed of each pair."""
        return self.task.seeds

    def noise(self, particles: int = 1, stream: str = "initial", step: int = 0) -> State:
        """Return standard normal noise for `particles` of each pair, keyed by (seed, particle, stream, step)."""
        drawn = self.task.noise(particles, stream, step)
        if not self.split:
            return drawn
        own = shard(list(range(particles)))
        return drawn.reshape(len(self.seeds), particles, *drawn.shape[1:])[:, own].flatten(0, 1)

    def uniform(self, particles: int, step: int) -> Values:
        """Return a number in [0, 1) for each of `particles` of each pair, keyed by (seed, particle, step), float64."""
        drawn = seeding.uniform(self.seeds, count=particles, stream="select", step=step)
        own = shard(list(range(particles))) if self.split else slice(None)
        return drawn[:, own].flatten().to(self.task.like.device)

    def jump(self, x: State, s: float, t: float) -> State:
        """Return F(x, s, t)."""
        return self.rows(lambda x, condition: self.flow_map.jump(x, s, t, condition), x)

    def look_ahead(self, x: State, t: float) -> State:
        """Return F(x, t, 0)."""
        return self.jump(x, t, 0.0)

    def velocity(self, x: State, t: float) -> State:
        """Return v(x, t)."""
        return self.rows(lambda x, condition: self.flow_map.velocity(x, t, condition), x)

    def rows(self, function: Callable[[State, Condition | None], Tensor], x: State) -> Tensor:
        """Return function(x, condition) of all rows, a micro-batch at a time."""
        return torch.cat(self._in_parts(lambda rows, condition, _: function(rows, condition), x))

    def rewards(self, x0: State) -> Values:
        """Return the reward of each row of clean states."""
        decode = self.flow_map.decode
        return torch.cat(self._in_parts(lambda rows, _, prompts: self.reward(decode(rows), prompts).total, x0))

    def reward_gradient(
        self, x: State, clean: Callable[[State, Condition | None], State]
    ) -> tuple[State, Values, State]:
        """Return (x0, r(x0), its gradient with respect to x) of x0 = clean(x, condition), row by row."""

        def one(rows: State, condition: Condition | None, prompts: list[str]) -> tuple[State, Values, State]:
            decode = partial(decoded, self.flow_map)
            return value_and_gradient(partial(_told, clean, condition), self.reward, decode, rows, prompts)

        x0, values, gradients = zip(*self._in_parts(one, x), strict=True)
        return torch.cat(x0), torch.cat(values), torch.cat(gradients)

    def steps(self, times: Sequence[float]) -> Iterator[tuple[int, float, float]]:
        """Yield (i, s, t) for each step from s to t; one that spends the rest of the budget goes to the last time.

        What is recorded during a step is told to the watch after it.
        """
        before, largest = self.spent(), Cost()
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            if i and not self.watch.budget.bears(before + largest + largest):
                t = times[-1]
            yield i, s, t
            spent = self.spent()
            largest, before = _largest(largest, spent, before), spent
            self._tell(i + 1, len(times) - 1, t, spent)
            if t == times[-1]:
                return

    def rounds(self, count: int) -> Iterator[int]:
        """Yield 0 to count - 1, one round each, as long as the budget bears another as dear as the dearest so far."""
        before, largest = self.spent(), Cost()
        for i in range(count):
            if i and not self.watch.budget.bears(before + largest):
                return
            yield i
            spent = self.spent()
            largest, before = _largest(largest, spent, before), spent
            self._tell(i + 1, count, 0.0, spent)

    def waves(self, candidates: int) -> Iterator[slice]:
        """Yield which candidates to draw next: all at once, or one by one as long as a budget bears another."""
        if not self.watch.budget.limited:
            yield slice(0, candidates)
            self._tell(candidates, candidates, 0.0, self.spent())
            return
        for i in self.rounds(candidates):
            yield slice(i, i + 1)

    def record(self, **values: Tensor) -> None:
        """Add one step to the trace, (B, ...) by name; clean predictions, `look_ahead`, only if they are watched."""
        for name, value in values.items():
            if name != "look_ahead" or self.watch.look_aheads:
                self.trace.setdefault(name, []).append(value.detach())

    def traced(self) -> dict[str, Tensor]:
        """Return the trace, each (B, steps, ...)."""
        return {name: torch.stack(values, 1) for name, values in self.trace.items()}

    def spent(self) -> Cost:
        """Return the cost so far: of all processes where they share the particles."""
        cost = self.cost()
        if not self.split or world()[1] == 1:
            return cost
        numbers = torch.tensor([[getattr(cost, each.name) for each in fields(Cost)]], dtype=torch.float64)
        calls = gather(numbers.to(self.task.like.device))
        network, rewards, gradients, _ = calls.sum(0).tolist()
        return Cost(network, rewards, gradients, float(calls[:, 3].max()))

    def _in_parts(self, function: Callable[[Tensor, Condition | None, list[str]], T], x: Tensor) -> list[T]:
        """Return function(rows, their condition, their prompts) of each micro-batch.

        Where memory runs out they become smaller, and stay so for the rest of the run.
        """
        each = len(x) // len(self.seeds)

        def part(start: int, stop: int) -> T:
            pairs = torch.arange(start, stop) // each
            condition = self.task.condition
            if condition is not None:
                condition = condition.select(pairs.to(x.device))
            return function(x[start:stop], condition, [self.task.prompts[i] for i in pairs.tolist()])

        found, self.micro_batch = in_micro_batches(part, len(x), self.micro_batch, "steering")
        return found

    def _tell(self, done: int, of: int, t: float, cost: Cost) -> None:
        if self.watch.on_step is not None:
            self.watch.on_step(Progress(done, of, t, cost, {name: values[-1] for name, values in self.trace.items()}))


def value_and_gradient(
    function: Callable[[State], State],
    reward: Reward,
    decode: Callable[[State], Tensor],
    x: State,
    prompts: Sequence[str],
) -> tuple[State, Values, State]:
    """Return (clean, r(decode(clean)), gradient of r with respect to x) for clean = function(x).

    Samples are independent, so the gradient of the sum holds each sample's own. Raises RewardError where the
    reward is not connected to its pictures or its gradient is not finite.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        clean = function(x)
        values = reward(decode(clean), prompts).total
        if not values.requires_grad:
            raise RewardError(f"'{reward.name}' gave values without a gradient: it may detach or round its pictures.")
        (gradient,) = torch.autograd.grad(values.sum(), x)
    if not torch.isfinite(gradient).all():
        raise RewardError(f"The gradient of '{reward.name}' is not finite: check it with 'steerfm reward check'.")
    return clean.detach(), values.detach(), gradient


def ready_reward(reward: Any, method: Steering) -> Reward:
    """Return `reward` as a Reward. Raises RewardError where there is none, or the method needs its gradient."""
    name = type(method).__name__
    if reward is None:
        raise RewardError(f"{name} needs a reward, got None: pass any callable (images, prompts) -> (B,) numbers.")
    reward = as_reward(reward)
    if method.needs_gradient and not reward.differentiable:
        raise RewardError(
            f"'{reward.name}' has no gradient, and {name} needs one. Use {without_gradient()}, which do not; or a "
            "differentiable stand-in."
        )
    return reward


def without_gradient() -> str:
    """Return the methods that need no gradient of the reward, as a list in words."""
    from steerfm import steering

    kinds = [getattr(steering, name) for name in steering.__all__]
    methods = [kind for kind in kinds if issubclass(kind, Steering) and kind is not Steering]
    names = [kind.__name__ for kind in methods if not kind().needs_gradient]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def best(values: Tensor, states: State) -> State:
    """Return each pair's state of the highest value; (B, k), (B * k, *dim) -> (B, *dim)."""
    return pick(states, values.argmax(1))


def pick(states: State, chosen: Tensor) -> State:
    """Return the chosen one of each pair's k rows; (B * k, *dim), (B,) -> (B, *dim)."""
    pairs = states.reshape(len(chosen), -1, *states.shape[1:])
    return pairs[torch.arange(len(chosen), device=states.device), chosen.to(states.device)]


def check_counts(**counts: int) -> None:
    """Raise ConfigError unless every count is at least 1."""
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} must be at least 1, got {count}.")


def check_temperature(temperature: float | None, allow_none: bool = False) -> None:
    """Raise ConfigError unless the temperature is positive (or None, where that is allowed)."""
    if temperature is None and allow_none:
        return
    if temperature is None or not temperature > 0:
        raise ConfigError(f"temperature must be positive, got {temperature}: it divides the reward.")


def _told(clean: Callable[[State, Condition | None], State], condition: Condition | None, x: State) -> State:
    return clean(x, condition)


def _largest(known: Cost, after: Cost, before: Cost) -> Cost:
    """Return, entry by entry, the larger of the known cost of a step and that of the last one."""
    pairs = [
        (getattr(known, each.name), getattr(after, each.name) - getattr(before, each.name)) for each in fields(Cost)
    ]
    return Cost(*(max(pair) for pair in pairs))
