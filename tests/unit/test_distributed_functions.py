"""steerfm.distributed on one process, where it does nothing but must mean the same; tests/distributed has two."""

import pytest
import torch
from trainers import digit_map

from steerfm.distributed import (
    draw_ancestors,
    gather,
    group_statistics,
    mean_and_std,
    places_by_weight,
    shard,
    world,
)
from steerfm.errors import ConfigError
from steerfm.seeds import LARGE, BatchGenerator, drawn, rows_between
from steerfm.steering import FlowMapTilting


def test_one_process_is_the_whole_world() -> None:
    assert world() == (0, 1)
    values = torch.randn(6, requires_grad=True)
    assert torch.equal(gather(values), values)
    assert not gather(values).requires_grad  # as on several: a baseline takes no gradient by accident
    mean, std = mean_and_std(values)
    assert mean.dtype == torch.float64
    assert torch.allclose(mean.float(), values.mean())
    assert torch.allclose(std.float(), values.std(unbiased=False))


def test_groups_are_rows_of_one_name() -> None:
    values = torch.tensor([1.0, 10.0, 3.0, -1.0, 10.0, 7.0], requires_grad=True)
    mean, std, size, largest = group_statistics(values, ["a", "b", "a", "", "b", "a"])
    assert torch.allclose(mean, torch.tensor([11 / 3, 10, 11 / 3, -1, 10, 11 / 3]))
    assert torch.allclose(std, torch.tensor([56 / 9, 0, 56 / 9, 0, 0, 56 / 9]).sqrt())
    assert size.tolist() == [3, 2, 3, 1, 2, 3]
    assert largest.tolist() == [7, 10, 7, -1, 10, 7]
    assert mean.dtype == values.dtype
    assert not mean.requires_grad


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [0, 1, 5, 12])
def test_shares_are_contiguous_and_even(size: int, count: int) -> None:
    items = list(range(size))
    shares = [shard(items, rank, count) for rank in range(count)]
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("uniform", [0.0, 0.3, 1 - 2**-53])
def test_a_particle_without_weight_has_no_offspring(uniform: float, count: int) -> None:
    log_weights = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0], [0.0, -torch.inf, -torch.inf, -torch.inf]])
    ancestors = draw_ancestors(log_weights, torch.full((2, count), uniform, dtype=torch.float64))
    assert set(ancestors[0].tolist()) == {1, 3}
    assert ancestors[1].tolist() == [0, 0, 0, 0]


def test_places_are_drawn_by_weight() -> None:
    log_weights = torch.tensor([-torch.inf, 1.0, 3.0, 2.0, -torch.inf])
    weights = log_weights.double().softmax(0)
    numbers = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    counts = places_by_weight(log_weights, numbers).bincount(minlength=5)
    assert torch.allclose(counts.double() / 100_000, weights, atol=1e-5)
    assert places_by_weight(log_weights, torch.tensor([0.0, 1 - 2**-53, 1.0], dtype=torch.float64)).tolist() == [
        1,
        3,
        3,
    ]


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, LARGE // 6 + 1)], ids=["numbers", "rows", "large"])
def test_a_batch_draws_the_same_on_any_number_of_processes(shape: tuple[int, ...]) -> None:
    """Six rows by one process and by two: what is drawn for all of them, and for those from the second on."""
    one = BatchGenerator(3, 7, range(6), 6)
    two = [BatchGenerator(3, 7, range(rank, 6, 2), 6) for rank in range(2)]
    for draw in (torch.rand, torch.randn):
        whole = drawn(draw, (6, *shape[1:]), one)
        for rank in range(2):
            assert torch.equal(drawn(draw, shape, two[rank]), whole[rank::2])
    with rows_between(one, 1, 6):
        whole = drawn(torch.rand, (5, *shape[1:]), one)
    for rank, own in ((0, slice(1, None, 2)), (1, slice(0, None, 2))):
        with rows_between(two[rank], 1, 6):
            assert torch.equal(drawn(torch.rand, (len(two[rank].rows), *shape[1:]), two[rank]), whole[own])
    alone, others = torch.rand(9, generator=one), [torch.rand(9, generator=each) for each in two]
    assert not torch.equal(others[0], others[1])  # drawn by a process for itself
    assert not torch.equal(alone, others[0])


def test_more_processes_than_particles_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerfm.steering.populations.world", lambda: (0, 3))
    with pytest.raises(ConfigError, match="got 2 for 3 processes"):
        FlowMapTilting(2, 2, split=True)(digit_map(), lambda images: images.mean((1, 2, 3)))
