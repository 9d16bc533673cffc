"""A step of direct fine-tuning in 2 jumps against one of TRL 0.23.1's AlignProp trainer, which samples in 50 steps.

    python benchmarks/against_alignprop.py                          one CPU core, 45 min, and 6 GB for TRL's environment
    python benchmarks/against_alignprop.py --wish '' --steps 40    each picture's own prompt as its reward; 55 min

Both start from one small pipeline of Stable Diffusion's real classes that is trained here on scenes of one shape:
AlignProp from the pipeline, and steerfm from the flow map that it was distilled into. Both move all weights in float32
on one thread with the same prompts, batch, AdamW and clipping, toward the same CLIP's reward for a wish; for the rest,
each has its defaults (AlignProp: checkpointing of the U-Net, gradients through a random half of the steps, guidance in
two calls; steerfm: no checkpointing). Pictures of held-out prompts, each side's in its own way, are judged here, by
that CLIP and by a parser that says how many show what was wished and that nobody was trained toward. AlignProp goes
first, for so many steps; steerfm then for as many seconds. Seconds are of processor time. Everything is kept in a
folder, and what is there already is not made again. AlignProp runs in an environment of its own (--environment), made
by pip where it is missing: benchmarks/parity/alignprop has its versions, and what runs on the two sides.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import rehearsal
import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerfm import FlowMap, zoo
from steerfm.backbones import export_diffusers
from steerfm.data import ImageFolder, Prompts
from steerfm.data.shapes import shape_prompts
from steerfm.errors import ConfigError, RewardError, SteerfmError
from steerfm.metrics import prompt_following
from steerfm.rewards.clip import CLIPScore

ROOT = Path(__file__).parents[1]
SIDES = ROOT / "benchmarks/parity/alignprop"
BATCH, JUMPS, GUIDANCE = 8, 2, 2.5
RATE = 3e-5  # with each picture's own prompt as its reward, both sides leap about at 1e-4 and 3e-4
TEMPERATURE = 5e-4  # of steerfm's penalty; AlignProp has none
HELD_OUT = 100  # prompts that differ, and were not trained on
CLOSE = 1e-4  # by which the two sides may differ about one picture's reward
console = Console(width=None if os.isatty(1) else 150)


def make(folder: Path, pictures: int, autoencoder: int, velocity: int, distilled: int) -> dict[str, float]:
    """Make the pipeline, trained, and the map distilled from it, each where it is missing; return their seconds."""

    def steerfm(*words: str) -> Callable[[], Any]:
        command = [str(Path(sys.executable).with_name("steerfm")), *words, "threads=1"]
        return lambda: subprocess.run(command, cwd=folder, check=True)

    cached = f"cached={folder / 'runs/pictures'}"
    stages: dict[str, Callable[[], Any]] = {
        "pipeline": lambda: write_pipeline(folder, pictures, autoencoder),
        "latents": steerfm(
            "cache", "recipe=latents", f"map={folder / 'untrained'}", f"data.folder={folder / 'pictures'}",
            f"data.size={rehearsal.SIZE}", f"encoders.text_length={rehearsal.TOKENS}", "latents.batch_size=100",
            "name=pictures",
        ),
        "velocity": steerfm(
            "train", "recipe=rehearsal/train", f"map={folder / 'untrained'}", cached, "name=velocity",
            f"trainer.max_steps={velocity}",
        ),
        "flow map": steerfm(
            "train", "recipe=rehearsal/distil", f"map={folder / 'runs/velocity'}", cached, "name=distilled",
            f"module.guidance={GUIDANCE}", f"trainer.max_steps={distilled}",
        ),
        "trained pipeline": lambda: write_trained(folder),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "seconds.json"
    seconds = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, work in stages.items():
        if name not in seconds:
            start = time.monotonic()
            work()
            seconds[name] = time.monotonic() - start
            file.write_text(json.dumps(seconds), encoding="utf-8")
    return seconds


def write_pipeline(folder: Path, pictures: int, steps: int) -> None:
    """Write pictures of one shape, and a pipeline of Stable Diffusion's whose U-Net is yet to be trained."""
    if not (folder / "pictures/captions.jsonl").exists():
        rehearsal.write_pictures(folder / "pictures", pictures)
    data = ImageFolder(str(folder / "pictures"), size=rehearsal.SIZE, batch_size=32)
    vae, figures = rehearsal.trained_autoencoder(data, steps)
    vae.register_to_config(shift_factor=None)  # Stable Diffusion's pipeline knows none
    assembled(vae).save_pretrained(folder / "untrained", safe_serialization=True)
    as_published(folder / "untrained")
    console.print(f"Wrote {folder / 'untrained'}: {figures}")


