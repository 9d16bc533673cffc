"""Several processes: gather, statistics of groups, resampling. Plain functions that do nothing on one process."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from steerfm.types import Values


def world() -> tuple[int, int]:
    """Return (rank, number of processes); (0, 1) outside torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(values: Tensor) -> Tensor:
    """Return the rows of all processes, in rank order; processes may hold different numbers of rows.

    No gradient flows through it. Every process must call it, with the same trailing shape and type.
    """
    _, count = world()
    if count == 1:
        return values.detach()
    sizes = [torch.zeros(1, dtype=torch.long, device=values.device) for _ in range(count)]
    dist.all_gather(sizes, torch.tensor([len(values)], device=values.device))
    longest = int(max(sizes))
    padded = values.new_zeros((longest, *values.shape[1:]))
    padded[: len(values)] = values.detach()
    rows = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(rows, padded)
    return torch.cat([row[: int(size)] for row, size in zip(rows, sizes, strict=True)])


def names_everywhere(names: Sequence[str], device: torch.device | str = "cpu") -> list[str]:
    """Return the names that any process has, each once, sorted; every process must call it."""
    own = sorted(set(names))
    if world()[1] == 1:
        return own
    line = json.dumps(own).encode() + b"\n"
    everything = gather(torch.tensor(list(line), dtype=torch.uint8, device=device))
    return sorted({name for each in bytes(everything.tolist()).splitlines() for name in json.loads(each)})


def of_rank_zero(numbers: Sequence[int], device: torch.device | str = "cpu") -> list[int]:
    """Return the whole numbers that rank zero calls it with; every process must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(numbers)
    return gather(torch.tensor(numbers if world()[0] == 0 else [], dtype=torch.long, device=device)).tolist()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is shared out (FSDP2) as a whole, others as they are; every process must ask for it."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    from torch.distributed.tensor import DTensor  # takes a second

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a whole tensor on the device of another, and shared out where that is; every process must ask for it."""
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(other, DTensor) and not isinstance(tensor, DTensor):
            return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)
    return tensor.to(other.device)


def share_out(network: nn.Module, mesh: Any) -> nn.Module:
    """Share out a network's parameters over the processes of a mesh (FSDP2), in place; return a copy without weights.

    Blocks, which are the members of its lists of modules, are gathered one at a time, for as long as each is used.
    """
    from torch.distributed.fsdp import fully_shard

    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in network.parameters()}
    plain = copy.deepcopy(network, empty)
    for block in blocks(network):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    object.__setattr__(network, "_orig_mod", plain)  # what a description is made of, as for a compiled network
    return plain


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules with parameters that stand in lists of modules."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            if any(True for _ in child.parameters()):
                yield child
        else:
            yield from blocks(child)


def wait() -> None:
    """Return once every process has come here."""
    if world()[1] > 1:
        dist.barrier()


def gather_particles(values: Tensor) -> Tensor:
    """Return the particles of all processes, in rank order; (B, p, ...) -> (B, P, ...)."""
    return gather(values.transpose(0, 1)).transpose(0, 1)


def mean_and_std(values: Values) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over the values of all processes, in float64."""
    everything = gather(values).double()
    return everything.mean(), everything.std(unbiased=False)


class GroupStatistics(NamedTuple):
    """Hold mean, standard deviation, number of members and largest member of each row's group, (B,) each."""

    mean: Values
    std: Values
    size: Values
    largest: Values


def group_statistics(values: Values, groups: Sequence[str]) -> GroupStatistics:
    """Return what is known of each row's group, over the rows of all processes; (B,) each.

    groups: a row's group by name, such as its prompt. Statistics are worked out in float64, and no gradient flows.
    """
    digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in groups]
    own = torch.tensor([int.from_bytes(d, "big", signed=True) for d in digests], dtype=torch.long).to(values.device)
    keys, places = torch.unique(gather(own), return_inverse=True)
    everything, zeros = gather(values).double(), torch.zeros(len(keys), dtype=torch.float64, device=values.device)
    sizes = zeros.index_add(0, places, torch.ones_like(everything))
    means = zeros.index_add(0, places, everything) / sizes
    squares = zeros.index_add(0, places, (everything - means[places]) ** 2) / sizes
    largest = zeros.scatter_reduce(0, places, everything, "amax", include_self=False)
    group = torch.searchsorted(keys, own)
    return GroupStatistics(*(each[group].to(values) for each in (means, squares.sqrt(), sizes, largest)))


def shard(items: list, rank: int | None = None, count: int | None = None) -> list:
    """Return this process's contiguous share of `items`; shares differ by at most one."""
    if rank is None or count is None:
        rank, count = world()
    return items[len(items) * rank // count : len(items) * (rank + 1) // count]


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Return 1 / sum of squared normalised weights, in particles; (..., P) -> (...)."""
    return torch.exp(-torch.logsumexp(2 * log_weights.log_softmax(-1), -1))


def places_by_weight(log_weights: Tensor, numbers: Tensor) -> Tensor:
    """Return where numbers in [0, 1) lie among the cumulative weights; (..., P), (..., M) -> (..., M) long.

    A uniform number draws each place by its weight, and one of no weight never. Computed in float64, so that every
    process finds the same places.
    """
    edges = log_weights.double().softmax(-1).cumsum(-1)
    edges = edges / edges[..., -1:]
    below_one = numbers.to(edges).clamp_max(1 - 2**-53)  # 1 would fall to the last, whatever its weight
    return torch.searchsorted(edges, below_one, right=True)


def draw_ancestors(log_weights: Tensor, uniform: Tensor) -> Tensor:
    """Return the ancestor of each particle; (B, P), (B, 1) or (B, P) -> (B, P) long.

    One uniform number a population is systematic resampling, P of them are stratified; either way a particle of
    weight w has P w descendants on average.
    Reference: Douc, Cappe, Moulines 2005, arXiv cs/0507025, sections 2.3 and 2.4.
    """
    count = log_weights.shape[-1]
    slots = torch.arange(count, dtype=torch.float64, device=log_weights.device)
    return places_by_weight(log_weights, (slots + uniform.to(slots)) / count)
