"""`steerfm reward check`: try a reward on a few pictures and name what is wrong with it."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from torch import Tensor

from steerfm import digits, images, seeds, shape_captions, shapes
from steerfm.errors import ConfigError
from steerfm.reward import Finding, check, load_reward

console = Console(highlight=False)


def run(arguments: argparse.Namespace) -> int:
    """Check a reward; return 1 if it has a fault, 0 if it has none."""
    if arguments.count < 4:
        raise ConfigError(f"A check needs at least 4 different pictures, got --count {arguments.count}.")
    reward = load_reward(arguments.reward)
    pictures, prompts = PICTURES[arguments.pictures](arguments.count)
    findings = check(reward, pictures, prompts)
    for finding in findings:
        _print(finding)
    faults = sum(finding.fault for finding in findings)
    tried = f"'{reward.name}' on {len(pictures)} pictures of {tuple(pictures.shape[1:])}"
    console.print(f"{tried}: {_count(faults)}", markup=False, soft_wrap=True)
    return 1 if faults else 0


def tinted_digits(count: int) -> tuple[Tensor, list[str]]:
    """Return `count` different scans of digits, each in a colour of its own, (count, 3, 8, 8), and their captions."""
    scans = digits.load()
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(len(scans), generator=generator)[:count]
    colours = 0.5 + 0.5 * torch.rand(len(index), 3, 1, 1, generator=generator)
    return images.to_unit(scans.x0[index]) * colours, [scans.captions[i] for i in index.tolist()]


def noise(count: int) -> tuple[Tensor, list[str]]:
    """Return `count` random pictures (count, 3, 32, 32) and prompts."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 32, 32, generator=generator), [f"random picture {i}" for i in range(count)]


def scenes(count: int) -> tuple[Tensor, list[str]]:
    """Return `count` scenes of shapes (count, 3, 32, 32), every other one with the caption of the one before it."""
    rng = seeds.generator(0, "data")
    drawn = [shapes.sample_scene(rng) for _ in range(count)]
    captions = [shape_captions.plain(shape_captions.describe(scene, rng)) for scene in drawn]
    return shapes.render(drawn), [captions[i - i % 2] for i in range(count)]


PICTURES = {"digits": tinted_digits, "shapes": scenes, "random": noise}


def _print(finding: Finding) -> None:
    mark, style = ("fault ", "red") if finding.fault else ("remark", "yellow")
    console.print(f"[{style}]{mark}[/{style}]", end="  ")
    console.print(f"'{finding.part}' ({finding.subject}): {finding.message}", markup=False, soft_wrap=True)


def _count(faults: int) -> str:
    return "no fault" if faults == 0 else "1 fault" if faults == 1 else f"{faults} faults"
