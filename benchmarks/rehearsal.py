"""A dress rehearsal of pretrained models: everything that docs/pretrained.md does, at a size that two cores train.

    python benchmarks/rehearsal.py make rehearsal      pictures and an untrained pipeline; two CPU cores, 3 min
    python benchmarks/rehearsal.py run                 every command of docs/pretrained.md's rehearsal; 55 min

`make` writes what a user brings: a folder of captioned pictures (rehearsal/pictures, scenes of one shape), and a
pipeline in diffusers' layout (rehearsal/pipeline) of its real classes: StableDiffusion3Pipeline, whose AutoencoderKL is
trained here on the pictures, whose two text encoders are the CLIP of the zoo in transformers' classes, and whose
SD3Transformer2DModel is still random. `run` then takes the commands from the guide, one by one, says how long each
took, and prints how many samples follow their prompts, judged by a parser that nothing was ever trained toward.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from steerfm import images, zoo
from steerfm.backbones.pipeline_files import library
from steerfm.data import ImageFolder, Shapes
from steerfm.metrics import prompt_following
from steerfm.optimizers import Muon
from steerfm.seeds import torch_generator

diffusers = library("diffusers")
ROOT = Path(__file__).parents[1]
GUIDE, HEADING = ROOT / "docs/pretrained.md", "## A dress rehearsal"
SIZE, TOKENS = 32, 16  # pixels a side; tokens of a prompt
console = Console()


def make(folder: Path, count: int, steps: int) -> None:
    """Write pictures and pipeline into a folder; what is there already stays."""
    pictures = folder / "pictures"
    if not (pictures / "captions.jsonl").exists():
        write_pictures(pictures, count)
    if (folder / "pipeline/model_index.json").exists():
        console.print(f"{folder} is there already")
        return
    vae, figures = trained_autoencoder(ImageFolder(str(pictures), size=SIZE, batch_size=32), steps)
    pipeline = assembled(vae)
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    console.print(f"Wrote {folder}: {figures}")


def write_pictures(folder: Path, count: int) -> None:
    """Write scenes of one shape as PNG files with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    batch = Shapes(count, SIZE, count=1).batch(0)
    rows = []
    for i, (picture, caption) in enumerate(zip(batch["x0"], batch["prompt"], strict=True)):
        name = f"{i:05d}.png"
        (folder / name).write_bytes(images.encode_png(images.to_unit(picture)))
        rows.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n")


def trained_autoencoder(data: ImageFolder, steps: int, rate: float = 4e-3) -> tuple[Any, str]:
    """Return an AutoencoderKL of 32 x 32 pictures, and in words how many scenes it keeps.

    It minimises the mean absolute error and a thousandth of the divergence from N(0, 1), in nats a value (Rombach et
    al. 2022, arXiv 2112.10752, without their adversarial term). Scale and shift are measured on pictures afterwards.
    """
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )
    optimizer = Muon(vae.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1, cycle_momentum=False)
    for step in range(steps):
        x0 = data.batch(step)["x0"]
        law = vae.encode(x0).latent_dist
        z = law.mean + law.std * torch.randn(law.mean.shape, generator=torch_generator(0, "posterior", step))
        loss = (vae.decode(z).sample - x0).abs().mean() + 1e-3 * law.kl().mean() / x0[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            console.print(f"autoencoder: step {step} of {steps}, loss {loss.item():.4f}")
    vae.eval()
    with torch.no_grad():
        batch = data.rows(range(1000))
        z = vae.encode(batch["x0"]).latent_dist.mean
        kept = prompt_following(images.clamp(images.to_unit(vae.decode(z).sample)), batch["prompt"]).correct.mean
    vae.register_to_config(scaling_factor=float(1 / z.std()), shift_factor=float(z.mean()))
    return vae, f"the autoencoder keeps {kept:.3f} of 1,000 scenes as their captions say"


def assembled(vae: Any) -> Any:
    """Return the pipeline of Stable Diffusion 3, whose transformer is yet to be trained."""
    encoder, tokenizer = clip_text_encoder(), clip_tokenizer()
    width = encoder.config.hidden_size
    torch.manual_seed(1)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=32,
        num_attention_heads=4, caption_projection_dim=128, joint_attention_dim=2 * width,
        pooled_projection_dim=2 * encoder.config.projection_dim, pos_embed_max_size=SIZE // 4, qk_norm="rms_norm",
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0), vae=vae,
        text_encoder=encoder, tokenizer=tokenizer, text_encoder_2=encoder, tokenizer_2=tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def clip_text_encoder() -> Any:
    """Return the text tower of the zoo's CLIP, which open_clip's classes hold, as transformers' class."""
    folder = zoo.folder("shapes32_clip", zoo.CLIPS)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    text, count = config["text_cfg"], config["text_cfg"]["vocab_size"]
    encoder = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            vocab_size=count,
            hidden_size=text["width"],
            num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"],
            intermediate_size=int(text["width"] * text["mlp_ratio"]),
            max_position_embeddings=text["context_length"],
            projection_dim=config["embed_dim"],
            hidden_act="gelu",
            bos_token_id=count - 2,
            eos_token_id=count - 1,
            pad_token_id=0,
        )
    )
    kept = load_file(folder / "open_clip_model.safetensors")
    encoder.load_state_dict(_renamed({name: tensor.float() for name, tensor in kept.items()}, text["layers"]))
    return encoder.eval()


