"""A writer of prompts: what it is asked and judged by, what GRPO makes of it exactly, and the command."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from steerfm.cli import main
from steerfm.errors import CheckpointError, ConfigError, DataError
from steerfm.flow_map import FlowMap
from steerfm.metrics.paired import paired_change
from steerfm.networks import MLP
from steerfm.prompt_writer import Painter, Writer, Writing, judged, prompt_writer
from steerfm.rewards.simple import Brightness, Redness
from steerfm.sampling import Unsteered

WORDS = ["<pad>", "<eos>", "<unk>", "a", "red", "green", "blue", "yellow", "circle", "square", "cross"]
WISHES = ["a circle", "a blue square", "cross"]
CHAT = "{% for message in messages %}{{ message.content }} {% endfor %}"
QUICK = Writing(
    steps=2, prompts_per_step=2, samples_per_prompt=4, max_completion_length=3, learning_rate=0.01, use_cpu=True,
    log_every=1, save_every=100,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an untrained language model of eleven words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=1, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("language") / "model"
    LlamaForCausalLM(config).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture
def painter() -> Painter:
    """Return a painter whose untrained map is deaf: a text gives its picture's noise alone."""
    return Painter(FlowMap(MLP((3, 4, 4), width=8, depth=1)), Unsteered("jumps", 1))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def sampled(writer: Writer, wishes: list[str], length: int) -> list[str]:
    """Return a completion of each wish as the trainer draws them."""
    from transformers import GenerationConfig

    given = writer.tokenizer(wishes, padding=True, return_tensors="pt")
    how = GenerationConfig(max_new_tokens=length, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(1)
    writer.model.eval()
    ids = {key: given[key] for key in ("input_ids", "attention_mask")}
    found = writer.model.generate(**ids, generation_config=how)[:, given["input_ids"].shape[1] :]
    return writer.tokenizer.batch_decode(found, skip_special_tokens=True)


# The painter


def test_a_text_has_its_pictures_whatever_is_drawn_with_it(painter: Painter):
    two = dataclasses.replace(painter, samples=2)
    together = two(["b", "a", "c", "a"])
    assert together.shape == (8, 3, 4, 4)
    assert together.min() >= 0 and together.max() <= 1
    assert torch.equal(together[2:4], together[6:8])
    assert not torch.allclose(together[2], together[3], atol=0.1)
    assert not torch.allclose(together[0], together[2], atol=0.1)
    assert torch.allclose(two(["a"]), together[2:4], atol=1e-6)
    assert torch.allclose(painter(["a"]), together[2:3], atol=1e-6)
    assert torch.allclose(dataclasses.replace(two, micro_batch=3)(["b", "a", "c", "a"]), together, atol=1e-6)
    assert not torch.allclose(dataclasses.replace(painter, seed=1)(["a"]), together[2:3], atol=0.1)
    with pytest.raises(ConfigError, match="got samples=0 and micro_batch=64"):
        dataclasses.replace(painter, samples=0)


def test_samples_are_judged_with_the_wish(painter: Painter):
    def told(images, prompts):
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    found = judged(
        dataclasses.replace(painter, samples=2, micro_batch=3), told, ["?", "???"], ["x", "y"], {"b": bright}
    )
    assert found.prompts == ["?", "?", "???", "???"]
    assert found.rewards is not None and found.rewards.tolist() == [1, 1, 3, 3]
    assert torch.allclose(found.held_out["b"], bright(found.images.clamp(0, 1), []))
    assert len(set(found.seeds)) == 4
    assert found.cost.network_calls == 1


def bright(images, prompts):
    return images.mean((1, 2, 3))


# The writer


def test_what_is_written_does_not_depend_on_the_batch_and_survives_saving(folder: Path, tmp_path: Path):
    writer = Writer.load(folder, instruction="{prompt} red")
    written = writer.write(WISHES, 5)
    assert [writer.write([wish], 5)[0] for wish in WISHES] == written
    assert len(set(written)) > 1
    writer.save(tmp_path / "saved")
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} <= {".json", ".txt", ".safetensors"}
    again = Writer.load(tmp_path / "saved")
    assert again.instruction == "{prompt} red"
    assert again.write(WISHES, 5) == written
    assert Writer.load(tmp_path / "saved", instruction="{prompt}").write(WISHES, 5) != written
    with pytest.raises(ConfigError, match=r"has no \{prompt\}"):
        Writer.load(folder, instruction="Draw something.")


