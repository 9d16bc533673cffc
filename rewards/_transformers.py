"""Models of transformers for rewards: found in a folder or on the hub; their preprocessing as tensor code.

Nothing is scored with weights made up for missing keys, with an empty tokenizer or with code that comes with a
model: each is an error that says what is missing and where to put it. Offline is what HF_HUB_OFFLINE=1 says, or a
hub that cannot be reached; whatever lies in the hub's cache is then still found.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfm.errors import RewardError
from steerfm.images import clamp, resize

CONFIG_FILES = ("config.json",)
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")
LEAST_TOKENS = 0.9  # of the model's vocabulary; below, tokenizer files are missing
BILINEAR, BICUBIC = 2, 3  # Pillow's numbers


@dataclass(frozen=True)
class Preprocessing:
    """Prepare pictures as an image processor of transformers does, in float32, differentiable.

    `size` is (height, width), or one number for the shorter side; `crop` (height, width) is cut from the middle.
    """

    size: tuple[int, int] | int
    crop: tuple[int, int] | None
    method: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Return pictures (B, 1 or 3, H, W) in [0, 1] as the model wants them; (B, 3, h, w).

        What bicubic overshoots is clamped, gradients are not. Raises RewardError for any other shape.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise RewardError(f"This model needs pictures (B, 1 or 3, H, W), got the shape {tuple(images.shape)}.")
        height, width = self.resized((images.shape[2], images.shape[3]))
        pictures = resize_like_pillow(images, (height, width), self.method)
        if self.crop is not None:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            pictures = pictures[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (pictures.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pictures.expand(-1, 3, -1, -1) - mean) / std

    def resized(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) that a picture of this shape is resized to; transformers drops fractions."""
        if not isinstance(self.size, int):
            return self.size
        height, width = shape
        if height <= width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size


def resize_like_pillow(images: Tensor, shape: tuple[int, int], method: str) -> Tensor:
    """Resize pictures (B, C, H, W) in [0, 1] to (height, width): Pillow's order, rows, clamp, columns, clamp."""
    return clamp(resize(clamp(resize(images, (images.shape[2], shape[1]), method)), shape, method))


def find_file(
    source: str | Path, names: Sequence[str], option: str = "model", cache_dir: str | Path | None = None
) -> Path:
    """Return the first of `names` that a folder, or a hub repository "org/name" (with its cache), has.

    Raises RewardError that names the first file and `option`, the argument that takes a folder.
    """
    folder = Path(source).expanduser()
    if folder.exists():
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
            raise RewardError(f"{folder} has no {names[0]}{others}: put it there, or pass another {option}=.")
        return found
    return _from_hub(str(source), names, option, cache_dir)


def find_weights(source: str | Path, names: Sequence[str], cache_dir: str | Path | None = None) -> Path:
    """Return `source` if it is a file, else what `find_file` finds for the option "weights"."""
    file = Path(source).expanduser()
    return file if file.is_file() else find_file(source, names, "weights", cache_dir)


def load_model(
    kind: str,
    source: str | Path,
    *,
    unused: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    option: str = "model",
    cache_dir: str | Path | None = None,
) -> Any:
    """Return a pretrained model of transformers' class `kind`, in evaluation mode and of the given dtype.

    Every key of the checkpoint is used, or starts with one of `unused`, which are dropped by name; every parameter
    is found. Raises RewardError otherwise, naming a key or a file.
    """
    import transformers

    for names in (CONFIG_FILES, WEIGHT_FILES):
        find_file(source, names, option, cache_dir)
    with explained(source), _quiet():
        model, report = getattr(transformers, kind).from_pretrained(
            _place(source),
            dtype=dtype,
            trust_remote_code=False,
            cache_dir=cache_dir,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below by name
        )
    _check_keys(report, unused, source)
    return model.eval()


def load_tokenizer(
    source: str | Path, vocabulary: int, *, option: str = "model", cache_dir: str | Path | None = None
) -> Any:
    """Return the tokenizer of a folder or a hub id for a model that knows `vocabulary` tokens.

    Raises RewardError where files are missing, of which transformers would make an almost empty one, or where it
    knows more tokens than the model.
    """
    from transformers import AutoTokenizer

    find_file(source, TOKENIZER_FILES, option, cache_dir)
    with explained(source), _quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(_place(source), trust_remote_code=False, cache_dir=cache_dir)
    check_tokenizer(len(tokenizer), vocabulary, source)
    return tokenizer


def load_preprocessing(
    source: str | Path, *, option: str = "model", cache_dir: str | Path | None = None
) -> Preprocessing:
    """Return the preprocessing that a folder or a hub id declares. Raises RewardError if it is missing or another."""
    return preprocessing_of(load_image_processor(source, option=option, cache_dir=cache_dir), source)


def load_image_processor(source: str | Path, *, option: str = "model", cache_dir: str | Path | None = None) -> Any:
    """Return transformers' image processor of a folder or a hub id. Raises RewardError if it is missing."""
    from transformers import AutoImageProcessor

    find_file(source, PICTURE_FILES, option, cache_dir)
    with explained(source), _quiet():
        return AutoImageProcessor.from_pretrained(_place(source), trust_remote_code=False, cache_dir=cache_dir)


