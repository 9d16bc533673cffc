"""Models of open_clip for rewards: found by name, hub tag, file or folder; their preprocessing as tensor code.

Nothing is scored with random weights, cut or stretched checkpoints or an empty tokenizer: each is an error that says
what is missing and where to put it. Checkpoints are read as tensors only (safetensors, or torch.load with
weights_only=True), and a model's JSON can not ask for code of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional

from steerfm.errors import RewardError, TrustError, nearest
from steerfm.images import clamp, resize

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
FOLDER, HUB = "local-dir:", "hf-hub:"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".npz")
LEAST_TOKENS = 0.9  # of the model's vocabulary; below, tokenizer files are missing


@dataclass(frozen=True)
class OpenClip:
    """Hold a model of open_clip with what must go with it: its tokenizer and its preprocessing."""

    model: Any
    tokenizer: Any
    preprocessing: dict[str, Any]

    def tokens_of(self, text: str) -> int:
        """Return how many tokens `text` has, special ones counted, before it is cut to the context length."""
        if hasattr(self.tokenizer, "encode"):
            return len(self.tokenizer.encode(text)) + 2
        return len(self.tokenizer.tokenizer(text)["input_ids"])


def load(model: str, weights: str | Path | None = None, cache_dir: str | Path | None = None) -> OpenClip:
    """Return a pretrained model, in evaluation mode and float32, with its tokenizer and preprocessing.

    `model`: a name such as "ViT-B-32", "hf-hub:org/repository", or a folder in open_clip's published format.
    `weights` (for a name only): a hub tag such as "openai", a file, or such a folder. Raises RewardError.
    """
    import open_clip

    name, pretrained = _source(model, None if weights is None else str(weights))
    cache = None if cache_dir is None else str(cache_dir)
    with _quiet_root():
        try:
            _refuse_code(open_clip.get_model_config(name), name)
            net: Any = open_clip.create_model(
                name,
                pretrained=pretrained,
                force_quick_gelu=_is_quick_gelu(name, pretrained),
                require_pretrained=True,
                weights_only=True,
                cache_dir=cache,
            )
            for file in _given_files(name, pretrained):
                _refuse_stretched(net, file)
            tokenizer = open_clip.get_tokenizer(name, cache_dir=cache)
        except (RewardError, TrustError):
            raise
        except Exception as error:
            raise _explained(error, name, pretrained) from error
    _check_tokenizer(tokenizer, getattr(net, "vocab_size", None), name)
    return OpenClip(net.eval(), tokenizer, dict(net.visual.preprocess_cfg))


def preprocess(images: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return pictures (B, 1 or 3, H, W) in [0, 1] as a model wants them: (B, 3, h, w), float32, differentiable.

    The tensor form of open_clip's own preprocessing: `config` has its size, resize_mode ("shortest", "longest"
    or "squash"), interpolation, fill_color, mean and std. What bicubic overshoots is clamped, gradients are not.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise RewardError(f"CLIP needs pictures (B, 1 or 3, H, W), got the shape {tuple(images.shape)}.")
    size = config["size"]
    target = (size, size) if isinstance(size, int) else (size[0], size[-1])
    mode, method = _resampling(config, target)
    shape = resized_shape((images.shape[2], images.shape[3]), target, mode)
    wide = clamp(resize(images, (images.shape[2], shape[1]), method))  # Pillow's order: rows, clamp, columns, clamp
    pictures = clamp(resize(wide, shape, method))
    fill = config.get("fill_color", 0) / 255 if mode == "longest" else 0.0
    pictures = crop_or_pad(pictures, target, fill).expand(-1, 3, -1, -1)
    mean = pictures.new_tensor(config["mean"]).view(-1, 1, 1)
    std = pictures.new_tensor(config["std"]).view(-1, 1, 1)
    return (pictures - mean) / std


def resized_shape(shape: tuple[int, int], target: tuple[int, int], mode: str) -> tuple[int, int]:
    """Return the (height, width) that a picture is resized to before it is cropped or padded to `target`.

    Rounded as open_clip does: it keeps torchvision's integer part for square targets, else rounds.
    """
    height, width = shape
    if mode == "squash":
        return target
    if mode == "shortest" and target[0] == target[1]:
        short, long = min(shape), max(shape)
        scaled = int(target[0] * long / short)
        return (target[0], scaled) if height <= width else (scaled, target[0])
    pick = max if mode == "longest" else min
    ratio = pick(height / target[0], width / target[1])
    return round(height / ratio), round(width / ratio)


def crop_or_pad(pictures: Tensor, target: tuple[int, int], fill: float) -> Tensor:
    """Return the middle of the pictures, `target` = (height, width) large, padded with `fill` where too small."""
    missing = [max(wanted - had, 0) for wanted, had in zip(target, pictures.shape[-2:], strict=True)]
    if any(missing):
        (high, wide) = missing
        pictures = functional.pad(pictures, (wide // 2, (wide + 1) // 2, high // 2, (high + 1) // 2), value=fill)
    top = round((pictures.shape[-2] - target[0]) / 2)
    left = round((pictures.shape[-1] - target[1]) / 2)
    return pictures[..., top : top + target[0], left : left + target[1]]


def _resampling(config: Mapping[str, Any], target: tuple[int, int]) -> tuple[str, str]:
    """Return (resize mode, interpolation); open_clip resizes for non-square "shortest" targets always bicubic."""
    mode = config.get("resize_mode") or "shortest"
    if mode not in ("shortest", "longest", "squash"):
        raise RewardError(f"The model asks for resize_mode '{mode}'; known are shortest, longest and squash.")
    bilinear = config.get("interpolation") == "bilinear" and not (mode == "shortest" and target[0] != target[1])
    return mode, "bilinear" if bilinear else "bicubic"


def _source(model: str, weights: str | None) -> tuple[str, str | None]:
    """Return open_clip's (model name, pretrained) for what the user wrote; RewardError if it is not there."""
    import open_clip

    name = model.replace("/", "-")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is not None and weights not in tags and Path(weights).is_dir():
        return _folder(Path(weights)), None
    if name not in open_clip.list_models():
        if weights is not None and (model.startswith((HUB, FOLDER)) or Path(model).is_dir()):
            raise RewardError(f"'{model}' brings its own weights: leave out weights='{weights}'.")
        if model.startswith(HUB):
            return model, None
        if model.startswith(FOLDER) or Path(model).is_dir():
            return _folder(Path(model.removeprefix(FOLDER))), None
        raise RewardError(
            f"No CLIP model '{model}': it is neither a folder here nor a name that open_clip knows"
            f"{nearest(model, open_clip.list_models()) or '; open_clip.list_models() lists them.'}"
        )
    if weights is None:
        raise RewardError(f"'{model}' has no weights: pass weights= a file, a folder or one of {', '.join(tags)}.")
    if weights not in tags and not Path(weights).is_file():
        if Path(weights).suffix in WEIGHT_SUFFIXES or "/" in weights:
            raise RewardError(
                f"No file {weights}: put the weights of '{model}' there, or pass one of {', '.join(tags)}."
            )
        raise RewardError(f"'{model}' has no weights '{weights}'{nearest(weights, tags)} It has: {', '.join(tags)}.")
    return name, weights


