"""ImageReward here against the original package: tokens, scores and pixel gradients of a small random model.

    make parity                                       two CPU cores, 3 min, most of it the installation (5 GB)

Pictures of 224 pixels need no resizing: there both should agree to rounding. On others the original resizes in
whole levels of 1/255, which shows. --store writes tests/data/image_reward.json, which the tests compare with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))  # the small model is the one of the tests

import tiny_image_reward as tiny

from steerfm.rewards.image_reward import PREPROCESSING, ImageReward

ROOT = Path(__file__).parents[3]
STORED = ROOT / "tests" / "data" / "image_reward.json"
BLOCK = 56  # pixels: the stored gradients are means over blocks of this side
EXACT, RESIZED = 1e-5, 0.02  # largest gap of a score, without and with resizing


def original(folder: Path, python: str) -> dict[str, Tensor]:
    """Return what the original package makes of the examples."""
    for i, picture in enumerate(tiny.pictures()):
        tiny.to_pil(picture).save(folder / f"{i}.png")
    (folder / "prompts.json").write_text(json.dumps([prompt for prompt, _ in tiny.EXAMPLES]), encoding="utf-8")
    (folder / "sizes.json").write_text(json.dumps(tiny.SIZES | {"hidden": tiny.MED["hidden_size"]}))
    script = Path(__file__).with_name("original.py")
    subprocess.run([python, str(script), str(folder)], check=True, stdout=subprocess.DEVNULL)
    return load_file(folder / "original.safetensors")


def ours(reward: ImageReward) -> dict[str, Tensor]:
    """Return the same from steerfm; gradients are to pixels in [0, 1], of pictures that need no resizing."""
    scores, gradients = [], []
    for (prompt, shape), picture in zip(tiny.EXAMPLES, tiny.pictures(), strict=True):
        leaf = picture[None].requires_grad_(True)
        score = reward.score(leaf, [prompt])  # the contract refuses the empty prompt
        scores.append(score.detach())
        if shape == (3, 224, 224):
            gradients.append(torch.autograd.grad(score.sum(), leaf)[0])
    tokens = reward.tokens([prompt for prompt, _ in tiny.EXAMPLES])["input_ids"]
    return {"scores": torch.cat(scores), "tokens": tokens, "gradients": torch.cat(gradients)}


def main() -> int:
    """Print the table; return 1 where the two differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=str(ROOT / ".venv-image-reward" / "bin" / "python"))
    parser.add_argument("--store", action="store_true", help="write what the original says for the tests")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = tiny.save(Path(name))
        theirs = original(folder, arguments.python)
        mine = ours(ImageReward(folder, folder / tiny.BERT, vision_layers=tiny.SIZES["layers"]))
    exact = len(mine["gradients"])
    theirs["gradients"] = theirs["gradients"][:exact] / torch.tensor(PREPROCESSING["std"]).view(3, 1, 1)
    gaps = (mine["scores"] - theirs["scores"]).abs()
    slopes = (mine["gradients"] - theirs["gradients"]).abs().amax((1, 2, 3)) / theirs["gradients"].abs().amax((1, 2, 3))
    rows = [
        ("tokens that differ", int((mine["tokens"] != theirs["tokens"]).sum()), 0),
        (f"score, {exact} pictures of 224 pixels", float(gaps[:exact].max()), EXACT),
        ("gradient, relative to its largest", float(slopes.max()), EXACT),
        (f"score, {len(gaps) - exact} pictures of other sizes", float(gaps[exact:].max()), RESIZED),
    ]
    table = Table(
        "", "largest gap", "allowed", title=f"scores {theirs['scores'].min():.2f} to {theirs['scores'].max():.2f}"
    )
    for label, gap, allowed in rows:
        table.add_row(label, f"{gap:.2g}", f"{allowed:g}")
    Console().print(table)
    if arguments.store:
        pooled = functional.avg_pool2d(theirs["gradients"], BLOCK)
        stored = {"scores": theirs["scores"], "tokens": theirs["tokens"], "gradients": pooled}
        STORED.parent.mkdir(exist_ok=True)
        STORED.write_text(json.dumps({key: value.tolist() for key, value in stored.items()}) + "\n")
    return int(any(gap > allowed for _, gap, allowed in rows))


if __name__ == "__main__":
    sys.exit(main())
