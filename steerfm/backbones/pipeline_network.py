"""The denoiser of a pretrained pipeline as the network of a flow map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from steerfm.backbones.conversions import Kind, conversion_of, kind_of
from steerfm.backbones.families import control_residuals, family_of
from steerfm.backbones.ip_adapter import IPAdapter, Outside
from steerfm.backbones.left_out import LeftOut, digests_of
from steerfm.backbones.pipeline_files import PipelineFiles
from steerfm.building import remembered
from steerfm.conditions.guidance import SCALE
from steerfm.errors import ConfigError, missing_package
from steerfm.types import Condition, State, Times

Quantised = Literal["int8"]


@remembered
class PipelineNetwork(nn.Module):
    """Let a pipeline's transformer or U-Net answer with u(x, s, t), through `steerfm.backbones.conversions`.

    files: where it lies. kind: "velocity" answers with v(x, s) whatever t is, so that jumps are Euler steps; "partial"
    knows u(x, s, 0) alone, and raises ConfigError for any other t; None reads it off the scheduler. size: of pictures
    in pixels, one number or (height, width); the pipeline's own where nothing is said. checkpointing: keep the inputs
    of its blocks alone for the backward pass. quantised: "int8" holds the weights of linear layers in 8 bits, frozen,
    for LoRA on top, by torchao. ip_adapter: reads "image_embedding" beside the text, frozen, and no part of what is
    saved. States and times are float32 whatever the type of its weights is: a time of 8 bits is another training
    step. Its weights take gradients; a saved map holds those that are not as they were published, and reads the rest
    anew.
    """

    state_dtype = torch.float32

    def __init__(
        self,
        files: PipelineFiles,
        kind: Kind | None = None,
        size: int | Sequence[int] | None = None,
        checkpointing: bool = False,
        quantised: Quantised | None = None,
        ip_adapter: IPAdapter | None = None,
    ) -> None:
        super().__init__()
        if quantised not in (None, *get_args(Quantised)):
            raise ConfigError(f"quantised is 'int8' or None, got '{quantised}'.")
        if kind not in (None, "velocity", "partial"):
            raise ConfigError(f"kind is 'velocity', 'partial' or None, got '{kind}'.")
        self.files = files
        self.family = family_of(files.index())
        self.scheduler = files.part("scheduler")
        self.conversion = conversion_of(self.scheduler)
        self.partial = (kind or kind_of(self.scheduler)) == "partial"
        self.velocity_only = not self.partial
        self.model: Any = files.part(self.family.network).requires_grad_(True)
        self.ip_adapter = ip_adapter
        self._outside: list[Outside] = [] if ip_adapter is None else ip_adapter.put_into(self.model)
        control = self.family.control
        held: tuple[Any, ...] = () if control is None else (files.part(control),)
        self._control = held  # frozen, and no part of what is saved
        config = self.model.config
        self.guidance_input = self.family.guidance_input(config)
        shrink = vae_scale(files.config("vae"))
        channels = int(config.in_channels) // (4 if self.family.packed else 1)
        self.size = picture_size(size, config, shrink, 2 if self.family.packed else 1)
        self.data_shape = (channels, self.size[0] // shrink, self.size[1] // shrink)
        if checkpointing:
            self.model.enable_gradient_checkpointing()
        self.quantised = quantised
        digests = digests_of(self.model)
        if quantised is not None:
            _quantise(self.model)
        self._left_out = LeftOut(self, "model", files.source, digests)

    def forward(self, x: State, s: Times, t: Times, condition: Condition | None = None) -> State:
        if condition is None:
            raise ConfigError(
                "A pretrained model reads a prompt: give a condition, for one flow_map.encode_prompts([''])."
            )
        if self.partial:
            _check_target(t)
        told, timestep = self.conversion.told(x, s)
        guidance = condition.tensors.get(SCALE, torch.ones_like(s)).to(s)
        told = told.to(self.model.dtype)
        for each in self._outside:
            each.module.to(told)
        more = {"residuals": self._residuals(told, timestep, condition)} if self._control else {}
        answer = self.family.call(self.model, told, timestep, condition, guidance, self.size, **more)
        return self.conversion.average_velocity(answer.to(x.dtype), x, s)

    def _residuals(self, told: State, timestep: Times, condition: Condition) -> dict[str, Any]:
        (control,) = self._control
        return control_residuals(control.to(told), told, timestep, condition, self.size)


def _quantise(model: nn.Module) -> None:
    """Hold the weights of linear layers in 8 bits, with a scale a row, frozen; products are in the type of states."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ModuleNotFoundError as error:
        raise missing_package("torchao", "quantised", "quantised='int8'") from error
    model.requires_grad_(False)
    quantize_(model, Int8WeightOnlyConfig(version=2))


def _check_target(t: Tensor) -> None:
    """Raise ConfigError unless every target time is 0."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(t):  # type: ignore[attr-defined]
        return
    if (t != 0).any():
        raise ConfigError(
            f"This map knows jumps to data, t = 0, alone, and one to t = {float(t.max()):.3g} was asked for: sample it "
            "by jumping there and adding noise anew, Unsteered('renoised', steps=4), or in one jump; or load it with "
            "kind='velocity', which takes its answer for the posterior mean."
        )


def vae_scale(config: Any) -> int:
    """Return how many pixels a latent's side has, from the settings of an autoencoder."""
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return 2 ** (len(blocks) - 1)


def picture_size(size: int | Sequence[int] | None, config: Any, shrink: int, even: int) -> tuple[int, int]:
    """Return (height, width) in pixels. Raises ConfigError where latents or patches would not be whole."""
    usual = getattr(config, "sample_size", None) or 128  # FLUX has none written down and is used at 128 latents
    side = [usual, usual] if isinstance(usual, int) else list(usual)
    shape = [each * shrink for each in side] if size is None else [size, size] if isinstance(size, int) else list(size)
    whole = shrink * max(even, int(getattr(config, "patch_size", None) or 1))
    if len(shape) != 2 or any(each < whole or each % whole for each in shape):
        raise ConfigError(f"Pictures of this model have sides that {whole} divides, got {size}.")
    return int(shape[0]), int(shape[1])
