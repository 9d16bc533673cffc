"""Muon against torch's own Muon on matrices, against AdamW on vectors, and on what neither takes."""

import copy

import pytest
import torch
from torch import Tensor, nn

from steerfm.errors import ConfigError
from steerfm.optimizers import Muon, orthogonal


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(optimizers: list[torch.optim.Optimizer], parameters: list[nn.Parameter], steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        for i, p in enumerate(parameters):
            p.grad = draws(1000 * step + i, *p.shape)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("shape", [(6, 10), (12, 5), (7, 7)])
def test_matrices_move_as_torchs_muon_moves_them(shape: tuple[int, int]):
    """Torch iterates in bfloat16, which is good for a hundredth of a step."""
    ours, theirs = nn.Parameter(draws(1, *shape)), nn.Parameter(draws(1, *shape))
    run([Muon([ours], lr=0.01, weight_decay=0.1)], [ours], 20)
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    run([reference], [theirs], 20)
    assert (ours - theirs).norm() < 0.01 * (theirs - draws(1, *shape)).norm()


def test_vectors_move_as_adamw_moves_them():
    ours, theirs = nn.Parameter(draws(2, 9)), nn.Parameter(draws(2, 9))
    run([Muon([ours], lr=0.01, weight_decay=0.1)], [ours], 20)
    run([torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)], [theirs], 20)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_embeddings_of_a_large_vocabulary_move_as_adamw_moves_them():
    ours, theirs = nn.Parameter(draws(2, 9, 4)), nn.Parameter(draws(2, 9, 4))
    run([Muon([ours], lr=0.01, longest=8)], [ours], 5)
    run([torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0)], [theirs], 5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_filter_is_a_matrix_and_company_does_not_matter():
    """Two filters of one shape are made orthogonal together, and each moves as a matrix alone would."""
    filters = [nn.Parameter(draws(i, 4, 3, 3, 3)) for i in range(2)]
    matrices = [nn.Parameter(draws(i, 4, 3, 3, 3).flatten(1)) for i in range(2)]
    optimizers = [Muon(filters), *(Muon([m]) for m in matrices)]
    for step in range(3):
        for i, (p, m) in enumerate(zip(filters, matrices, strict=True)):
            p.grad = draws(10 * step + i + 5, 4, 3, 3, 3)
            m.grad = p.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    for p, m in zip(filters, matrices, strict=True):
        torch.testing.assert_close(p.flatten(1), m, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8)])
def test_orthogonal_keeps_the_singular_vectors_and_evens_the_values(shape: tuple[int, int, int]):
    matrices = draws(3, *shape)
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    turned = U.mT @ orthogonal(matrices) @ Vh.mT
    values = turned.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.65 and values.max() < 1.25
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-4


def test_a_resumed_run_goes_on_bitwise():
    parameters = [nn.Parameter(draws(4, 5, 6)), nn.Parameter(draws(5, 3))]
    optimizer = Muon(parameters)
    run([optimizer], parameters, 3)
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = Muon(copies)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run([optimizer], parameters, 3, first=3)
    run([resumed], copies, 3, first=3)
    assert all(torch.equal(p, c) for p, c in zip(parameters, copies, strict=True))


def test_what_has_no_gradient_stays_and_a_closure_gives_the_loss():
    still, moved = nn.Parameter(draws(6, 4, 4)), nn.Parameter(draws(7, 4, 4))
    before = still.detach().clone()
    optimizer = Muon([still, moved], weight_decay=0.5)

    def closure() -> float:
        loss = moved.square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == pytest.approx(float(draws(7, 4, 4).square().sum()))
    assert torch.equal(still, before) and not torch.equal(moved, draws(7, 4, 4))


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"momentum": 1.0}, {"betas": (0.9, 1.0)}, {"iterations": 0}])
def test_wrong_options_are_refused(options: dict):
    with pytest.raises(ConfigError, match="Muon needs"):
        Muon([nn.Parameter(torch.zeros(2, 2))], **options)
