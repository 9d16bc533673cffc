"""Words and parsed attributes as conditions, null conditions, and maps that are trained with them."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from trainers import trainer

from steerfm import DirectBackprop, FlowMap, FlowMapTraining, Prompts, RewardFineTuning
from steerfm.conditions import CaptionWords, Labels, Pictures, SceneAttributes
from steerfm.errors import ConfigError, DataError
from steerfm.networks import SlotEncoder, UNet, WordEncoder
from steerfm.networks.mlp import randomise
from steerfm.objectives import Compositional
from steerfm.rewards.simple import Brightness
from steerfm.shape_captions import BEFORE, Description, Wanted, plain
from steerfm.shapes import COLORS, SHAPES, SIZES
from steerfm.times import Triangle

VOCABULARY = ["a", "red", "blue", "circle", "square", "x-ray", "artist's"]
CAPTIONS = ["a red circle", "a blue square", "a red square", "a blue circle"]


def words(length: int = 4) -> CaptionWords:
    return CaptionWords(VOCABULARY, length)


# --- words ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "numbers"),
    [
        ("a red circle", [2, 3, 5, 0]),
        ("A RED Circle", [2, 3, 5, 0]),
        ("  a,red . circle!\n", [2, 3, 5, 0]),
        ("an x-ray (artist's)", [1, 7, 8, 0]),
        ("red circle a square", [3, 5, 2, 6]),
        ("", [0, 0, 0, 0]),
        (" ... ", [0, 0, 0, 0]),
    ],
)
def test_words_are_numbered_whatever_their_case_and_punctuation(prompt: str, numbers: list[int]):
    assert words()([prompt])["words"].tolist() == [numbers]


def test_an_unknown_word_is_said_once(caplog: pytest.LogCaptureFixture):
    conditioner = words()
    with caplog.at_level(logging.WARNING):
        condition = conditioner(["a mauve circle", "a mauve square", "Mauve"])
    assert condition["words"][:, :2].tolist() == [[2, 1], [2, 1], [1, 0]]
    assert [message.count("'mauve'") for message in caplog.messages] == [1]
    assert "Known: a, red, blue" in caplog.text


def test_a_cut_is_said_once_a_prompt(caplog: pytest.LogCaptureFixture):
    conditioner, long = words(), "a red circle a blue square"
    with caplog.at_level(logging.WARNING):
        condition = conditioner([long, long, "a red circle a"])
    assert condition["words"].tolist() == [[2, 3, 5, 2]] * 3
    assert len(caplog.messages) == 1
    assert "has 6 words and is cut after 4" in caplog.text


@pytest.mark.parametrize(("vocabulary", "length"), [(["a", "a"], 3), (["a"], 0)])
def test_a_vocabulary_has_different_words_and_prompts_a_length(vocabulary: list[str], length: int):
    with pytest.raises(ConfigError, match="different words, and prompts a length of at least 1"):
        CaptionWords(vocabulary, length)


# --- parsed attributes ----------------------------------------------------------------------------------------

circle, square, cross = (1 + SHAPES.index(name) for name in ("circle", "square", "cross"))
red, blue = (1 + list(COLORS).index(name) for name in ("red", "blue"))
small = 1 + list(SIZES).index("small")


@pytest.mark.parametrize(
    ("caption", "slots"),
    [
        ("a red circle", [circle, red, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("a cross", [cross, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("a small red circle left of a blue square", [circle, red, small, square, blue, 0, 0, 0, 0, 1]),
        ("a blue square right of a small red circle", [circle, red, small, square, blue, 0, 0, 0, 0, 1]),
        ("under a red circle is a cross", [circle, red, 0, cross, 0, 0, 0, 0, 0, 2]),
        ("three blue squares", [square, blue, 0, square, blue, 0, square, blue, 0, 0]),
        (" ", [0] * 10),
    ],
)
def test_captions_are_parsed_into_slots(caption: str, slots: list[int]):
    assert SceneAttributes()([caption])["slots"].tolist() == [slots]


def test_different_descriptions_have_different_slots_and_each_value_has_room():
    wanted = [Wanted(shape, color, size) for shape in SHAPES for color in ("", *COLORS) for size in ("", *SIZES)]
    others = [item for item in wanted if item != Wanted("cross", "red", "small")]  # two alike have no usual caption
    pairs = [Description.of((item, Wanted("cross", "red", "small")), place) for item in others for place in BEFORE]
    captions = [plain(description) for description in (*(Description.of([item]) for item in wanted), *pairs)]
    slots = SceneAttributes()(captions)["slots"]
    assert len(slots.unique(dim=0)) == len(captions)
    assert (slots.amax(0)[[0, 1, 2, 9]] == torch.tensor(SceneAttributes.values)[[0, 1, 2, 9]] - 1).all()


def test_a_caption_that_cannot_be_parsed_passes_its_error_on():
    with pytest.raises(DataError, match="cannot be read as a scene: a shape was expected at 'dog'"):
        SceneAttributes()(["a red dog"])


# --- what all conditioners share ------------------------------------------------------------------------------

CONDITIONERS: dict[str, Any] = {
    "labels": lambda: Labels(CAPTIONS),
    "words": words,
    "attributes": SceneAttributes,
    "pictures": lambda: Pictures(1, 4),
    "pictures and words": lambda: Pictures(3, (4, 8), captions=words()),
}


@pytest.mark.parametrize("kind", list(CONDITIONERS))
def test_the_empty_prompt_is_the_null_condition(kind: str):
    conditioner = CONDITIONERS[kind]()
    empty, null = conditioner(["", ""]), conditioner.null(2)
    assert empty.tensors.keys() == null.tensors.keys()
    for name, tensor in empty.tensors.items():
        assert torch.equal(tensor, null[name])
        assert tensor.dtype == null[name].dtype
        assert not tensor.requires_grad


@pytest.mark.parametrize("kind", ["labels", "words", "attributes"])
def test_dropout_mixes_null_rows_in(kind: str):
    """Row i is the caption's own where the draw keeps it and the null row elsewhere; half of 400 within 6 sigma."""
    conditioner = CONDITIONERS[kind]()
    flow_map = FlowMap(UNet((1, 4, 4), channels=(8,)), conditioner=conditioner)
    prompts = CAPTIONS * 100
    whole, null = conditioner(prompts), conditioner.null(400)
    name = next(iter(whole.tensors))

    def dropped(share: float) -> Tensor:
        module = FlowMapTraining(flow_map, prompt_dropout=share)
        mixed = module._condition(prompts, torch.Generator().manual_seed(0))
        assert mixed is not None
        own = (mixed[name] == whole[name]).reshape(400, -1).all(1)
        none = (mixed[name] == null[name]).reshape(400, -1).all(1)
        assert (own ^ none).all()
        return none

    assert not dropped(0.0).any()
    assert dropped(1.0).all()
    assert abs(int(dropped(0.5).sum()) - 200) < 60


