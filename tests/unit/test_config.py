"""Recipes are composed, checked and refused before anything is built."""

import sys
from pathlib import Path

import pytest

from steerfm import config
from steerfm.errors import ConfigError, SteerfmError, TrustError

RECIPE = """\
# @package _global_
# steerfm train recipe=tiny      one core, no time
# expect: nothing
defaults:
  - /network: mlp
  - /trainer: cpu
  - /logger: none
  - /reward: none
  - _self_

command: train
map: ???   # runs/digits
network:
  data_shape: [2]
module:
  _target_: steerfm.flow_map.FlowMap
  network: ${network}
law:
  _target_: steerfm.times.Triangle
  diagonal: 0.5
"""


@pytest.fixture
def kitchen(workplace: Path) -> Path:
    """Return an empty current directory with one recipe of the user's in ./recipes."""
    folder = workplace / "recipes" / "recipe"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(RECIPE)
    return workplace


def compose(*overrides: str, command: str = "train", trusted: tuple[str, ...] = ()) -> config.Composed:
    return config.compose(command, ["recipe=tiny", "map=here", *overrides], trusted=trusted)


def test_a_recipe_of_the_users_composes_from_our_parts(kitchen: Path):
    recipe = compose("network.width=8", "name=first")
    assert recipe.recipe == "tiny"
    assert recipe.values["module"]["network"]["width"] == 8
    assert recipe.values["name"] == "first"
    assert type(recipe.values["network"]["data_shape"]) is list


def test_a_checked_part_is_built(kitchen: Path):
    recipe = compose("network.width=8", "network.depth=1")
    assert recipe.build("module").data_shape == (2,)
    assert recipe.build("law").diagonal == 0.5
    assert recipe.build("reward") is None


def test_what_a_recipe_cannot_hold_is_handed_over_when_building(kitchen: Path):
    network = compose("network.width=8", "network.depth=1").build("network")
    flow_map = config.instantiate({"_target_": "steerfm.flow_map.FlowMap"}, network=network)
    assert flow_map.network is network


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("netwrk.width=8", "did you mean 'network'?"),
        ("network.widht=8", "did you mean 'width'?"),
        ("law.diagnal=1", "did you mean 'diagonal'?"),
        ("+network.foo=1", "takes no argument 'foo'"),
        ("network=mpl", "did you mean 'mlp'?"),
        ("trainer.max_steps=many", "trainer.max_steps must be a whole number, got 'many'"),
        ("trainer.max_steps=1e4", "trainer.max_steps must be a whole number, got 10000.0"),
        ("law.diagonal=half", "law.diagonal must be a number, got 'half'"),
        ("law.both=3", "law.both must be true or false, got 3"),
        ("module.output=denoise", "did you mean 'denoised'"),
        ("module.network.width=8", "write network.width=... instead"),
        ("network.width=8,16", "add -m"),
        ("network=mlp,unet", "add -m"),
        ("width", "not of the form key=value"),
        ("seeds=[0,1", "not of the form key=value"),
        ("~network.data_shape", "needs the argument 'data_shape'"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_built(kitchen: Path, override: str, said: str):
    with pytest.raises(ConfigError) as refused:
        compose(override)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_part_set_to_null_is_left_out(kitchen: Path):
    assert compose("law=null").build("law") is None


def test_a_group_set_to_null_says_how_to_leave_it_out(kitchen: Path):
    with pytest.raises(ConfigError, match=r"objective is a choice of parts.*: to leave it out, write ~objective"):
        config.compose("train", ["recipe=digits", "objective=null"])


def test_an_argument_that_the_recipe_left_out_needs_no_plus(kitchen: Path):
    assert compose("law.both=true").values["law"]["both"] is True


def test_a_missing_value_names_its_key_and_an_example(kitchen: Path):
    with pytest.raises(ConfigError, match="needs a value for 'map': add map=runs/digits"):
        config.compose("train", ["recipe=tiny"])


@pytest.mark.parametrize(
    ("command", "overrides", "said"),
    [
        ("train", ["recipe=tiyn"], "did you mean 'tiny'?"),
        ("train", [], "steerfm train recipe=NAME"),
        ("steer", ["recipe=tiny"], "steerfm train recipe=tiny"),
    ],
)
def test_the_right_recipe_and_command_are_named(kitchen: Path, command: str, overrides: list[str], said: str):
    with pytest.raises(ConfigError) as refused:
        config.compose(command, overrides)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "target",
    ["os.system", "subprocess.run", "builtins.eval", "torch.load", "steerfm.flow_map.torch.load", "cooked.soup"],
)
def test_untrusted_code_is_refused_without_being_imported(kitchen: Path, target: str):
    (kitchen / "cooked.py").write_text("raise RuntimeError('imported')")
    with pytest.raises(SteerfmError, match=r"trust|builtins|no '"):
        compose(f"+x._target_={target}")
    assert "cooked" not in sys.modules


