"""`steerfm cache`: what a pretrained model's encoders make of pictures and captions, worked out once."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from steerfm.commands import common
from steerfm.config import Composed
from steerfm.data.latents import Latents, cache_latents
from steerfm.errors import ConfigError

log = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> int:
    """Keep latents and texts as the recipe describes (each point of a sweep, in turn); return the exit code."""
    for recipe in common.each(arguments, "cache"):
        common.say(f"Saved {cache(recipe)}")
    return 0


def cache(recipe: Composed) -> Path:
    """Write latents/ and texts/ into the run folder of a composed recipe, and return the folder.

    The denoiser is not loaded, and text encoders only for captions that are not there yet. An interrupted run goes on
    where it was. Raises ConfigError where the pictures have another size than the model's.
    """
    with common.running(recipe) as run, common.interruptible(run):
        device = recipe.values["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
        encoders = recipe.build("encoders", text_files=str(run.folder / "texts"), device=device)
        data = recipe.build("data")
        height, width = data.rows([0])["x0"].shape[-2:]
        if (height, width) != encoders.size:
            raise ConfigError(
                f"The model's pictures have {encoders.size[0]} x {encoders.size[1]} pixels and the data's {height} x "
                f"{width}: set the one or the other, by data.size= or encoders.size=."
            )
        folder = cache_latents(encoders.codec, data, run.folder / "latents", device=device, **recipe.values["latents"])
        latents = Latents(folder, verify=False)
        encoders.conditioner.keep(latents.captions)
        run.finish({"pictures": latents.count, "prompts": len(set(latents.captions))})
    return run.folder
