"""What every metric asks of its input: a finite set of vectors, in float64."""

from __future__ import annotations

from torch import Tensor

from steerfm.errors import DataError


def as_vectors(x: Tensor, least: int = 1, name: str = "the set") -> Tensor:
    """Return `x` (N, *dim) as vectors (N, D) in float64.

    Raises DataError for fewer than `least` rows or a value that is not finite.
    """
    if x.ndim < 2 or len(x) < least:
        raise DataError(f"{name} needs the shape (N, ...) with N of at least {least}, got {tuple(x.shape)}.")
    vectors = x.detach().double().flatten(1)
    bad = (~vectors.isfinite()).any(1).nonzero()
    if len(bad):
        raise DataError(f"{name} holds values that are not finite in {len(bad)} of {len(x)} rows, first {int(bad[0])}.")
    return vectors


def same_dimension(a: Tensor, b: Tensor) -> None:
    """Raise DataError unless two sets of vectors live in one space."""
    if a.shape[1] != b.shape[1]:
        raise DataError(f"The two sets need vectors of one length, got {a.shape[1]} and {b.shape[1]}.")
