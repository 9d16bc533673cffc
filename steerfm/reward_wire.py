"""How pictures, scores and gradients are written between a reward and whoever asks it over HTTP, and read unbelieving.

Two forms. JSON carries PNG pictures (8 bits) and scores. Safetensors carry floating-point pictures, scores and, where
asked for, the gradient of the summed total to the pictures: a reward scores each picture on its own, so a backward
pass multiplies it by one number a picture. Prompts are what the reward reads: captions, without pictures' paths.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from steerfm.errors import RewardError
from steerfm.files import is_number
from steerfm.images import to_uint8
from steerfm.reward import Reward, Scores, checked, parts_of
from steerfm.types import Values

JSON, TENSORS = "application/json", "application/vnd.safetensors"
FORMS = (JSON, TENSORS)
DTYPES = (torch.float32, torch.float64)
SLACK = 1e-3  # how far outside [0, 1] rounding may take a pixel
MARKS = 2**22  # commas and brackets of a JSON text, each of which may cost a hundred bytes of memory
PART = "part/"  # before the name of a part, where it names a tensor


class Refused(RewardError):
    """Say why a request or an answer is refused; `status` is what HTTP calls it."""

    def __init__(self, sentence: str, status: int = 400) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """Hold what one request may be: bytes, pictures, pixels of all of them together, characters of each prompt."""

    body: int = 2**28
    pictures: int = 256
    pixels: int = 2**26
    prompt: int = 10_000


@dataclass(frozen=True)
class Request:
    """Hold what is to be scored: images (B, C, H, W) in [0, 1], B prompts, and whether the gradient is wanted."""

    images: Tensor
    prompts: list[str]
    gradient: bool = False


@dataclass(frozen=True)
class Reply:
    """Hold the scores of a request, and the gradient of their summed total (B, C, H, W) where it was wanted."""

    scores: Scores
    gradient: Tensor | None = None


@dataclass(frozen=True)
class Declared:
    """Hold what a reward declares (see Reward), and what its parts declare where it is made of others.

    abstains: NaN may stand among its values, for one that is made of others also because a part's does.
    """

    name: str
    differentiable: bool
    higher_is_better: bool
    needs_prompt: bool
    native_range: tuple[float, float] | None
    abstains: bool
    parts: tuple[Declared, ...] = ()


def declared(reward: Reward, name: str | None = None) -> Declared:
    """Return what a reward declares, under its own name or another."""
    parts = parts_of(reward) if reward.members else []
    return Declared(
        name or reward.name,
        reward.differentiable,
        reward.higher_is_better,
        reward.needs_prompt,
        reward.native_range,
        reward.abstains or any(part.abstains for part in parts),
        tuple(declared(part) for part in parts),
    )


def write_declared(each: Declared) -> dict[str, Any]:
    """Return it as plain values; a bound that is infinite is None, which JSON has."""
    bounds = each.native_range
    return {
        **vars(each),
        "native_range": bounds and [bound if math.isfinite(bound) else None for bound in bounds],
        "parts": [write_declared(part) for part in each.parts],
    }


def read_declared(values: Any) -> Declared:
    """Read what `write_declared` wrote. Raises Refused."""
    flags = ("differentiable", "higher_is_better", "needs_prompt", "abstains")
    if not (isinstance(values, dict) and isinstance(values.get("name"), str)):
        raise Refused(f"A reward is described by an object with its name, got {_short(values)}.")
    given = {"higher_is_better": True, "abstains": False, **values}
    wrong = next((flag for flag in flags if not isinstance(given.get(flag), bool)), None)
    if wrong is not None:
        raise Refused(f"'{wrong}' of the reward '{_short(given['name'])}' is true or false, got {given.get(wrong)!r}.")
    parts = given.get("parts", [])
    if not isinstance(parts, list) or any(isinstance(part, dict) and part.get("parts") for part in parts):
        raise Refused(f"The parts of the reward '{_short(given['name'])}' are a list of rewards without parts.")
    return Declared(
        given["name"],
        **{flag: given[flag] for flag in flags},
        native_range=_range(given.get("native_range")),
        parts=tuple(read_declared(part) for part in parts),
    )


def read_listing(body: bytes) -> dict[str, Declared]:
    """Read the answer {"rewards": [...]} of GET /rewards, by name. Raises Refused."""
    listed = _object(body).get("rewards")
    if not isinstance(listed, list):
        raise Refused("'rewards' is a list of objects.")
    return {each.name: each for each in map(read_declared, listed)}


def write_request(request: Request, form: str) -> bytes:
    """Return a request in one of the two FORMS. JSON rounds pixels to 8 bits, and cannot ask for the gradient."""
    if form == JSON:
        pictures = [base64.b64encode(_png(pixels)).decode() for pixels in _pixels(request.images)]
        return json.dumps({"images": pictures, "prompts": request.prompts}).encode()
    more = json.dumps({"prompts": request.prompts, "gradient": request.gradient})
    return safetensors.torch.save({"images": _plain(request.images)}, metadata={"request": more})


def read_request(body: bytes, form: str, limits: Limits) -> Request:
    """Read a request in one of the two FORMS. Raises Refused, with the status, for anything that is not sound."""
    if form == JSON:
        values = _object(body)
        if values.get("gradient"):
            raise Refused(f"Gradients are given for floating-point pictures: send {TENSORS}.")
        prompts, encoded = _prompts(values, limits), values.get("images")
        if not (isinstance(encoded, list) and all(isinstance(each, str) for each in encoded)):
            raise Refused("'images' is a list of PNG files, each in base64.")
        _check_count(len(encoded), prompts, limits)
        return Request(_decoded(encoded, limits), prompts)
    tensors, more = _tensors(body, "images")
    values = _object(more.encode())
    prompts, gradient, images = _prompts(values, limits), values.get("gradient", False), tensors["images"]
    if not isinstance(gradient, bool):
        raise Refused(f"'gradient' is true or false, got {_short(gradient)}.")
    if images.dtype not in DTYPES or images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        kind = str(images.dtype).removeprefix("torch.")
        raise Refused(
            f"'images' has the shape (B, 1 or 3, H, W) and is float32 or float64, got {tuple(images.shape)}, {kind}."
        )
    _check_count(len(images), prompts, limits)
    _check_pixels(images.numel() // images.shape[1], limits)
    low, high = (float(bound) for bound in images.aminmax())
    if not (low >= -SLACK and high <= 1 + SLACK):
        raise Refused(f"Pixels lie in [0, 1], got values in [{low:g}, {high:g}]: clamp the pictures.", 422)
    return Request(images, prompts, gradient)


def write_reply(reply: Reply, form: str) -> bytes:
    """Return scores in one of the two FORMS; NaN, no opinion, is null in JSON."""
    total, parts = reply.scores
    if form == JSON:
        named = {name: _nullable(values) for name, values in parts.items()}
        return json.dumps({"total": _nullable(total), "parts": named}).encode()
    tensors = {"total": total, **{PART + name: values for name, values in parts.items()}}
    if reply.gradient is not None:
        tensors["gradient"] = reply.gradient
    return safetensors.torch.save({name: _plain(values) for name, values in tensors.items()})


def read_reply(body: bytes, form: str, request: Request, reward: Declared) -> Reply:
    """Read the answer to a request to a reward that declared this much. Raises RewardError unless it is sound."""
    gradient = None
    if form == JSON:
        values = _object(body)
        given = values.get("parts")
        if not isinstance(given, dict):
            raise Refused("'parts' is an object of lists of numbers.")
        total, parts = _values(values.get("total")), {name: _values(each) for name, each in given.items()}
    else:
        tensors, _ = _tensors(body, "total")
        total = tensors["total"]
        parts = {name[len(PART) :]: each for name, each in tensors.items() if name.startswith(PART)}
        gradient = tensors.get("gradient")
    missing = [part.name for part in reward.parts if part.name not in parts]
    if missing or not (reward.parts or len(parts) == 1):
        names = ", ".join(_short(part.name) for part in reward.parts) or "its values alone"
        raise Refused(f"The parts of '{_short(reward.name)}' are {names}, got {len(parts)} others.")
    count, silent = len(request.images), reward.abstains
    for name, each in parts.items():
        checked(each, _short(name), count, silent)
    if request.gradient:
        _check_gradient(gradient, request.images)
    return Reply(Scores(checked(total, reward.name, count, silent), parts), gradient if request.gradient else None)


def _check_gradient(gradient: Tensor | None, images: Tensor) -> None:
    if gradient is None:
        raise Refused("A gradient was asked for, and none came.")
    if gradient.shape != images.shape or gradient.dtype not in DTYPES:
        raise Refused(f"A gradient has the shape {tuple(images.shape)} of its pictures, got {tuple(gradient.shape)}.")
    if not bool(gradient.isfinite().all()):
        raise Refused("The gradient is not finite: look for sqrt, norm or division at zero in the reward.")


def _check_count(count: int, prompts: Sequence[str], limits: Limits) -> None:
    if count == 0 or count != len(prompts):
        raise Refused(f"There is one prompt a picture, and at least one picture, got {count} and {len(prompts)}.")
    if count > limits.pictures:
        raise Refused(f"A request has at most {limits.pictures} pictures, got {count}: send fewer at once.", 413)


def _check_pixels(count: int, limits: Limits) -> None:
    if count > limits.pixels:
        raise Refused(f"A request has at most {limits.pixels} pixels, got {count}: send fewer pictures at once.", 413)


def _prompts(values: Mapping[str, Any], limits: Limits) -> list[str]:
    prompts = values.get("prompts")
    if not (isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)):
        raise Refused("'prompts' is a list of strings, one a picture.")
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest > limits.prompt:
        raise Refused(f"A prompt has at most {limits.prompt} characters, got {longest}: shorten it.", 413)
    try:
        "".join(prompts).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which no tokenizer takes
        raise Refused("A prompt has half of a character in it: send it in UTF-8.") from error
    return prompts


def _object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in `body`. Raises Refused."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MARKS:
        raise Refused(f"A JSON text has at most {MARKS} commas and brackets: send less at once.", 413)
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"This is no JSON ({_short(error)}).") from error
    if not isinstance(values, dict):
        raise Refused(f"A JSON object was expected, got {type(values).__name__}.")
    return values


def _tensors(body: bytes, needed: str) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a safetensors file, one of which is needed, and its metadata called "request"."""
    length = int.from_bytes(body[:8], "little")
    if length > len(body) - 8:
        raise Refused("These are no safetensors: they are shorter than their header.")
    header = _object(body[8 : 8 + length])
    try:
        tensors = safetensors.torch.load(body)
    except Exception as error:  # the library's own error, and what a type that PyTorch lacks makes it raise
        raise Refused(f"These safetensors cannot be read ({_short(error)}).") from error
    if needed not in tensors:
        raise Refused(f"The safetensors lack the tensor '{needed}'.")
    return tensors, (header.get("__metadata__") or {}).get("request", "")


