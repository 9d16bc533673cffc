"""Run PyTorch on shapes alone, and follow the bytes of all tensors that are alive at once.

Inside `Shapes` a tensor of more than `SMALL` numbers has a type and a shape and no values: its memory is asked for and
never touched, so that networks of any size run in next to none. Smaller ones are worked out for good, as long as they
come from no larger one, so that code which looks at a time or a count goes the way that it always goes. A question that
only values could answer is answered as a healthy run does: all is finite, nothing is wrong.

A storage is counted from the operation that makes it until the last tensor on it is gone, in blocks of 512 bytes as
PyTorch's allocator on CUDA gives them out. What an operation needs inside itself alone is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as meta
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from steerfm.errors import SteerfmError

SMALL = 2**14  # numbers of a tensor that is worked out for good
BLOCK = 512  # bytes
WORKING = "activations"  # the kind of what operations make, until something else is said
META = torch.device("meta")
aten = torch.ops.aten


class Unshaped(SteerfmError):
    """An operation was called whose result has no shape before it has numbers."""


@dataclass(frozen=True)
class Peak:
    """The most bytes alive at once, in which phase, and what they were by kind."""

    size: int = 0
    phase: str = ""
    kinds: dict[str, int] = field(default_factory=dict)


@dataclass
class _Block:
    size: int
    kind: str = WORKING
    unreal: bool = False
    answer: bool = True  # to the question whether it is true


class Shapes(TorchDispatchMode):
    """Work on shapes and count bytes inside the `with` block; see the module's text.

    kinds: bytes alive by kind. peak: since the beginning, or since it was set to `Peak()`. peaks: the most bytes in
    each phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak = 0, Peak()
        self.kinds: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self._blocks: dict[int, _Block] = {}
        self._found: dict[Any, Any] = {}  # what operations made of shapes that were seen before
        self._phases = ["start"]

    def hold(self, kind: str, tensors: Iterable[Any]) -> int:
        """Count tensors as of a kind from now on, those that were counted before too; return their bytes."""
        blocks = {id(block): block for block in map(self._block, _tensors(list(tensors)))}
        for block in blocks.values():
            self._change(block.kind, -block.size)
            block.kind = kind
            self._change(kind, block.size)
        return sum(block.size for block in blocks.values())

    def add(self, kind: str, size: int) -> None:
        """Count so many bytes more, for good, of what is not there to be seen."""
        self._change(kind, size)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what happens inside the block; a backward pass is one, whatever runs in it."""
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.pop()

    def unreal(self, tensor: Tensor) -> Tensor:
        """Return a copy without values, however small it is; gradients pass."""
        copied = tensor.clone()
        self._block(copied).unreal = True
        return copied

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _here(value) for name, value in (kwargs or {}).items()}
        given = _tensors([args, kwargs])
        if any(self._is_unreal(each) for each in given):
            return self._shaped(func, args, kwargs)
        if not given and _large(self._shape_of(func, args, kwargs)):
            return self._shaped(func, args, kwargs)
        made = func(*args, **kwargs)
        self._count(func, made)
        return made

    def _is_unreal(self, tensor: Tensor) -> bool:
        if tensor.device == META:
            return False
        block = self._blocks.get(tensor.untyped_storage()._cdata)
        return tensor.numel() > SMALL or (block is not None and block.unreal)

    def _shaped(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operation makes, without values; what it changes loses its own."""
        if func is aten._local_scalar_dense.default:
            return self._said(args[0])
        if func is aten.equal.default:
            return True
        if func._overloadpacket is aten.set_:  # how a tensor is copied: it stands on another storage from now on
            made = func(*args, **kwargs)
            self._block(made).unreal = True
            return made
        returns = func._schema.returns
        if returns and all(each.alias_info is not None and not each.alias_info.is_write for each in returns):
            return func(*args, **kwargs)  # a view
        made, written = self._shape_of(func, args, kwargs), self._written(func, args, kwargs)
        # "Is any of it" asks for what is wrong.
        answer = func not in (aten.any.default, aten.any.dim, aten.any.dims)
        if not isinstance(made, tuple | list):
            return written[0] if returns and _is_write(returns[0]) else self._made(made, answer)
        if len(returns) != len(made):  # one list of tensors
            return self._made(made, answer)
        changed = iter(written)
        found = [
            next(changed) if _is_write(each) else self._made(new, answer)
            for each, new in zip(returns, made, strict=True)
        ]
        return tuple(found)

    def _shape_of(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operation makes of shapes, which depends on no number but whole ones."""
        key = (func, torch.get_default_dtype(), _signature(args), _signature(kwargs))
        if key not in self._found:
            every_row: Any = {"meta_nonzero_assume_all_nonzero": True}  # those that are chosen by their values
            try:
                with meta.patch(every_row):  # type: ignore[attr-defined]
                    self._found[key] = func(*_mapped(_shape, args), **_on_meta(_mapped(_shape, kwargs)))
            except NotImplementedError as error:
                raise Unshaped(f"{func} makes of its shapes what only numbers could tell.") from error
        return self._found[key]

    def _written(self, func: Any, args: Any, kwargs: Any) -> list[Any]:
        """Return the arguments that an operation changes, which have no values after it."""
        changed = []
        for i, argument in enumerate(func._schema.arguments):
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and given is not None:
                changed.append(given)
                for each in _tensors(given):
                    self._block(each).unreal = True
        return changed

    def _made(self, like: Any, answer: bool) -> Any:
        """Return tensors without values of these shapes."""
        if isinstance(like, list | tuple):
            return type(like)([self._made(each, answer) for each in like])
        if not isinstance(like, Tensor):
            return like
        with _unfilled():
            made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        if made.numel() <= SMALL:
            made.zero_()  # somebody may print it
        block = self._block(made)
        block.unreal, block.answer = True, answer
        return made

    def _said(self, tensor: Tensor) -> Any:
        """Return what a healthy run would find: nothing is wrong, everything is finite, numbers are 1."""
        if tensor.dtype == torch.bool:
            return self._block(tensor).answer
        return 1.0 if tensor.is_floating_point() else 1

    def _count(self, func: Any, made: Any) -> None:
        if any(each.alias_info is None for each in func._schema.returns):
            for each in _tensors(made):
                self._block(each)

    def _block(self, tensor: Tensor) -> _Block:
        """Return the block of a tensor's storage, counted from now on if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._blocks:
            size = 0 if tensor.device == META else -(-storage.nbytes() // BLOCK) * BLOCK
            self._blocks[key] = _Block(size)
            weakref.finalize(storage, self._release, key).atexit = False
            self._change(WORKING, size)
        return self._blocks[key]

    def _release(self, key: int) -> None:
        block = self._blocks.pop(key)
        self._change(block.kind, -block.size)

    def _change(self, kind: str, size: int) -> None:
        self.alive += size
        self.kinds[kind] = self.kinds.get(kind, 0) + size
        phase = "backward" if torch._C._current_graph_task_id() != -1 else self._phases[-1]
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.alive)
        if self.alive >= self.peak.size:
            self.peak = Peak(self.alive, phase, dict(self.kinds))


def _tensors(values: Any) -> list[Tensor]:
    """Return all tensors in nested values; of one that stands for others, as quantised weights do, those."""
    if isinstance(values, Tensor):
        if not is_traceable_wrapper_subclass(values):
            return [values]
        return _tensors([getattr(values, name) for name in values.__tensor_flatten__()[0]])
    inside = values.values() if isinstance(values, dict) else values if isinstance(values, list | tuple) else ()
    return [tensor for value in inside for tensor in _tensors(value)]


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _mapped(change, each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(change, each) for each in value]
    return change(value)


def _signature(value: Any) -> Any:
    """Return what decides the shape and the type of a result, hashable."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, dict):
        return tuple((name, _signature(each)) for name, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(_signature(each) for each in value)
    return (type(value), None if isinstance(value, float | torch.Generator) else value)


def _here(value: Any) -> Any:
    """Return any device but that of shapes as the CPU: nothing is on another."""
    return torch.device("cpu") if isinstance(value, torch.device) and value != META else value


def _shape(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.device == META:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return an operation's arguments for tensors of the shape alone: a generator belongs to a device."""
    changed = {"device": META, "generator": None, "pin_memory": None}
    return {name: changed.get(name, value) for name, value in kwargs.items()}


def _large(made: Any) -> bool:
    return any(each.numel() > SMALL for each in _tensors(made))


def _is_write(returned: Any) -> bool:
    return returned.alias_info is not None and returned.alias_info.is_write


@contextmanager
def _unfilled() -> Iterator[None]:
    """Let memory that is asked for stay untouched where deterministic algorithms would fill it."""
    settings: Any = torch.utils.deterministic
    before, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before
