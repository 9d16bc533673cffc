"""The flow map: a network that jumps from any point of a path to any other in one call.

F(x, s, t) = x + (t - s) u(x, s, t) carries x from source time s to target time t; u is the average velocity,
and u(x, t, t) = v(x, t) the velocity. Two more functions lead to clean data, and they are not the same:
`look_ahead` is one real sample, F(x, t, 0); `denoise` is the posterior mean E[x0 | x_t].

Reference: Boffi et al. 2024, arXiv 2406.07507 (flow map matching).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from steerfm import images
from steerfm.building import remembered
from steerfm.conditions.guidance import EVERYWHERE, SCALE, checked_interval, null_rows, with_scale, without_scale
from steerfm.errors import ConfigError
from steerfm.paths import Linear, Path
from steerfm.saving import load_flow_map, save_flow_map
from steerfm.types import Condition, State, Times, unsqueeze_like

Output = Literal["average_velocity", "denoised"]
SMALLEST_SOURCE = 1e-3  # the denoised output divides by s, which is kept at least this far from 0


class Codec(Protocol):
    """Lead from model space to what rewards see, and back."""

    def encode(self, pictures: Tensor, /) -> Tensor: ...

    def decode(self, x: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Pixels:
    """Model space is pixels in [-1, 1]; rewards see [0, 1], clamped, with gradients passing straight through."""

    def encode(self, pictures: Tensor) -> Tensor:
        return images.to_model(pictures)

    def decode(self, x: Tensor) -> Tensor:
        return images.clamp(images.to_unit(x))


@dataclass(frozen=True)
class Identity:
    """Model space is what rewards see: points (B, d)."""

    def encode(self, points: Tensor) -> Tensor:
        return points

    def decode(self, x: Tensor) -> Tensor:
        return x


@remembered
class FlowMap(nn.Module):
    """Jump along a path with a network that predicts an average velocity or a denoised picture.

    network: called as network(x, s, t, condition) -> (B, *data_shape), with `data_shape` as attribute.
    conditioner: prompts -> Condition, with `null(n)`; None for a map without prompts. codec: model space to
    [0, 1] and back; Pixels for (C, H, W), Identity for points. output: what the network returns, u itself or
    D with u = (x - D) / s. guidance_scale: classifier-free guidance, u_null + scale (u - u_null); 1 is off, and a
    condition's own scales come first (`steerfm.conditions.guidance.with_scale`). A network with `guidance_input`
    reads the scale, 1 in null rows, and is called once, any other twice. guidance_interval: (low, high), the source
    times at which guidance acts, ends included; elsewhere the scale is 1, and a batch that lies outside as a whole
    pays for one call. Times are (B,) tensors or plain numbers, in [0, 1]; t = 1 is noise.
    """

    codec: Codec

    def __init__(
        self,
        network: nn.Module,
        *,
        path: Path | None = None,
        conditioner: nn.Module | None = None,
        codec: Codec | None = None,
        output: Output = "average_velocity",
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] = EVERYWHERE,
    ) -> None:
        super().__init__()
        if output not in ("average_velocity", "denoised"):
            raise ConfigError(f"output is 'average_velocity' or 'denoised', got '{output}'.")
        if not hasattr(network, "data_shape"):
            raise ConfigError(f"{type(network).__name__} has no data_shape, for example (1, 8, 8): set it in __init__.")
        self.network = network
        self.path = path or Linear()
        self.conditioner = conditioner
        self.data_shape: tuple[int, ...] = tuple(network.data_shape)  # type: ignore[arg-type]
        default = Identity() if len(self.data_shape) == 1 else Pixels()
        self.codec = default if codec is None else codec
        self.output: Output = output
        self.guidance_scale = guidance_scale
        self.guidance_interval = checked_interval(guidance_interval)
        self.weights = "raw"  # which weights these are: "raw", or "ema" when loaded so

    @property
    def device(self) -> torch.device:
        """Return the device of the network's first tensor; the CPU when it has none."""
        tensor = next(self.parameters(), None)
        tensor = tensor if tensor is not None else next(self.buffers(), None)
        return tensor.device if tensor is not None else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Return the floating type of states: a network's `state_dtype`, or its first tensor's, or float32."""
        stated = declared(self.network, "state_dtype")
        if stated is not None:
            return stated
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.float32

    @property
    def partial(self) -> bool:
        """Whether the map knows jumps to data, t = 0, alone, as consistency models do; others raise ConfigError."""
        return bool(declared(self.network, "partial", False))

    def average_velocity(
        self, x: State, s: Times | float, t: Times | float, condition: Condition | None = None
    ) -> State:
        """Return u(x, s, t), the mean velocity from source time s to target time t; shape (B, *dim).

        Reference: Ho and Salimans 2022, arXiv 2207.12598 (classifier-free guidance); Kynkäänniemi et al. 2024, arXiv
        2404.07724 (its interval); Meng et al. 2022, arXiv 2210.03142 (its scale as an input).
        """
        s, t = as_times(s, x), as_times(t, x)
        if condition is None:
            return self._predict(x, s, t, None)
        scale, condition = self._scale(s, condition), without_scale(condition)
        if scale is None:
            return self._predict(x, s, t, condition)
        if self.conditioner is None:
            raise ConfigError("Guidance needs a null condition, and this flow map has no conditioner.")
        if getattr(self.network, "guidance_input", False):
            null = self.conditioner.null(1).to(x.device)  # type: ignore[operator]
            return self._predict(x, s, t, with_scale(condition, scale.masked_fill(null_rows(condition, null), 1.0)))
        null = self.conditioner.null(len(x)).to(x.device)  # type: ignore[operator]
        both = self._predict(torch.cat([x, x]), torch.cat([s, s]), torch.cat([t, t]), Condition.cat([condition, null]))
        guided, free = both.chunk(2)
        return torch.lerp(free, guided, unsqueeze_like(scale, x))

    def _scale(self, s: Times, condition: Condition) -> Times | None:
        """Return the guidance scale of each row, (B,), 1 outside the interval; None where no row is guided."""
        own = condition.tensors.get(SCALE)
        if own is None and self.guidance_scale == 1.0:
            return None
        scale = torch.full_like(s, self.guidance_scale) if own is None else own.to(s)
        if self.guidance_interval == EVERYWHERE:
            return scale
        low, high = self.guidance_interval
        source = s.clamp(0, 1)  # a central difference may step outside a little
        inside = (low <= source) & (source <= high)
        return scale.masked_fill(~inside, 1.0) if inside.any() else None

    def _predict(self, x: State, s: Times, t: Times, condition: Condition | None) -> State:
        output = self.network(x, s, t, condition).to(x.dtype)  # autocast may have made it bfloat16
        if self.output == "denoised":
            return (x - output) / unsqueeze_like(s.clamp_min(SMALLEST_SOURCE), x)
        return output

    def velocity(self, x: State, t: Times | float, condition: Condition | None = None) -> State:
        """Return v(x, t) = u(x, t, t), the velocity of the path; shape (B, *dim)."""
        t = as_times(t, x)
        return self.average_velocity(x, t, t, condition)

    def jump(self, x: State, s: Times | float, t: Times | float, condition: Condition | None = None) -> State:
        """Return F(x, s, t): x carried from source time s to target time t; shape (B, *dim)."""
        s, t = as_times(s, x), as_times(t, x)
        return x + unsqueeze_like(t - s, x) * self.average_velocity(x, s, t, condition)

    def look_ahead(self, x: State, t: Times | float, condition: Condition | None = None) -> State:
        """Return F(x, t, 0), one real sample of clean data; not the posterior mean."""
        return self.jump(x, t, 0.0, condition)

    def denoise(self, x: State, t: Times | float, condition: Condition | None = None) -> State:
        """Return E[x0 | x_t], the posterior mean (Tweedie); not a sample."""
        t = as_times(t, x)
        return self.path.denoised(x, self.velocity(x, t, condition), t)

    def score(self, x: State, t: Times | float, condition: Condition | None = None) -> State:
        """Return the gradient of log p_t at x, from the velocity; t > 0."""
        t = as_times(t, x)
        return self.path.score(x, self.velocity(x, t, condition), t)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition | None:
        """Return the condition that prompts stand for, on the map's device; None for a map without prompts."""
        return None if self.conditioner is None else self.conditioner(prompts).to(self.device)

    def encode(self, pictures: Tensor) -> State:
        """Return pictures in [0, 1] (or points) in model space."""
        return self.codec.encode(pictures)

    def decode(self, x: State) -> Tensor:
        """Return what rewards see: pictures in [0, 1], gradients passing the clamp straight through."""
        return self.codec.decode(x)

    def with_guidance(self, scale: float, interval: Sequence[float] = EVERYWHERE) -> FlowMap:
        """Return the same map, sharing its weights, with classifier-free guidance of this scale in this interval.

        As a `teacher` of an objective it gives the guided velocity. Raises ConfigError for an impossible interval.
        """
        view = copy.copy(self)
        view.guidance_scale, view.guidance_interval = scale, checked_interval(interval)
        return view

    def requires_grad_(self, requires_grad: bool = True) -> FlowMap:
        """Let all weights train, or none. Raises ConfigError where they are quantised."""
        if requires_grad and declared(self.network, "quantised"):
            raise ConfigError(
                "Quantised weights cannot be trained: train low-rank additions, LoRA(16)(flow_map), adapter=lora in a "
                "recipe, or load the pipeline without quantised."
            )
        return super().requires_grad_(requires_grad)

    def frozen_copy(self) -> FlowMap:
        """Return a copy whose weights are its own and take no gradient: a reference or a teacher."""
        return copy.deepcopy(self).eval().requires_grad_(False)

    def save(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> FilePath:
        """Write flow_map.json and flow_map.safetensors into `folder`; see `FlowMap.load`.

        dtype: the floating type of the file (torch.float16 halves it); the map is loaded in its own type again.
        """
        return save_flow_map(self, FilePath(folder), dtype)

    @classmethod
    def from_zoo(cls, name: str) -> FlowMap:
        """Load a trained map that ships with the package, such as "shapes32"; `steerfm.zoo.MAPS` names them."""
        from steerfm import zoo

        return cls.load(zoo.folder(name, zoo.MAPS))

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        kind: Literal["velocity", "partial"] | None = None,
        size: int | Sequence[int] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
        variant: str | None = None,
        text_length: int | None = None,
        text_device: str | None = None,
        text_files: str | os.PathLike[str] | None = None,
        tiling: bool = False,
        slicing: bool = False,
        offload: bool = False,
        checkpointing: bool = False,
        quantised: Literal["int8"] | None = None,
        ip_adapter: str | os.PathLike[str] | None = None,
        ip_adapter_encoder: str | os.PathLike[str] | None = None,
        ip_adapter_scale: float | None = None,
    ) -> FlowMap:
        """Load a pipeline in diffusers' layout, by folder or hub id, or a map that steerfm saved; docs/pretrained.md.

        kind: "velocity", or "partial" for models that know jumps to data alone; None reads it off the scheduler.
        size: of pictures, one number or (height, width). guidance_scale: the pipeline's own by default, 1 is none, and
        models that learnt guidance are told it. negative_prompt: the null condition. dtype: of its weights; states are
        float32. revision: on the hub; the commit that was found is kept. variant: of the weights, such as "fp16".
        text_length: the most tokens of a long prompt; text_device: where prompts are read; text_files: a folder that
        keeps what they were read as, so that encoders are not loaded again. tiling, slicing: of decoding; offload: the
        autoencoder rests in the CPU's memory. checkpointing: of the network's backward pass. quantised: "int8" holds
        the network in 8 bits, for LoRA on top. ip_adapter: a .safetensors by which a U-Net reads the picture that a
        prompt names; ip_adapter_encoder: the folder of its image encoder, image_encoder beside it by default;
        ip_adapter_scale: its strength, 1 by default. Of a map that steerfm saved guidance_scale, text_files,
        checkpointing and a smaller dtype can be set. No pickle is read and no code that comes with a model is run.
        Raises CheckpointError for missing, gated or damaged files, ConfigError for an unknown pipeline or an option
        that a saved map has not.
        """
        from steerfm.backbones.diffusers import is_saved_map, load_pipeline, opened
        from steerfm.backbones.pipeline_files import PipelineFiles

        source, dtype = os.fspath(source), str(dtype).removeprefix("torch.")
        alike: dict[str, Any] = {
            "guidance_scale": guidance_scale,
            "text_files": None if text_files is None else os.fspath(text_files),
            "checkpointing": checkpointing,
        }
        built: dict[str, Any] = {
            "kind": kind,
            "size": size,
            "negative_prompt": negative_prompt,
            "text_length": text_length,
            "text_device": text_device,
            "tiling": tiling,
            "slicing": slicing,
            "offload": offload,
            "quantised": quantised,
            "ip_adapter": None if ip_adapter is None else os.fspath(ip_adapter),
            "ip_adapter_encoder": None if ip_adapter_encoder is None else os.fspath(ip_adapter_encoder),
            "ip_adapter_scale": ip_adapter_scale,
        }
        if is_saved_map(source):
            said = built | {"revision": revision, "variant": variant}
            others = [name for name, given in said.items() if given is not None and given is not False]
            return opened(cls.load(source), source, others, dtype=dtype, **alike)
        return load_pipeline(cls, PipelineFiles(source, revision, variant, dtype), **built, **alike)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        weights: Literal["ema", "raw"] | None = None,
        network: nn.Module | None = None,
        trusted: Sequence[str] = (),
    ) -> FlowMap:
        """Load a saved map, a run folder's map, or the map inside a Lightning checkpoint.

        weights: "ema" or "raw", for checkpoints, which hold both; EMA where there is one by default, and a
        log line says which were taken. network: a network of your own, for a map whose JSON names code that
        is not trusted. Raises CheckpointError for missing or damaged files, TrustError for untrusted code.
        """
        return load_flow_map(cls, FilePath(path), weights=weights, network=network, trusted=trusted)


