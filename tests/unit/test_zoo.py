"""The models that ship with the package are those of their recipes, and do what figures.json says."""

import json

import pytest
import torch
from safetensors.torch import load_file

from steerfm import FlowMap, Unsteered, config, zoo
from steerfm.building import describe
from steerfm.data.shapes import shape_prompts
from steerfm.errors import ConfigError
from steerfm.metrics.prompt_following import prompt_following
from steerfm.rewards.clip import CLIPScore
from steerfm.saving import describe_flow_map
from steerfm.shapes import Object, render


def test_together_they_are_smaller_than_8_megabytes_and_in_half_precision() -> None:
    files = list(zoo.HERE.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    floats = {t.dtype for path in files for t in load_file(path).values() if t.is_floating_point()}
    assert floats == {torch.float16}


def test_the_map_is_that_of_its_recipe() -> None:
    recipe = config.compose("train", [f"recipe={zoo.MAPS['shapes32']}"])
    saved = json.loads((zoo.folder("shapes32") / "flow_map.json").read_text())
    assert saved["flow_map"] == describe_flow_map(recipe.build("module").flow_map)
    assert saved["weights"] == "ema"
    flow_map = FlowMap.from_zoo("shapes32")
    assert flow_map.dtype == torch.float32
    assert describe(flow_map.network) == saved["flow_map"]["network"]


def test_the_clip_is_that_of_its_recipe() -> None:
    recipe = config.compose("train", [f"recipe={zoo.CLIPS['shapes32_clip']}"])
    saved = json.loads((zoo.folder("shapes32_clip") / "open_clip_config.json").read_text())
    assert saved["model_cfg"] == recipe.values["module"]["model"]


def test_figures_lie_within_their_bounds() -> None:
    bounded = 0
    for name in (*zoo.MAPS, *zoo.CLIPS):
        for figure in zoo.figures(name).values():
            if figure["bounds"] is not None:
                bounded += 1
                assert figure["bounds"][0] <= figure["value"] <= figure["bounds"][1]
    assert bounded >= 4


def test_the_map_paints_what_figures_say() -> None:
    """Within four standard errors of a binomial over so many prompts; other prompts would be another figure."""
    n = 150
    recorded = zoo.figures("shapes32")["one object, 4 jumps"]["value"]
    prompts = shape_prompts(n, count=1)
    samples = Unsteered("jumps", 4)(FlowMap.from_zoo("shapes32"), prompts=prompts, seeds=range(n))
    correct = prompt_following(samples.images, prompts).correct
    assert correct.mean == pytest.approx(recorded, abs=4 * (recorded * (1 - recorded) / n) ** 0.5 + 1 / n)


def test_the_clip_tells_a_right_from_a_wrong_caption() -> None:
    prompts = ["a red circle", "a blue square", "a yellow triangle", "a cyan cross"]
    kinds = [("circle", "red"), ("square", "blue"), ("triangle", "yellow"), ("cross", "cyan")]
    images = render([(Object(shape, color, 0.5, 0.5, 0.15),) for shape, color in kinds])
    clip = CLIPScore(str(zoo.folder("shapes32_clip")))
    with torch.no_grad():
        scores = torch.stack([clip(images, [prompt] * 4).total for prompt in prompts])
    assert (scores.argmax(0) == torch.arange(4)).all()


def test_recipes_find_the_zoo_and_wrong_names_are_refused() -> None:
    values = config.compose("sample", ["recipe=shapes_sample"]).values
    assert values["map"] == str(zoo.folder("shapes32")) and values["reward"]["model"] == values["clip"]
    with pytest.raises(ConfigError, match="did you mean 'shapes32'"):
        FlowMap.from_zoo("shapes23")
    with pytest.raises(ConfigError, match="Nothing in the zoo is called 'shapes32_clip'"):
        FlowMap.from_zoo("shapes32_clip")
