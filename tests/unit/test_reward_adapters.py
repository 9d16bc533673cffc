"""Rewards of torchmetrics and of TRL, and rewards as reward functions of TRL, in a real run of its trainer."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics.image as metrics
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure, total_variation

from steerfm.errors import ConfigError, RewardError
from steerfm.reward import Reward, Scores, as_reward, check
from steerfm.reward_adapters import FromTRL, TorchMetric, means, trl_reward

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "bb", "ccc", "dddd"]
TRAINER: dict[str, Any] = {"completion_ids": [[1], [2], [3], [4]], "trainer_state": object(), "log_extra": None}


def bright(images, prompts):
    return images.mean((1, 2, 3))


class Length(Reward):
    """Score the length of the text, but for "bb", of which it has no opinion."""

    abstains = True
    differentiable = False

    def score(self, images, prompts, **metadata):
        return torch.tensor([torch.nan if prompt == "bb" else float(len(prompt)) for prompt in prompts])


# torchmetrics


def test_a_metric_scores_each_picture_on_its_own_and_less_is_better():
    reward = as_reward(metrics.TotalVariation())
    assert (reward.name, reward.differentiable, reward.higher_is_better) == ("TotalVariation", True, False)
    scores = reward(IMAGES, PROMPTS)
    expected = total_variation(IMAGES, reduction="none")
    assert torch.allclose(scores.parts["TotalVariation"], expected)
    assert torch.allclose(scores.total, -expected)
    assert isinstance(reward, TorchMetric)
    assert reward.metric.num_elements == 0  # nothing piles up over a training
    assert [finding for finding in check(reward, IMAGES, PROMPTS) if finding.fault] == []


def test_a_metric_with_a_reference_has_its_gradient():
    reference = IMAGES[3]
    reward = TorchMetric(metrics.StructuralSimilarityIndexMeasure(data_range=1.0), reference, name="ssim")
    leaf = IMAGES[:3].clone().requires_grad_(True)
    total = reward(leaf, PROMPTS[:3]).total
    other = IMAGES[:3].clone().requires_grad_(True)
    expected = structural_similarity_index_measure(
        other, reference.expand(3, -1, -1, -1), data_range=1.0, reduction="none"
    )
    assert isinstance(expected, Tensor)
    assert torch.allclose(total, expected, atol=1e-6)
    (gradient,), (exact,) = torch.autograd.grad(total.sum(), leaf), torch.autograd.grad(expected.sum(), other)
    assert torch.allclose(gradient, exact, atol=1e-7)
    assert reward.state_dict() == {}


def test_a_metric_that_needs_more_is_refused():
    with pytest.raises(ConfigError, match="compares pictures with a 'target': wrap it with reference="):
        as_reward(metrics.StructuralSimilarityIndexMeasure())
    with pytest.raises(RewardError, match="must give one number a picture"):
        TorchMetric(metrics.StructuralSimilarityIndexMeasure(return_full_image=True), IMAGES[0])(IMAGES, PROMPTS)


# A reward as a reward function of TRL


def drawn(texts: list[str]) -> Tensor:
    """Return a grey picture for each text, the brighter the longer the text."""
    return torch.stack([torch.full((3, 8, 8), len(text) / 10) for text in texts])


def test_pictures_drawn_from_completions_are_scored_with_the_prompts():
    function = trl_reward(as_reward(bright) + Length(), drawn)
    logged: dict[str, float] = {}
    values = function(prompts=PROMPTS, completions=["1", "22", "333", "4444"], log_metric=logged.__setitem__, **TRAINER)
    assert values == pytest.approx([1.1, 0.2, 3.3, 4.4])
    name = "1 * bright + 1 * length"
    assert function.__name__ == name
    assert logged[f"{name}/bright"] == pytest.approx(0.25)
    assert logged[f"{name}/length"] == pytest.approx(8 / 3)
    assert logged[f"{name}/length/abstained"] == 0.25


def test_pictures_of_a_column_are_scored_with_the_completions():
    pictures = [Image.new("RGB", (4, 4), (level, level, level)) for level in (0, 51, 102, 255)]
    expected = pytest.approx([1.0, 2.2, 3.4, 3.0])
    function = trl_reward(as_reward(bright) + Length(), name="both")
    given = {"prompts": ["?"] * 4, "completions": ["x", "yy", "zzz", "ww"], **TRAINER}
    assert function.__name__ == "both"
    assert function(**given, image=pictures) == expected
    assert function(**given, images=[[picture] for picture in pictures]) == expected
    chat = [[{"role": "assistant", "content": text}] for text in given["completions"]]
    assert function(**{**given, "completions": chat}, image=pictures) == expected
    blocks = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in given["completions"]]
    assert function(**{**given, "completions": blocks}, image=pictures) == expected
    with pytest.raises(RewardError, match=r'TRL gave none \(columns: .*give the data set a column "image"'):
        function(**given)
    with pytest.raises(RewardError, match="resize them to one"):
        function(**given, image=[torch.zeros(3, 4, 4), torch.zeros(3, 5, 4)])


def test_columns_reach_the_reward_and_silence_is_none():
    def answered(images, prompts, answer):
        return torch.tensor(answer)

    function = trl_reward(answered, drawn)
    assert function(prompts=["a"] * 2, completions=["x", "y"], answer=[1.0, 2.0], **TRAINER) == [1.0, 2.0]
    assert trl_reward(Length(), drawn)(prompts=["bb", "a"], completions=["x", "y"]) == [None, 1.0]


def test_an_asynchronous_function_gives_the_same():
    function = trl_reward(bright, drawn, asynchronous=True)
    assert asyncio.iscoroutinefunction(function)
    values = asyncio.run(function(prompts=["a"], completions=["four"], **TRAINER))
    assert values == pytest.approx([0.4])
    assert function.__name__ == "bright"


# A reward function of TRL as a reward


def counted(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer=None, **columns):
    log_metric("seen", 1.0)
    assert len(completion_ids) == len(prompts)
    levels = [float(picture.getpixel((0, 0))[0]) for picture in completions]
    return [None if prompt == "bb" else level for prompt, level in zip(prompts, levels, strict=True)]


async def read_back(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [float(text == wanted) for text, wanted in zip(completions, columns["answer"], strict=True)]


def test_a_function_of_trl_scores_pictures_and_may_abstain():
    scores = (FromTRL(counted).normalised(100.0, 10.0) + 0.0 * as_reward(bright))(drawn(PROMPTS), PROMPTS)
    assert scores.parts["counted"].nan_to_num(-1).tolist() == [26.0, -1.0, 76.0, 102.0]
    assert scores.total.tolist() == pytest.approx([-7.4, 0.0, -2.4, 0.2], abs=1e-5)
    assert means(scores)["counted/abstained"] == 0.25
    assert not FromTRL(counted).differentiable


@pytest.mark.parametrize("inside_a_loop", [False, True])
def test_an_asynchronous_function_of_trl_reads_what_is_read(inside_a_loop):
    reward = FromTRL(read_back, read=lambda images: [f"{round(float(image.mean() * 10))}" for image in images])

    def score() -> list[float]:
        return reward(drawn(PROMPTS), PROMPTS, answer=["1", "3", "3", "5"]).total.tolist()

    async def within() -> list[float]:
        return score()

    assert (asyncio.run(within()) if inside_a_loop else score()) == [1.0, 0.0, 1.0, 0.0]


def test_a_function_of_trl_is_not_taken_for_a_reward():
    with pytest.raises(ConfigError, match=r"wrap it in steerfm\.reward_adapters\.FromTRL"):
        as_reward(counted)


def test_means_leave_silence_out():
    scores = Scores(torch.zeros(2), {"a": torch.tensor([1.0, torch.nan]), "b": torch.full((2,), torch.nan)})
    assert means(scores) == {"a": 1.0, "a/abstained": 0.5, "b/abstained": 1.0}


# The trainer itself


def language_model(folder: Path) -> str:
    """Save a tiny untrained language model with a tokenizer of words, and return its folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "draw", "a", "red", "blue", "bright", "dark", "square"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1, bos_token_id=1, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_reward_of_five_lines_trains_a_writer_of_prompts(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from steerfm.flow_map import FlowMap
    from steerfm.networks import MLP
    from steerfm.reward import load_reward
    from steerfm.sampling import Unsteered

    (workplace / "five_lines.py").write_text(
        "def redness(images, prompts):\n    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))\n"
    )
    monkeypatch.syspath_prepend(str(workplace))
    flow_map = FlowMap(MLP((3, 4, 4), width=8, depth=1))
    seen: list[str] = []

    def pictures(texts: list[str]) -> Tensor:
        seen.extend(texts)
        seeds = [sum(text.encode()) for text in texts]
        return Unsteered(steps=1)(flow_map, prompts=texts, seeds=seeds).images

    redness = load_reward("five_lines:redness")
    functions = [trl_reward(redness, pictures), trl_reward(redness, pictures, asynchronous=True, name="later")]
    trainer = GRPOTrainer(
        model=language_model(workplace / "model"),
        reward_funcs=[*functions, trl_reward(Length(), pictures, against="completions")],
        args=GRPOConfig(
            output_dir=str(workplace / "out"), max_steps=2, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=4, report_to=[], use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
            learning_rate=0.1,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["draw a red square", "draw a blue square"]}),
    )  # fmt: skip
    model = trainer.model
    assert model is not None
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(seen) == 3 * 2 * 4
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    logged = [line for line in trainer.state.log_history if "rewards/redness/mean" in line]
    assert len(logged) == 2
    for line in logged:
        assert line["rewards/redness/mean"] == pytest.approx(line["rewards/later/mean"], abs=1e-6)
        assert line["redness/redness"] == pytest.approx(line["rewards/redness/mean"], abs=1e-6)
