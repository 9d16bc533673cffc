"""The run folder: whole files, no lost run, one clear sentence when something is in the way."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from steerfm import files, provenance, runs
from steerfm.errors import RunError
from steerfm.images import to_uint8
from steerfm.runs import Run
from steerfm.types import Cost, Samples

CONFIG = {"recipe": "digits", "optimizer": {"lr": 1e-3, "betas": [0.9, 0.99]}, "steps": 10, "ema": None}


def start(root: Path, name: str = "digits", config: dict | None = None, **options) -> Run:
    return Run.start(name, command="train", config=config or CONFIG, recipe="digits", root=root, **options)


def some_samples(count: int = 3, **fields) -> Samples:
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    defaults = {
        "x0": images * 2 - 1,
        "images": images,
        "prompts": ["a handwritten seven"] * count,
        "seeds": list(range(count)),
        "cost": Cost(4.0, 1.0, 0.0, 0.25),
        "rewards": torch.linspace(0, 1, count),
        "parts": {"clip": torch.linspace(1, 2, count)},
    }
    return Samples(**{**defaults, **fields})


def test_a_run_keeps_what_it_was_made_from(tmp_path: Path) -> None:
    run = start(tmp_path, label="digits, 10 steps")
    assert run.info.status == "running"
    assert not run.resumed
    run.finish({"loss": 0.5, "broken": float("nan")})
    again = Run.open("digits", root=tmp_path)
    assert again.info.status == "finished"
    assert again.info.label == "digits, 10 steps"
    assert again.config == CONFIG
    assert again.read_metrics() == {"loss": 0.5, "broken": None}
    assert again.info.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert again.info.seconds >= 0
    assert not list((tmp_path / "digits").glob("*.tmp"))


def test_a_finished_run_is_never_overwritten(tmp_path: Path) -> None:
    run = start(tmp_path)
    run.finish()
    with pytest.raises(RunError, match=r"finished run is never overwritten: choose another name .* or delete"):
        start(tmp_path)
    with pytest.raises(RunError, match="reading only"):
        run.write_text("notes.txt", "late")
    assert Run.is_done(tmp_path, "digits", runs.run_fingerprint(CONFIG))
    assert not Run.is_done(tmp_path, "digits", runs.run_fingerprint({**CONFIG, "steps": 11}))
    assert not Run.is_done(tmp_path, "absent", "0")


def test_an_unfinished_run_is_resumed_unless_its_recipe_changed(tmp_path: Path) -> None:
    run = start(tmp_path)
    run.write_text("checkpoints/last.ckpt", "weights")
    (run.folder / ".samples.jsonl.4711.tmp").write_text("half of")
    with pytest.raises(ZeroDivisionError), run:
        _ = 1 / 0
    assert Run.open(run.folder).info.error == "ZeroDivisionError: division by zero"
    with pytest.raises(RunError, match="begun with another recipe"):
        start(tmp_path, config={**CONFIG, "steps": 11})
    second = start(tmp_path)
    assert second.resumed
    assert second.last_checkpoint is not None
    assert second.info.error == ""
    assert second.info.started == run.info.started
    assert not list(run.folder.glob(".*.tmp"))
    second.finish()


def test_interrupting_is_said_and_resumed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), start(tmp_path):
        raise KeyboardInterrupt
    assert Run.open("digits", tmp_path).info.error == "interrupted"
    assert start(tmp_path).resumed
    files.unlock_folder(tmp_path / "digits")


def test_the_fingerprint_follows_the_inputs(tmp_path: Path) -> None:
    start(tmp_path, "base").finish()
    start(tmp_path, "other", {**CONFIG, "steps": 99}).finish()
    before = runs.run_fingerprint({"a": 1, "b": 2}, ["base"], tmp_path)
    assert before == runs.run_fingerprint({"b": 2, "a": 1}, [tmp_path / "base"], tmp_path)
    assert before != runs.run_fingerprint({"a": 1, "b": 2}, ["other"], tmp_path)
    tuned = start(tmp_path, "tuned", inputs=["base"])
    tuned.fail("stopped")
    runs.set_aside(tmp_path, "base")
    start(tmp_path, "base", {**CONFIG, "steps": 11}).finish()
    with pytest.raises(RunError, match="begun with other inputs"):
        start(tmp_path, "tuned", inputs=["base"])


def test_an_unfinished_input_counts_as_another(tmp_path: Path) -> None:
    run = start(tmp_path, "base")
    before = runs.input_fingerprint("base", tmp_path)
    run.finish()
    assert runs.input_fingerprint("base", tmp_path) == run.info.fingerprint != before


def test_inputs_may_be_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "map").mkdir()
    (tmp_path / "map" / "flow_map.json").write_text("{}")
    before = runs.input_fingerprint(tmp_path / "map")
    (tmp_path / "map" / "flow_map.json").write_text("[]")
    assert before != runs.input_fingerprint(tmp_path / "map")
    with pytest.raises(RunError, match="Nothing found at"):
        runs.input_fingerprint(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a//b", "a/../b", "", ".hidden", "a/.lock", "~/x", "a\\b", "a\nb"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="is no run name"):
        start(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_names_may_hold_slashes_but_runs_do_not_nest(tmp_path: Path) -> None:
    run = start(tmp_path, "demo/base")
    assert run.folder == tmp_path / "demo" / "base"
    run.finish()
    with pytest.raises(RunError, match="would lie inside the run 'demo/base'"):
        start(tmp_path, "demo/base/tuned")
    with pytest.raises(RunError, match="is no run folder and holds 'base'"):
        start(tmp_path, "demo")
    with pytest.raises(RunError, match="did you mean 'demo/base'"):
        Run.open("demo/bsae", tmp_path)
    with pytest.raises(RunError, match="is no file name"):
        Run.open("demo/base", tmp_path).write_text("../../outside", "x")


def test_a_config_that_is_not_plain_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config\.optimizer\.betas\[1\] is a Tensor"):
        start(tmp_path, config={"optimizer": {"betas": (0.9, torch.ones(2))}})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "digits"}', "\x00"])
def test_a_corrupt_run_json_is_one_sentence(tmp_path: Path, text: str) -> None:
    start(tmp_path).finish()
    path = tmp_path / "digits" / "run.json"
    path.write_text(text)
    with pytest.raises(RunError, match=r"run\.json cannot be read .*: restore it, or move its run folder away"):
        start(tmp_path)
    assert path.read_text() == text


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunError, match=r"Cannot write .*: choose another folder"):
        start(tmp_path / "file")
    with pytest.raises(RunError, match=r"shorter name"):
        start(tmp_path, "x" * 300)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    run = start(tmp_path)
    run.write_text("notes.txt", "kept")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunError, match=r"Cannot write .*notes\.txt .*free some space"):
            run.write_text("notes.txt", "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (run.folder / "notes.txt").read_text() == "kept"
    assert not list(run.folder.glob(".*.tmp"))
    run.finish()


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib; from steerfm.files import lock_folder;"
        "lock_folder(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "digits")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"in use by process {other.pid} on .*choose another name"):
            start(tmp_path)
        with pytest.raises(RunError, match="in use by process"):
            runs.set_aside(tmp_path, "digits")
        other.send_signal(signal.SIGKILL)
    run = start(tmp_path)  # the lock went with the process
    with pytest.raises(RunError, match="in use by this very process"):
        start(tmp_path)
    assert "this very process" in run.in_use_by
    run.finish()
    assert run.in_use_by == ""


def test_rank_zero_names_the_run_and_the_others_look_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs.choose_name("digits/tune", root=tmp_path).startswith("digits-tune-20")
    with start(tmp_path, "chosen") as run:
        run.write_text("notes.txt", "from rank 0")
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert runs.choose_name("digits", root=tmp_path) == "chosen"
        other = start(tmp_path, "chosen")
        other.write_text("notes.txt", "from rank 1")
        other.finish()
        assert (run.folder / "notes.txt").read_text() == "from rank 0"
        assert Run.open(run.folder).info.status == "running"
        monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RunError, match="add name=NAME"):
        runs.choose_name("digits", root=tmp_path)


def test_slurm_and_torchrun_share_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="add name=NAME"):
        runs.choose_name("digits")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    assert runs.choose_name("digits") == "digits-1234"


def test_two_runs_in_one_second_get_two_names(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        name = runs.choose_name("digits", root=tmp_path)
        start(tmp_path, name).finish()
        names.append(name)
    assert len(set(names)) == 3


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    samples = some_samples()
    with start(tmp_path) as run:
        run.write_samples(samples, held_out={"judge": torch.tensor([0.1, 0.2, float("nan")])})
        run.write_reference(samples.x0)
    again = Run.open("digits", tmp_path)
    stored = again.read_samples()
    assert len(stored) == 3
    assert torch.equal(stored.x0, samples.x0) if stored.x0 is not None else False
    assert [row["reward"] for row in stored.rows] == [0.0, 0.5, 1.0]
    assert stored.rows[0]["held_out"] == {"judge": pytest.approx(0.1)}
    assert stored.rows[2]["held_out"] == {"judge": None}
    assert stored.rows[1]["cost"] == {"network_calls": 4, "reward_calls": 1, "reward_gradients": 0, "seconds": 0.25}
    picture = stored.picture(1)
    assert picture is not None
    assert (to_uint8(samples.images)[1] == np.asarray(Image.open(picture))).all()
    assert torch.equal(again.read_reference(), samples.x0)  # pyright: ignore[reportArgumentType]


def test_batches_particles_and_notes(tmp_path: Path) -> None:
    particles = torch.arange(8.0).reshape(2, 4, 1)
    weighted = some_samples(
        2,
        x0=particles[:, 2],
        images=particles[:, 2],  # points have no pictures
        particles=particles,
        log_weights=torch.log_softmax(torch.arange(8.0).reshape(2, 4), 1),
        effective_sample_size=torch.tensor([1.5, 2.5]),
        note="temperature is nominal: guidance is biased",
    )
    with start(tmp_path) as run:
        run.write_samples([weighted, weighted], reward_unclamped=torch.tensor([0.0, 1.0, 0.0, 3.0]))
    run = Run.open(run.folder)
    rows = run.read_samples().rows
    assert run.info.note == "temperature is nominal: guidance is biased"
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert weighted.log_weights is not None
    assert rows[0]["log_weight"] == pytest.approx(weighted.log_weights[0, 2].item())
    assert rows[3]["effective_sample_size"] == 2.5
    assert ["reward_unclamped" in row for row in rows] == [False, False, False, True]
    assert run.read_samples().picture(0) is None


def test_damage_to_samples(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        pass
    with pytest.raises(RunError, match="wrote none; run `steerfm sample`"):
        run.read_samples()
    with start(tmp_path, "full") as run:
        run.write_samples(some_samples(prompts=["a\u2028b", "<script>", "ß"]))
    path = run.folder / "samples.jsonl"
    whole = path.read_bytes()
    assert [row["prompt"] for row in run.read_samples().rows] == ["a\u2028b", "<script>", "ß"]
    path.write_bytes(whole[:-30])
    stored = run.read_samples()
    assert len(stored) == 2
    assert stored.x0 is not None
    assert len(stored.x0) == 2
    assert "cut off" in stored.warnings[0]
    path.write_bytes(b"{\n" + whole)
    with pytest.raises(RunError, match="line 1"):
        run.read_samples()
    path.write_bytes(b"")
    with pytest.raises(RunError, match="cannot be read"):
        run.read_samples()


def test_a_picture_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.write_samples(some_samples())
    (tmp_path / "private.png").write_bytes((run.folder / "images/000000.png").read_bytes())
    row = {"prompt": "p", "seed": 0, "image": "../private.png"}
    (run.folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
    assert run.read_samples().picture(0) is None


def test_damaged_tensors_are_one_sentence(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.write_samples(some_samples())
    (run.folder / "samples.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(RunError, match=r"samples\.safetensors cannot be read"):
        run.read_samples()
    (run.folder / "samples.safetensors").unlink()
    stored = run.read_samples()
    assert stored.x0 is None
    assert "no diversity" in stored.warnings[0]


def test_held_out_values_of_the_wrong_length_are_refused(tmp_path: Path) -> None:
    with start(tmp_path) as run, pytest.raises(RunError, match="held_out 'judge' needs one value a sample"):
        run.write_samples(some_samples(), held_out={"judge": torch.zeros(2)})


def test_the_config_is_yaml_that_people_read(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        pass
    text = (run.folder / "config.yaml").read_text()
    assert text.startswith("recipe: digits\n")
    assert yaml.safe_load(text) == CONFIG


def test_git_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.git_state(tmp_path) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(".") == {}


def test_git_says_when_the_code_was_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", "code.py")
    git("commit", "-m", "begin")
    state = provenance.git_state(tmp_path)
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (tmp_path / "code.py").write_text("a = 2\n")
    assert provenance.git_state(tmp_path)["dirty"] is True
