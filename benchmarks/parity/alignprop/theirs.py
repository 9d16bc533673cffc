"""TRL's AlignProp trainer on the task of a folder, in an environment of its own; against_alignprop.py starts it.

    ENVIRONMENT/bin/python benchmarks/parity/alignprop/theirs.py FOLDER

FOLDER holds task.json, which names a pipeline and a CLIP in their published layouts. What ours.py writes is written
beside it: STEP.safetensors, pictures of the held-out prompts after so many steps with the rewards as they are seen
here, and figures.json, the seconds of each step, or what one holds in memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import open_clip
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from sides import begin, finish, resident
from torch import Tensor
from torch.nn import functional
from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline

from steerfm.reward_check import peak_memory


def clip_score(folder: str, wish: str | None) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Return the cosine of a picture and a wish, or its prompt, as TRL asks for it, by a CLIP that lies in a folder.

    Its pictures have the size that the CLIP reads, so that nothing is resized.
    """
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval().requires_grad_(False)
    mean, std = (torch.tensor(model.visual.preprocess_cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))

    def score(images: Tensor, prompts: tuple[str, ...], metadata: Any) -> tuple[Tensor, dict[str, Any]]:
        texts = list(prompts) if wish is None else [wish] * len(images)
        seen = functional.normalize(model.encode_image((images - mean) / std), dim=-1)
        with torch.no_grad():
            asked = functional.normalize(model.encode_text(tokenizer(texts)), dim=-1)
        return (seen * asked).sum(1), {}

    return score


def new_trainer(task: dict[str, Any]) -> AlignPropTrainer:
    """Return the trainer with TRL's defaults, but all weights in float32, and the task's batch, rate and guidance."""
    config = AlignPropConfig(
        mixed_precision="no",
        train_batch_size=task["batch"],
        train_learning_rate=task["rate"],
        sample_guidance_scale=task["guidance"],
        save_freq=10**9,  # nothing is written between steps
    )
    prompts = iter([prompt for step in task["prompts"] for prompt in step])
    PartialState()  # the trainer logs before it makes one
    pipeline = DefaultDDPOStableDiffusionPipeline(task["pipeline"], use_lora=False)
    return AlignPropTrainer(config, clip_score(task["clip"], task["wish"]), lambda: (next(prompts), {}), pipeline)


def show(trainer: AlignPropTrainer, prompts: list[str], file: Path) -> None:
    """Write pictures of the prompts, from the same noise each time, and their rewards."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        images = trainer._generate_samples(len(prompts), with_grad=False, prompts=prompts)["images"]
        rewards, _ = trainer.reward_fn(images, tuple(prompts), None)
    save_file({"images": images, "rewards": rewards}, file)


def trained(trainer: AlignPropTrainer, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, show what comes out after the task's marks, and return the seconds of each step."""
    show(trainer, task["held_out"], folder / "0.safetensors")
    seconds = []
    for step in range(1, task["steps"] + 1):
        start = time.process_time()
        trainer.step(step - 1, step - 1)
        seconds.append(time.process_time() - start)
        print(f"AlignProp: step {step}, {seconds[-1]:.1f} s", flush=True)
        if step in task["marks"]:
            show(trainer, task["held_out"], folder / f"{step}.safetensors")
    return {"seconds": seconds}


def remembered(trainer: AlignPropTrainer) -> dict[str, Any]:
    """Return what a step holds in memory at most, in bytes: of tensors, and of the process."""
    before = resident()
    trainer.step(0, 0)
    after = resident()
    return {"resident": after - before, "tensors": peak_memory(lambda: trainer.step(0, 1), torch.device("cpu"))}


def main() -> None:
    """Do the task."""
    folder, task = begin()
    trainer = new_trainer(task)
    trainer.sd_pipeline.set_progress_bar_config(disable=True)
    figures = remembered(trainer) if task["memory"] else trained(trainer, task, folder)
    finish(folder, figures, ("trl", "diffusers", "transformers", "torch"))


if __name__ == "__main__":
    main()
