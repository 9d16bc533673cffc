"""The autoencoder of a pretrained pipeline as the codec of a flow map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steerfm import images
from steerfm.backbones.pipeline_files import PipelineFiles
from steerfm.building import remembered
from steerfm.networks.sharing import called_on
from steerfm.types import State


@remembered
class PipelineCodec(nn.Module):
    """Decode latents into pictures in [0, 1] by a pipeline's autoencoder, and encode pictures into them.

    Latents are (z - shift) scale of the autoencoder's z, or (z - mean) scale / std where its settings hold these.
    tiling: decode large pictures tile by tile, whose seams are blended. slicing: decode one picture after the other.
    offload: keep the autoencoder in the CPU's memory, and copy it to the latents' device for each use.

    The autoencoder is loaded at first use and stands outside the module tree: it is frozen, and neither trained, saved
    nor copied with the map; it follows the latents to their device. What it decodes for a gradient is worked out again
    in the backward pass (`steerfm.sampling.decoded`). It works in float32 where float16 is known to overflow.
    """

    def __init__(
        self, files: PipelineFiles, tiling: bool = False, slicing: bool = False, offload: bool = False
    ) -> None:
        super().__init__()
        self._holder, self.offload = _Holder(files, tiling, slicing), offload

    def decode(self, x: State) -> Tensor:
        """Return pictures in [0, 1], float32, clamped with gradients passing straight through."""
        vae = self._vae(x)
        decoded = self._run(vae, "decode", self._raw(x.float(), vae.config).to(vae.dtype), return_dict=False)[0]
        return images.clamp(images.to_unit(decoded.float()))

    def encode(self, pictures: Tensor) -> State:
        """Return the latents of pictures in [0, 1], the mean where the autoencoder has a law of them; float32."""
        vae = self._vae(pictures)
        encoded = self._run(vae, "encode", images.to_model(pictures).to(vae.dtype))
        raw = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        return self._model(raw.float(), vae.config)

    def _vae(self, like: Tensor) -> Any:
        return self._holder.on(torch.device("cpu") if self.offload else like.device)

    def _run(self, vae: Any, method: str, x: Tensor, **options: Any) -> Any:
        if self.offload:
            return called_on(x.device, vae, method, x, **options)
        return getattr(vae, method)(x, **options)

    def _raw(self, x: Tensor, config: Any) -> Tensor:
        mean, std = _affine(x, config)
        return x * (std / config.scaling_factor) + mean

    def _model(self, raw: Tensor, config: Any) -> Tensor:
        mean, std = _affine(raw, config)
        return (raw - mean) * (config.scaling_factor / std)


def _affine(x: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Return what the autoencoder's latents are moved and divided by, besides their scale."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        return x.new_tensor(mean).reshape(-1, 1, 1), x.new_tensor(std).reshape(-1, 1, 1)
    return x.new_tensor(getattr(config, "shift_factor", None) or 0.0), x.new_tensor(1.0)


class _Holder:
    """Hold the autoencoder outside the module tree; copies of a map share it."""

    def __init__(self, files: PipelineFiles, tiling: bool, slicing: bool) -> None:
        self.files, self.tiling, self.slicing = files, tiling, slicing
        self.vae: Any = None

    def __deepcopy__(self, memo: Any) -> _Holder:
        return self

    def __reduce__(self) -> Any:
        return _Holder, (self.files, self.tiling, self.slicing)  # another process loads it itself

    def on(self, device: torch.device) -> Any:
        """Return the autoencoder on a device."""
        if self.vae is None:
            overflows = self.files.dtype == "float16" and self.files.config("vae").get("force_upcast", False)
            vae = self.files.part("vae", "float32" if overflows else None)
            if self.tiling:
                vae.enable_tiling()
            if self.slicing:
                vae.enable_slicing()
            self.vae = vae
        self.vae.to(device)
        return self.vae