def assembled(vae: Any) -> Any:
    """Return the pipeline of Stable Diffusion, with the zoo's CLIP to read prompts and a random U-Net.

    The U-Net answers with v, as that of Stable Diffusion 2.1 does: where there is next to no data left, a first jump
    made from a predicted noise would multiply the network's error by 15.
    """
    diffusers, whole = rehearsal.diffusers, rehearsal.clip_text_encoder()
    encoder = transformers.CLIPTextModel(whole.config)
    weights = whole.state_dict()
    encoder.load_state_dict({name: weights[f"text_model.{name}"] for name in encoder.state_dict()})
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=rehearsal.SIZE // 2, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(32, 64, 128), cross_attention_dim=whole.config.hidden_size, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=encoder.eval(), tokenizer=rehearsal.clip_tokenizer(), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def as_published(folder: Path) -> None:
    """Write text encoder and tokenizer of a pipeline as older versions of transformers publish and read them."""
    weights = folder / "text_encoder/model.safetensors"
    save_file({f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    theirs = open_clip.SimpleTokenizer()
    merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)  # as they were learnt
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "tokenizer/merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer/vocab.json").write_text(json.dumps(theirs.encoder), encoding="utf-8")


def write_trained(folder: Path) -> None:
    """Write the pipeline with the U-Net that was trained, which AlignProp starts from."""
    shutil.copytree(folder / "untrained", folder / "trained", dirs_exist_ok=True)
    export_diffusers(FlowMap.load(folder / "runs/velocity/map"), folder / "trained")


def python_of(environment: Path) -> str:
    """Return the Python of AlignProp's environment, which is made or completed; raise ConfigError where it cannot."""
    python = environment / "bin/python"
    wanted = [f"torch=={torch.__version__.partition('+')[0]}", "-r", str(SIDES / "requirements.txt")]
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        console.print(f"Completing {environment}, which may take minutes")
        done = subprocess.run([python, "-m", "pip", "install", "-q", *wanted], stderr=subprocess.PIPE, text=True)
        failed = done.returncode != 0
        reason = done.stderr.strip().rpartition("\n")[2]
    except (OSError, subprocess.CalledProcessError) as error:
        failed, reason = True, str(error)
    if failed:
        raise ConfigError(
            f"AlignProp needs an environment of its own, and {environment} could not be completed ({reason}): run this "
            "where pip reaches a package index, or name one made elsewhere, --environment PATH."
        )
    return str(python)


