"""Estimate what a recipe holds in memory at most, on each device, before it starts: `steerfm env --plan`.

The recipe's own module is built and takes two steps (or samples one batch) on shapes alone, see
`steerfm.commands.shapes`: no weight is filled, nothing is trained or downloaded. In the second step everything is there
that a first one makes: the optimiser's state, and gradients until they are set to None.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from steerfm.backbones.pipeline_files import PipelineFiles
from steerfm.callbacks import EMA, GuardRails, SampleGrid
from steerfm.commands.env import machine_memory
from steerfm.commands.shapes import Peak, Shapes
from steerfm.conditions.guidance import EVERYWHERE
from steerfm.config import Composed
from steerfm.errors import CheckpointError, ConfigError, RewardError, TrustError
from steerfm.flow_map import declared
from steerfm.http_client import Client
from steerfm.logs import quiet
from steerfm.modules import SteeredSampling
from steerfm.reward import Reward, Scores
from steerfm.sampling import Unsteered
from steerfm.steering import Watch

GIB, MIB = 2**30, 2**20
TRAINED, FROZEN, GRADIENTS, STATE = "weights, trained", "weights, frozen", "gradients", "optimiser's state"
PRECISIONS = {"bf16": torch.bfloat16, "16": torch.float16}
RESERVE = 0.1  # of a GPU's memory, for the CUDA context, libraries' workspaces and gaps between blocks
CARDS = (24, 48, 80)  # GiB of usual GPUs, where there is none to ask


@dataclass(frozen=True)
class Plan:
    """What a recipe holds at most: `peak`, by kind, and the most in each phase, in bytes on each device.

    what: was followed. processes: among which the batch is divided. notes: what was counted as nothing, or as more.
    remedies: what to lower first.
    """

    what: str
    peak: Peak
    phases: dict[str, int]
    processes: int = 1
    notes: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()


@dataclass
class Course:
    """Hold what is found out on the way; `trainer` is the recipe's, of which only plain values are read."""

    recipe: Composed
    shapes: Shapes = field(default_factory=Shapes)
    notes: dict[str, None] = field(default_factory=dict)  # in order, each once

    @property
    def trainer(self) -> Mapping[str, Any]:
        return self.recipe.values.get("trainer") or {}

    @property
    def on_gpu(self) -> bool:
        kind = self.trainer.get("accelerator", "auto")
        return kind in ("gpu", "cuda") or (kind == "auto" and torch.cuda.is_available())

    @property
    def processes(self) -> int:
        devices = self.trainer.get("devices", 1)
        if devices in (-1, "-1", "auto"):
            devices = max(torch.cuda.device_count(), 1) if self.on_gpu else 1
        each = len(devices) if isinstance(devices, list) else int(devices)
        return each * int(self.trainer.get("num_nodes", 1) or 1)


def plan(recipe: Composed) -> Plan:
    """Return the plan of a composed recipe. Raises ConfigError for a command that holds nothing worth planning."""
    course, command = Course(recipe), recipe.values["command"]
    if command in ("train", "finetune"):
        with no_weights(), _nobody_asked():
            module = _followed_fit(course)
        what = "a step of training" if command == "train" else "a step of fine-tuning"
    elif command in ("sample", "steer"):
        with no_weights(), _nobody_asked():
            module = _followed_generation(course)
        what = "a batch of samples"
    else:
        raise ConfigError(
            f"A plan is for recipes that train, finetune, sample or steer, and this one is for {command}."
        )
    phases, shapes = dict(course.shapes.peaks), course.shapes
    return Plan(
        what, shapes.peak, phases, course.processes, tuple(course.notes), tuple(_remedies(course, module, shapes.peak))
    )


def _followed_fit(course: Course) -> Any:
    """Build a recipe's module and follow two of its steps, its validation and the pictures of its callbacks."""
    recipe, shapes = course.recipe, course.shapes
    data = recipe.build("data")
    data.trainer = stand_in(course)
    batch = _share(next(iter(data.train_dataloader())), course.processes)
    with shapes:
        module = _in_precision(recipe.build("module"), course)
        callbacks = (recipe.build("callbacks") or {}).values()
        kept = follow_fit(module, batch, course, callbacks)  # its state stays
        _validated(module, data, course)
        for callback in callbacks:
            _drawn(callback, module, shapes)
        del kept
    return module


def follow_fit(module: Any, batch: Any, course: Course, callbacks: Iterable[Any] = ()) -> Any:
    """Let a module that was built inside `course.shapes` take two steps on a batch; return its optimiser."""
    shapes, trainer = course.shapes, stand_in(course)
    _watch(module, course)
    module.trainer, module.log, module.log_dict = trainer, _nothing, _nothing
    shapes.hold("batch", tree_leaves(batch))
    module.on_fit_start()
    optimizer = _optimizer(module, course)
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: _hold_gradient(shapes, p))
    every = getattr(module, "monitor_every", 1)
    first = math.ceil(getattr(module, "flow_matching_steps", 0) / every) * every
    for i in range(2):
        trainer.global_step = first + i * every
        _step(module, batch, optimizer, course, accumulated=i > 0 and trainer.accumulate_grad_batches > 1)
        shapes.hold(STATE, (each for state in optimizer.state.values() for each in state.values()))
        module.on_train_batch_end(None, batch, i)
        if i == 0:
            _add_what_waits(trained, callbacks, course)
    return optimizer


