"""Pictures as conditions, for spatial control: "a red circle @ sketches/circle.png"."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from steerfm.building import remembered
from steerfm.errors import ConfigError, DataError
from steerfm.images import resize, to_model
from steerfm.types import Condition

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # no format that runs another program, as EPS
MAX_PIXELS = 2**26  # a larger picture is never decoded
MAX_BYTES = 8 * MAX_PIXELS  # four channels of 16 bits, uncompressed
_FILE = r"\S(?:(?!\s@\s).)*\.(?:a?png|jpe?g|webp|gif|bmp|tiff?|p[gp]m|avif)"
_PROMPT = re.compile(rf"(?:(.*)\s)?@\s+({_FILE})\s*", re.IGNORECASE | re.DOTALL)
_ALMOST = re.compile(rf"(?:^|\s)@(?:\s|$|{_FILE}\s*$)", re.IGNORECASE)


def split_prompt(prompt: str) -> tuple[str, str | None]:
    """Return the caption of a prompt, and the path of its picture or None: "caption @ path.png", either part alone.

    Only a last " @ " before the name of a picture file parts them, so that "coffee @ noon" is all caption. A path may
    have spaces, and no " @ ".
    """
    found = _PROMPT.fullmatch(prompt)
    return (prompt, None) if found is None else ((found[1] or "").strip(), found[2].strip())


def parts_of(prompts: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return caption and picture of each prompt. Raises DataError where a picture was meant and none is named."""
    parts = [split_prompt(prompt) for prompt in prompts]
    for (caption, _), prompt in zip(parts, prompts, strict=True):
        _check_caption(caption, prompt)
    return parts


def captions_of(prompts: Sequence[str]) -> Sequence[str]:
    """Return prompts without the paths of their pictures, which no reward should read."""
    if not any(isinstance(prompt, str) and _PROMPT.fullmatch(prompt) for prompt in prompts):
        return prompts
    return [split_prompt(prompt)[0] for prompt in prompts]


def joined(first: Condition, second: Condition) -> Condition:
    """Return the tensors of both conditions in one. Raises ConfigError where a name occurs in both."""
    both = sorted(set(first.tensors) & set(second.tensors))
    if both:
        raise ConfigError(f"Two conditioners both give '{both[0]}': only one of them can be read, so leave one out.")
    return Condition({**first.tensors, **second.tensors})


@remembered
class Pictures(nn.Module):
    """Turn "caption @ path" into a picture beside the state, Condition(picture=(B, channels + 1, H, W) float32).

    channels: 3, or 1 for grey. size: of the state, one number or (height, width); pictures are stretched to it, so
    that all of them lies on all of the state. Values are in [-1, 1], and the last channel is 1 where there is a
    picture; zeros are none. captions: the conditioner of the captions, whose tensors join the picture; without one
    they are not read. The null condition is no picture and the null caption. Networks take it with
    `UNet(picture_channels=channels)`. Paths start at the current folder.
    """

    def __init__(self, channels: int, size: int | Sequence[int], captions: nn.Module | None = None) -> None:
        super().__init__()
        shape = (size, size) if isinstance(size, int) else tuple(size)
        if channels not in (1, 3) or len(shape) != 2 or min(shape) < 1:
            raise ConfigError(
                f"Pictures have 1 or 3 channels and a size of one number or [height, width], got {channels} and {size}."
            )
        self.channels, self.size, self.captions = channels, (int(shape[0]), int(shape[1])), captions
        self._warned = False

    def forward(self, prompts: Sequence[str]) -> Condition:
        """Return the condition of B prompts. Raises DataError, naming the file, for one that is no good picture."""
        parts = parts_of(prompts)
        picture = self._none(len(prompts))
        for i, (_, path) in enumerate(parts):
            if path is not None:
                picture[i, :-1] = read_picture(path, self.channels, self.size)
                picture[i, -1] = 1
        captions = [caption for caption, _ in parts]
        if self.captions is None:
            self._warn(captions)
            return Condition({"picture": picture})
        return joined(Condition({"picture": picture}), self.captions(captions))

    def null(self, n: int) -> Condition:
        """Return the null condition for n samples: no picture and no caption."""
        none = Condition({"picture": self._none(n)})
        return none if self.captions is None else joined(none, self.captions.null(n))  # type: ignore[operator]

    def _none(self, n: int) -> Tensor:
        return torch.zeros(n, self.channels + 1, *self.size, dtype=torch.float32)

    def _warn(self, captions: Sequence[str]) -> None:
        unread = next((caption for caption in captions if caption), None)
        if unread and not self._warned:
            self._warned = True
            log.warning("The map reads pictures and no captions, so '%s' does not reach it.", unread)


def read_picture(path: str, channels: int, size: tuple[int, int]) -> Tensor:
    """Return a picture (channels, *size) in [-1, 1], of what `read_pixels` returns."""
    pixels = read_pixels(path, channels)
    resized = resize(torch.from_numpy(pixels).permute(2, 0, 1)[None], size)[0]
    return to_model(resized.clamp(0, 1)).expand(channels, -1, -1)


def read_pixels(path: str, channels: int) -> np.ndarray[Any, Any]:
    """Return a picture (H, W, 1 or channels) in [0, 1]: upright, on white where transparent, the first of its frames.

    Raises DataError for a file that is missing, too large, damaged or no picture.
    """
    from PIL import Image, UnidentifiedImageError

    file = Path(path)
    try:
        if not file.is_file():
            raise DataError(f"There is no picture '{path}' below {Path.cwd()}: write the path of a file after the '@'.")
        if file.stat().st_size > MAX_BYTES:
            raise DataError(f"The picture '{path}' is a file of more than {MAX_BYTES} bytes: make it smaller.")
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"The picture '{path}' has more than {MAX_PIXELS} pixels: make it smaller.")
            if image.format == "PNG":  # its checksums find what decoding lets pass; what was verified must be reopened
                image.verify()
        with Image.open(file, formats=FORMATS) as image:
            return _pixels(image, channels)
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"The file '{path}' is no picture: give one of {', '.join(FORMATS)}.") from error
    except Exception as error:  # what a damaged file makes Pillow raise is anybody's guess
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"The picture '{path}' cannot be read ({reason}): save it again.") from error


def _pixels(image: Image.Image, channels: int) -> np.ndarray[Any, Any]:
    """Return a picture (H, W, 1 or channels) in [0, 1], float32."""
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        return np.asarray(upright).astype(np.float32)[..., None] / 65535
    if upright.mode in ("I", "F"):
        raise ValueError(f"the range of its numbers is unknown, Pillow's mode {upright.mode}")
    if upright.has_transparency_data:
        cut_out = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", cut_out.size, "white"), cut_out)
    flat = upright.convert("RGB").convert("L" if channels == 1 else "RGB")
    return np.asarray(flat).astype(np.float32).reshape(flat.height, flat.width, -1) / 255


def _check_caption(caption: str, prompt: str) -> None:
    """Raise DataError where a picture was meant and would be read as words."""
    if _ALMOST.search(caption):
        raise DataError(
            f"The prompt '{prompt}' has an '@' without a picture: write 'caption @ file.png', one file a prompt, and "
            "another word than '@' in a caption."
        )
