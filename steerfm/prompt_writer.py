"""A prompt writer: a language model that turns wishes into prompts for a frozen flow map, tuned by TRL's GRPO.

The reward looks at the pictures and at the wish, never at what was written. Few jumps a picture make it affordable.
Reference: Hao et al. 2022, arXiv 2212.09611 (Promptist), for the idea; Shao et al. 2024, arXiv 2402.03300, for GRPO;
Liu et al. 2025, arXiv 2503.20783 (Dr. GRPO), for rewards that no standard deviation divides and constant lengths.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from steerfm import seeds
from steerfm.data.batches import epoch_indices
from steerfm.data.prompts import read_prompts
from steerfm.errors import CheckpointError, ConfigError
from steerfm.flow_map import FlowMap
from steerfm.reward import as_reward
from steerfm.reward_adapters import trl_reward
from steerfm.sampling import Unsteered
from steerfm.types import Images, Samples

INSTRUCTION = "instruction.txt"  # beside the weights: a writer is of use only with what it was asked in training
NO_THINKING = {"enable_thinking": False}  # Qwen3's; other templates ignore it
FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class Painter:
    """Draw pictures of texts: the same for the same text, whatever else is drawn with it.

    sampler: `Unsteered`, or what is called as it is. samples: pictures a text, neighbours in what is returned; more
    teach a writer what is good on average, not which wording happens to have a lucky seed. A picture's seed is made
    of `seed`, its number and the text. micro_batch: pictures drawn at a time.
    """

    flow_map: FlowMap
    sampler: Callable[..., Samples] = field(default_factory=lambda: Unsteered("jumps", 4))
    samples: int = 1
    seed: int = 0
    micro_batch: int = 64

    def __post_init__(self) -> None:
        seeds.whole(self.seed)
        if self.samples < 1 or self.micro_batch < 1:
            raise ConfigError(
                f"A painter draws at least one picture a text and at a time, got samples={self.samples} and "
                f"micro_batch={self.micro_batch}."
            )

    def __call__(self, texts: Sequence[str]) -> Images:
        """Return the pictures of B texts, (B * samples, C, H, W) in [0, 1]; equal texts are drawn once."""
        different = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        images = torch.cat([batch.images for batch in self.draw(list(different))]).clamp(0, 1)
        rows = torch.tensor([different[text] for text in texts], device=images.device)
        return images.unflatten(0, (-1, self.samples))[rows].flatten(0, 1)

    def draw(self, texts: Sequence[str]) -> list[Samples]:
        """Return samples of B texts, B * samples in all, in micro-batches."""
        pairs = [(text, _digest(f"{self.seed}/{i}/{text}")) for text in texts for i in range(self.samples)]
        parts = [pairs[i : i + self.micro_batch] for i in range(0, len(pairs), self.micro_batch)]
        return [
            self.sampler(self.flow_map, prompts=[text for text, _ in part], seeds=[seed for _, seed in part])
            for part in parts
        ]


@dataclass(frozen=True)
class Writer:
    """Hold a language model of transformers with its tokenizer, and the instruction with which a wish is put to it.

    instruction: {prompt} in it stands for the wish. Models with a chat template read it as the user's message, without
    thinking aloud; others go on from it.
    """

    model: Any
    tokenizer: Any
    instruction: str = "{prompt}"

    def __post_init__(self) -> None:
        if "{prompt}" not in self.instruction:
            raise ConfigError(f"The instruction has no {{prompt}} where the wish would stand: '{self.instruction}'.")

    @classmethod
    def load(cls, path: str | os.PathLike[str], instruction: str | None = None, online: bool = False) -> Writer:
        """Load a model and its tokenizer in float32, from tensors only; no code that comes with it is run.

        path: a folder, or a hub id that the cache holds or, where `online`, that is downloaded. instruction: None takes
        the one that was saved with it, if any, else the wish alone. Raises CheckpointError.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            folder = _folder(path, online)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **safe
            )
            model, report = loaded
            tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **safe)
        except Exception as error:  # whatever transformers makes of files that are missing or damaged
            raise _unloadable(path, error) from error
        unfit = sorted({*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])})
        if unfit:
            raise CheckpointError(f"The weights of '{path}' do not fit its config: {unfit[0]} is missing or differs.")
        if tokenizer.eos_token is None:
            raise CheckpointError(f"The tokenizer of '{path}' has no end of text, so that nothing written would end.")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        saved = folder / INSTRUCTION
        if instruction is None:
            instruction = saved.read_text(encoding="utf-8") if saved.exists() else "{prompt}"
        return cls(model, tokenizer, instruction)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save weights (safetensors), tokenizer and instruction as transformers and `load` read them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        Path(folder, INSTRUCTION).write_text(self.instruction, encoding="utf-8")

    def ask(self, wish: str) -> Any:
        """Return what the model is given for a wish: a conversation where it has a chat template, else a text."""
        text = self.instruction.replace("{prompt}", wish)
        return text if self.tokenizer.chat_template is None else [{"role": "user", "content": text}]

    @torch.no_grad()
    def write(self, wishes: Sequence[str], max_completion_length: int = 64, micro_batch: int = 64) -> list[str]:
        """Return a prompt for each wish: at every place the likeliest token, at most so many in all."""
        from transformers import GenerationConfig

        how = GenerationConfig(
            max_new_tokens=max_completion_length,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        self.model.eval()
        written: list[str] = []
        for i in range(0, len(wishes), micro_batch):
            given = self._tokens(wishes[i : i + micro_batch])
            found = self.model.generate(**given, generation_config=how)[:, given["input_ids"].shape[1] :]
            written += self.tokenizer.batch_decode(found, skip_special_tokens=True)
        return written

    def _tokens(self, wishes: Sequence[str]) -> Any:
        asked, chat = [self.ask(wish) for wish in wishes], self.tokenizer.chat_template is not None
        if chat:
            asked = [
                self.tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True, **NO_THINKING)
                for one in asked
            ]
        given = self.tokenizer(
            asked, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=not chat
        )
        return {key: given[key].to(self.model.device) for key in ("input_ids", "attention_mask")}