def _folder(folder: Path) -> str:
    """Return open_clip's name of a folder that holds a config and weights; RewardError names the missing file."""
    if not (folder / CONFIG_FILE).is_file():
        raise RewardError(f"{folder} has no {CONFIG_FILE}: put a model in open_clip's published format there.")
    if not any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir()):
        raise RewardError(f"{folder} has no weights: put {WEIGHTS_FILE} there.")
    return f"{FOLDER}{folder}"


def _is_quick_gelu(name: str, pretrained: str | None) -> bool:
    """Say whether a hub tag's weights were trained with QuickGELU; open_clip itself only warns of a mismatch."""
    from open_clip.pretrained import get_pretrained_cfg

    known = {} if name.startswith((HUB, FOLDER)) or pretrained is None else get_pretrained_cfg(name, pretrained)
    return bool(known.get("quick_gelu", False))


def _refuse_code(config: Any, name: str) -> None:
    """Raise TrustError if a model's JSON asks for code to be run from its folder or repository."""
    if isinstance(config, Mapping):
        if config.get("trust_remote_code"):
            raise TrustError(
                f"The config of '{name}' asks to run code that comes with it (trust_remote_code): refused."
            )
        for value in config.values():
            _refuse_code(value, name)


def _check_tokenizer(tokenizer: Any, vocabulary: int | None, name: str) -> None:
    """Raise RewardError for a tokenizer whose files are missing: transformers then makes an almost empty one."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None and vocabulary and len(inner) < LEAST_TOKENS * vocabulary:
        raise RewardError(
            f"The tokenizer of '{name}' knows {len(inner)} of {vocabulary} tokens: its files are missing. "
            "Put tokenizer.json (or vocab and merges files) beside the weights."
        )


def _explained(error: Exception, name: str, pretrained: str | None) -> RewardError:
    """Return the one sentence for a model that open_clip could not load."""
    reason = " ".join(str(error).split())[:300]
    if name.startswith(HUB):
        return _absent(f"'{name}'", name.removeprefix(HUB), f"{CONFIG_FILE} and {WEIGHTS_FILE}", "model=FOLDER", reason)
    if not name.startswith(FOLDER) and pretrained is not None and not Path(pretrained).is_file():
        return _absent_tag(name, pretrained, reason)
    where = name.removeprefix(FOLDER) if name.startswith(FOLDER) else pretrained
    if "state_dict" in reason:
        return RewardError(f"The weights in {where} do not fit the model '{name}': {reason}")
    if "weights_only" in reason or "Weights only" in reason:
        return RewardError(f"{where} holds more than tensors and was not opened: convert it to safetensors. ({reason})")
    if isinstance(error, json.JSONDecodeError):
        return RewardError(f"{where}/{CONFIG_FILE} is no JSON: {reason}")
    return RewardError(f"The model in {where} cannot be loaded ({type(error).__name__}: {reason}): is the file whole?")


def _absent_tag(name: str, tag: str, reason: str) -> RewardError:
    from open_clip.pretrained import get_pretrained_cfg

    known = get_pretrained_cfg(name, tag)
    repository, _, file = known.get("hf_hub", "").rpartition("/")
    file = file or (WEIGHTS_FILE if repository else known.get("url", "").rpartition("/")[2])
    pass_on = f"weights=FILE{' and a -quickgelu model name' if known.get('quick_gelu') else ''}"
    return _absent(f"The weights '{tag}' of '{name}'", repository, file, pass_on, reason)


def _absent(what: str, repository: str, files: str, pass_on: str, reason: str) -> RewardError:
    from huggingface_hub import constants

    source = f" of the hub repository {repository}" if repository else ""
    return RewardError(
        f"{what} is not on this machine and cannot be downloaded: put {files}{source} where you like and pass "
        f"{pass_on}, or into the hub's cache {constants.HF_HUB_CACHE}. ({reason})"
    )


def _given_files(name: str, pretrained: str | None) -> list[Path]:
    """Return the files of weights here that the user named; none for those of the hub."""
    if name.startswith(FOLDER):
        folder = Path(name.removeprefix(FOLDER))
        return sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    return [Path(pretrained)] if pretrained is not None and Path(pretrained).is_file() else []


def _refuse_stretched(net: Any, file: Path) -> None:
    """Refuse position embeddings of another size than the model's, which open_clip has stretched without a word."""
    from open_clip.factory import load_state_dict

    given = {} if file.suffix == ".npz" else load_state_dict(str(file), weights_only=True)
    for key, own in net.state_dict().items():
        found = given.get(key, given.get(key.removeprefix("text.")))  # as older files call the text tower's
        if key.endswith("positional_embedding") and found is not None and found.shape != own.shape:
            raise RewardError(
                f"{file} was learnt for pictures or texts of another size: its '{key}' is {tuple(found.shape)}, and "
                f"{tuple(own.shape)} is needed. Give the model that it belongs to."
            )


@contextlib.contextmanager
def _quiet_root() -> Iterator[None]:
    """Keep open_clip's calls of logging.info() from configuring the root logger of whoever uses us."""
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)
    try:
        yield
    finally:
        root.removeHandler(silent)
