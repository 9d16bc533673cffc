"""What a stranger's recipe or map may not do: write, import, ask or read the environment through what we trust."""

import json
import os
import resource
from pathlib import Path

import pytest
from PIL import Image

from steerfm import MLP, FlowMap, config
from steerfm.building import build, resolve
from steerfm.data.captions import read_captions
from steerfm.data.preference_pairs import read_pairs
from steerfm.data.prompts import read_prompts
from steerfm.errors import CheckpointError, ConfigError, DataError, RewardError, RunError, SteerfmError, TrustError
from steerfm.files import holder, lock_folder, read_json, read_yaml
from steerfm.recipe_files import Library
from steerfm.report.pictures import read_picture
from steerfm.report.sources import load
from steerfm.reward_wire import read_listing


def composed(text: str, *overrides: str) -> config.Composed:
    """Compose a recipe of this text, as somebody could have sent it."""
    Path("recipes/recipe").mkdir(parents=True, exist_ok=True)
    Path("recipes/recipe/sent.yaml").write_text(f"# @package _global_\ncommand: train\n{text}\n")
    return config.compose("train", ["recipe=sent", *overrides])


@pytest.mark.parametrize("command", ["${zoo:../x}", "${oc.env:STEERFM_SECRET}", "${nothing.like.it}", "[a, b]"])
def test_the_command_of_a_recipe_is_a_word(workplace: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("STEERFM_SECRET", "s3cr3t")
    Path("recipes/recipe").mkdir(parents=True)
    Path("recipes/recipe/sent.yaml").write_text(f"# @package _global_\ncommand: {command}\n")
    with pytest.raises(ConfigError, match="'sent' is a recipe for another command") as error:
        config.compose("train", ["recipe=sent"])
    assert "s3cr3t" not in str(error.value)


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
        "steerfm.backbones.hub.push",  # uploads
        "steerfm.callbacks.Checkpoints",  # deletes checkpoints in its folder
        "steerfm.callbacks.StopOnSignal",  # runs scontrol
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
    assert "other" in [recipe.name for recipe in Library().recipes()]


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


def test_an_error_is_one_line_that_a_terminal_does_not_obey():
    text = str(SteerfmError("a\nb\x1b[2J" + "x" * 10_000))
    assert text.isprintable()
    assert text.startswith("a b [2J")
    assert len(text) < 4100


# --- what the fuzzing found -----------------------------------------------------------------------------------


DEEP = "[" * 100_000


def test_what_is_no_name_of_a_file_is_refused(workplace: Path):
    for name in ("a\0b", "x" * 500):
        with pytest.raises(DataError, match="cannot be read"):
            read_prompts(name)
        with pytest.raises(DataError, match="no table of captions"):
            read_captions(workplace, ["a.png"], ["a.png"], name)
        row = {"image_a": name, "image_b": "b.png", "prompt": "", "preferred": "a"}
        (workplace / "pairs.jsonl").write_text(json.dumps(row))
        with pytest.raises(DataError, match="which is no file"):
            read_pairs(workplace / "pairs.jsonl")


def test_json_that_is_nested_too_deeply_is_refused(workplace: Path):
    (workplace / "metadata.jsonl").write_text(DEEP)
    with pytest.raises(DataError, match="no JSON"):
        read_captions(workplace, ["metadata.jsonl"], ["a.png"], "auto")
    with pytest.raises(DataError, match="no JSON"):
        read_pairs(workplace / "metadata.jsonl")
    with pytest.raises(RunError, match="cannot be read"):
        read_json(workplace / "metadata.jsonl")


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "- a", "a: 2020-01-01", "a: !!python/name:os.system", DEEP, "\0"])
def test_a_runs_config_is_plain_or_refused(workplace: Path, text: str):
    (workplace / "config.yaml").write_text(text)
    with pytest.raises(RunError, match="cannot be read"):
        read_yaml(workplace / "config.yaml")


