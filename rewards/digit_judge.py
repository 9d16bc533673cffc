"""A judge of handwritten digits for held-out scores, fitted on scans that no reward saw.

Model: logistic regression on Nystroem features of a Gaussian kernel (scikit-learn), fitted on the "judge" half
of the digits when first used, in about 0.1 s; the same every time, nothing is stored. Source: this file.
Preprocessing: grey values in [0, 1], 8x8. Range: a probability in [0, 1]. Licence: as steerfm. Memory: 4 MB.
Measured on the "reward" half, which the judge did not see: accuracy 0.983, mean probability of the true digit
0.964, of a seven for real sevens 0.979, for other digits 0.003, for pixels of uniform noise 0.17.
Fooled by: blends of a seven with another digit; it must name one of ten digits whatever it is shown.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerfm import digits
from steerfm.errors import RewardError
from steerfm.images import to_unit
from steerfm.reward import Reward

KERNEL_WIDTH = 0.25  # gamma of exp(-gamma |x - y|^2)
FEATURES = 450
INVERSE_PENALTY = 300.0


class DigitJudge(Reward):
    """Score the probability that a picture shows `digit`, or, where that is None, the digit its prompt ends with.

    A black box.
    """

    differentiable = False

    def __init__(self, digit: int | None = 7, name: str | None = None) -> None:
        super().__init__(name)
        if digit is not None and digit not in range(10):
            raise RewardError(f"A digit is one of 0 to 9, got {digit!r}.")
        self.digit = digit
        self.needs_prompt = digit is None

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return p(digit | picture); (B,). Raises RewardError for a prompt that has to name a digit and does not."""
        wanted = [self._named(prompt) if self.digit is None else self.digit for prompt in prompts]
        return self.probabilities(images)[torch.arange(len(wanted)), wanted]

    def _named(self, prompt: str) -> int:
        word = prompt.lower().split()[-1]
        if word not in digits.NAMES:
            raise RewardError(
                f"'{self.name}' judges the digit that a prompt ends with, got '{prompt}': set digit=7, say."
            )
        return digits.NAMES.index(word)

    def probabilities(self, images: Tensor) -> Tensor:
        """Return p(digit | picture) for all ten digits; (B, 10). Raises RewardError for pictures that are not 8x8."""
        if images.ndim != 4 or tuple(images.shape[2:]) != (8, 8):
            raise RewardError(f"'{self.name}' reads pictures (B, C, 8, 8), got the shape {tuple(images.shape)}.")
        grey = images.detach().float().mean(1).clamp(0, 1).flatten(1).cpu().numpy()
        if not np.isfinite(grey).all():
            sample = int(np.flatnonzero(~np.isfinite(grey).all(1))[0])
            raise RewardError(f"'{self.name}' was shown a picture that is not finite, sample {sample}.")
        return torch.from_numpy(_classifier().predict_proba(grey)).to(images.device, torch.float32)

    def labels(self, images: Tensor) -> Tensor:
        """Return the most probable digit of each picture; (B,) long."""
        return self.probabilities(images).argmax(1)


@functools.cache
def _classifier() -> Any:
    """Return the classifier, fitted once a process."""
    from sklearn.kernel_approximation import Nystroem
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    scans = digits.load("judge")
    model = make_pipeline(
        Nystroem(gamma=KERNEL_WIDTH, n_components=FEATURES, random_state=0),
        LogisticRegression(C=INVERSE_PENALTY, max_iter=1000),
    )
    return model.fit(to_unit(scans.x0).flatten(1).numpy(), scans.labels.numpy())