def _renamed(kept: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Return open_clip's tensors of a text tower by transformers' names."""
    outer, names = "text_model.", {"token_embedding.weight": "embeddings.token_embedding.weight"}
    names |= {"positional_embedding": "embeddings.position_embedding.weight"}
    names |= {f"ln_final.{part}": f"final_layer_norm.{part}" for part in ("weight", "bias")}
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    inner |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    found = {outer + theirs: kept[ours] for ours, theirs in names.items()}
    for i in range(layers):
        block, theirs = f"transformer.resblocks.{i}.", f"{outer}encoder.layers.{i}."
        for part in ("weight", "bias"):
            found |= {f"{theirs}{new}.{part}": kept[f"{block}{old}.{part}"] for old, new in inner.items()}
            together = kept[f"{block}attn.in_proj_{part}"].chunk(3)
            found |= {f"{theirs}self_attn.{name}_proj.{part}": each for name, each in zip("qkv", together, strict=True)}
    return found | {"text_projection.weight": kept["text_projection"].T.contiguous()}


def clip_tokenizer() -> Any:
    """Return CLIP's tokenizer, from open_clip's copy of its vocabulary, for prompts of a few tokens."""
    theirs = open_clip.SimpleTokenizer()
    merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)  # as they were learnt
    return transformers.CLIPTokenizer(
        vocab=theirs.encoder, merges=merges, model_max_length=TOKENS, pad_token="!", bos_token="<start_of_text>",
        eos_token="<end_of_text>", unk_token="<end_of_text>",
    )  # fmt: skip


def run(folder: Path) -> None:
    """Run the guide's commands in a folder, one after the other, and print how long each took and what came out."""
    folder.mkdir(parents=True, exist_ok=True)
    table = Table("command", "seconds", "reward", "prompts followed", title="Rehearsal of pretrained models")
    for command in commands(GUIDE.read_text(encoding="utf-8")):
        console.print(f"$ {command}", soft_wrap=True, markup=False)
        start = time.monotonic()
        subprocess.run(executed(command), cwd=folder, check=True)
        table.add_row(title(command), f"{time.monotonic() - start:.0f}", *figures(folder, command))
    console.print(table)


def commands(guide: str) -> list[str]:
    """Return the commands of the guide's rehearsal."""
    section = guide.partition(HEADING)[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith(("python ", "steerfm "))]


def executed(command: str) -> list[str]:
    """Return a command's arguments, with the programs of this environment."""
    first, *rest = shlex.split(command)
    if first == "steerfm":
        return [str(Path(sys.executable).with_name("steerfm")), *rest]
    return [sys.executable, str(ROOT / rest[0]), *rest[1:]]


def title(command: str) -> str:
    """Return what a command does, and the name of its run."""
    first, *rest = shlex.split(command)
    return f"{rest[0] if first == 'steerfm' else rest[1]} {run_name(command)}"


def run_name(command: str) -> str:
    """Return the name that a command gives its run, "" where it makes none."""
    return next((word.removeprefix("name=") for word in shlex.split(command) if word.startswith("name=")), "")


def figures(folder: Path, command: str) -> tuple[str, str]:
    """Return the mean reward and share of followed prompts of the run that a command made, if it sampled."""
    path = folder / "runs" / run_name(command) / "metrics.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return tuple(f"{found[key]:.3f}" if key in found else "" for key in ("reward", "held_out.judge"))  # type: ignore[return-value]


def main() -> None:
    """Make what is trained on, or run the rehearsal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    making = actions.add_parser("make", help="write pictures and an untrained pipeline")
    making.add_argument("folder", type=Path)
    making.add_argument("--pictures", type=int, default=20_000)
    making.add_argument("--steps", type=int, default=800, help="of training the autoencoder (default: 800)")
    running = actions.add_parser("run", help="run every command of the guide's rehearsal")
    running.add_argument("--in", dest="folder", type=Path, default=Path(), help="where (default: here)")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.action == "make":
        make(arguments.folder, arguments.pictures, arguments.steps)
    else:
        run(arguments.folder)


if __name__ == "__main__":
    main()
