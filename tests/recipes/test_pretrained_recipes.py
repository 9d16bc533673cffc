"""The recipes of pretrained models, from pictures to an export, on tiny pipelines of the real diffusers classes."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from picture_files import encoded, noisy
from tiny_recipes import COMMANDS, PRETRAINED, read

from steerfm import config
from steerfm.cli import main
from steerfm.flow_map import FlowMap, declared

pytest.importorskip("diffusers")
tiny: Any = pytest.importorskip("tiny_pipelines")

ROOT = Path(__file__).parents[2]
CAPTIONS = ["a red circle", "a blue square", "the red square", "a circle"]
SHORT = {
    "train": ["data.batch_size=4", "trainer.max_steps=2", "checkpoint_every=1"],
    "finetune": ["prompts=[a red circle]", "data.prompts_per_step=2", "trainer.max_steps=2", "checkpoint_every=1"],
    "sample": ["prompts=[a red circle]", "seeds=2", "data.batch_size=2"],
    "steer": ["prompts=[a red circle]", "seeds=2", "data.batch_size=2", "method.n=2"],
}
QUIET = ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with captioned pictures and three tiny pipelines, whose encoders have led them to latents."""
    folder = tmp_path_factory.mktemp("studio")
    loader = tiny.Loader(folder)
    (folder / "pictures").mkdir()
    rows = []
    for i, caption in enumerate(CAPTIONS):
        (folder / f"pictures/{i}.png").write_bytes(encoded(noisy(16, 16, i), "PNG"))
        rows.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (folder / "pictures/captions.jsonl").write_text("\n".join(rows))
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name in ("sd3", "flux-dev", "sana"):
            arguments = ["recipe=latents", f"map={loader.path(name)}", "data.folder=pictures", "data.size=16"]
            more = [] if name == "sd3" else ["encoders.dtype=bfloat16"]
            assert main(["cache", *arguments, *more, "encoders.text_length=16", f"name=cached-{name}"]) == 0
    finally:
        os.chdir(before)
    return folder


def ran(name: str, *more: str) -> Path:
    """Run a recipe shortly, and return its run's folder."""
    command = COMMANDS[name]
    run = "-".join(["run", name.replace("/", "-")])
    assert main([command, f"recipe={name}", f"name={run}", *SHORT[command], *QUIET, *more]) == 0
    assert read(Path("runs") / run)["status"] == "finished"
    return Path("runs") / run


def test_from_a_pipeline_to_an_export(
    studio: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(studio)
    velocity = ran("pretrained_train", "map=sd3", "cached=runs/cached-sd3", "trainer.devices=1")
    distilled = ran("pretrained_distil", f"map={velocity}", "cached=runs/cached-sd3")
    assert not declared(FlowMap.load(distilled).network, "velocity_only")
    brightness = "reward=brightness"
    tuned = ran("pretrained_finetune", f"map={distilled}", "module.flow_map.checkpointing=false", brightness)
    ran("pretrained_sample", f"map={distilled}", brightness)
    ran("pretrained_steer", f"map={tuned}", brightness)
    assert main(["compare", "runs=[run-pretrained_sample,run-pretrained_steer]", "name=both"]) == 0
    assert main(["export", str(tuned), "exported", "--jumps", "4"]) == 0
    assert "plain diffusers paints the same" in " ".join(capsys.readouterr().out.split())


def test_the_rehearsal_runs(studio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(studio)
    velocity = ran("rehearsal/train", "map=sd3", "cached=runs/cached-sd3")
    distilled = ran("rehearsal/distil", f"map={velocity}", "cached=runs/cached-sd3")
    ran("rehearsal/finetune", f"map={distilled}", "module.held_out=[]", "reward=brightness")
    for name in ("sample", "steer"):
        ran(f"rehearsal/{name}", f"map={distilled}", "held_out={}", "reference=null", "reward=brightness")


@pytest.mark.parametrize("name", ["flux_distil", "sana_distil"])
def test_the_recipes_of_large_models_train(studio: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(studio)
    pytest.importorskip("torchao")
    model = {"flux_distil": "flux-dev", "sana_distil": "sana"}[name]
    size = ["module.flow_map.flow_map.size=16", "module.flow_map.flow_map.text_length=16"]
    run = ran(name, f"map={model}", f"cached=runs/cached-{model}", *size, "trainer.accumulate_grad_batches=1")
    found = FlowMap.load(run)
    assert found.guidance_scale == {"flux_distil": 3.5, "sana_distil": 1.0}[name]


def test_every_recipe_of_pretrained_models_is_run_here() -> None:
    run = {"latents", *(f"pretrained_{name}" for name in ("train", "distil", "finetune", "sample", "steer"))}
    run |= {f"rehearsal/{name}" for name in ("train", "distil", "finetune", "sample", "steer")}
    assert run | {"flux_distil", "sana_distil"} == PRETRAINED


def test_the_guide_s_commands_compose(studio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(studio)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    rehearsal: Any = importlib.import_module("rehearsal")

    found = [shlex.split(line) for line in rehearsal.commands(rehearsal.GUIDE.read_text())]
    assert len(found) > 8
    for program, command, *arguments in found:
        if program == "steerfm" and command not in ("export", "compare"):
            config.compose(command, arguments)
    assert {words[1] for words in found if words[0] == "steerfm"} >= {"cache", "train", "finetune", "steer", "export"}
    assert Path(sys.executable).with_name("steerfm").exists()
