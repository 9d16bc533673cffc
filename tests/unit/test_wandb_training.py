"""Runs that log to W&B, from the command line to a server that stands in: tables, lineage, and runs read back."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import wandb_files
from PIL import Image
from tiny_recipes import tiny
from wandb_stand_in import ENTITY, KEY, StandIn, stand_in

from steerfm import report
from steerfm.cli import main
from steerfm.errors import RunError
from steerfm.report import remote, wandb_run

LOGGED = ["logger=wandb", "trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, StandIn]]:
    """Return a folder with a map, one fine-tuned from it and samples of both, and the server that was told of them."""
    folder = tmp_path_factory.mktemp("logged")
    with pytest.MonkeyPatch.context() as patch, stand_in(patch, folder / "home") as server:
        patch.chdir(folder)
        assert main([*tiny("digits"), "name=base", *LOGGED, "callbacks.grid.every=1"]) == 0
        tuning = [*tiny("digits_finetune", "reward=brightness"), "name=tuned", "map=runs/base", *LOGGED]
        assert main([*tuning, "callbacks.guard.every=1"]) == 0
        for command, map_name in (("digits_sample", "base"), ("digits_steer", "tuned")):
            asked = [*tiny(command, "reward=brightness"), f"name={command}", f"map=runs/{map_name}"]
            assert main([*asked, "logger=wandb"]) == 0
        yield folder, server


@pytest.fixture
def here(place: tuple[Path, StandIn], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place[0])
    return place[0]


@pytest.fixture
def server(place: tuple[Path, StandIn], here: Path) -> StandIn:
    return place[1]


def record(name: str) -> dict[str, Any]:
    return json.loads(Path("runs", name, "wandb.json").read_text())


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def rows_of(server: StandIn, artifact: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Return the rows of the table in an artifact, by column, and its pictures by path."""
    files = server.files(artifact)
    (table,) = (json.loads(data) for name, data in files.items() if name.endswith(".table.json"))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]], files


def test_a_table_with_pictures_grows_as_training_goes(server: StandIn) -> None:
    run = record("base")["id"]
    logs = [row["progress"] for row in server.history(run) if "progress" in row]
    assert [(log["nrows"], log["increment_num"]) for log in logs] == [(10, 0), (20, 1)]
    parts = [a for a in server.of_type("wandb-run-incremental-table") if a["run"] == run]
    rows = [row for part in parts for row in rows_of(server, part)[0]]
    assert [row["step"] for row in rows] == [1] * 10 + [2] * 10
    assert {key: rows[3][key] for key in ("prompt", "seed", "reward")} == {"prompt": "", "seed": 3, "reward": None}
    _, files = rows_of(server, parts[-1])
    sheet = np.asarray(Image.open("runs/base/pictures/step_0000002.png").convert("RGB"))[::4, ::4]
    for i, row in enumerate(rows[10:]):
        shown = pixels(files[row["picture"]["path"]])
        size = shown.shape[0]
        top, left = sheet.shape[0] - size - 1, 1 + i * (size + 1)  # the grid's last row is that of the most jumps
        assert (sheet[top : top + size, left : left + size] == shown).all()


def test_fine_tuning_shows_rewards_beside_its_pictures(server: StandIn) -> None:
    run = record("tuned")["id"]
    parts = [a for a in server.of_type("wandb-run-incremental-table") if a["run"] == run]
    rows, files = rows_of(server, parts[-1])
    assert list(rows[0]) == ["step", "prompt", "seed", "picture", "reward", "held_out.judge"]
    for row in rows:
        shown = pixels(files[row["picture"]["path"]])
        assert shown.dtype == np.uint8 and row["reward"] == pytest.approx(shown.mean() / 255, abs=2e-3)
        assert 0 <= row["held_out.judge"] <= 1 and row["prompt"] == "a handwritten seven"
    history = server.history(run)
    assert {"loss", "reward", "guard/reward", "guard/divergence"} <= set().union(*history)


def test_samples_are_a_table_of_their_own_with_the_same_names_in_every_run(server: StandIn) -> None:
    for name in ("digits_sample", "digits_steer"):
        run = record(name)["id"]
        (artifact,) = [a for a in server.of_type("run_table") if a["run"] == run]
        rows, files = rows_of(server, artifact)
        stored = [json.loads(line) for line in Path("runs", name, "samples.jsonl").read_text().splitlines()]
        for row, line in zip(rows, stored, strict=True):
            assert row["seed"] == line["seed"] and row["reward"] == line["reward"]
            assert row["held_out.judge"] == line["held_out"]["judge"]
            kept = pixels(Path("runs", name, line["image"]).read_bytes())
            assert (pixels(files[row["picture"]["path"]]) == kept).all()
        summary = server.summary(run)
        assert {"reward", "held_out/judge", "cost/network_calls", "cost/reward_calls", "samples"} <= set(summary)
    lines = [row for row in server.history(run) if "steering/reward" in row]
    calls = [row["steering/network_calls"] for row in lines]
    assert calls == sorted(calls) and len(calls) == 2


