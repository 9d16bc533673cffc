"""Pretrained text encoders, one prompt at a time: transformers' T5 and CLIP, and the text towers of open_clip.

Weights are read as tensors only (safetensors for transformers, `weights_only` for open_clip), no code that comes with
a model is run, and nothing is encoded by random weights or an almost empty tokenizer: each is an error that says what
is missing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from steerfm.errors import CheckpointError, ConfigError, TrustError, nearest
from steerfm.logs import quiet

OPEN_CLIP_CONFIG = "open_clip_config.json"
FOLDER, HUB = "local-dir:", "hf-hub:"
LEAST_TOKENS = 0.9  # of the model's vocabulary; below, tokenizer files are missing
ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}  # transformers' model types and the class that reads text alone


class Embedded(NamedTuple):
    """One prompt: the embeddings (n, D) of the n tokens that were kept, and how many tokens it had."""

    tokens: Tensor
    asked: int


class TextModel(Protocol):
    """A frozen encoder: `dimension` of a token, `most` tokens it can read (None: any number), its `module`."""

    dimension: int
    most: int | None
    module: nn.Module

    def embed(self, prompt: str, length: int) -> Embedded:
        """Return the embeddings of the first `length` tokens of a prompt, special ones counted."""
        ...


def load_text_model(encoder: str, weights: str | None = None) -> TextModel:
    """Return an encoder in float32 and evaluation mode, without gradients; the global random state is left alone.

    encoder: a folder (with transformers' config.json or open_clip's open_clip_config.json), a hub id for
    transformers such as "google/t5-v1_1-base", "hf-hub:org/name" for open_clip, or a name that open_clip knows, with
    `weights` (a hub tag or a file). Raises CheckpointError, ConfigError or TrustError.
    """
    found = _open_clip_source(encoder, weights)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), quiet(), _root_handled():
        model = _Transformers(encoder) if found is None else _OpenClip(*found)
    model.module = model.module.eval().float().requires_grad_(False)
    return model


class _Transformers:
    """A text encoder of transformers; prompts are read without padding."""

    def __init__(self, source: str) -> None:
        import transformers
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            if config.model_type not in ENCODERS:
                known = ", ".join(ENCODERS)
                raise ConfigError(f"'{source}' is of the type '{config.model_type}', and text is read by {known} only.")
            encoder = getattr(transformers, ENCODERS[config.model_type])
            self.module, report = encoder.from_pretrained(
                source, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
            self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except ConfigError:
            raise
        except Exception as error:  # whatever transformers makes of files that are missing or damaged
            raise _unloadable(source, error) from error
        unfit = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
        if unfit:
            raise CheckpointError(f"The weights of '{source}' do not fit its config: {unfit[0]} is missing or differs.")
        text = self.module.config.get_text_config()
        _check_tokenizer(len(self.tokenizer), text.vocab_size, source)
        self.dimension = int(text.hidden_size)
        self.most = getattr(text, "max_position_embeddings", None)

    def embed(self, prompt: str, length: int) -> Embedded:
        count = len(self.tokenizer(prompt, verbose=False)["input_ids"])
        numbers = self.tokenizer(prompt, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
        numbers = numbers.to(next(self.module.parameters()).device)
        return Embedded(self.module(input_ids=numbers).last_hidden_state[0], count)


class _OpenClip:
    """The text tower of an open_clip model, padded as it was trained; its last layer after the final norm."""

    def __init__(self, name: str, pretrained: str | None) -> None:
        import open_clip

        source = name.removeprefix(FOLDER)
        try:
            _refuse_code(open_clip.get_model_config(name), source)
            self.module: Any = open_clip.create_model(
                name,
                pretrained=pretrained,
                force_quick_gelu=_is_quick_gelu(name, pretrained),
                require_pretrained=True,
                weights_only=True,
            )
            self.tokenizer: Any = open_clip.get_tokenizer(name)
        except TrustError:
            raise
        except Exception as error:  # whatever open_clip makes of files that are missing or damaged
            raise _unloadable(pretrained or source, error) from error
        tower = getattr(self.module, "text", self.module)
        if not hasattr(tower, "token_embedding"):
            raise ConfigError(f"The text tower of '{source}' is not open_clip's own: name the encoder that is inside.")
        self._inner = getattr(self.tokenizer, "tokenizer", None)
        if self._inner is not None:
            _check_tokenizer(len(self._inner), tower.vocab_size, source)
        self.module.visual = nn.Identity()  # only the text is read
        self.context = int(tower.context_length)
        self.most: int | None = self.context
        self.dimension = int(tower.token_embedding.embedding_dim)

    def embed(self, prompt: str, length: int) -> Embedded:
        encode = self.tokenizer.encode if self._inner is None else None
        count = len(encode(prompt)) + 2 if encode else len(self._inner(prompt)["input_ids"])  # type: ignore[misc]
        numbers = self.tokenizer([prompt], context_length=length)
        padding = 0 if self._inner is None else self._inner.pad_token_id
        whole = functional.pad(numbers, (0, self.context - numbers.shape[1]), value=padding)
        whole = whole.to(next(self.module.parameters()).device)
        layers = self.module.forward_intermediates(
            text=whole, text_indices=1, normalize_intermediates=True, intermediates_only=True
        )
        return Embedded(layers["text_intermediates"][-1][0, : min(count, length)], count)


def _open_clip_source(encoder: str, weights: str | None) -> tuple[str, str | None] | None:
    """Return open_clip's (model name, pretrained) for what the user wrote, or None where it is transformers'."""
    folder = Path(encoder.removeprefix(FOLDER))
    if folder.is_dir() or encoder.startswith((FOLDER, HUB)):
        if weights is not None:
            raise ConfigError(f"'{encoder}' brings its own weights: leave out weights='{weights}'.")
        if encoder.startswith(HUB):
            return encoder, None
        if (folder / OPEN_CLIP_CONFIG).is_file():
            return f"{FOLDER}{folder}", None
        if (folder / "config.json").is_file():
            return None
        what = f"holds neither config.json nor {OPEN_CLIP_CONFIG}" if folder.is_dir() else "does not exist"
        raise CheckpointError(f"The folder of the text encoder, {folder}, {what}: put a published model there.")
    return _named(encoder, weights)


def _named(encoder: str, weights: str | None) -> tuple[str, str | None] | None:
    import open_clip

    name = encoder.replace("/", "-")
    if name not in open_clip.list_models():
        if weights is None:
            return None
        near = nearest(encoder, open_clip.list_models()) or "; open_clip.list_models() lists them."
        raise ConfigError(f"weights goes with a name that open_clip knows, and '{encoder}' is none{near}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is None:
        raise ConfigError(f"'{encoder}' has no weights: pass weights= a file, or one of {', '.join(tags)}.")
    if weights not in tags and not Path(weights).is_file():
        raise CheckpointError(f"'{encoder}' has no weights '{weights}', and no such file is here: pass another.")
    return name, weights


def _is_quick_gelu(name: str, pretrained: str | None) -> bool:
    """Say whether a hub tag's weights were trained with QuickGELU; open_clip itself only warns of a mismatch."""
    from open_clip.pretrained import get_pretrained_cfg

    known = {} if name.startswith((HUB, FOLDER)) or pretrained is None else get_pretrained_cfg(name, pretrained)
    return bool(known.get("quick_gelu", False))