def _step(module: Any, batch: Any, optimizer: Any, course: Course, accumulated: bool) -> None:
    """Take one optimiser step in Lightning's order: gradients of the last one are there until the loss is."""
    shapes = course.shapes
    with shapes.phase("forward"), _autocast(course.trainer.get("precision")):
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
    batch = _share(next(iter(loader)), course.processes)
    with shapes:
        flow_map, method, reward = (recipe.build(part) for part in ("flow_map", "method", "reward"))
        held_out = [judge for judge in (recipe.build("held_out") or {}).values() if judge is not None]
        steers = hasattr(method, "steer")
        watch = Watch(look_aheads=True) if steers and recipe.values.get("trace") else None
        module = _in_precision(SteeredSampling(flow_map, method, reward, held_out, watch), course)
        kept = follow_batch(module, batch, course)
        batches = math.ceil(len(loader) / course.processes)
        if batches > 1:
            size = sum(each.untyped_storage().nbytes() for each in _tensors(vars(kept)))
            course.notes[
                f"Samples of all {batches} batches stay on the device until the end: {_written(size * batches)}, of "
                "which the peak has one batch."
            ] = None
    return module


def follow_batch(module: SteeredSampling, batch: Any, course: Course) -> Any:
    """Let a sampler that was built inside `course.shapes` draw one batch, inside them; return its samples."""
    _watch(module, course)
    module.eval()
    phase = course.shapes.phase("steering" if hasattr(module.method, "steer") else "sampling")
    with torch.no_grad(), _autocast(course.trainer.get("precision")), phase:
        return module.predict_step(batch, 0)


# --- what is counted, and as what -------------------------------------------------------------------------------


def _watch(module: Any, course: Course) -> None:
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


def _hold_gradient(shapes: Shapes, parameter: Tensor) -> None:
    shapes.hold(GRADIENTS, [parameter.grad])


def _add_what_waits(trained: list[Any], callbacks: Iterable[Any], course: Course) -> None:
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
def _validated(module: Any, data: Any, course: Course) -> None:
    """Take a step of validation, on the first batch there is, as a fit does unless its trainer leaves it out."""
    batch = next(iter(data.val_dataloader() or []), None)
    if batch is not None and course.trainer.get("limit_val_batches") != 0:
        with course.shapes.phase("validation"), _autocast(course.trainer.get("precision")):
            module.validation_step(batch, 0)


@torch.no_grad()
def _drawn(callback: Any, module: Any, shapes: Shapes) -> None:
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


# --- what stands in for a trainer, weights and services ---------------------------------------------------------


def stand_in(course: Course) -> Any:
    """Return what modules and data ask of their trainer."""
    every = int(course.trainer.get("accumulate_grad_batches", 1) or 1)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=0))
    return SimpleNamespace(
        global_step=0, max_steps=1, accumulate_grad_batches=every, fit_loop=loop, callbacks=[], world_size=1,
        sanity_checking=False, should_stop=False, ckpt_path=None, loggers=[], logger=None, is_global_zero=True,
    )  # fmt: skip


def _optimizer(module: Any, course: Course) -> Any:
    """Return the module's optimiser, which on a GPU works on all parameters at once, and needs memory for that."""
    configured = module.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    for group in optimizer.param_groups:
        if course.on_gpu and "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True
    return optimizer