def test_models_are_artifacts_whose_descent_is_known(server: StandIn) -> None:
    models = {a["name"]: a for a in server.of_type("model")}
    assert set(models) == {"base", "tuned"}
    for name, artifact in models.items():
        saved = {path.name: path.read_bytes() for path in Path("runs", name, "map").iterdir()}
        assert server.files(artifact) == saved
        assert artifact["run"] == record(name)["id"]
    used = {(run, server.artifacts[artifact]["name"]) for run, artifact in server.used}
    expected = {("tuned", "base"), ("digits_sample", "base"), ("digits_steer", "tuned")}
    assert {(record(name)["id"], model) for name, model in expected} <= used


def test_runs_in_wandb_compare_as_they_do_here(server: StandIn, tmp_path: Path) -> None:
    names = ["digits_sample", "digits_steer"]
    local = report.compare(names).records()
    addresses = [f"wandb:{ENTITY}/steerfm/{record(name)['id']}" for name in names]
    there = report.compare(addresses, root=tmp_path).records()
    assert there == [{**row, "run": there[i]["run"]} for i, row in enumerate(local)]
    assert there[1]["temperature"] == 0.1 and there[1]["tuning_seconds"] > 0  # known of the runs before it
    asked = len(server.asked)
    assert report.compare(addresses, root=tmp_path).records() == there
    assert len(server.asked) == asked  # they are here now


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("wandb:a/b", "write wandb:ENTITY/PROJECT/ID"),
        ("wandb:../../etc", "is no run in W&B"),
        ("wandb:a//b", "is no run in W&B"),
        (f"wandb:{ENTITY}/steerfm/nobody", "could not be read from W&B"),
    ],
)
def test_an_address_of_no_run_is_one_sentence(server: StandIn, tmp_path: Path, address: str, said: str) -> None:
    with pytest.raises(RunError, match=said) as caught:
        remote.fetched(address, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil", "images/../../evil.png", "map.pkl", "images/a.png"])
def test_files_that_no_run_folder_has_are_not_downloaded(server: StandIn, tmp_path: Path, name: str) -> None:
    identity = record("digits_sample")["id"]
    (artifact,) = [a for a in server.of_type("run") if a["name"].endswith(identity)]
    place = f"{artifact['id']}/wandb_manifest.json"
    before = server.uploads[place]
    manifest = json.loads(before)
    manifest["contents"][name] = manifest["contents"]["run.json"]
    server.uploads[place] = json.dumps(manifest).encode()
    try:
        with pytest.raises(RunError, match=r"which no run folder has: it was not downloaded"):
            remote.fetched(f"wandb:{ENTITY}/steerfm/{identity}", tmp_path)
    finally:
        server.uploads[place] = before
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_references_and_giants_are_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def __init__(self, size: int = 1, ref: str | None = None) -> None:
            self.size, self.ref = size, ref

    remote._check({"run.json": Entry()})
    with pytest.raises(RunError, match="a reference to elsewhere"):
        remote._check({"run.json": Entry(ref="file:///etc/passwd")})
    with pytest.raises(RunError, match=r"17\.0 GiB"):
        remote._check({"samples.safetensors": Entry(17 * 2**30)})


def test_no_key_is_ever_told(server: StandIn, here: Path) -> None:
    assert server.unknown == []
    assert not any(KEY.encode() in body for body in server.bodies)
    files = [path for path in (here / "runs").rglob("*") if path.is_file()]
    assert not any(KEY.encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize("trouble", ["down", "silent", "unauthorised"])
def test_runs_end_well_without_wandb(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    monkeypatch.setattr(wandb_run, "SECONDS_TO_REACH", 2.0)
    asked = {
        "train": [*tiny("digits"), f"name=train_{trouble}", *LOGGED],
        "steer": [
            *tiny("digits_steer", "reward=brightness"),
            f"name=steer_{trouble}",
            "map=runs/base",
            "logger=wandb",
        ],
    }
    with stand_in(monkeypatch, tmp_path / "home") as server:
        if trouble == "down":
            server.stop()
        else:
            server.mood = trouble  # type: ignore[assignment]
        for command, arguments in asked.items():
            caplog.clear()
            began = time.monotonic()
            assert main([*arguments, "logger.mode=online"]) == 0
            assert time.monotonic() - began < 60
            told = [each.getMessage() for each in caplog.records if "could not be reached" in each.getMessage()]
            assert len(told) == 1 and told[0].endswith("the run is kept offline.")
            folder = here / "runs" / f"{command}_{trouble}"
            assert json.loads((folder / "run.json").read_text())["status"] == "finished"
            assert len(list((folder / "wandb").glob("offline-run-*"))) == 1


@pytest.fixture
def offline(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the place of runs where W&B is offline."""
    for name, value in {"WANDB_MODE": "offline", "HOME": str(tmp_path), "WANDB_CACHE_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    yield here
    wandb.teardown()


def test_an_offline_run_read_back_holds_everything(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = [*tiny("digits_finetune", "reward=brightness"), "name=offline", "map=runs/base", *LOGGED]
    assert main([*tuning, "callbacks.guard.every=1"]) == 0
    folder = offline / "runs" / "offline"
    kept = folder / "wandb"
    (run,) = kept.glob("offline-run-*")
    wandb.teardown()  # which closes its files
    history, metrics = wandb_files.histories(run), json.loads((folder / "metrics.json").read_text())
    measured = [row for row in history if "guard/reward" in row]
    assert [row["trainer/global_step"] for row in measured] == [0, 1, 2]
    assert [measured[-1][name] for name in ("guard/reward", "guard/divergence")] == pytest.approx(
        [metrics["guard/reward"], metrics["guard/divergence"]], rel=1e-6
    )
    losses = [row["loss"] for row in history if "loss" in row]
    assert len(losses) == 2 and losses[-1] == pytest.approx(metrics["loss"], rel=1e-6)
    told = wandb_files.config(run)
    assert told["map"] == "runs/base" and told["module"]["temperature"] == 0.13
    parts = sorted(wandb_files.tables(kept), key=lambda rows: rows[0]["step"])
    assert [row["step"] for rows in parts for row in rows] == [0] * 10 + [1] * 10 + [2] * 10
    waiting = wandb_files.pictures(kept)
    sheet = pixels(Path("runs/offline/pictures/guard_0000002.png").read_bytes())[::4, ::4]
    for i, row in enumerate(parts[-1]):
        shown = pixels(waiting[row["picture"]["sha256"]])
        top, left = shown.shape[0] + 2, 1 + i * (shown.shape[0] + 1)  # below the base's
        assert (sheet[top : top + shown.shape[0], left : left + shown.shape[0]] == shown).all()
    artifacts = wandb_files.artifacts(run)
    assert artifacts["base"].type == artifacts["offline"].type == "model"
    assert artifacts["base"].use_after_commit and not artifacts["offline"].use_after_commit
    saved = {path.read_bytes() for name in ("base", "offline") for path in Path("runs", name, "map").iterdir()}
    copies = [path for place in (kept, tmp_path) for path in place.rglob("*") if path.is_file()]
    assert not [path for path in copies if path.read_bytes() in saved]  # a model is sent from where it lies
    check_sent(run, tmp_path, monkeypatch)


def check_sent(run: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that an offline run is sent whole, from another folder."""
    with stand_in(monkeypatch, elsewhere / "home") as server:
        subprocess.run([sys.executable, "-m", "wandb", "sync", str(run.resolve())], cwd=elsewhere, check=True)
        models = {a["name"]: a for a in server.of_type("model")}
        assert {name: server.files(a) for name, a in models.items()} == {
            name: {path.name: path.read_bytes() for path in Path("runs", name, "map").iterdir()}
            for name in ("base", "offline")
        }
        assert [artifact for _, artifact in server.used] == [models["base"]["id"]]
        assert len(server.of_type("run")) == 1 and len(server.of_type("wandb-run-incremental-table")) == 3
        assert server.unknown == []


def test_the_recipe_names_a_run_and_leaves_its_artifacts_out(offline: Path) -> None:
    more = ["logger.artifacts=false", "logger.tags=[light]", "logger.name=feather", "logger.log_model=false"]
    assert main([*tiny("digits"), "name=light", *LOGGED, *more]) == 0
    (run,) = (offline / "runs" / "light" / "wandb").glob("offline-run-*")
    wandb.teardown()
    assert wandb_files.histories(run)
    begun = wandb_files.begun(run)
    assert (begun.display_name, list(begun.tags), begun.job_type) == ("feather", ["light"], "train")
    assert [name for name, each in wandb_files.artifacts(run).items() if each.type in ("model", "run")] == []


def test_the_other_loggers_get_figures_and_tensorboard_pictures(here: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*tiny("digits"), "name=board", "logger=tensorboard", "trainer.log_every_n_steps=1"]) == 0
    events = EventAccumulator("runs/board/logs/tensorboard")
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["grid"] and len(events.Scalars("loss")) == 2
    drawn = pixels(events.Images("grid")[-1].encoded_image_string)
    assert (drawn == pixels(Path("runs/board/pictures/step_0000002.png").read_bytes())[::4, ::4]).all()
    for logger in ("tensorboard", "csv"):
        asked = [*tiny("digits_steer", "reward=brightness"), f"name=steer_{logger}", "map=runs/base"]
        assert main([*asked, f"logger={logger}"]) == 0
    events = EventAccumulator("runs/steer_tensorboard/logs/tensorboard")
    events.Reload()
    rewards = json.loads(Path("runs/steer_tensorboard/metrics.json").read_text())
    assert events.Scalars("reward")[0].value == pytest.approx(rewards["reward"])
    assert len(events.Scalars("steering/reward")) == 2
    (table,) = Path("runs/steer_csv/logs").rglob("metrics.csv")
    head = table.read_text().splitlines()[0].split(",")
    assert {"reward", "held_out/judge", "cost/network_calls", "steering/reward"} <= set(head)


def test_without_its_package_tensorboard_is_one_sentence(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*tiny("digits"), "name=no_board", "logger=tensorboard"]) == 2
    said = capsys.readouterr()
    assert "logger=tensorboard needs the package 'tensorboard'" in said.out + said.err