def _decoded(encoded: Sequence[str], limits: Limits) -> Tensor:
    """Return PNG files in base64 as pictures (B, 1 or 3, H, W) in [0, 1], float32, checked before they are decoded."""
    from PIL import Image

    pictures, pixels = [], 0
    for i, text in enumerate(encoded):
        try:
            data = base64.b64decode(text, validate=True)
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                pixels += image.width * image.height
                _check_pixels(pixels, limits)
                if image.mode not in ("L", "RGB"):
                    raise Refused(f"Picture {i} is of Pillow's mode {image.mode}: save it as 8-bit RGB or grey.")
                image.verify()  # its checksums find what decoding lets pass; what was verified must be reopened
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                pictures.append(np.atleast_3d(np.asarray(image)))
        except (Refused, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise Refused(f"Picture {i} has too many pixels ({_short(error)}).", 413) from error
        except Exception as error:  # what a damaged file makes Pillow raise is anybody's guess
            raise Refused(f"Picture {i} is no PNG in base64 ({_short(error) or type(error).__name__}).") from error
        if pictures[i].shape != pictures[0].shape:
            raise Refused(f"Picture {i} is {pictures[i].shape} and the first one {pictures[0].shape}: send one size.")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().contiguous() / 255


def _pixels(images: Tensor) -> list[np.ndarray]:
    """Return pictures (B, C, H, W) as arrays of 8 bits, (H, W) for one channel and (H, W, 3) for three."""
    return [pixels[..., 0] if images.shape[1] == 1 else pixels for pixels in to_uint8(images)]


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1)  # the network is quicker than the packer
    return stream.getvalue()


def _plain(values: Tensor) -> Tensor:
    """Return a tensor as it is sent: on the CPU, in float32 or float64."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return values.detach().to("cpu", dtype).contiguous()


def _nullable(values: Values) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _values(given: Any) -> Values:
    """Return a list of numbers and nulls as values (B,), float32, with NaN for null. Raises Refused."""
    if not isinstance(given, list) or any(isinstance(v, bool) or not isinstance(v, int | float | None) for v in given):
        raise Refused("Scores are lists of numbers, null for no opinion.")
    try:
        return torch.tensor([math.nan if value is None else float(value) for value in given], dtype=torch.float32)
    except (OverflowError, RuntimeError) as error:
        raise Refused("A score is too large for a floating-point number.") from error


def _range(bounds: Any) -> tuple[float, float] | None:
    if bounds is None:
        return None
    if not (isinstance(bounds, list) and len(bounds) == 2 and all(b is None or is_number(b) for b in bounds)):
        raise Refused(f"'native_range' is the least and the greatest value, got {_short(bounds)}.")
    low, high = bounds
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))


def _short(value: Any) -> str:
    """Return the start of something from outside on one line, with nothing that a terminal would obey."""
    return "".join(each for each in " ".join(str(value).split()) if each.isprintable())[:200]
