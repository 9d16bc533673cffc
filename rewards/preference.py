"""Preference: a reward of your own, learnt from pairs of pictures of which one was better.

Model: any CLIP that open_clip loads, with a small head, and with its picture tower frozen, LoRA-tuned or tuned in full;
trained by steerfm.modules.PreferenceTraining (`steerfm train recipe=reward/preference`). Source: Kirstain et al. 2023,
arXiv 2305.01569 (PickScore), where the tower is tuned and the score is the scaled cosine; Bradley & Terry 1952.
Preprocessing: the CLIP's own, in float32, differentiable. Range: open; a difference of two pictures of one prompt is
the log-odds that the first is preferred, the zero means nothing unless training centred it. Licence: the CLIP's, and
that of your pairs. Memory: the CLIP's. Fooled by: whatever the pairs did not show; judge it on pairs kept apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from steerfm.errors import CheckpointError, ConfigError, nearest
from steerfm.reward import Reward
from steerfm.rewards.clip import CLIPScore

FORMAT = 1
JSON_NAME, WEIGHTS_NAME = "preference.json", "preference.safetensors"
TUNED = ("head", "lora", "full")


class Preference(Reward):
    """Score how likely a picture is to be preferred: the log-odds against another of the same prompt.

    `path`: a folder that PreferenceTraining saved, a run's `preference`. `model`, `weights`: where the CLIP is now on
    which it was learnt, if it was moved; it must be the same one. `prompt` fixes one text for every sample. Raises
    CheckpointError for a folder that is not whole or another CLIP, RewardError where the CLIP cannot be loaded.
    """

    def __init__(
        self,
        path: str | Path,
        model: str | None = None,
        weights: str | Path | None = None,
        prompt: str | None = None,
        *,
        cache_dir: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.prompt = prompt
        network = PreferenceNetwork.load(path, model, weights, cache_dir=cache_dir)
        network.merge()
        self.network = network

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        """Return the reward of each picture for its prompt; (B,)."""
        texts = list(prompts) if self.prompt is None else [self.prompt] * len(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images, texts)


class PreferenceNetwork(nn.Module):
    """A CLIP with a head that gives one number a picture and prompt; what takes gradients is what is learnt.

    `model`, `weights`: as for CLIPScore. tune: "head" learns the head alone, "lora" also low-rank changes of `rank`
    of every matrix in the blocks of the picture tower, "full" the whole picture tower. The text tower stays as it is,
    so that each prompt is read once. hidden: the width of a layer that the head adds; 0 is a linear head, see `Head`.
    Raises ConfigError for a wrong option.
    """

    def __init__(
        self,
        model: str,
        weights: str | Path | None = None,
        *,
        tune: str = "head",
        hidden: int = 0,
        rank: int = 8,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        if tune not in TUNED:
            raise ConfigError(f"tune is one of {', '.join(TUNED)}, got '{tune}'{nearest(tune, TUNED) or '.'}")
        if hidden < 0 or rank < 1:
            raise ConfigError(f"hidden is at least 0 and rank at least 1, got {hidden} and {rank}.")
        self.clip = CLIPScore(model, weights, cache_dir=cache_dir)
        self.arguments = {
            "model": str(model), "weights": None if weights is None else str(weights),
            "tune": tune, "hidden": hidden, "rank": rank,
        }  # fmt: skip
        self.fingerprint = _fingerprint(self.clip)
        scale = float(self.clip.model.logit_scale.detach().exp())
        self.head = Head(self.clip.embed_texts([""]).shape[1], scale, hidden)
        if tune == "full":
            self.clip.model.visual.requires_grad_(True)
        elif tune == "lora":
            _add_low_rank(self.clip.model.visual, rank)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return the reward of pictures (B, 1 or 3, H, W) in [0, 1] for their prompts; (B,)."""
        x = self.clip.embed_images(images)
        with torch.autocast(images.device.type, enabled=False):  # in bfloat16 the scale would blur a reward by 0.1
            return self.head(x.float(), self.clip.embed_texts(prompts, images.device))

    def learnt(self) -> dict[str, Tensor]:
        """Return what is learnt, by name: the parameters themselves, not copies."""
        return {name: parameter.data for name, parameter in self.named_parameters() if parameter.requires_grad}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what was learnt into the network. Raises CheckpointError where names or shapes differ."""
        own = self.learnt()
        wrong = sorted(own.keys() ^ tensors.keys())
        wrong += [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
        if wrong:
            raise CheckpointError(
                f"What was learnt does not fit the network: '{wrong[0]}' ({len(wrong)} in all) is missing, of another "
                "shape or not asked for. Load it with the version of steerfm that saved it, or train again."
            )
        for name, parameter in own.items():
            parameter.copy_(tensors[name])

    def describe(self) -> dict[str, Any]:
        """Return what rebuilds the network, as JSON-able data, with the fingerprint of its CLIP."""
        return {"format": FORMAT, "network": self.arguments, "fingerprint": self.fingerprint}

    def merge(self) -> None:
        """Put low-rank changes into the weights themselves; the rewards stay the same, nothing can be learnt after."""
        self.requires_grad_(False)
        for module in list(self.modules()):
            for name in list(getattr(module, "parametrizations", ())):
                parametrize.remove_parametrizations(module, name)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: str | None = None,
        weights: str | Path | None = None,
        *,
        cache_dir: str | Path | None = None,
    ) -> PreferenceNetwork:
        """Return a saved network; see Preference for the arguments and what is raised."""
        folder = Path(path)
        saved, tensors = _read(folder)
        arguments = dict(saved["network"])
        if model is not None:
            arguments |= {"model": model, "weights": weights}
        network = cls(**arguments, cache_dir=cache_dir)
        if network.fingerprint != saved["fingerprint"]:
            raise CheckpointError(
                f"{folder} was learnt on another CLIP than '{arguments['model']}' is now: pass model= (and weights=) "
                f"the one that it was trained with, then '{saved['network']['model']}'."
            )
        network.take(tensors)
        return network


class Head(nn.Module):
    """Turn the embeddings x of a picture and y of a text, each of length one, (B, D), into a reward, (B,).

    r = scale (sum_d (1 + v_d) x_d y_d + w . x + m([x, y, x y])) + bias, with scale = CLIP's own times exp(gain).

    Everything learnt starts at r = scale cos(x, y), which is PickScore's form, and weight decay pulls back to it: v
    weighs what CLIP compares anew, w likes or dislikes pictures whatever their prompt. m has one layer of `hidden`
    units, and is left out for 0: it is for preferences that the prompt turns around, and wants thousands of pairs.
    Pairs tell nothing of the bias: only centring moves it.
    """

    def __init__(self, dimension: int, scale: float, hidden: int = 0) -> None:
        super().__init__()
        self.scale = scale
        self.gain = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(()))
        self.v = nn.Parameter(torch.zeros(dimension))
        self.w = nn.Parameter(torch.zeros(dimension))
        self.m = None
        if hidden:
            last = nn.Linear(hidden, 1, bias=False)
            nn.init.zeros_(last.weight)
            self.m = nn.Sequential(nn.Linear(3 * dimension, hidden), nn.GELU(), last)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        r = (x * y) @ (1 + self.v) + x @ self.w
        if self.m is not None:
            r = r + self.m(torch.cat([x, y, x * y], dim=1)).squeeze(1)
        return self.scale * self.gain.exp() * r + self.bias


class LowRank(nn.Module):
    """Add up @ down to a matrix (rows, columns); up starts at zero. Reference: Hu et al. 2021, arXiv 2106.09685.

    It stands behind the weight itself, so that whatever reads the weight reads the change: an adapter around a layer
    has no effect inside nn.MultiheadAttention, which takes its layers' weights without calling them.
    """

    def __init__(self, matrix: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = matrix.shape
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix + self.up @ self.down


def _add_low_rank(tower: nn.Module, rank: int) -> None:
    """Let every matrix of the tower's linear and attention layers be changed by one of low rank."""
    for module in list(tower.modules()):
        linear = "weight" if isinstance(module, nn.Linear) else None
        name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else linear
        matrix = getattr(module, name, None) if name else None
        if name and matrix is not None:
            parametrize.register_parametrization(module, name, LowRank(matrix, rank))
    if not any(isinstance(module, LowRank) for module in tower.modules()):
        raise ConfigError("The picture tower of this CLIP has no linear layers for LoRA: use tune=head or tune=full.")


def _fingerprint(clip: CLIPScore) -> str:
    """Return a digest of a CLIP's weights and preprocessing."""
    digest = hashlib.sha256(json.dumps(clip._clip.preprocessing, sort_keys=True, default=list).encode())
    for name, tensor in sorted(clip.model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the tensors of a saved preference."""
    for name in (JSON_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}: give the folder that a training of preferences saved.")
    try:
        saved = json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))
        version, _, _ = int(saved["format"]), saved["fingerprint"], dict(saved["network"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / JSON_NAME} is damaged ({error!r}): copy or save it again.") from error
    if version > FORMAT:
        raise CheckpointError(f"{folder / JSON_NAME} was written by a newer steerfm: upgrade steerfm to load it.")
    try:
        return saved, load_file(folder / WEIGHTS_NAME)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_NAME} is damaged ({error}): copy or save it again.") from error
