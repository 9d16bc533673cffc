"""What pictures look like on the whole: brightness, contrast, saturation, and how much of them was cut off.

None of these has a right value. Those of real pictures, or of the same seeds before a change, are the yardstick.
"""

from __future__ import annotations

from torch import Tensor

from steerfm.errors import DataError

ENDS = 1e-6  # a value as near to 0 or 1 was put there by a clamp


def looks(images: Tensor) -> dict[str, float]:
    """Return the mean brightness, contrast, saturation and clamped share of pictures (N, C, H, W) in [0, 1].

    contrast: a picture's standard deviation of grey values, averaged over pictures. saturation: the mean distance of
    a pixel's largest from its smallest channel, left out for one channel. clamped: share of values at the ends.
    """
    if images.ndim != 4 or len(images) == 0:
        raise DataError(f"Looks need pictures (N, C, H, W), got the shape {tuple(images.shape)}.")
    pictures = images.detach().double()
    found = {
        "mean": float(pictures.mean()),
        "contrast": float(pictures.mean(1).flatten(1).std(1, unbiased=False).mean()),
        "clamped": float(((pictures <= ENDS) | (pictures >= 1 - ENDS)).double().mean()),
    }
    if images.shape[1] > 1:
        found["saturation"] = float((pictures.amax(1) - pictures.amin(1)).mean())
    return found
