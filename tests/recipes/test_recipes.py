"""Every recipe that ships composes, is checked, and runs: two steps of training, two samples, one comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny_recipes import COMMANDS, LIBRARY, PRETRAINED, RECIPES, read, tiny

from steerfm import config
from steerfm.cli import main
from steerfm.commands import common
from steerfm.errors import ConfigError

OWN = {name: command for name, command in COMMANDS.items() if name not in PRETRAINED}
FITTED = sorted(name for name, command in OWN.items() if command in ("train", "finetune"))
SAMPLED = sorted(name for name, command in OWN.items() if command in ("sample", "steer"))


@pytest.mark.parametrize("name", FITTED)
def test_two_steps_are_taken_and_what_was_learnt_is_saved(name: str, here: Path):
    if not (here / "runs" / name).exists():
        assert main(tiny(name)) == 0
    run = here / "runs" / name
    assert read(run)["status"] == "finished"
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"step=00000001.ckpt", "step=00000002.ckpt", "last.ckpt"}
    saved = yaml.safe_load((run / "config.yaml").read_text())["save_as"]
    assert any((run / saved).glob("*.safetensors"))
    assert "loss" in json.loads((run / "metrics.json").read_text())


@pytest.mark.parametrize("name", SAMPLED)
def test_two_samples_are_drawn_and_kept(name: str, here: Path):
    assert main(tiny(name)) == 0
    rows = [json.loads(line) for line in (here / "runs" / name / "samples.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [3, 5]
    assert all(row["cost"]["network_calls"] > 0 for row in rows)
    assert (here / "runs" / name / "reference.safetensors").exists()


TUNING = sorted(name for name, path in LIBRARY.options("method").items() if "steerfm.finetuning" in path.read_text())


@pytest.mark.parametrize("method", sorted(set(LIBRARY.options("method")) - {"unsteered", *TUNING}))
def test_every_steering_method_steers(method: str, here: Path):
    assert main(tiny("digits_steer", f"method={method}", f"name={method}")) == 0
    rows = [json.loads(line) for line in (here / "runs" / method / "samples.jsonl").read_text().splitlines()]
    assert all(isinstance(row["reward"], float) and 0 <= row["held_out"]["judge"] <= 1 for row in rows)


@pytest.mark.parametrize("method", sorted(set(TUNING) - {"dpo"}))  # which has a recipe of its own
def test_every_fine_tuning_method_tunes(method: str, here: Path):
    more = ["method.center=0.5", "method.divisor=0.5"] if method == "nft" else []
    assert main(tiny("digits_finetune", f"method={method}", f"name=tuned_{method}", "callbacks=null", *more)) == 0
    assert any((here / "runs" / f"tuned_{method}" / "map").glob("*.safetensors"))


@pytest.mark.parametrize("objective", sorted(LIBRARY.options("objective")))
def test_every_objective_trains(objective: str, here: Path):
    assert main(tiny("digits", f"objective={objective}", f"name=objective_{objective}")) == 0


def test_threads_are_those_of_the_recipe_while_it_runs(here: Path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with common.running(config.compose("train", [*tiny("digits", "threads=1", "name=threads")[1:]])):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        wrong = config.compose("train", [*tiny("digits", "threads=0", "name=no_threads")[1:]])
        with pytest.raises(ConfigError, match="at least 1, or null"), common.running(wrong):
            pass
    finally:
        torch.set_num_threads(before)
    assert not (here / "runs" / "no_threads").exists()


def test_the_unet_trains(here: Path):
    arguments = [text for text in tiny("digits") if not text.startswith("network.")]
    assert main([*arguments, "network=unet", "network.channels=[8,8]", "name=unet"]) == 0


def test_runs_are_compared(here: Path, capsys: pytest.CaptureFixture[str]):
    for method in ("best_of_n", "guidance"):
        if not (here / "runs" / method).exists():
            assert main(tiny("digits_steer", f"method={method}", f"name={method}")) == 0
    assert main(["compare", "runs=[best_of_n,guidance]", "report=wandb", "name=both"]) == 0
    assert (here / "runs" / "both" / "page.html").stat().st_size > 1000
    assert any((here / "runs" / "both" / "wandb").glob("offline-run-*"))
    assert "page.html" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_says_what_to_type_and_what_to_expect(name: str):
    first, second, *_ = RECIPES[name].header
    typed, _, needs = first.partition("   ")
    assert typed.startswith(f"steerfm {COMMANDS[name]} ")
    assert f"recipe={name}" in typed.split() or COMMANDS[name] == name
    assert needs.strip()
    assert second.startswith("expect: ")


@pytest.mark.parametrize("trainer", sorted(LIBRARY.options("trainer")))
@pytest.mark.parametrize("logger", sorted(LIBRARY.options("logger")))
def test_every_trainer_and_logger_is_checked(trainer: str, logger: str, here: Path):
    config.compose("train", ["recipe=digits", f"trainer={trainer}", f"logger={logger}", "trainer.max_steps=2"])


@pytest.mark.parametrize("name", sorted(LIBRARY.options("demo")))
def test_every_stage_of_a_demo_is_checked(name: str, here: Path):
    from steerfm.commands import demo

    for stage in demo.read(name, LIBRARY):
        overrides = [f"recipe={stage.recipe}", f"name={stage.name}", *stage.overrides]
        assert config.compose(stage.command, overrides).values["name"] == stage.name


def test_what_is_saved_stays_in_the_run(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(tiny("digits", "save_as=../../elsewhere", "name=outside")) == 2
    assert "'../../elsewhere' is no name for what is saved" in " ".join(capsys.readouterr().err.split())
    assert not (here.parent / "elsewhere").exists()