@dataclass(frozen=True)
class Writing:
    """Say how a writer is tuned; passed to `prompt_writer`.

    temperature: of the tilt of the model's law of completions by the mean reward of their pictures; exact for
    completions of one token, nominal for longer ones, since GRPO's penalty looks at each token alone and not at where
    it leads. steps: of the optimizer. prompts_per_step wishes with samples_per_prompt completions each make a step,
    over all processes; micro_batch of them a process go through the model at a time (None: all).
    max_completion_length: in tokens. save_every, log_every: steps. bf16: autocast. use_cpu: even where there is a GPU.
    """

    temperature: float = 0.1
    steps: int = 200
    prompts_per_step: int = 8
    samples_per_prompt: int = 8
    micro_batch: int | None = None
    max_completion_length: int = 64
    learning_rate: float = 1e-6
    seed: int = 0
    save_every: int = 50
    log_every: int = 10
    report_to: Literal["none", "wandb"] = "none"
    bf16: bool = False
    use_cpu: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be positive, got {self.temperature}: it divides the reward.")
        if self.samples_per_prompt < 2:
            raise ConfigError(
                f"samples_per_prompt must be at least 2, got {self.samples_per_prompt}: GRPO compares a completion "
                "with others of the same wish, and one alone teaches nothing."
            )
        if self.report_to not in ("none", "wandb"):
            raise ConfigError(f"report_to is 'none' or 'wandb', got '{self.report_to}'.")
        numbers = ("steps", "prompts_per_step", "max_completion_length", "save_every", "log_every")
        for name in numbers:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def config(self, folder: str | os.PathLike[str]) -> Any:
        """Return TRL's GRPOConfig, with checkpoints in `folder`.

        Rewards are not divided by their spread, which would divide the temperature's meaning away; a group's mean holds
        the completion itself, so that its advantages are (n - 1) / n of what they ought to be, and the penalty is too.
        """
        from trl.trainer.grpo_config import GRPOConfig

        n, rows, at_once = self.samples_per_prompt, *self._rows()
        return GRPOConfig(
            output_dir=str(folder),
            beta=self.temperature * (n - 1) / n,
            scale_rewards="none",
            loss_type="dr_grpo",
            shuffle_dataset=False,
            max_steps=self.steps,
            num_generations=n,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=rows // at_once,
            max_completion_length=self.max_completion_length,
            chat_template_kwargs=NO_THINKING,
            learning_rate=self.learning_rate,
            disable_dropout=True,
            gradient_checkpointing=False,
            seed=self.seed,
            save_steps=self.save_every,
            save_total_limit=2,
            logging_steps=self.log_every,
            report_to=self.report_to,
            run_name=Path(folder).resolve().parent.name,
            bf16=self.bf16,
            use_cpu=self.use_cpu,
            disable_tqdm=True,
        )

    def _rows(self) -> tuple[int, int]:
        """Return how many completions a process makes a step, and how many go through its model at a time."""
        rows, processes = self.prompts_per_step * self.samples_per_prompt, int(os.environ.get("WORLD_SIZE", "1"))
        own = rows // processes
        at_once = self.micro_batch or own
        if own * processes != rows or at_once < 1 or own % at_once:
            raise ConfigError(
                f"A step's {rows} completions (prompts_per_step * samples_per_prompt) cannot be shared evenly among "
                f"{processes} processes in micro-batches of {at_once}: choose numbers that divide them."
            )
        return own, at_once


