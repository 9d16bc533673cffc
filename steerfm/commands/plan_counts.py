"""What a plan counts, and as what: weights by what they are for, and the phase in which each call works."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.callbacks import EMA, GuardRails, SampleGrid
from steerfm.commands.plan_course import Course, autocast
from steerfm.commands.shapes import Peak, Shapes
from steerfm.conditions.guidance import EVERYWHERE
from steerfm.errors import CheckpointError, ConfigError, TrustError
from steerfm.reward import Reward, Scores
from steerfm.sampling import Unsteered

TRAINED, FROZEN, GRADIENTS, STATE = "weights, trained", "weights, frozen", "gradients", "optimiser's state"


def watch(module: Any, course: Course) -> None:
    """Count what the module holds by kind, and name the phases of what it calls."""
    shapes, flow_map = course.shapes, getattr(module, "flow_map", None)
    seen: set[int] = set()

    def hold(kind: str, tensors: Iterable[Tensor]) -> None:
        new = [each for each in tensors if id(each) not in seen]
        seen.update(map(id, new))
        shapes.hold(kind, new)

    hold(TRAINED, (p for p in module.parameters() if p.requires_grad))
    hold(FROZEN, [*module.parameters(), *module.buffers()])
    reference = getattr(module, "_reference", None)
    if reference is not None:
        hold("reference", _held(reference.module))
        _named(shapes, reference.module.network, "forward", "network")
    for teacher in getattr(module, "_teachers", ()):
        hold("teachers", _held(teacher.module))
    own = getattr(module, "_reward", None)
    for kind, guests in (("rewards", [own] if own else []), ("held-out rewards", getattr(module, "_held_out", ()))):
        for guest in guests:
            hold(kind, _held(guest.module))
            _scored_on_shapes(guest.module, course)
    shapes.peak, shapes.peaks = Peak(), {}  # what was made while the module was built is no part of it
    if flow_map is None:
        return
    flow_map.guidance_interval = EVERYWHERE  # the peak is where guidance acts
    _named(shapes, flow_map.network, "forward", "network")
    for call, kind, part in (("decode", "autoencoder", "codec"), ("encode_prompts", "text encoders", "conditioner")):
        _named(shapes, flow_map, call, call.replace("_", " "))
        _held_after(shapes, flow_map, call, kind, part)


def _held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers(), *_hidden(module)]


def _named(shapes: Shapes, owner: Any, name: str, phase: str) -> None:
    """Let an object's method be a phase of its own."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def called(*arguments: Any, **more: Any) -> Any:
        with shapes.phase(phase):
            return method(*arguments, **more)

    setattr(owner, name, called)


def _held_after(shapes: Shapes, flow_map: Any, name: str, kind: str, part: str) -> None:
    """Count the models that a part loads at first use, after each call, as of a kind."""
    method = getattr(flow_map, name)

    @functools.wraps(method)
    def called(*arguments: Any) -> Any:
        found = method(*arguments)
        shapes.hold(kind, _hidden(getattr(flow_map, part)))
        return found

    setattr(flow_map, name, called)


def _hidden(owner: Any, depth: int = 3) -> list[Tensor]:
    """Return the weights of the models that an object holds outside its module tree, loaded so far."""
    if owner is None or depth == 0:
        return []
    found: list[Tensor] = []
    for part in owner.modules() if isinstance(owner, nn.Module) else [owner]:
        for value in getattr(part, "__dict__", {}).values():
            if isinstance(value, nn.Module):
                found += [*value.parameters(), *value.buffers()]
            elif type(value).__module__.startswith(("steerfm.", "diffusers.")):
                found += _hidden(value, depth - 1)
    return found


def _scored_on_shapes(reward: Reward, course: Course) -> None:
    """Let a reward score pictures without values; one that cannot is counted as nothing, and a note says so."""
    for member in reward.members:
        _scored_on_shapes(member, course)
    evaluate, shapes = reward.evaluate, course.shapes
    unseen: set[str] = set()

    def on_shapes(images: Tensor, prompts: Any, **metadata: Any) -> Scores:
        images = shapes.unreal(images)
        try:
            with shapes.phase("reward"):
                return evaluate(images, prompts, **metadata)
        except (CheckpointError, ConfigError, TrustError):
            raise
        except Exception as error:
            if reward.name not in unseen and torch._C._current_graph_task_id() != -1:
                raise  # checkpointing ends its second pass by one
            unseen.add(reward.name)
            reason = " ".join(str(error).split())[:100]
            course.notes[
                f"The reward '{reward.name}' cannot work on shapes alone ({type(error).__name__}: {reason}): what it "
                "needs beside its weights is not counted."
            ] = None
            values = images.flatten(1).float().mean(1) if reward.differentiable else images.new_zeros(len(images))
            return Scores(values, {reward.name: values})

    reward.evaluate = on_shapes  # type: ignore[method-assign]


def hold_gradient(shapes: Shapes, parameter: Tensor) -> None:
    """Count a weight's gradient."""
    shapes.hold(GRADIENTS, [parameter.grad])


def add_what_waits(trained: list[Any], callbacks: Iterable[Any], course: Course) -> None:
    """Count what stays from the first step on and is made elsewhere: the average of the weights, DDP's buckets."""
    if any(isinstance(callback, EMA) for callback in callbacks):
        course.shapes.add("moving average", sum(p.numel() * max(4, p.itemsize) for p in trained))
    if course.processes > 1 and "Sharded" in str(course.trainer.get("strategy")):
        course.notes[
            f"Under FSDP each of the {course.processes} devices holds its share of weights, gradients and optimiser's "
            "state, and one block's as a whole: they are counted as if each held all of them."
        ] = None
    elif course.processes > 1:
        course.shapes.add("DDP's buckets", sum(p.nbytes for p in trained))


@torch.no_grad()
def validated(module: Any, data: Any, course: Course) -> None:
    """Take a step of validation, on the first batch there is, as a fit does unless its trainer leaves it out."""
    batch = next(iter(data.val_dataloader() or []), None)
    if batch is not None and course.trainer.get("limit_val_batches") != 0:
        with course.shapes.phase("validation"), autocast(course.trainer.get("precision")):
            module.validation_step(batch, 0)


@torch.no_grad()
def drawn(callback: Any, module: Any, shapes: Shapes) -> None:
    """Draw the samples that a callback draws."""
    if isinstance(callback, SampleGrid):
        with shapes.phase("pictures"):
            callback.draw(module.flow_map)
    if isinstance(callback, GuardRails):
        fixed = callback.fixed
        count = min(fixed.samples, fixed.batch_size)
        prompts = [fixed.prompts[i % len(fixed.prompts)] for i in range(count)]
        with shapes.phase("pictures"):
            Unsteered("jumps", fixed.jumps)(module.flow_map, module.reward, prompts=prompts, seeds=range(count))