def _refuse_code(config: Any, source: str) -> None:
    """Raise TrustError if a model's JSON asks for code to be run from its folder or repository."""
    if isinstance(config, Mapping):
        if config.get("trust_remote_code"):
            raise TrustError(f"The config of '{source}' asks to run code that comes with it: refused.")
        for value in config.values():
            _refuse_code(value, source)


def _check_tokenizer(known: int, vocabulary: int, source: str) -> None:
    """Raise CheckpointError for a tokenizer of another model, or one whose files are missing (it is almost empty)."""
    if not LEAST_TOKENS * vocabulary <= known <= vocabulary:
        raise CheckpointError(
            f"The tokenizer of '{source}' knows {known} tokens and the model {vocabulary}, so its files are missing or "
            "another model's: put tokenizer.json and tokenizer_config.json beside the weights."
        )


def _unloadable(source: str, error: Exception) -> CheckpointError:
    """Return the one sentence for a text encoder that could not be loaded."""
    reason = " ".join(str(error).split())[:200]
    if Path(source).exists():
        return CheckpointError(
            f"The text encoder in {source} cannot be loaded ({type(error).__name__}: {reason}): put a whole one there, "
            "with safetensors and its tokenizer."
        )
    return CheckpointError(
        f"There is no text encoder '{source}': no such folder below {Path.cwd()}, and it cannot be had from the hub "
        f"({reason}). Put its folder there, or write the right place as encoder in the recipe or flow_map.json."
    )


@contextlib.contextmanager
def _root_handled() -> Iterator[None]:
    """Keep open_clip from setting up logging, which it does where the root logger has no handler."""
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)
    try:
        yield
    finally:
        root.removeHandler(silent)