def _share(batch: Any, processes: int) -> Any:
    """Return one process's rows of a batch of all of them."""
    rows = max((len(each) for each in batch.values() if isinstance(each, list | Tensor)), default=0)
    share = -(-rows // processes)
    cut = {
        name: each[:share] if isinstance(each, list | Tensor) and len(each) == rows else each
        for name, each in batch.items()
    }
    return batch if processes == 1 else cut


def _in_precision(module: Any, course: Course) -> Any:
    """Return the module in Lightning's precision, where it converts weights."""
    bits, _, how = str(course.trainer.get("precision") or "32").partition("-")
    return module.to(PRECISIONS[bits]) if how == "true" and bits in PRECISIONS else module


def _autocast(precision: Any) -> contextlib.AbstractContextManager[Any]:
    bits, _, how = str(precision or "32").partition("-")
    if how == "mixed" and bits in PRECISIONS:
        return torch.autocast("cpu", dtype=PRECISIONS[bits])
    return contextlib.nullcontext()


@contextlib.contextmanager
def no_weights() -> Iterator[None]:
    """Build the parts of a pretrained pipeline from their settings alone, inside the block."""
    read, PipelineFiles._model = PipelineFiles._model, _unfilled  # type: ignore[method-assign]
    try:
        yield
    finally:
        PipelineFiles._model = read  # type: ignore[method-assign]


def _unfilled(files: PipelineFiles, part: str, kind: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """Return a part of a pipeline without its weights; reading it is what `PipelineFiles` does."""
    with files._telling(part), torch.inference_mode(False), quiet(), _made_in(dtype):
        if kind.__module__.startswith("diffusers."):
            model = kind.from_config(files.config(part))
        else:
            model = kind(kind.config_class.from_pretrained(files.source, **options))
        return model.to(dtype).eval().requires_grad_(False)


@contextlib.contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Make weights in this type at once inside the block, as reading them does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _nobody_asked() -> Iterator[None]:
    """Let no reward that is scored elsewhere be asked for scores inside the block."""

    def refused(client: Client, path: str, content: bytes, media_type: str) -> Any:
        raise RewardError("it is scored elsewhere")

    post, Client.post = Client.post, refused  # type: ignore[method-assign]
    try:
        yield
    finally:
        Client.post = post  # type: ignore[method-assign]


def _nothing(*arguments: Any, **more: Any) -> None:
    """Log nothing."""


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in tree_leaves(value) if isinstance(each, Tensor)]


# --- what to do, and what is shown ------------------------------------------------------------------------------


def _remedies(course: Course, module: Any, peak: Peak) -> Iterator[str]:
    """Yield what would lower the peak, what saves most for least first."""
    values, kinds = course.recipe.values, peak.kinds
    method = getattr(module, "method", None)
    key = "module." if hasattr(module, "_held_out") and "module" in values else "method."
    worked = kinds.get("activations", 0) > 0.3 * peak.size
    if worked and getattr(module if key == "module." else method, "micro_batch", 0) is None:
        yield f"{key}micro_batch=1 (pictures decoded and scored at once)"
    if worked and getattr(method, "checkpointing", None) is False:
        yield "method.checkpointing=true (keeps the states between jumps alone)"
    inner = declared(getattr(module, "flow_map", None) or nn.Identity(), "model")
    if worked and getattr(inner, "is_gradient_checkpointing", None) is False and peak.phase in ("backward", "forward"):
        yield "checkpointing: true of the pretrained map (keeps the inputs of its blocks alone)"
    jumps = getattr(method, "jumps", None)
    if worked and isinstance(jumps, int) and jumps > 1 and peak.phase in ("backward", "network"):
        yield "fewer method.jumps, or method.last=1"
    trained = sum(kinds.get(kind, 0) for kind in (TRAINED, GRADIENTS, STATE, "moving average", "reference"))
    if trained > 0.4 * peak.size and kinds.get(FROZEN, 0) < kinds.get(TRAINED, 0):
        yield "adapter=lora (trains low-rank additions, and holds base and reference once)"
    if kinds.get("text encoders", 0) > 0.1 * peak.size:
        yield "text_device: cpu of the pretrained map, or its conditioner's release() once the prompts are read"
    yield "a smaller batch (data)"


def show(recipe: Composed, made: Plan, console: Console) -> None:
    """Print a plan, and whether it fits where it is to run."""
    table = Table("held at the peak", "", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for kind, size in sorted(made.peak.kinds.items(), key=lambda item: -item[1]):
        if size > 0:
            table.add_row(kind, _written(size))
    table.add_row("peak", f"{_written(made.peak.size)}, in phase '{made.peak.phase}'", style="bold")
    console.print(f"{recipe.recipe}: {made.what}, on each of {made.processes} device(s)")
    console.print(table)
    phases = ", ".join(f"{name} {_written(size)}" for name, size in made.phases.items() if name != "start")
    console.print(f"most in each phase: {phases}")
    for note in made.notes:
        console.print(note)
    console.print(fit(made, Course(recipe).on_gpu))
    console.print(
        "Bytes of tensors, by shape. On a GPU add 0.3 to 0.6 GiB for the CUDA context and up to a tenth for gaps and "
        "workspaces; attention is counted as flash kernels hold it."
    )


def fit(made: Plan, on_gpu: bool) -> str:
    """Return one sentence: whether the peak fits the device, and what to lower first where it does not."""
    need, lower = made.peak.size, f" Lower first: {'; then '.join(made.remedies)}."
    if not on_gpu:
        have, name = machine_memory(), "this machine's memory"
    elif torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        have, name = int(device.total_memory * (1 - RESERVE)), f"{device.name}, nine tenths of its memory"
    else:
        fits = [f"{card} GiB" for card in CARDS if need <= card * GIB * (1 - RESERVE)]
        return f"There is no GPU here to compare with; it fits one of {fits[0]}." if fits else (
            f"There is no GPU here to compare with; it fits none of {CARDS[-1]} GiB.{lower}"
        )  # fmt: skip
    if have is None:
        return "What this machine has could not be found out."
    return f"It fits: {_written(have)} is {name}." if need <= have else (
        f"It does not fit: {_written(have)} is {name}.{lower}"
    )  # fmt: skip


def _written(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"