def preprocessing_of(processor: Any, source: str | Path) -> Preprocessing:
    """Return what an image processor does as tensor code. Raises RewardError for steps that this cannot express."""
    size = _sides(processor.size)
    crop = _sides(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
    steps = [getattr(processor, step, True) for step in ("do_resize", "do_rescale", "do_normalize")]
    method = {BILINEAR: "bilinear", BICUBIC: "bicubic"}.get(int(processor.resample))
    by_255 = abs(255 * getattr(processor, "rescale_factor", 1 / 255) - 1) < 1e-6
    padded = bool(getattr(processor, "do_pad", False))
    if size is None or method is None or isinstance(crop, int) or not all((*steps, by_255, not padded)):
        raise RewardError(
            f"The preprocessing of '{source}' ({type(processor).__name__}) is none that steerfm knows: it should "
            "resize to a size or a shortest edge, bilinear or bicubic, cut out the middle, divide by 255 and normalise."
        )
    if crop is not None and any(cut > side for cut, side in zip(crop, _both(size), strict=True)):
        raise RewardError(f"The preprocessing of '{source}' cuts {crop} out of {_both(size)}, which is smaller.")
    return Preprocessing(size, crop, method, tuple(processor.image_mean), tuple(processor.image_std))


def check_tokenizer(known: int, vocabulary: int, source: str | Path) -> None:
    """Raise RewardError for a tokenizer of another model, or one whose files are missing (it is almost empty)."""
    if not LEAST_TOKENS * vocabulary <= known <= vocabulary:
        raise RewardError(
            f"The tokenizer of '{source}' knows {known} tokens and the model {vocabulary}: its files are missing or "
            "another model's. Put tokenizer.json (or vocab and merges) and tokenizer_config.json beside the weights."
        )


def read_tensors(file: str | Path) -> Mapping[str, Any]:
    """Return what a safetensors file, or a file of torch that holds nothing but tensors, holds, on the CPU.

    Raises RewardError for a damaged file, one that holds code, and one that holds no table.
    """
    from safetensors.torch import load_file

    file = Path(file)
    with explained(file):
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping):
        raise RewardError(f"{file} holds {type(found).__name__}, not a table of tensors: is it the right file?")
    return found


@contextlib.contextmanager
def explained(source: str | Path) -> Iterator[None]:
    """Turn whatever a library makes of damaged files into one sentence."""
    try:
        yield
    except RewardError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        if "weights_only" in reason or "Weights only" in reason:
            raise RewardError(
                f"{source} holds more than tensors and was not opened: use the published file. ({reason})"
            ) from error
        raise RewardError(
            f"{source} cannot be loaded ({type(error).__name__}: {reason}): is every file whole, and the right one?"
        ) from error


def _from_hub(source: str, names: Sequence[str], option: str, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

    reason = ""
    try:
        for name in names:
            if isinstance(cached := try_to_load_from_cache(source, name, cache_dir), str):
                return Path(cached)
        for name in names:
            try:
                return Path(hf_hub_download(source, name, cache_dir=cache_dir))
            except RemoteEntryNotFoundError as error:  # it may have the next
                reason = _first_line(error)
    except HFValidationError as error:
        raise RewardError(f"There is no folder {source}: put {names[0]} there, or pass another {option}=.") from error
    except Exception as error:  # no access or no network: each has a class of its own
        reason = _first_line(error)
    raise RewardError(
        f"{names[0]} of '{source}' is not on this machine and cannot be downloaded: put it into a folder and pass "
        f"{option}=FOLDER, or into the hub's cache {cache_dir or constants.HF_HUB_CACHE}. ({reason})"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _place(source: str | Path) -> str:
    folder = Path(source).expanduser()
    return str(folder if folder.exists() else source)


def _check_keys(report: Mapping[str, Any], unused: Sequence[str], source: str | Path) -> None:
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if missing:
        raise RewardError(
            f"The weights of '{source}' do not fit: keys are missing or of another shape ({len(missing)}, such as "
            f"{missing[0]}). Use the published file."
        )
    strange = sorted(key for key in report["unexpected_keys"] if not key.startswith(tuple(unused)))
    if strange:
        raise RewardError(
            f"The weights of '{source}' do not fit: keys belong to another model ({len(strange)}, such as "
            f"{strange[0]}). Use the published file."
        )


def _sides(size: Any) -> tuple[int, int] | int | None:
    """Return transformers' size as (height, width) or the shorter side; None for what is neither."""
    given = {key: value for key, value in dict(size).items() if value is not None} if size else {}
    if set(given) == {"height", "width"}:
        return given["height"], given["width"]
    return given["shortest_edge"] if set(given) == {"shortest_edge"} else None


def _both(size: tuple[int, int] | int) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from listing keys, which are checked here, and from drawing progress bars."""
    from transformers.utils import logging as theirs

    logger = logging.getLogger("transformers")
    level, bars = logger.level, theirs.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            theirs.enable_progress_bar()