def test_a_pipe_or_a_device_is_no_text(workplace: Path):
    os.mkfifo(workplace / "run.json")
    (workplace / "config.yaml").symlink_to("/dev/zero")
    with pytest.raises(RunError, match="it is no file"):
        read_json(workplace / "run.json")
    with pytest.raises(RunError, match="it is no file"):
        read_yaml(workplace / "config.yaml")


def finished(root: Path) -> Path:
    """Return the folder of a finished run of one picture."""
    from made_runs import make_run

    return make_run(root, "base", name="base", count=2).folder


@pytest.mark.parametrize(
    "change",
    [{"name": {}}, {"label": ["a"]}, {"status": {"a": 1}}, {"seconds": "x"}, {"inputs": ["a"]}, {"seconds": 10**400}],
)
def test_a_run_that_says_something_else_of_itself_is_damaged(workplace: Path, change: dict[str, object]):
    folder = finished(workplace)
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(info | change))
    with pytest.raises(RunError, match=rf"its {next(iter(change))} is"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [{"index": -1}, {"index": 0.5}, {"index": True}, {"seed": "x"}, {"seed": None}, {"reward": 10**400},
     {"parts": {"clip": float("nan")}}, {"cost": {"seconds": True}}],
)  # fmt: skip
def test_a_sample_of_no_sense_is_damage(workplace: Path, change: dict[str, object]):
    folder = finished(workplace)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    rows[0] |= change
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunError, match="line 1"):
        load(folder)


def test_a_picture_of_a_run_is_png_or_is_not_read(workplace: Path):
    """Pillow starts Ghostscript for EPS, whatever the file's name."""
    folder = finished(workplace)
    picture = folder / "images" / "000000.png"
    picture.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    assert read_picture(picture) is None
    assert load(folder).x0 is not None
    picture.write_bytes(b"\x89PNG\r\n")
    assert load(folder).x0 is not None


def test_a_picture_that_claims_gigabytes_takes_none(tmp_path: Path):
    """The length of a damaged PNG's chunk is what Pillow asks the file for, and a file makes room before it reads."""
    Image.new("RGB", (8, 8)).save(tmp_path / "huge.png")
    data = bytearray((tmp_path / "huge.png").read_bytes())
    place = data.index(b"IDAT")
    data[place - 4 : place] = (2**32 - 1).to_bytes(4, "big")
    (tmp_path / "huge.png").write_bytes(data)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, before[1]))
    try:
        read_picture(tmp_path / "huge.png")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_map_far_larger_than_its_weights_is_refused(workplace: Path):
    folder = FlowMap(MLP((2,), width=4, depth=1)).save(workplace / "map")
    described = json.loads((folder / "flow_map.json").read_text())
    far = "far larger than its weights"
    for change, said in (
        ({"width": 10**6}, far),
        ({"width": 500, "depth": 1000}, far),
        ({"depth": 10**7}, "at most 1000"),
    ):
        described["flow_map"]["network"] |= change
        (folder / "flow_map.json").write_text(json.dumps(described))
        with pytest.raises(CheckpointError, match=said):
            FlowMap.load(folder)


def test_the_lock_of_a_folder_that_was_sent_leads_nowhere(workplace: Path):
    (workplace / "mine").write_text("precious")
    (workplace / "sent").mkdir()
    (workplace / "sent" / ".lock").symlink_to(workplace / "mine")
    with pytest.raises(RunError, match="Cannot write"):
        lock_folder(workplace / "sent")
    assert holder(workplace / "sent") == ""
    assert (workplace / "mine").read_text() == "precious"


@pytest.mark.parametrize("bounds", [[0, 10**400], [float("nan"), 1], [True, 1], [0]])
def test_a_range_of_no_sense_is_refused(bounds: list[object]):
    reward = {"name": "a", "differentiable": True, "needs_prompt": False, "native_range": bounds}
    with pytest.raises(RewardError, match="the least and the greatest value"):
        read_listing(json.dumps({"rewards": [reward]}).encode())