def declared(network: nn.Module, name: str, default: Any = None) -> Any:
    """Return an attribute of a network, or else of the one that it is wrapped around, as by LoRA or torch.compile."""
    inner: Any = network
    while isinstance(inner, nn.Module):
        if hasattr(inner, name):
            return getattr(inner, name)
        inner = getattr(inner, "_orig_mod", getattr(inner, "network", None))
    return default


def as_times(t: Any, x: Tensor) -> Times:
    """Return t as a (B,) tensor like x. Raises ConfigError for numbers outside [0, 1].

    Tensors are checked on the CPU only, where looking at them costs no synchronisation, and a little slack is
    left for finite differences.
    """
    if isinstance(t, Tensor):
        if t.ndim == 0:
            t = t.expand(len(x))
        if t.shape != (len(x),):
            raise ConfigError(f"t needs one time a sample, shape ({len(x)},), got {tuple(t.shape)}.")
        watched = t.device.type == "cpu" and not torch.compiler.is_compiling() and len(t) > 0
        if watched and not torch._C._functorch.is_functorch_wrapped_tensor(t):  # type: ignore[attr-defined]
            low, high = t.detach().aminmax()
            _check_range(float(low), slack=0.05)
            _check_range(float(high), slack=0.05)
        return t.to(x)
    _check_range(float(t))
    return torch.full((len(x),), float(t), dtype=x.dtype, device=x.device)


def _check_range(t: float, slack: float = 0.0) -> None:
    if not -slack <= t <= 1 + slack:
        raise ConfigError(
            f"t must lie in [0, 1], got {t}. "
            "diffusers timesteps are 1000 t: divide, or use steerfm.backbones.diffusers."
        )