def test_a_model_that_is_not_whole_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"loaded from 'nobody/nothing' .*writer\.online=true"):
        Writer.load("nobody/nothing")
    partial = tmp_path / "partial"
    partial.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (partial / name).write_bytes((folder / name).read_bytes())
    state = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save(state, partial / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="put a whole one there, with safetensors"):
        Writer.load(partial)
    del state["lm_head.weight"]
    safetensors.torch.save_file(state, partial / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"do not fit its config: lm_head\.weight"):
        Writer.load(partial)


# Its training


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples_per_prompt": 1}, "one alone teaches nothing"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"report_to": "mlflow"}, "'none' or 'wandb'"),
    ],
)
def test_options_that_cannot_teach_are_refused(changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(QUICK, **changes)


def test_steps_that_cannot_be_shared_are_refused(folder: Path, painter: Painter):
    writer = Writer.load(folder)
    with pytest.raises(ConfigError, match=r"8 completions .* among 1 processes in micro-batches of 3"):
        prompt_writer(writer, painter, bright, WISHES, dataclasses.replace(QUICK, micro_batch=3))
    with pytest.raises(DataError, match="no prompts"):
        prompt_writer(writer, painter, bright, [], QUICK)


def test_the_reward_sees_the_wish_alone_and_a_completion_gets_the_mean(folder: Path, painter: Painter, tmp_path: Path):
    writer = Writer.load(folder, instruction="{prompt} red")
    writer.tokenizer.chat_template = CHAT
    assert writer.ask("cross") == [{"role": "user", "content": "cross red"}]
    seen: list[str] = []
    given: list[list[float]] = []

    def redness(images, prompts):
        seen.extend(prompts)
        given.append(images.mean((1, 2, 3)).tolist())
        return images.mean((1, 2, 3))

    options = dataclasses.replace(QUICK, steps=3, micro_batch=4)
    trainer = prompt_writer(writer, dataclasses.replace(painter, samples=2), redness, WISHES, options, tmp_path)
    before = weights(writer.model)
    trainer.train()
    assert len(seen) == 3 * 8 * 2
    assert set(seen) <= set(WISHES)
    logged = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    assert logged == pytest.approx([sum(values) / len(values) for values in given], abs=1e-6)
    assert any(not torch.equal(before[name], parameter) for name, parameter in writer.model.named_parameters())


def test_one_word_ends_at_the_tilt(folder: Path, painter: Painter, tmp_path: Path):
    """The law of a one-token completion must become p(word) exp(r(word) / temperature), normalised.

    In groups of four, whose means hold the completion itself, an uncorrected penalty would end at 4/3 of the
    temperature, 0.08 away in total variation: half of that is allowed. What is left, 0.015, is the noise of the last
    steps, whose rate falls to zero.
    """
    writer, temperature = Writer.load(folder), 0.05

    def law() -> Tensor:
        with torch.no_grad():
            return writer.model(**writer.tokenizer("a circle", return_tensors="pt")).logits[0, -1].softmax(0)

    def tilted(t: float) -> Tensor:
        return (before.log() + rewards / t).softmax(0)

    texts = [writer.tokenizer.decode([i], skip_special_tokens=True) for i in range(len(WORDS))]
    rewards = bright(painter(texts), texts)
    before = law()
    options = dataclasses.replace(
        QUICK, steps=60, prompts_per_step=48, learning_rate=0.02, temperature=temperature, max_completion_length=1
    )
    prompt_writer(writer, painter, Brightness(), ["a circle"], options, tmp_path).train()
    assert distance(before, tilted(temperature)) > 0.2
    assert distance(tilted(temperature), tilted(temperature * 4 / 3)) > 0.06
    assert distance(law(), tilted(temperature)) < 0.04


def distance(p: Tensor, q: Tensor) -> float:
    """Return the total variation distance of two laws."""
    return float((p - q).abs().sum() / 2)


def test_a_writer_learns_to_ask_for_red(folder: Path, tmp_path: Path):
    writer = Writer.load(folder)
    painter = Painter(FlowMap.from_zoo("shapes32"), Unsteered("jumps", 1))
    wishes = WISHES * 20
    options = dataclasses.replace(QUICK, steps=20, samples_per_prompt=16, learning_rate=0.02, temperature=0.02)
    old = judged(painter, Redness(), wishes, sampled(writer, wishes, 3)).rewards
    prompt_writer(writer, painter, Redness(), WISHES, options, tmp_path).train()
    new = judged(painter, Redness(), wishes, sampled(writer, wishes, 3)).rewards
    assert old is not None and new is not None
    change = paired_change(old, new)
    assert change.mean > 0.04
    assert change.mean > 5 * change.error


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(folder: Path, painter: Painter, tmp_path: Path):
    options = dataclasses.replace(QUICK, steps=3, save_every=1)
    whole = Writer.load(folder)
    prompt_writer(whole, painter, bright, WISHES, options, tmp_path).train()
    resumed = Writer.load(folder)
    trainer = prompt_writer(resumed, painter, bright, WISHES, options, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = Writer.load(folder)
    prompt_writer(again, painter, bright, WISHES, options, tmp_path / "again").train()
    expected = weights(whole.model)
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, expected[name])
    for name, parameter in trainer.model.named_parameters():
        assert torch.allclose(parameter, expected[name], atol=1e-6)


# The command


def command(folder: Path, name: str) -> list[str]:
    return [
        "write", "recipe=prompt_writer", f"name={name}", f"model={folder}", "drawn.n=2", "asked.n=2",
        "painter.samples=2", "options.steps=2", "options.prompts_per_step=2", "options.samples_per_prompt=2",
        "options.log_every=1", "options.max_completion_length=3", "options.bf16=false", "options.use_cpu=true",
        "options.save_every=1", "options.learning_rate=0.05",
    ]  # fmt: skip


def test_the_recipe_tunes_and_keeps_what_was_written(folder: Path, workplace: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*command(folder, "test"), "options.report_to=wandb"]) == 0
    run = workplace / "runs" / "test"
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    rows = [json.loads(line) for line in (run / "written.jsonl").read_text().splitlines()]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    metrics = json.loads((run / "metrics.json").read_text())
    assert [row["wish"] for row in rows for _ in range(2)] == [sample["prompt"] for sample in samples]
    assert rows[0]["reward_after"] == pytest.approx((samples[0]["reward"] + samples[1]["reward"]) / 2)
    assert metrics["reward"] == pytest.approx((rows[0]["reward_after"] + rows[1]["reward_after"]) / 2)
    assert {sample["cost"]["network_calls"] for sample in samples} == {4.0}
    assert all(set(sample["held_out"]) == {"judge"} for sample in samples)
    assert (run / "images" / "000003.png").stat().st_size > 0
    asked = yaml.safe_load((run / "config.yaml").read_text())["writer"]["instruction"]
    learnt = Writer.load(run / "writer")
    assert learnt.instruction == asked
    assert learnt.write([row["wish"] for row in rows], 3) == [row["after"] for row in rows]
    said = capsys.readouterr().out
    assert "step 2 of 2: reward" in said
    assert "held_out.judge: " in said


def test_an_interrupted_command_goes_on(folder: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch):
    from steerfm.commands import write

    def interrupt(self: Any, args: Any, state: Any, control: Any, **other: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write.News, "on_log", interrupt)
        assert main(command(folder, "stopped")) == 130
    run = workplace / "runs" / "stopped"
    assert [path.name for path in (run / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    (run / "checkpoints" / "checkpoint-2").mkdir()  # as a process that is killed while it saves leaves it
    assert main(command(folder, "stopped")) == 0
    assert main(command(folder, "whole")) == 0
    learnt, expected = (
        weights(Writer.load(workplace / "runs" / name / "writer").model) for name in ("stopped", "whole")
    )
    assert all(torch.allclose(learnt[name], expected[name], atol=1e-6) for name in expected)
