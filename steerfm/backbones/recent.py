"""What encoders made of recent prompts and pictures."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from steerfm.conditions.text_files import TextFiles

CACHE_BYTES = 2**28


class Recent:
    """Hold the tensors of what was asked recently, on the CPU."""

    def __init__(self) -> None:
        self.held: OrderedDict[Any, dict[str, Tensor]] = OrderedDict()
        self.bytes = 0

    def read(self, asked: Any, files: TextFiles | None, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of what was asked: those that are held, else those of a file, else what `make` makes."""
        if asked in self.held:
            self.held.move_to_end(asked)
            return self.held[asked]
        tensors = files.read(asked) if files else None
        if tensors is None:
            tensors = make()
            if files:
                files.write(asked, tensors)
        self._hold(asked, tensors)
        return tensors

    def _hold(self, asked: Any, tensors: dict[str, Tensor]) -> None:
        self.held[asked] = tensors
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        while self.bytes > CACHE_BYTES and len(self.held) > 1:
            self.bytes -= sum(tensor.nbytes for tensor in self.held.popitem(last=False)[1].values())