def prompt_writer(
    writer: Writer,
    painter: Painter,
    reward: Any,
    prompts: str | os.PathLike[str] | Sequence[str],
    options: Writing | None = None,
    folder: str | os.PathLike[str] = "runs/writer/checkpoints",
) -> Any:
    """Return a trl.GRPOTrainer that tunes the writer's model in place: call `.train()`.

    prompts: the wishes, a list or a text file with one a line. reward: as `as_reward` takes it; a completion's is the
    mean over the painter's pictures of it, judged with the wish. The painter's map and the reward are moved to the
    trainer's device. Raises ConfigError, DataError.
    """
    from datasets import Dataset
    from trl.trainer.grpo_trainer import GRPOTrainer

    options = options or Writing()
    wishes = _order(read_prompts(prompts), options)
    config = options.config(folder)
    judge = as_reward(reward).to(config.device)
    painter.flow_map.to(config.device)
    return GRPOTrainer(
        model=writer.model,
        reward_funcs=_of_wishes(trl_reward(judge, painter, against="prompts"), painter.samples),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": writer.ask(wish), "wish": wish} for wish in wishes]),
        processing_class=writer.tokenizer,
    )


def judged(
    painter: Painter,
    reward: Any,
    wishes: Sequence[str],
    texts: Sequence[str],
    held_out: Mapping[str, Any] | None = None,
) -> Samples:
    """Return samples of B texts, B * painter.samples in all, with the wishes as prompts and scored with them.

    held_out: rewards by name that nothing optimises.
    """
    wanted = [wish for wish in wishes for _ in range(painter.samples)]
    drawn = painter.draw(texts)
    images = torch.cat([batch.images for batch in drawn])
    with torch.no_grad():
        scores = as_reward(reward)(images, wanted)
        others = {name: as_reward(judge)(images, wanted).total for name, judge in (held_out or {}).items()}
    cost = replace(drawn[0].cost, seconds=sum(batch.cost.seconds * len(batch) for batch in drawn) / len(wanted))
    return Samples(
        torch.cat([batch.x0 for batch in drawn]),
        images,
        wanted,
        [seed for batch in drawn for seed in batch.seeds],
        cost,
        rewards=scores.total,
        parts=scores.parts,
        held_out=others,
    )


def _of_wishes(function: Callable[..., Any], samples: int) -> Callable[..., list[float | None]]:
    """Return a reward function of TRL that is told the wish in place of the whole instruction, and takes means."""

    def score(
        prompts: Sequence[Any], completions: Sequence[Any], wish: Sequence[str], log_metric: Any = None, **other: Any
    ) -> list[float | None]:
        wanted = [one for one in wish for _ in range(samples)]
        values = function(prompts=wanted, completions=completions, log_metric=log_metric)
        return [_mean(values[i : i + samples]) for i in range(0, len(values), samples)]

    score.__name__ = function.__name__
    return score


def _order(wishes: list[str], options: Writing) -> list[str]:
    """Return the wishes of all steps, one pass for TRL: it shuffles a resumed run's later passes otherwise."""
    per_step = options.prompts_per_step
    places = [epoch_indices(len(wishes), step, per_step, options.seed) for step in range(options.steps)]
    return [wishes[i] for i in torch.cat(places).tolist()]


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that are not None, None where all are."""
    said = [value for value in values if value is not None]
    return sum(said) / len(said) if said else None


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _folder(path: str | os.PathLike[str], online: bool) -> Path:
    """Return the folder of a model: as given, or the hub's snapshot, in which no code is."""
    from huggingface_hub import snapshot_download

    if Path(path).is_dir():
        return Path(path)
    return Path(snapshot_download(str(path), allow_patterns=list(FILES), local_files_only=not online))


def _unloadable(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    """Return the one sentence for a language model that could not be loaded."""
    reason = " ".join(str(error).split())[:200]
    fix = "put a whole one there, with safetensors and its tokenizer"
    if not Path(path).is_dir():
        fix = "write its folder, or, to download it from the hub, online=True (in a recipe: writer.online=true)"
    return CheckpointError(
        f"No language model could be loaded from '{path}' ({type(error).__name__}: {reason}): {fix}."
    )
