"""Comparisons: right figures from run folders alone, honest warnings, and pages and tables that show just that."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import METHODS, PROMPT, make_run, points_run, pose, scans
from PIL import Image
from rich.console import Console

from steerfm import report
from steerfm.errors import RunError
from steerfm.images import to_uint8
from steerfm.metrics import frechet_distance, mean_pairwise_distance
from steerfm.report import columns, estimates
from steerfm.report.wandb import resolve_mode
from steerfm.runs import Run

OWN_SEVENS = {"label": "base, its own sevens", "run": "base", "where": "held_out.judge p(7)", "above": 0.5}


@pytest.fixture(scope="module")
def compared(six: Path) -> report.Comparison:
    runs = [
        "base",
        "best-of-16",
        "guidance--T---0-1",
        "tilting--T---0-1",
        "fine-tuned--T---0-1",
        "fine-tuned--T---0-01",
    ]
    return report.compare(runs, subsets=[OWN_SEVENS], root=six)


def test_every_row_holds_what_its_samples_say(compared: report.Comparison) -> None:
    table = {row["label"]: row for row in compared.records()}
    assert list(table) == [*METHODS, "base, its own sevens", "real data"]
    samples, held_out = pose("tilting, T = 0.1")
    assert samples.rewards is not None
    row, judge = table["tilting, T = 0.1"], held_out["judge p(7)"]
    reference = scans()[0][scans()[1] == 7]
    assert row["samples"] == 48
    assert row["reward"] == pytest.approx(samples.rewards.mean().item())
    assert row["reward_low"] < row["reward"] < row["reward_high"]
    assert row["held_out.judge p(7)"] == pytest.approx(judge.mean().item())
    assert row["held_out.judge p(7)_above_half"] == pytest.approx((judge > 0.5).double().mean().item())
    x0 = samples.x0.clamp(-1, 1)  # distances are those of the pictures that were scored
    assert row["diversity"] == pytest.approx(mean_pairwise_distance(x0))
    assert row["diversity_ratio"] == pytest.approx(mean_pairwise_distance(x0) / mean_pairwise_distance(reference))
    assert row["frechet"] == pytest.approx(frechet_distance(x0, reference))
    costs = [row[name] for name in ("network_calls", "reward_calls", "reward_gradients", "seconds")]
    assert costs == pytest.approx([768, 512, 512, 0.4])
    assert row["temperature"] == 0.1
    assert not row["temperature_nominal"]
    assert table["guidance, T = 0.1"]["temperature_nominal"]
    assert table["base"]["temperature"] is None
    assert table["fine-tuned, T = 0.1"]["tuning_seconds"] > 0
    assert {len(row) for row in table.values()} == {len(row)}


def test_the_collapsed_run_shows_as_such(compared: report.Comparison) -> None:
    table = {row["label"]: row for row in compared.records()}
    hacked, good = table["fine-tuned, T = 0.01"], table["fine-tuned, T = 0.1"]
    assert hacked["reward"] > good["reward"]
    assert hacked["held_out.judge p(7)"] < good["held_out.judge p(7)"]
    assert hacked["diversity_ratio"] < 0.3 < good["diversity_ratio"]
    assert hacked["frechet"] > good["frechet"]


def test_subset_and_real_data_rows(compared: report.Comparison) -> None:
    table = {row["label"]: row for row in compared.records()}
    subset, real = table["base, its own sevens"], table["real data"]
    judged = pose("base")[1]["judge p(7)"]
    assert subset["kind"] == "subset"
    assert subset["samples"] == int((judged > 0.5).sum())
    assert subset["held_out.judge p(7)"] > 0.5
    assert subset["network_calls"] is None  # the samples that were thrown away were paid for too
    assert real["samples"] == 179
    assert real["diversity"] == pytest.approx(4.65, abs=0.01)
    assert real["diversity_ratio"] == 1
    assert 0 < real["frechet"] < 2
    assert ("real data", "its Fréchet distance is that between two random halves") in compared.notes


def test_differences_are_paired_by_prompt_and_seed(six: Path, compared: report.Comparison) -> None:
    by_name = {(pair.label, pair.metric): pair for pair in compared.pairs}
    here, there = pose("best of 16")[0].rewards, pose("base")[0].rewards
    assert here is not None
    assert there is not None
    pair = by_name["best of 16", "reward"]
    assert pair.difference.mean == pytest.approx((here - there).mean().item())
    assert pair.against == "base"
    assert not pair.within_noise
    again = make_run(six, "base", name="again", first_seed=24)
    shifted = report.compare([six / "base", again.folder], root=six)
    (reward, _) = shifted.pairs
    assert reward.difference.n == 24
    assert reward.within_noise
    assert "within noise" in columns.difference_text(reward)
    assert any("differ in seeds: 24 (prompt, seed) pairs in common" in warning for warning in shifted.warnings)
    assert [source.label for source in shifted.sources] == ["base (base)", "base (again)"]


def test_each_folder_counts_once_and_labels_tell_runs_apart(tmp_path: Path) -> None:
    """A copy that came from another machine has the same label and name in run.json."""
    folder = make_run(tmp_path, "base").folder
    shutil.copytree(folder, tmp_path / "copied")
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(folder, tmp_path / "elsewhere" / "base")
    comparison = report.compare(["base", "./base", "copied", "elsewhere/base", tmp_path / "copied"], root=tmp_path)
    assert [row.label for row in comparison.rows][:3] == ["base (base)", "base (copied)", "base (elsewhere/base)"]
    page = report.write_comparison(comparison, tmp_path / "c")
    assert Run.open(page.parent).config["runs"] == ["base", "copied", "elsewhere/base"]


def test_labels_steer_no_terminal(tmp_path: Path) -> None:
    label = "\x1b[31mred \u202ereversed 👩\u200d👧"
    with Run.start("odd", command="sample", config={}, recipe="r", label=label, root=tmp_path) as run:
        run.write_samples(pose("base", count=3)[0])
    assert report.compare(["odd"], root=tmp_path).rows[0].label == " [31mred  reversed 👩\u200d👧"


def test_missing_pictures_are_said_and_change_no_figure_while_one_is_left(tmp_path: Path) -> None:
    run = make_run(tmp_path, "base")
    before = report.compare(["base"], root=tmp_path).rows[0]
    pictures = sorted((run.folder / "images").glob("*.png"))
    for path in pictures[:-1]:
        path.unlink()
    comparison = report.compare(["base"], root=tmp_path)
    assert comparison.rows[0].diversity == before.diversity
    assert any(f"lacks {len(pictures) - 1} of its 48 pictures" in warning for warning in comparison.warnings)


def test_costs_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run = make_run(tmp_path, "base", name=name)
        path = run.folder / "samples.jsonl"
        path.write_text(path.read_text().replace('"network_calls": 4', '"network_calls": null'))
    comparison = report.compare(["a", "b"], root=tmp_path)
    assert "network_calls" not in comparison.rows[0].costs and comparison.equal_cost == ()
    assert report.page(comparison)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["a"], "has the form {column"),
        ({"x": ["a"]}, r"lines.x has the form"),
        ({"x": {"y": "a"}}, r"The line 'y' needs a list of runs, such as \[a\], got 'a'"),
    ],
)
def test_lines_of_another_form_are_one_sentence(tmp_path: Path, lines, said: str) -> None:
    make_run(tmp_path, "base", name="a")
    with pytest.raises(RunError, match=said):
        report.compare(["a"], root=tmp_path, lines=lines)


def test_numbers_beyond_reason_do_not_stop_it() -> None:
    assert columns.plus_minus(estimates.Estimate(1e308, -1.7e308, 1.7e308, 3))
    assert columns.plus_minus(estimates.Estimate(0.5, 0.5, 0.5 + 1e-320, 3)) == "0.500"


def test_warnings_name_what_differs(tmp_path: Path) -> None:
    make_run(tmp_path, "base", count=48)
    make_run(tmp_path, "best of 16", prompts=["a handwritten one", PROMPT], count=10)
    make_run(tmp_path, "tilting, T = 0.1", reference=False)
    warnings = " ".join(report.compare(["base", "best-of-16", "tilting--T---0-1"], root=tmp_path).warnings)
    assert "'best of 16' and 'base' differ in prompts: 1 in common, 1 only in the former" in warnings
    assert "different numbers of samples (20 to 48)" in warnings
    assert "'tilting, T = 0.1' has no reference data" in warnings


def test_frechet_at_equal_n(tmp_path: Path) -> None:
    make_run(tmp_path, "base", count=48)
    make_run(tmp_path, "best of 16", count=20)
    comparison = report.compare(["base", "best-of-16"], root=tmp_path)
    base, other = comparison.rows[:2]
    assert comparison.equal_samples == 20
    assert base.frechet is not None
    assert base.frechet_equal is not None
    assert base.frechet_equal > base.frechet  # fewer samples are further away
    assert other.frechet_equal == pytest.approx(other.frechet, rel=1e-6)
    assert "Fréchet, n = 20" in [column.title for column in columns.columns(comparison)]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "samples.jsonl").unlink(), "wrote none; run `steerfm sample`"),
        (lambda folder: (folder / "run.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.yaml").write_text("a: [1"), "cannot be read"),
        (lambda folder: (folder / "samples.safetensors").write_bytes(b"x"), "cannot be read"),
        (lambda folder: (folder / "samples.jsonl").write_text('{"prompt": 1, "seed": 0}\n'), "line 1"),
        (lambda folder: (folder / "samples.jsonl").write_text('{"prompt": "", "seed": 0, "parts": []}\n'), "line 1"),
    ],
)
def test_a_damaged_run_is_one_sentence(tmp_path: Path, damage, said: str) -> None:
    folder = make_run(tmp_path, "base", count=4).folder
    damage(folder)
    with pytest.raises(RunError) as caught:
        report.compare(["base"], root=tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cut_off_last_line_is_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "base").folder
    path = folder / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    comparison = report.compare(["base"], root=tmp_path)
    assert comparison.rows[0].samples == 47
    assert "is cut off: one sample is left out" in comparison.warnings[0]


def test_unfinished_runs_are_named(tmp_path: Path) -> None:
    run = Run.start("slow", command="steer", config={}, recipe="made", root=tmp_path)
    with pytest.raises(RunError, match=r"'slow' is still running \(this very process .*wait for it, or leave it out"):
        report.compare(["slow"], root=tmp_path)
    run.fail(ValueError("the reward is NaN."))
    with pytest.raises(RunError, match=r"'slow' failed \(ValueError: the reward is NaN\): run its command again"):
        report.compare(["slow"], root=tmp_path)
    data = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**data, "status": "running"}))
    with pytest.raises(RunError, match="'slow' was stopped before its end"):
        report.compare(["slow"], root=tmp_path)


def test_wrong_arguments_name_the_right_ones(six: Path) -> None:
    with pytest.raises(RunError, match="did you mean 'network_calls'"):
        report.compare(["base"], x="network_call", root=six)
    with pytest.raises(RunError, match="did you mean 'base'"):
        report.compare(["bas"], root=six)
    with pytest.raises(RunError, match="Nothing to compare"):
        report.compare([], root=six)
    with pytest.raises(RunError, match=r"did you mean 'held_out\.judge p\(7\)'"):
        report.compare(["base"], subsets=[{**OWN_SEVENS, "where": "held_out.judge p7"}], root=six)
    with pytest.raises(RunError, match="lacks 'above'"):
        report.compare(["base"], subsets=[{"label": "x", "run": "base", "where": "reward"}], root=six)
    with pytest.raises(RunError, match="'above' needs a number"):
        report.compare(["base"], subsets=[{**OWN_SEVENS, "above": "half"}], root=six)
    none = report.compare(["base"], subsets=[{**OWN_SEVENS, "above": 2}], root=six)
    assert "No sample of 'base' has held_out.judge p(7) above 2." in none.warnings


def test_rewards_that_are_not_finite_are_left_out_and_said(tmp_path: Path) -> None:
    samples, _ = pose("base", count=6)
    bad = dataclasses.replace(samples, rewards=torch.tensor([1.0, float("nan"), 2.0, float("inf"), 3.0, 4.0]))
    with Run.start("bad", command="sample", config={}, recipe="made", root=tmp_path) as run:
        run.write_samples(bad)
    comparison = report.compare(["bad"], root=tmp_path)
    assert comparison.rows[0].reward is not None
    assert comparison.rows[0].reward.mean == 2.5
    assert comparison.rows[0].reward.n == 4
    assert "'bad': 2 of 6 values of reward are missing or not finite; left out." in comparison.warnings
    assert "NaN" not in json.dumps(comparison.records())


def test_the_temperature_and_the_tuning_time_come_from_the_runs_it_was_made_from(tmp_path: Path) -> None:
    with Run.start("tune", command="finetune", config={"a": {"temperature": 0.3}}, recipe="t", root=tmp_path) as run:
        pass
    with Run.start("samples", command="sample", config={}, recipe="s", inputs=["tune"], root=tmp_path) as sampled:
        sampled.write_samples(pose("base", count=4)[0])
    (row,) = report.compare(["samples"], root=tmp_path).rows
    assert row.temperature == 0.3
    assert row.tuning_seconds == run.info.seconds
    best = {"method": {"n": 4, "temperature": None}}
    with Run.start("best", command="steer", config=best, recipe="s", inputs=["tune"], root=tmp_path) as argmax:
        argmax.write_samples(pose("base", count=4)[0])
    assert report.compare(["best"], root=tmp_path).rows[0].temperature is None
    with Run.start("noted", command="sample", config={}, recipe="s", inputs=["tune"], root=tmp_path) as noted:
        noted.write_samples(pose("base", count=4)[0])
        noted.write_json("metrics.json", {"temperature": 0.7, "note": "temperature is nominal"})
    (row,) = report.compare(["noted"], root=tmp_path).rows
    assert (row.temperature, row.nominal) == (0.7, True)


def test_one_sample_has_no_interval(tmp_path: Path) -> None:
    make_run(tmp_path, "base", count=1)
    comparison = report.compare(["base"], root=tmp_path)
    row = comparison.rows[0]
    assert row.reward is not None
    assert (row.reward.low, row.diversity, row.frechet) == (None, None, None)
    assert report.page(comparison)


def test_bootstrap_intervals_cover_as_often_as_they_say() -> None:
    generator, hits = np.random.default_rng(0), 0
    for i in range(200):
        found = estimates.estimate(generator.normal(size=60), seed=i)
        hits += bool(found is not None and found.covers_zero)
    assert 0.89 < hits / 200 < 0.985  # 95%, within three standard errors of 200 trials and a little small-sample bias
    assert estimates.estimate([]) is None
    assert estimates.estimate(np.ones(5)) == estimates.Estimate(1, 1, 1, 5)


def test_terminal_tables_fit_and_lose_nothing(compared: report.Comparison) -> None:
    for width in (200, 120, 80):
        console = Console(width=width, file=io.StringIO(), color_system=None)
        report.show(compared, console)
        text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        assert max(map(len, text.splitlines())) <= width
        for word in ("21.5", "(25%)", "nominal", "768", "+1.086 ± 0.083"):
            assert word in text


def test_numbers_read_as_people_write_them() -> None:
    assert [columns.number(v) for v in (0, 0.0004, 0.0123, 0.5, 4.652, 21.46, 768, 12345.6, None)] == [
        "0", "4.0e-04", "0.012", "0.500", "4.65", "21.5", "768", "12,346", "–",
    ]  # fmt: skip
    assert [columns.compact(v) for v in (4.0, 0.1, 0.002, 1234.0, 0.4 - 1e-17)] == ["4", "0.1", "0.002", "1,234", "0.4"]
    estimate = estimates.Estimate
    assert columns.plus_minus(estimate(20.5432, 20.3, 20.78, 9)) == "20.54 ± 0.24"
    assert columns.plus_minus(estimate(1234.5, 1200, 1260, 9)) == "1,234 ± 30"
    assert columns.plus_minus(estimate(0.5, None, None, 1)) == "0.500"
    assert columns.plus_minus(estimate(0.5, 0.5, 0.5, 3)) == "0.500"


def test_a_cosine_is_no_probability(tmp_path: Path) -> None:
    with Run.start("scored", command="sample", config={}, recipe="r", root=tmp_path) as run:
        run.write_samples(pose("base", count=6)[0], held_out={"HPSv2": torch.linspace(0.2, 0.35, 6)})
    comparison = report.compare(["scored"], root=tmp_path)
    assert [c.title for c in columns.columns(comparison)][2:5] == ["reward", "HPSv2, held out", "diversity"]


def test_labels_are_no_markup(tmp_path: Path) -> None:
    with Run.start("x", command="sample", config={}, recipe="r", label="[bold]a|b<i>[/bold]", root=tmp_path) as run:
        run.write_samples(pose("base", count=4)[0])
    comparison = report.compare(["x"], root=tmp_path)
    console = Console(width=120, file=io.StringIO(), color_system=None)
    report.show(comparison, console)
    assert "[bold]a|b<i>[/bold]" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "\\[bold\\]a\\|b&lt;i&gt;" in report.markdown(comparison)


def test_markdown_holds_every_row(compared: report.Comparison) -> None:
    lines = report.markdown(compared).splitlines()
    assert {line.count("|") for line in lines if line.startswith("| base")} == {lines[0].count("|")}
    assert sum(line.startswith("| ") for line in lines) == 2 + len(compared.rows) + 2 + 5


def test_latents_are_not_clamped_and_pixels_are(tmp_path: Path) -> None:
    samples, _ = pose("base", count=4)
    latents = dataclasses.replace(samples, x0=torch.full((4, 4, 2, 2), 5.0))
    for name, made in {"pixels": samples, "latents": latents}.items():
        with Run.start(name, command="sample", config={}, recipe="r", root=tmp_path) as run:
            run.write_samples(made)
    pixels, latent = report.compare(["pixels", "latents"], root=tmp_path).sources
    assert pixels.x0 is not None
    assert latent.x0 is not None
    assert pixels.x0.abs().max() == 1 < samples.x0.abs().max()
    assert latent.x0.max() == 5


def test_a_comparison_is_a_run_folder(six: Path, compared: report.Comparison, tmp_path: Path) -> None:
    page = report.write_comparison(compared, tmp_path / "compared")
    run = Run.open(tmp_path / "compared")
    assert page == tmp_path / "compared" / "page.html"
    assert (run.info.command, run.info.status) == ("compare", "finished")
    assert {path.name for path in run.folder.iterdir()} == {
        "config.yaml", "run.json", "table.json", "table.md", "pictures.png", "page.html", ".lock",
    }  # fmt: skip
    table = json.loads((run.folder / "table.json").read_text())
    assert table["rows"] == json.loads(json.dumps(compared.records()))
    assert table["differences"][0]["within_noise"] is False
    before = page.stat().st_mtime_ns
    report.write_comparison(compared, tmp_path / "compared")  # nothing changed, nothing written
    assert page.stat().st_mtime_ns == before
    with pytest.raises(RunError, match="never overwritten"):
        report.write_comparison(report.compare(["base"], root=six), tmp_path / "compared")
    with Run.start("mine", command="compare", config={}, recipe="c", root=tmp_path) as mine:
        report.write_comparison(compared, mine)
        assert mine.info.status == "running"


@pytest.mark.parametrize(
    ("asked", "environment", "found"),
    [
        (None, {}, "offline"),
        (None, {"WANDB_API_KEY": "k"}, "online"),
        (None, {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        (None, {"WANDB_MODE": "dryrun"}, "offline"),
        ("online", {}, "online"),
    ],
)
def test_wandb_modes(asked, environment, found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolve_mode(asked) == found
    with pytest.raises(RunError, match="use online, offline or disabled"):
        resolve_mode("onlin")


def test_wandb_keeps_the_table_and_the_pictures_readable(compared: report.Comparison, tmp_path: Path) -> None:
    report.write_comparison(compared, tmp_path / "compared", wandb_mode="offline")
    kept = tmp_path / "compared" / "wandb"
    (run,) = kept.glob("offline-run-*")
    staged = {path: path.read_bytes() for path in kept.glob("data/**/*") if path.is_file()}
    pictures = {hashlib.sha256(data).hexdigest(): data for data in staged.values() if data.startswith(b"\x89PNG")}
    tables = [json.loads(data) for data in staged.values() if data.startswith(b"{") and b'"_type": "table"' in data]
    figures = next(table for table in tables if table["columns"][:2] == ["label", "kind"])
    samples = next(table for table in tables if table["columns"][0] == "prompt")
    assert figures["data"] == json.loads(json.dumps([list(row.values()) for row in compared.records()]))
    assert samples["columns"][:4] == ["prompt", "seed", "base", "base: reward"]
    assert len(samples["data"]) == 12
    for i, label in enumerate(METHODS):
        made = pose(label)[0]
        originals = to_uint8(made.images)
        for seed, row in enumerate(samples["data"]):
            picture = row[2 + 2 * i]
            assert row[:2] == [PROMPT, seed]
            assert picture["_type"] == "image-file"
            pixels = np.asarray(Image.open(io.BytesIO(pictures[picture["sha256"]])))
            assert pixels.dtype == np.uint8
            assert (pixels == originals[seed]).all()
            assert made.rewards is not None
            assert row[3 + 2 * i] == pytest.approx(made.rewards[seed].item())
    panels = list((run / "files" / "media" / "images").rglob("*.png"))
    assert len(panels) == 6 * 12
    shown = {np.asarray(Image.open(path)).tobytes() for path in panels}
    assert shown == {picture.tobytes() for label in METHODS for picture in to_uint8(pose(label)[0].images)[:12]}


def test_wandb_that_is_down_keeps_the_run_offline(
    six: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("steerfm.report.wandb.SECONDS_TO_REACH", 3.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens on the discard port
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("HOME", str(tmp_path))
    comparison = report.compare(["base"], root=six)
    kept = report.log_comparison(comparison, tmp_path / "compared", mode="online")
    assert kept is not None
    assert kept.name.startswith("offline-run-")
    assert "could not be reached" in caplog.text


def test_importing_the_report_imports_no_wandb() -> None:
    code = "import sys, steerfm.report; sys.exit('wandb' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_sheet_puts_the_same_seeds_under_each_other(six: Path, compared: report.Comparison, tmp_path: Path) -> None:
    folder = report.write_comparison(compared, tmp_path / "with_sheet").parent
    with Image.open(folder / "pictures.png") as image:
        drawn = np.asarray(image.convert("RGB"))
    rows, columns = len(compared.sources), 12
    assert drawn.shape[0] == rows * 52 + 4 and drawn.shape[1] > columns * 52
    left = drawn.shape[1] - columns * 52
    for row, source in enumerate(compared.sources):
        path = source.samples.picture(0)
        assert path is not None
        with Image.open(path) as image:
            original = np.asarray(image.convert("RGB"))
        cell = drawn[4 + 52 * row : 52 + 52 * row, left : left + 48]
        assert (cell[3::6, 3::6] == original).all(), "a cell does not show its sample's pixels"


def test_points_have_no_sheet(tmp_path: Path) -> None:
    points_run(tmp_path, "moons")
    folder = report.write_comparison(report.compare(["moons"], root=tmp_path), tmp_path / "c").parent
    assert (folder / "page.html").exists() and not (folder / "pictures.png").exists()
