"""The Vendi score: how many different things a set holds, as an effective number.

    exp(-Σ λ_i log λ_i),  λ the eigenvalues of K / N,  K_ij the similarity of rows i and j, K_ii = 1

N rows without any likeness score N, copies of one row score 1, and k equal clusters of copies score k. It looks at
the samples alone: noise scores high, so show a distance to data beside it.

Reference: Friedman & Dieng 2022, arXiv 2210.02410.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from steerfm.errors import DataError
from steerfm.metrics.points import as_vectors


def vendi_score(
    features: Tensor, similarity: Literal["cosine", "gaussian"] = "cosine", bandwidth: float | None = None
) -> float:
    """Return the Vendi score of features (N, *dim), in [1, N]; in float64.

    similarity: "cosine" of the rows, where the score is also at most D; or "gaussian", exp(-|x - y|² / (2 h²)),
    which needs a bandwidth h, best `median_distance(data)`: a bandwidth taken from the samples themselves would
    hide their collapse. Cosines of pixels in [0, 1] are all near 1, so there prefer features or "gaussian".

    It grows with N until every kind has been seen: compare at equal N, with real data's own score at that N as
    the yardstick, `floor_of(lambda a, _: vendi_score(a), data, N)`. Raises DataError for a row of zeros, which has
    no direction, and for similarities without what they need. Takes N³ operations, or N D² for cosines.
    """
    x = as_vectors(features, name="A Vendi score")
    if similarity == "cosine" and bandwidth is None:
        return _effective_number(_cosine_gram(x), len(x))
    if similarity != "gaussian" or bandwidth is None or not bandwidth > 0:
        raise DataError(
            "A Vendi score's similarity is 'cosine' without a bandwidth, or 'gaussian' with one above 0, "
            f"got '{similarity}' and {bandwidth}."
        )
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return vendi_score_of((-(distance / bandwidth).square() / 2).exp())


def vendi_score_of(similarities: Tensor) -> float:
    """Return the Vendi score of a matrix of similarities (N, N): symmetric, positive semi-definite, 1 on the diagonal.

    Raises DataError for any other matrix.
    """
    if similarities.ndim != 2 or similarities.shape[0] != similarities.shape[1]:
        raise DataError(f"Similarities need the shape (N, N), got {tuple(similarities.shape)}.")
    K = as_vectors(similarities, name="A table of similarities")
    if not torch.allclose(K, K.T, atol=1e-8) or not torch.allclose(K.diagonal(), torch.ones_like(K[0]), atol=1e-8):
        raise DataError("Similarities must be symmetric with ones on the diagonal, got a matrix that is not.")
    return _effective_number(K, len(K))


def _cosine_gram(x: Tensor) -> Tensor:
    """Return the smaller of X Xᵀ and Xᵀ X for rows of length one: their positive eigenvalues are the same."""
    norm = x.norm(dim=1, keepdim=True)
    if bool((norm == 0).any()):
        first = int((norm[:, 0] == 0).nonzero()[0])
        raise DataError(f"A cosine needs rows that are not zero, got a zero row, number {first}: use 'gaussian'.")
    x = x / norm
    return x @ x.T if len(x) <= x.shape[1] else x.T @ x


def _effective_number(gram: Tensor, count: int) -> float:
    """Return exp of the entropy of the eigenvalues of gram / count, which sum to one."""
    values = torch.linalg.eigvalsh(gram / count)
    if float(values.min()) < -1e-8:
        raise DataError(f"Similarities must be positive semi-definite, got the eigenvalue {float(values.min()):g}.")
    values = values.clamp(min=0)
    return float((-torch.xlogy(values, values).sum()).exp())
