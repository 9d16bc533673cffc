"""How well the shapes map follows prompts at 1 to 16 jumps, and what the small CLIP tells apart.

    python benchmarks/shapes.py --map runs/shapes --clip runs/shapes_clip            two CPU cores, about 6 min

Protocol: held-out prompts in varied wordings, one sample a prompt with seeds 0, 1, ..., without guidance; a parser
reads the pictures (steerfm/shapes.py). "all right" is the share of pictures in which every object, colour, shape,
size, count and place is as asked. Unseen: one object whose colour and shape never came together in training. CLIP:
how often the right caption of a held-out scene has a higher cosine than that of the scene edited in one respect.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from steerfm import FlowMap, Unsteered
from steerfm.data.shapes import shape_pictures, shape_prompts
from steerfm.metrics import frechet_distance, frechet_floor
from steerfm.metrics.prompt_following import PromptFollowing, prompt_following
from steerfm.rewards.clip import CLIPScore
from steerfm.seeds import generator
from steerfm.shape_captions import describe, plain
from steerfm.shape_edits import EDITS
from steerfm.shapes import is_possible, render, sample_scene

JUMPS = (1, 2, 4, 16)
KINDS: dict[str, dict[str, Any]] = {
    "one object": {"count": 1},
    "two objects": {"count": 2},
    "three objects": {"count": 3},
    "one, unseen": {"count": 1, "split": "unseen"},
}
console = Console()


def follow_prompts(flow_map: FlowMap, prompts: list[str], jumps: int) -> tuple[PromptFollowing, torch.Tensor]:
    """Return how samples follow their prompts, and the samples in model space."""
    batches = []
    for start in range(0, len(prompts), 100):
        chosen = prompts[start : start + 100]
        batches.append(Unsteered("jumps", jumps)(flow_map, prompts=chosen, seeds=range(start, start + len(chosen))))
    images = torch.cat([batch.images for batch in batches])
    return prompt_following(images, prompts), torch.cat([batch.x0 for batch in batches])


def measure_map(flow_map: FlowMap, n: int) -> None:
    """Print how the map follows prompts of each kind, by number of jumps."""
    for kind, options in KINDS.items():
        prompts = shape_prompts(n, **options)
        table = Table("jumps", "all right", "colour", "shape", "count", "binding", "position", "Fréchet", title=kind)
        real = shape_pictures(2000, **options)
        for jumps in JUMPS:
            followed, samples = follow_prompts(flow_map, prompts, jumps)
            distance = frechet_distance(samples.clamp(-1, 1).flatten(1), real.flatten(1))
            parts = [getattr(followed, part) for part in ("correct", "color", "shape", "count", "binding", "position")]
            cells = [f"{share.mean:.3f}" if share.n else "-" for share in parts]
            table.add_row(str(jumps), *cells, f"{distance:.1f}")
        floor = frechet_floor(real.flatten(1), n, repeats=2)
        table.caption = f"{n} prompts, standard error at most {0.5 / n**0.5:.3f}; Fréchet in pixels, floor {floor:.1f}"
        console.print(table)


def measure_clip(clip: CLIPScore, n: int) -> None:
    """Print how often the CLIP prefers the right caption to that of an edited scene, by edit."""
    table = Table("edit", "one object", "two objects", title="CLIP: right caption above wrong, held-out scenes")
    for name in EDITS:
        shares = [compare_captions(clip, name, count, n) for count in (1, 2)]
        table.add_row(name, *("-" if share is None else f"{share:.3f}" for share in shares))
    table.caption = f"{n} pairs each, standard error at most {0.5 / n**0.5:.3f}"
    console.print(table)


def compare_captions(clip: CLIPScore, edit: str, count: int, n: int) -> float | None:
    """Return the share of n scenes whose own caption scores above the edited scene's; None where no edit is seen."""
    rng = generator(77, "validation")
    scenes, right, wrong = [], [], []
    for _ in range(20 * n):
        scene = sample_scene(rng, count, "held_out")
        other = EDITS[edit](scene, rng)
        seed = int(rng.integers(2**31))
        captions = [plain(describe(each, generator(seed, "validation"))) for each in (scene, other)]
        if captions[0] != captions[1] and is_possible(other):
            scenes.append(scene)
            right.append(captions[0])
            wrong.append(captions[1])
        if len(scenes) == n:
            break
    if len(scenes) < n:
        return None
    with torch.no_grad():
        images = render(scenes)
        return float((clip(images, right).total > clip(images, wrong).total).float().mean())


def clip_path(folder: str) -> Path:
    """Return where a CLIP lies in a run folder, or the folder itself."""
    inside = Path(folder) / "clip"
    return inside if inside.is_dir() else Path(folder)


def main() -> None:
    """Measure what was given, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", help="a saved map, or its run")
    parser.add_argument("--clip", help="a saved CLIP, or its run")
    parser.add_argument("--n", type=int, default=1000, help="prompts of each kind (default: 1000)")
    arguments = parser.parse_args()
    if not arguments.map and not arguments.clip:
        parser.error("give --map, --clip or both: steerfm train recipe=shapes, and recipe=shapes_clip, make them")
    if arguments.clip:
        measure_clip(CLIPScore(str(clip_path(arguments.clip))), arguments.n)
    if arguments.map:
        measure_map(FlowMap.load(arguments.map), arguments.n)


if __name__ == "__main__":
    main()
