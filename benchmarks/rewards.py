"""How fast rewards are: batches of tensors against Pillow, one picture at a time, and every reward that needs no file.

    python benchmarks/rewards.py                      one CPU core, 2 min

The first table scores pictures as the original ImageReward does (a picture of Pillow, resized in whole levels,
its prompt read anew, one picture a call) and as steerfm does (a batch of tensors), with the same small random model:
as deep as the published one (24 and 12 layers) and 64 numbers wide, on pictures of 64 pixels. What a batch saves is
the overhead of each call: a network that is wide enough to keep the processor busy by itself gains less, and on a GPU
a small batch keeps it idle. The second table scores shapes of 32 pixels, with gradient where there is one. Rounds
alternate; figures are medians.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import pkgutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the small model is the one of the tests

import tiny_image_reward as tiny

import steerfm.rewards
from steerfm.errors import SteerfmError
from steerfm.images import resize
from steerfm.reward import Reward
from steerfm.rewards.image_reward import MEAN, PREPROCESSING, STD, TOKENS, ImageReward
from steerfm.rewards.inverse import CompressedSensing, Downsampling, GaussianBlur, Mask, Measurement
from steerfm.rewards.similarity import SSIM
from steerfm.shapes import render, sample_scene

SIDE = 64
PROMPT = "a red circle"


def small_image_reward(folder: Path) -> ImageReward:
    """Return a narrow ImageReward of the published depth."""
    med = tiny.MED | {"num_hidden_layers": 12, "hidden_size": 60, "num_attention_heads": 12, "intermediate_size": 240}
    tiny.save(folder, med=med, width=64, layers=24, side=SIDE)
    return ImageReward(folder, folder / tiny.BERT)


def one_by_one(reward: ImageReward, pictures: list[Image.Image], prompt: str) -> list[float]:
    """Return the scores by the steps of the original package, ImageReward.score of image-reward 1.5."""
    prepare: Any = transforms.Compose(
        [
            transforms.Resize(SIDE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIDE),
            transforms.Lambda(lambda picture: picture.convert("RGB")),
            transforms.ToTensor(),
            transforms.Normalize(PREPROCESSING["mean"], PREPROCESSING["std"]),
        ]
    )
    scores = []
    for picture in pictures:
        text = reward.tokenizer(prompt, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        patches = reward.model["vision"](pixel_values=prepare(picture)[None]).last_hidden_state
        words = reward.model["text"](text.input_ids, text.attention_mask, encoder_hidden_states=patches)
        raw = reward.model["head"](words.last_hidden_state[:, 0])
        scores.append(((raw - MEAN) / STD).item())
    return scores


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def batches_against_pillow(count: int, size: int, rounds: int) -> tuple[Table, float]:
    """Return the first table, and how many times faster a batch is per picture."""
    images = torch.stack([tiny.natural((3, size, size), seed) for seed in range(count)])
    pictures = [tiny.to_pil(image) for image in images]
    with tempfile.TemporaryDirectory() as folder:
        reward = small_image_reward(Path(folder))
    with torch.no_grad():
        alone = torch.tensor(one_by_one(reward, pictures, PROMPT))
        gap = (reward(images, [PROMPT] * count).total - alone).abs().max()
        pairs = [
            (seconds(lambda: one_by_one(reward, pictures, PROMPT)), seconds(lambda: reward(images, [PROMPT] * count)))
            for _ in range(rounds)
        ]
    ratios = sorted(a / b for a, b in pairs)
    title = f"small ImageReward, {count} pictures of {size} pixels, {torch.get_num_threads()} thread(s)"
    table = Table("", "ms a picture", title=title)
    table.add_row("Pillow, one by one", f"{1e3 * statistics.median(a for a, _ in pairs) / count:.2f}")
    table.add_row("tensors, one batch", f"{1e3 * statistics.median(b for _, b in pairs) / count:.2f}")
    table.add_row("times faster", f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})")
    table.add_row("largest gap of a score", f"{gap:.2g}, standard deviation {alone.std():.2g}")
    return table, statistics.median(ratios)


def given(picture: Tensor) -> dict[str, Reward]:
    """Return rewards that need a picture or an operator, but no weights."""
    measured = {"Mask": Mask(torch.ones(picture.shape[1:])), "GaussianBlur": GaussianBlur(1.0),
                "Downsampling": Downsampling(2), "CompressedSensing": CompressedSensing(64)}  # fmt: skip
    measurements = {f"Measurement, {name}": Measurement(of, 0.1, picture=picture) for name, of in measured.items()}
    return {"SSIM": SSIM(picture), **measurements}


def rewards() -> Iterator[tuple[str, Reward | str]]:
    """Yield every reward class of steerfm.rewards with an instance, or with why it cannot be made from nothing."""
    for module_name in sorted(info.name for info in pkgutil.iter_modules(steerfm.rewards.__path__)):
        module = importlib.import_module(f"steerfm.rewards.{module_name}")
        for name, found in sorted(vars(module).items()):
            if inspect.isclass(found) and issubclass(found, Reward) and found.__module__ == module.__name__:
                try:
                    inspect.signature(found).bind()
                    yield name, found()
                except TypeError:
                    yield name, "needs arguments"
                except SteerfmError:
                    yield name, "needs weights"


def throughput(reward: Reward, images: Tensor, rounds: int) -> float:
    """Return pictures a second, with the gradient to the pictures where the reward has one."""
    leaf = images.clone().requires_grad_(reward.differentiable)

    def work() -> None:
        total = reward(leaf, [PROMPT] * len(images)).total
        if reward.differentiable:
            torch.autograd.grad(total.sum(), leaf)

    work()
    return len(images) / statistics.median(seconds(work) for _ in range(rounds))


def every_reward(count: int, rounds: int) -> Table:
    """Return the second table."""
    table = Table(
        "",
        "gradient",
        "pictures a second",
        title=f"rewards without a file, {count} pictures of 32 pixels (DigitJudge 8)",
    )
    images = render([sample_scene(np.random.default_rng(seed)) for seed in range(count)], 32)
    for name, reward in (*rewards(), *given(images[0]).items()):
        if isinstance(reward, str):
            table.add_row(name, "", reward)
            continue
        try:
            speed = throughput(reward, resize(images, (8, 8)) if name == "DigitJudge" else images, rounds)
            table.add_row(name, "yes" if reward.differentiable else "no", f"{speed:,.0f}")
        except SteerfmError as error:
            table.add_row(name, "", str(error))
    return table


def main() -> int:
    """Print both tables; return 1 where a batch is not five times faster."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=32, help="in a batch")
    parser.add_argument("--size", type=int, default=64, help="pixels of the pictures that are scored")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched to be timed
    torch.set_num_threads(arguments.threads)
    table, faster = batches_against_pillow(arguments.pictures, arguments.size, arguments.rounds)
    Console().print(table)
    Console().print(every_reward(arguments.pictures, arguments.rounds))
    return int(faster < 5)


if __name__ == "__main__":
    sys.exit(main())
