"""Preferences between two samples: Bradley and Terry's model of them, and how right and how calibrated a judge is.

P(a is preferred to b) = sigmoid(a - b) for rewards a and b. `preferred` is what was said, as the probability of a:
1 for a, 0 for b, 0.5 for a tie, or a share of votes. Everything is symmetric: with a and b swapped and preferred
turned into 1 - preferred, nothing changes.

References: Bradley & Terry 1952, Biometrika 39, 324-345; ties as half a preference for each: Kirstain et al. 2023,
arXiv 2305.01569 (PickScore).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from steerfm.errors import ConfigError
from steerfm.types import Values

BINS = 10


class Reliability(NamedTuple):
    """Hold what a judge said and what came true, (bins,) each, by how sure it was; empty bins are NaN.

    confidence: the mean probability of the sample it put first; frequency: how often that one was preferred (ties
    count half); pairs: how many.
    """

    confidence: Tensor
    frequency: Tensor
    pairs: Tensor


def log_likelihood(a: Values, b: Values, preferred: Values) -> Values:
    """Return the log-likelihood of each preference under the rewards; (B,), at most 0.

    preferred log sigmoid(a - b) + (1 - preferred) log sigmoid(b - a)
    """
    return preferred * functional.logsigmoid(a - b) + (1 - preferred) * functional.logsigmoid(b - a)


def bradley_terry(a: Values, b: Values, preferred: Values) -> Values:
    """Return the cross-entropy of each preference against sigmoid(a - b); (B,), at least 0.

    Its least value is the entropy of `preferred`, zero where that is 0 or 1: a tie costs log 2 at best.
    """
    return -log_likelihood(a, b, preferred)


def centring(a: Values, b: Values) -> Values:
    """Return (a + b)^2 of each pair, (B,), which pulls rewards toward zero: pairs fix their differences alone.

    Reference: Eisenstein et al. 2023, arXiv 2312.09244; TRL's center_rewards_coefficient multiplies it.
    """
    return (a + b) ** 2


def agreement(a: Values, b: Values, preferred: Values) -> Values:
    """Return 1 where the higher reward was preferred, 0 where the lower one was; (B,). Their mean is the accuracy.

    Equal rewards are half right. Ties (preferred = 0.5) are NaN, to be left out (`nanmean`): nobody can be right.
    """
    right = (torch.sign(a - b) * torch.sign(preferred - 0.5) + 1) / 2
    return right.masked_fill(preferred == 0.5, torch.nan)


def reliability(a: Values, b: Values, preferred: Values, bins: int = BINS) -> Reliability:
    """Return the reliability diagram of sigmoid(a - b), in bins of equal width of the confidence, from 0.5 to 1.

    Each pair is turned so that the sample with the higher reward stands first. Raises ConfigError for no bins.
    """
    if bins < 1:
        raise ConfigError(f"A reliability diagram needs at least one bin, got {bins}.")
    gap = (a - b).double()
    confidence = torch.sigmoid(gap.abs())
    true = torch.where(gap >= 0, preferred.double(), 1 - preferred.double())
    place = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    count = torch.bincount(place, minlength=bins)
    mean = [torch.bincount(place, values, minlength=bins) / count for values in (confidence, true)]
    return Reliability(mean[0], mean[1], count)


def calibration_error(a: Values, b: Values, preferred: Values, bins: int = BINS) -> Tensor:
    """Return the expected calibration error of sigmoid(a - b): the mean gap of its reliability diagram; in [0, 1].

    sum over bins of (count / B) |frequency - confidence|. It is biased upwards by the sampling error of each bin.
    Reference: Guo et al. 2017, arXiv 1706.04599.
    """
    diagram = reliability(a, b, preferred, bins)
    gaps = (diagram.frequency - diagram.confidence).abs().nan_to_num()
    return (gaps * diagram.pairs).sum() / diagram.pairs.sum()