@pytest.mark.parametrize(
    "target",
    [
        "steerfm.building.build",
        "steerfm.saving.build",
        "steerfm.cli.main",
        "steerfm.commands.common.config.instantiate",
        "steerfm.reward.load_reward",
        "steerfm.commands.reward.load_reward",
        "steerfm.reward_server.listen",
        "steerfm.reward_server.Server",
    ],
)
def test_a_recipe_cannot_name_what_would_trust_for_it(kitchen: Path, target: str):
    with pytest.raises(TrustError, match="may not name"):
        compose(f"+x._target_={target}")


def test_a_recipe_cannot_trust(kitchen: Path):
    with pytest.raises(TrustError, match="--trust"):
        compose("+x._target_=steerfm.flow_map.FlowMap.load", "+x.path=a", "+x.trusted=[os]")


def test_a_trusted_package_is_built(kitchen: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (kitchen / "pantry.py").write_text("class Jar:\n    def __init__(self, size: int = 1):\n        self.size = size\n")
    with pytest.raises(TrustError, match="--trust pantry"):
        compose("+x._target_=pantry.Jar")
    recipe = compose("+x._target_=pantry.Jar", "+x.size=3", trusted=("pantry",))
    assert recipe.build("x").size == 3


def test_a_reward_typed_on_the_command_line_is_trusted(kitchen: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (kitchen / "spices.py").write_text(
        "def heat(images, prompts):\n    return images.mean((1, 2, 3))\n\n"
        "class Salt:\n    def __init__(self, grams: float = 1.0):\n        self.grams = grams\n"
    )
    assert compose("reward=spices:heat").build("reward").__name__ == "heat"
    assert compose("reward=spices:Salt", "++reward.grams=2").build("reward").grams == 2


def test_a_typed_reward_that_is_not_there_names_the_nearest(kitchen: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (kitchen / "herbs.py").write_text("def thyme(images, prompts):\n    return images.mean((1, 2, 3))\n")
    with pytest.raises(ConfigError, match="did you mean 'thyme'"):
        compose("reward=herbs:tyme")


def test_a_reward_that_refuses_to_be_imported_is_one_sentence(kitchen: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (kitchen / "locked.py").write_text("raise ImportError('write unlocked.x')")
    with pytest.raises(ConfigError, match=r"'locked.lid' cannot be imported: write unlocked.x"):
        compose("reward=locked:lid")


def test_a_recipe_can_start_from_one_of_ours(kitchen: Path):
    text = "# @package _global_\ndefaults:\n  - digits\n  - _self_\n\nnetwork:\n  width: 512\n"
    (kitchen / "recipes" / "recipe" / "wide.yaml").write_text(text)
    recipe = config.compose("train", ["recipe=wide", "callbacks.grid=null", "logger=wandb"])
    assert recipe.values["module"]["flow_map"]["network"]["width"] == 512
    assert recipe.values["callbacks"]["grid"] is None


def test_an_error_of_ours_in_a_constructor_comes_out_as_it_is(kitchen: Path):
    with pytest.raises(ConfigError, match=r"^diagonal is a share of the batch"):
        compose("law.diagonal=2").build("law")


def test_any_other_error_in_a_constructor_is_one_sentence(kitchen: Path):
    with pytest.raises(ConfigError, match="could not be built"):
        compose("network.width=-3").build("module")


def test_a_recipe_that_ours_would_hide_is_refused(kitchen: Path):
    (kitchen / "recipes" / "network").mkdir()
    (kitchen / "recipes" / "network" / "mlp.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match="rename it"):
        compose()


def test_a_part_that_is_no_yaml_is_named_with_its_line(kitchen: Path):
    (kitchen / "recipes" / "network").mkdir()
    (kitchen / "recipes" / "network" / "odd.yaml").write_text("width: 8\nnote: this: that\n")
    with pytest.raises(ConfigError, match=r"no YAML .*odd.yaml.*line 2.*needs quotes"):
        compose("network=odd")


def test_a_folder_of_recipes_that_is_missing_is_named(kitchen: Path):
    with pytest.raises(ConfigError, match="no such folder"):
        config.compose("train", ["recipe=tiny"], folders=["nowhere"])


def test_a_sweep_is_every_combination_in_order():
    points = config.sweep(["recipe=tiny", "a.width=8,16", "b=range(1,3)", "c=[1,2]"])
    assert [lines for lines, _ in points] == [
        ["recipe=tiny", f"a.width={width}", f"b={b}", "c=[1,2]"] for width in (8, 16) for b in (1, 2)
    ]
    assert [suffix for _, suffix in points] == ["width-8-b-1", "width-8-b-2", "width-16-b-1", "width-16-b-2"]


def test_a_sweep_without_values_is_refused():
    with pytest.raises(ConfigError, match="list them"):
        config.sweep(["a=interval(0,1)"])
