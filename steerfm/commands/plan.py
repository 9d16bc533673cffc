"""Estimate what a recipe holds in memory at most, on each device, before it starts: `steerfm env --plan`.

The recipe's own module is built and takes two steps (or samples one batch) on shapes alone, see
`steerfm.commands.shapes`: no weight is filled, nothing is trained or downloaded. In the second step everything is there
that a first one makes: the optimiser's state, and gradients until they are set to None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from steerfm.commands.plan_counts import STATE, add_what_waits, drawn, hold_gradient, validated, watch
from steerfm.commands.plan_course import (
    Course,
    autocast,
    in_precision,
    no_weights,
    nobody_asked,
    nothing,
    optimizer_of,
    share,
    stand_in,
    tensors_in,
)
from steerfm.commands.plan_page import Plan, remedies, written
from steerfm.config import Composed
from steerfm.errors import ConfigError
from steerfm.modules import SteeredSampling
from steerfm.steering import Watch


def plan(recipe: Composed) -> Plan:
    """Return the plan of a composed recipe. Raises ConfigError for a command that holds nothing worth planning."""
    course, command = Course(recipe), recipe.values["command"]
    if command in ("train", "finetune"):
        with no_weights(), nobody_asked():
            module = _followed_fit(course)
        what = "a step of training" if command == "train" else "a step of fine-tuning"
    elif command in ("sample", "steer"):
        with no_weights(), nobody_asked():
            module = _followed_generation(course)
        what = "a batch of samples"
    else:
        raise ConfigError(
            f"A plan is for recipes that train, finetune, sample or steer, and this one is for {command}."
        )
    phases, shapes = dict(course.shapes.peaks), course.shapes
    return Plan(
        what, shapes.peak, phases, course.processes, tuple(course.notes), tuple(remedies(course, module, shapes.peak))
    )


def _followed_fit(course: Course) -> Any:
    """Build a recipe's module and follow two of its steps, its validation and the pictures of its callbacks."""
    recipe, shapes = course.recipe, course.shapes
    data = recipe.build("data")
    data.trainer = stand_in(course)
    batch = share(next(iter(data.train_dataloader())), course.processes)
    with shapes:
        module = in_precision(recipe.build("module"), course)
        callbacks = (recipe.build("callbacks") or {}).values()
        kept = follow_fit(module, batch, course, callbacks)  # its state stays
        validated(module, data, course)
        for callback in callbacks:
            drawn(callback, module, shapes)
        del kept
    return module


def follow_fit(module: Any, batch: Any, course: Course, callbacks: Iterable[Any] = ()) -> Any:
    """Let a module that was built inside `course.shapes` take two steps on a batch; return its optimiser."""
    shapes, trainer = course.shapes, stand_in(course)
    watch(module, course)
    module.trainer, module.log, module.log_dict = trainer, nothing, nothing
    shapes.hold("batch", tree_leaves(batch))
    module.on_fit_start()
    optimizer = optimizer_of(module, course)
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: hold_gradient(shapes, p))
    every = getattr(module, "monitor_every", 1)
    first = math.ceil(getattr(module, "flow_matching_steps", 0) / every) * every
    for i in range(2):
        trainer.global_step = first + i * every
        _step(module, batch, optimizer, course, accumulated=i > 0 and trainer.accumulate_grad_batches > 1)
        shapes.hold(STATE, (each for state in optimizer.state.values() for each in state.values()))
        module.on_train_batch_end(None, batch, i)
        if i == 0:
            add_what_waits(trained, callbacks, course)
    return optimizer


def _step(module: Any, batch: Any, optimizer: Any, course: Course, accumulated: bool) -> None:
    """Take one optimiser step in Lightning's order: gradients of the last one are there until the loss is."""
    shapes = course.shapes
    with shapes.phase("forward"), autocast(course.trainer.get("precision")):
        found = module.training_step(batch, 0)
    loss = found["loss"] if isinstance(found, dict) else found
    if not accumulated:
        optimizer.zero_grad()
    loss.backward()
    with shapes.phase("optimiser"):
        clip = course.trainer.get("gradient_clip_val")
        if clip:
            torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], clip)
        optimizer.step()


def _followed_generation(course: Course) -> SteeredSampling:
    """Build a recipe's sampler and follow one batch."""
    recipe, shapes = course.recipe, course.shapes
    loader = recipe.build("data").predict_dataloader()
    batch = share(next(iter(loader)), course.processes)
    with shapes:
        flow_map, method, reward = (recipe.build(part) for part in ("flow_map", "method", "reward"))
        held_out = [judge for judge in (recipe.build("held_out") or {}).values() if judge is not None]
        steers = hasattr(method, "steer")
        traced = Watch(look_aheads=True) if steers and recipe.values.get("trace") else None
        module = in_precision(SteeredSampling(flow_map, method, reward, held_out, traced), course)
        kept = follow_batch(module, batch, course)
        batches = math.ceil(len(loader) / course.processes)
        if batches > 1:
            size = sum(each.untyped_storage().nbytes() for each in tensors_in(vars(kept)))
            course.notes[
                f"Samples of all {batches} batches stay on the device until the end: {written(size * batches)}, of "
                "which the peak has one batch."
            ] = None
    return module


def follow_batch(module: SteeredSampling, batch: Any, course: Course) -> Any:
    """Let a sampler that was built inside `course.shapes` draw one batch, inside them; return its samples."""
    watch(module, course)
    module.eval()
    phase = course.shapes.phase("steering" if hasattr(module.method, "steer") else "sampling")
    with torch.no_grad(), autocast(course.trainer.get("precision")), phase:
        return module.predict_step(batch, 0)