# --- training -------------------------------------------------------------------------------------------------


def word_map() -> FlowMap:
    network = UNet((1, 4, 4), channels=(8,), text=WordEncoder(len(VOCABULARY), 4, width=8, layers=1, heads=2))
    randomise(network, scale=0.3)
    return FlowMap(network, conditioner=words())


def table_of(flow_map: Any) -> Tensor:
    return flow_map.network.text.words.weight


def sampled(flow_map: FlowMap, prompts: list[str] = CAPTIONS) -> Tensor:
    noise = torch.randn(len(prompts), 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return flow_map.look_ahead(noise, 1.0, flow_map.encode_prompts(prompts))


class Pairs(torch.utils.data.Dataset[dict[str, Any]]):
    """Four pictures, each of one grey, with their captions."""

    def __len__(self) -> int:
        return len(CAPTIONS)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x0": torch.full((1, 4, 4), i / 2 - 0.75), "prompt": CAPTIONS[i]}


def test_a_map_that_reads_words_is_trained(tmp_path: Path):
    flow_map = word_map()
    before, table = sampled(flow_map), table_of(flow_map).detach().clone()
    times = Triangle(0.5, both=True)
    module = FlowMapTraining(flow_map, Compositional("uniform"), times, optimizer=partial(SGD, lr=0.1))
    trainer(tmp_path, 2).fit(module, torch.utils.data.DataLoader(Pairs(), batch_size=4))
    moved = (table_of(flow_map) - table).abs().amax(1) > 0
    assert moved[2:7].all()  # the words of the captions
    assert not moved[7:].any()  # words that were not said
    assert (sampled(flow_map) - before).abs().max() > 1e-4


def test_tuned_map_and_reference_read_with_weights_of_their_own(tmp_path: Path):
    flow_map = word_map()
    before = sampled(flow_map)
    tuning = RewardFineTuning(flow_map, Brightness(), DirectBackprop(2), optimizer=partial(SGD, lr=0.1))
    trainer(tmp_path, 2).fit(tuning, Prompts(CAPTIONS))
    reference, condition = tuning._reference.on(torch.device("cpu")), flow_map.encode_prompts(CAPTIONS)
    assert condition is not None
    assert not any(tensor.requires_grad for tensor in condition.tensors.values())
    kept, tuned = sampled(reference), sampled(flow_map)
    assert torch.allclose(kept, before, atol=1e-5)  # the copy of a weight may be added up in another order
    assert (tuned - before).abs().max() > 1e-4
    with torch.no_grad():
        table_of(flow_map).neg_()
    assert torch.equal(sampled(reference), kept)
    assert (sampled(flow_map) - tuned).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["words", "attributes"])
def test_guidance_starts_from_the_null_condition(kind: str):
    """u_null + scale (u - u_null): off at 1, free at 0, and linear in between; float32 rounding."""
    flow_map = word_map()
    if kind == "attributes":
        network = UNet((1, 4, 4), channels=(8,), text=SlotEncoder(SceneAttributes.values, 8, 1, 2))
        randomise(network, scale=0.3)
        flow_map = FlowMap(network, conditioner=SceneAttributes())
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    told = flow_map.encode_prompts(CAPTIONS)
    own, free = flow_map.velocity(x, 0.7, told), flow_map.velocity(x, 0.7, None)
    assert (own - free).abs().max() > 1e-3
    assert torch.allclose(flow_map.with_guidance(0.0).velocity(x, 0.7, told), free, atol=1e-5)
    assert torch.allclose(flow_map.with_guidance(2.0).velocity(x, 0.7, told), 2 * own - free, atol=1e-5)