def done(folder: Path, python: str, task: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one side's task, which is carried out in a process of its own unless it was before."""
    script = SIDES / ("ours.py" if python == sys.executable else "theirs.py")
    figures = folder / "figures.json"
    if not figures.exists() or json.loads((folder / "task.json").read_text(encoding="utf-8")) != task:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
        there = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([python, str(script), str(folder)], check=True, env=os.environ | there)
    return json.loads(figures.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Mark:
    """Hold what came out after so many steps: rewards and whether prompts were followed, (N,) each."""

    steps: int
    seconds: float
    rewards: Tensor
    followed: Tensor


def judged(folder: Path, figures: dict[str, Any], reward: CLIPScore, prompts: Sequence[str]) -> list[Mark]:
    """Return a side's marks, in order; raise RewardError where it saw other rewards than are seen here."""
    marks = []
    for file in sorted(folder.glob("*.safetensors"), key=lambda file: int(file.stem)):
        kept = load_file(file)
        with torch.no_grad():
            rewards = reward.score(kept["images"], prompts)
        apart = float((rewards - kept["rewards"]).abs().max())
        if not apart <= CLOSE:
            raise RewardError(f"{file} has rewards that differ by {apart:.1e} from those here, which {CLOSE} is for.")
        asked = prompts if reward.prompt is None else [reward.prompt] * len(prompts)
        followed = prompt_following(kept["images"], asked).values["correct"]
        steps = int(file.stem)
        marks.append(Mark(steps, sum(figures["seconds"][:steps]), rewards, followed))
    return marks


def mean(values: Tensor, digits: int = 4) -> str:
    """Return a mean and its standard error."""
    values = values.double()
    return f"{float(values.mean()):.{digits}f} ± {float(values.std()) / math.sqrt(len(values)):.{digits}f}"


def gained(marks: Sequence[Mark], i: int) -> Tensor:
    """Return by how much the rewards have risen since the start, prompt by prompt; (N,)."""
    return marks[i].rewards - marks[0].rewards


def per_gain(cost: float, gain: float) -> float:
    """Return the cost of 0.01 of reward, infinite where nothing was gained."""
    return 0.01 * cost / gain if gain > 0 else math.inf


def compared(theirs: Sequence[Mark], ours: Sequence[Mark], bytes_of: tuple[int, int]) -> Table:
    """Return what 0.01 of reward cost each side, after as many steps and after as many seconds, and the ratios."""
    table = Table("", "AlignProp", "steerfm", "ratio", title="What 0.01 of reward costs on held-out prompts")
    same = next(i for i, mark in enumerate(ours) if mark.steps == theirs[-1].steps)
    for name, i in (("as many steps", same), ("as many seconds", len(ours) - 1)):
        gains = [float(gained(marks, at).mean()) for marks, at in ((theirs, -1), (ours, i))]
        seconds = [per_gain(mark.seconds, gain) for mark, gain in zip((theirs[-1], ours[i]), gains, strict=True)]
        held = [per_gain(size / 1e6, gain) for size, gain in zip(bytes_of, gains, strict=True)]
        for unit, (their_cost, our_cost) in (("seconds", seconds), ("MB a step", held)):
            ratio = f"{their_cost / our_cost:.2f}" if math.isfinite(their_cost) and math.isfinite(our_cost) else ""
            table.add_row(f"{unit}, after {name}", f"{their_cost:.2f}", f"{our_cost:.2f}", ratio)
    return table


def course(sides: dict[str, list[Mark]]) -> Table:
    """Return the table of what came out as training went on."""
    table = Table("", "steps", "seconds", "reward", "gained", "as wished", title="As training goes on")
    for side, marks in sides.items():
        for i, mark in enumerate(marks):
            rise = mean(gained(marks, i)) if i else ""
            row = (str(mark.steps), f"{mark.seconds:.0f}", mean(mark.rewards), rise, mean(mark.followed, 3))
            table.add_row(side if i == 0 else "", *row)
    return table


def a_step(sides: dict[str, tuple[list[float], dict[str, Any]]]) -> Table:
    """Return the table of what a step costs."""
    table = Table("", "seconds a step", "MB of tensors", "MB of the process", title=f"A step of {BATCH} pictures")
    for side, (seconds, figures) in sides.items():
        sizes = (f"{figures[name] / 1e6:.0f}" for name in ("tensors", "resident"))
        table.add_row(side, f"{statistics.median(seconds):.2f}", *sizes)
    return table


def tasks(folder: Path, steps: int, wish: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what AlignProp and steerfm are to do; steerfm is still to be told for how long."""
    trained = shape_prompts(1000, count=1, split="train")
    batches = Prompts(trained, BATCH)
    task = {
        "batch": BATCH, "rate": RATE, "steps": steps, "marks": [steps // 3, 2 * steps // 3, steps], "memory": False,
        "held_out": shape_prompts(HELD_OUT, count=1, distinct=True),
        "clip": str(zoo.folder("shapes32_clip", zoo.CLIPS)), "wish": wish,
    }  # fmt: skip
    theirs = {
        "guidance": GUIDANCE, "pipeline": str(folder / "trained"),
        "prompts": [batches.batch(step)["prompt"] for step in range(steps)],
    }  # fmt: skip
    ours = {
        "jumps": JUMPS, "temperature": TEMPERATURE, "checkpointing": False,
        "map": str(folder / "runs/distilled/map"), "trained": trained,
        "marks": [*task["marks"], *(steps * 2**i for i in range(1, 20))],
    }  # fmt: skip
    return task | theirs, task | ours


def run(folder: Path, python: str, steps: int, wish: str | None) -> None:
    """Fine-tune on both sides, AlignProp by the Python of its environment, and print the tables."""
    theirs, ours = tasks(folder, steps, wish)
    tuned = {"AlignProp": done(folder / "alignprop", python, theirs)}
    as_long = {"steps": 10**6, "seconds": sum(tuned["AlignProp"]["seconds"])}
    tuned["steerfm"] = done(folder / "steerfm", sys.executable, ours | as_long)
    memory = {"memory": True, "steps": 7, "seconds": math.inf}
    held = {
        "AlignProp": done(folder / "alignprop-memory", python, theirs | memory),
        "steerfm": done(folder / "steerfm-memory", sys.executable, ours | memory),
        "steerfm, checkpointing": done(
            folder / "steerfm-checkpointing", sys.executable, ours | memory | {"checkpointing": True}
        ),
    }
    reward, prompts = CLIPScore(theirs["clip"], prompt=wish), theirs["held_out"]
    found = {side: judged(folder / side.lower(), figures, reward, prompts) for side, figures in tuned.items()}
    console.print(a_step({side: (tuned.get(side, figures)["seconds"], figures) for side, figures in held.items()}))
    console.print(course(found))
    sizes = (held["AlignProp"]["tensors"], held["steerfm"]["tensors"])
    console.print(compared(found["AlignProp"], found["steerfm"], sizes))
    for side, figures in tuned.items():
        versions = {name: value for name, value in figures.items() if isinstance(value, str)}
        console.print(f"{side}: " + ", ".join(f"{name} {version}" for name, version in versions.items()))


def main() -> None:
    """Make what is missing, run both sides, and print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/alignprop", help="where everything is kept")
    parser.add_argument("--environment", type=Path, help="TRL's, made where it is missing (default: in the folder)")
    parser.add_argument("--steps", type=int, default=20, help="of AlignProp (default: 20)")
    parser.add_argument("--wish", default="a red circle", help="that all pictures be this; '' for each its own prompt")
    parser.add_argument("--pictures", type=int, default=20_000, help="to train on (default: 20,000)")
    parser.add_argument("--training", type=int, nargs=3, default=(600, 500, 250), metavar="N",
                        help="steps of training autoencoder, U-Net and flow map (default: 600 500 250)")  # fmt: skip
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.folder.resolve()
    environment = (arguments.environment or folder / "environment").absolute()
    try:
        python = python_of(environment)  # before the work of minutes
        made = make(folder, arguments.pictures, *arguments.training)
        console.print("Seconds to make: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in made.items()))
        run(folder, python, arguments.steps, arguments.wish or None)
    except SteerfmError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
