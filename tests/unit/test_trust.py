"""What a stranger's recipe or map may not do: write, import, ask or read the environment through what we trust."""

import json
import os
from pathlib import Path

import pytest

from steerfm import config
from steerfm.building import build, resolve
from steerfm.errors import ConfigError, SteerfmError, TrustError


def composed(text: str, *overrides: str) -> config.Composed:
    """Compose a recipe of this text, as somebody could have sent it."""
    Path("recipes/recipe").mkdir(parents=True, exist_ok=True)
    Path("recipes/recipe/sent.yaml").write_text(f"# @package _global_\ncommand: train\n{text}\n")
    return config.compose("train", ["recipe=sent", *overrides])


METHODS = [  # a method could be handed any object, and what is inherited is not ours
    "steerfm.runs.Run.write_text",
    "steerfm.runs.Run.config.fget",
    "steerfm.http_client.Client.get",
    "steerfm.prompt_writer.Writer.save",
    "steerfm.FlowMap.save",
    "steerfm.reward.as_reward.cache_clear",
    "steerfm.saving.log.manager.setLoggerClass",
    "steerfm.modules.RewardFineTuning.load_from_checkpoint",  # unpickles
    "steerfm.modules.RewardFineTuning.to_onnx",
    "steerfm.data.Shapes.load_from_checkpoint",
    "steerfm.callbacks.checkpoints.TorchCheckpointIO.load_checkpoint",
    "steerfm.commands.common.Trainer",
    "steerfm.rewards.pick_score.load_model",  # of a private module
]


@pytest.mark.parametrize("target", METHODS)
def test_methods_and_what_is_inherited_cannot_be_named(target: str):
    with pytest.raises((TrustError, ConfigError), match=r"method or an attribute|only borrowed|has no"):
        resolve(target)


def test_what_makes_an_object_can_be_named():
    assert resolve("steerfm.FlowMap.load").__name__ == "load"
    assert resolve("steerfm.prompt_writer.Writer.load").__name__ == "load"


@pytest.mark.parametrize(
    "target",
    [
        "steerfm.backbones.pipeline_files.library",  # imports what it is told to
        "steerfm.files.write_atomic",
        "steerfm.images.save_png",
        "steerfm.provenance.git_state",  # runs git in a folder
        "steerfm.report.publish",
        "steerfm.report.serve.open_browser",
        "steerfm.runs.Run",
        "steerfm.runs.Run.start",
        "steerfm.runs.set_aside",
        "steerfm.http_client.Client",
        "steerfm.saving.save_flow_map",
    ],
)
def test_a_recipe_cannot_name_what_writes_imports_or_asks(workplace: Path, target: str):
    with pytest.raises(SteerfmError, match=r"may not name it|has no"):
        composed(f"x: {{_target_: {target}}}")


def test_a_recipe_cannot_write_a_module_of_its_own(workplace: Path):
    run = "{_target_: steerfm.runs.Run.start, name: pytest, root: ., command: a, config: {}, recipe: a}"
    with pytest.raises(TrustError):
        composed(f"x: {{_target_: steerfm.runs.Run.write_text, self: {run}, name: __init__.py, text: print()}}")
    assert not (workplace / "pytest").exists()


@pytest.mark.parametrize("text", ["a: ${oc.env:SECRET_OF_MINE}", "a: env\nb: '${oc.${a}:SECRET_OF_MINE}'"])
def test_a_recipe_cannot_read_the_environment(workplace: Path, monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setenv("SECRET_OF_MINE", "canary")
    with pytest.raises(ConfigError, match="may not read the environment") as refused:
        composed(text)
    assert "canary" not in str(refused.value)


def test_the_environment_is_readable_again_afterwards(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    from omegaconf import OmegaConf

    monkeypatch.setenv("SECRET_OF_MINE", "canary")
    composed("a: 1")
    assert OmegaConf.create({"a": "${oc.env:SECRET_OF_MINE}"}).a == "canary"


@pytest.mark.parametrize("entry", ["../../secret", "/../../secret@q", "/network: ../../../secret"])
def test_the_defaults_of_a_recipe_stay_in_the_folders_of_recipes(workplace: Path, entry: str):
    (workplace / "secret.yaml").write_text("password: canary")
    with pytest.raises(ConfigError, match="among its defaults"):
        composed(f"defaults:\n- {entry}\n- _self_")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "with its aliases written out"),
        ("a: &a [*a]", "with its aliases written out"),
        (f"a: {'[' * 5000}{']' * 5000}", "nested more than"),
        ("a: !!binary aGVsbG8=", "a is a bytes"),
        ("a: !!python/object/apply:os.system [exit]", "no YAML"),
        ("a: {_target_: steerfm.MLP, _args_: 5}", "_args_ must be a list"),
        ("a: {_target_: steerfm.MLP, _partial_: 5}", "_partial_ must be true or false"),
        ("a: {_target_: torch.optim.lr_scheduler.Tensor}", "does not say which arguments"),
        ("a: {_target_: lightning.pytorch.loggers.WandbLogger, settings: {base_url: 'http://a'}}", "not for recipes"),
    ],
)
def test_a_harmful_recipe_is_one_sentence(workplace: Path, text: str, said: str):
    with pytest.raises(SteerfmError, match=said) as refused:
        composed(text)
    assert "\n" not in str(refused.value)


def test_aliases_within_reason_are_kept(workplace: Path):
    assert composed("a: &a [1, 2]\nb: [*a, *a]").values["b"] == [[1, 2], [1, 2]]


def test_a_recipe_that_is_not_utf_8_is_one_sentence(workplace: Path):
    composed("a: 1")
    Path("recipes/recipe/other.yaml").write_bytes(b"command: train\nx: \xff\xfe")
    with pytest.raises(ConfigError, match="no YAML"):
        config.compose("train", ["recipe=other"])
    assert "other" in [recipe.name for recipe in config.Library().recipes()]


@pytest.mark.parametrize(
    "description",
    [
        {"_target_": "steerfm.rewards.remote.Remote", "address": "http://localhost:1"},  # would send a token there
        {"_target_": "steerfm.data.ImageFolder", "folder": "."},
        {"_target_": "lightning.Trainer"},
        {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "logs"},
        {"_target_": "torch.optim.AdamW", "params": []},
    ],
)
def test_a_map_may_only_name_what_describe_writes(workplace: Path, description: dict[str, object]):
    with pytest.raises(TrustError, match="is no part of a map"):
        build(json.loads(json.dumps({"_target_": "steerfm.MLP", "data_shape": description})))
    assert not os.listdir(workplace)
