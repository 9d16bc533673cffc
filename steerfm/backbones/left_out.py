"""Leave weights that are as they were published out of saved maps and checkpoints: they are read again.

Low-rank additions to a model of 24 GB are then saved as some megabytes. A weight is left out while it takes no
gradient and nothing has written into it since it was read; what was trained, or loaded from elsewhere, is saved. A few
numbers of what was left out are kept, so that another model is not taken for the one that was tuned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steerfm.errors import CheckpointError

KEY = "left_out"  # in a state dict, in place of the weights
SAMPLED = 1024  # values of each weight
SAME = 1e-6  # relative difference of what is kept of them


class LeftOut:
    """Leave out of a network's state dict what is as published, and do without it on loading.

    inside: the name of the module that was read. source: where from, for the error: loading raises CheckpointError
    where that holds other weights now. digests: of the weights as they were published (`digests_of`), before they were
    quantised, say. A copy of the network has parameters of its own, and saves them.
    """

    def __init__(self, network: nn.Module, inside: str, source: str, digests: Mapping[str, Tensor]) -> None:
        self.inside, self.source = inside, source
        read = network.get_submodule(inside)
        self.known = {id(each): (_state(each), digests[name]) for name, each in read.named_parameters()}
        self.wanted: tuple[str, Tensor] | None = None
        network.register_state_dict_post_hook(partial(self._drop))  # PyTorch marks it, and a method takes no mark
        network.register_load_state_dict_pre_hook(self._begin)
        network.register_load_state_dict_post_hook(self._end)

    def __deepcopy__(self, memo: Any) -> LeftOut:
        """Return what is known of the parameters that the copy shares (`steerfm.networks.sharing`)."""
        copied = object.__new__(LeftOut)
        memo[id(self)] = copied
        copied.inside, copied.source, copied.wanted = self.inside, self.source, None
        copied.known = {key: value for key, value in self.known.items() if id(memo.get(key)) == key}
        return copied

    def _published(self, network: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Yield name, parameter and digest of what nobody has written into; adapters may have renamed it."""
        for name, each in network.get_submodule(self.inside).named_parameters():
            state, digest = self.known.get(id(each), (None, None))
            if digest is not None and state == _state(each):
                yield f"{self.inside}.{name}", each, digest

    def _drop(self, network: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        left = [(name, digest) for name, each, digest in self._published(network) if not each.requires_grad]
        for name, _ in left:
            state.pop(prefix + name, None)
        if left:
            state[prefix + KEY] = torch.stack([digest for _, digest in left]).sum(0)

    def _begin(self, network: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.wanted = (prefix, state.pop(prefix + KEY)) if prefix + KEY in state else None

    def _end(self, network: nn.Module, keys: Any) -> None:
        """Miss nothing that was left out, if it is the same."""
        if self.wanted is None:
            return
        (prefix, wanted), self.wanted = self.wanted, None
        found = torch.zeros(2, dtype=torch.float64)
        for name, _, digest in self._published(network):
            if prefix + name in keys.missing_keys:
                keys.missing_keys.remove(prefix + name)
                found += digest
        if not torch.allclose(found, wanted.cpu(), rtol=SAME):
            raise CheckpointError(
                f"{self.source} does not hold the weights that this map was tuned from: restore them, or tune it again."
            )


def _state(parameter: nn.Parameter) -> Any:
    """Return what changes where something is written; quantised weights, of another class, cannot be written."""
    return (parameter._version, parameter.dtype) if type(parameter) is nn.Parameter else type(parameter).__name__


def digests_of(module: nn.Module) -> dict[str, Tensor]:
    """Return sums of some of each parameter's values and of their squares, (2,) in float64, on the CPU."""
    return {name: _digest(each.detach().flatten()) for name, each in module.named_parameters()}


def _digest(flat: Tensor) -> Tensor:
    some = flat[:: max(1, flat.numel() // SAMPLED)].cpu().double()
    return torch.stack([some.sum(), some.square().sum()])
