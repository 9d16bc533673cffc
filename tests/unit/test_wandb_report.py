"""A comparison in W&B: an offline run read back whole, and a Report saved block by block on a server that stands in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_run
from wandb_stand_in import ENTITY, KEY, StandIn, stand_in

from steerfm import report
from steerfm.errors import RunError
from steerfm.report import published

LABELS = ["base", "best of 16", "tilting, T = 0.1"]
LINES = {"search": {"all of it": ["base", "best of 16", "tilting, T = 0.1"]}}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> report.Comparison:
    root = tmp_path_factory.mktemp("runs")
    names = [make_run(root, label, count=6).info.name for label in LABELS]
    return report.compare(names, root=root, lines=LINES)


@pytest.fixture(scope="module")
def online(compared: report.Comparison, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StandIn, Path]]:
    """Return a server that was told of a comparison, and the comparison's folder."""
    folder = tmp_path_factory.mktemp("online")
    with pytest.MonkeyPatch.context() as patch, stand_in(patch, folder / "home") as server:
        report.log_comparison(compared, folder / "c", mode="online", name="three methods")
        yield server, folder / "c"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    with stand_in(monkeypatch, tmp_path / "home") as server:
        yield server


def saved(server: StandIn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the last Report that was saved, and its blocks without the empty paragraphs around them."""
    view = server.views[-1]
    return view, [block for block in json.loads(view["spec"])["blocks"] if block["type"] != "paragraph"]


def panels(block: dict[str, Any]) -> list[dict[str, Any]]:
    return block["metadata"]["panelBankSectionConfig"]["panels"]


def test_online_the_report_is_saved_block_by_block(online: tuple[StandIn, Path]) -> None:
    server, folder = online
    (run,) = server.runs
    view, blocks = saved(server)
    url = json.loads((folder / "report.json").read_text())["url"]
    assert url.startswith(f"{server.url}/{ENTITY}/steerfm/reports/")
    assert (view["displayName"], view["projectName"], view["entityName"]) == ("three methods", "steerfm", ENTITY)
    kinds = ["heading", "markdown-block", "heading", "panel-grid", "heading", "panel-grid", "heading"]
    kinds += ["markdown-block", "panel-grid", "heading", "markdown-block", "heading", "markdown-block"]
    assert [block["type"] for block in blocks] == kinds
    heads = [block["children"][0]["text"] for block in blocks if block["type"] == "heading"]
    assert heads == [
        "Summary", "Figures", "The same prompts and seeds", "Reward against network calls", "Settings", "Conclusions",
    ]  # fmt: skip
    assert all(label in blocks[1]["content"] for label in LABELS)
    for grid in (blocks[3], blocks[5], blocks[8]):
        (runs,) = grid["metadata"]["runSets"]
        assert runs["filters"]["filters"][0]["key"] == {"section": "run", "name": "name"}
        assert runs["filters"]["filters"][0]["value"] == [run]
        assert runs["project"]["name"] == "steerfm"
    table, reward, held_out = panels(blocks[3])
    assert table["viewType"] == "Weave" and '"val": "figures"' in json.dumps(table)
    assert reward["config"]["xAxis"] == "lines/network_calls"
    assert reward["config"]["metrics"] == ["lines/all of it/reward"]
    assert held_out["config"]["metrics"] == ["lines/all of it/held_out.judge p(7)"]
    table, media = panels(blocks[5])
    assert '"val": "samples"' in json.dumps(table)
    assert media["viewType"] == "Media Browser"
    assert media["config"]["mediaKeys"] == ["pictures/base", "pictures/best of 16", "pictures/tilting- T = 0.1"]
    (scatter,) = panels(blocks[8])
    assert scatter["config"]["panelDefId"] == "wandb/scatter/v0"
    assert scatter["config"]["fieldSettings"] == {"x": "network_calls", "y": "reward"}
    assert "method.temperature" in blocks[10]["content"]
    assert "best of 16 against base: reward +" in blocks[12]["content"]
    assert server.unknown == []


def test_the_run_has_tables_lines_and_figures(compared: report.Comparison, online: tuple[StandIn, Path]) -> None:
    server, folder = online
    (run,) = server.runs
    tables = {a["name"].rpartition("-")[2]: a for a in server.of_type("run_table")}
    assert set(tables) == {"figures", "pareto", "samples"}
    figures = json.loads(server.files(tables["figures"])["figures.table.json"])
    assert figures["data"] == json.loads(json.dumps([list(row.values()) for row in compared.records()]))
    pareto = json.loads(server.files(tables["pareto"])["pareto.table.json"])
    assert [row[0] for row in pareto["data"]] == LABELS
    rows = [row for row in server.history(run) if "lines/network_calls" in row]
    by_label = {row["label"]: row for row in compared.records()}
    assert [row["lines/network_calls"] for row in rows] == [4, 64, 768]
    assert [row["lines/all of it/reward"] for row in rows] == [by_label[label]["reward"] for label in LABELS]
    assert server.summary(run)["base/reward"] == by_label["base"]["reward"]
    assert server.config(run)["runs"]["tilting, T = 0.1"]["method"] == {"temperature": 0.1}
    assert not any(KEY.encode() in body for body in server.bodies)
    assert not any(KEY.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_an_offline_comparison_is_published_later_by_the_command_it_names(
    compared: report.Comparison, server: StandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "steerfm")
    report.log_comparison(compared, tmp_path / "c", mode="offline", title="Later")
    assert f"steerfm report publish {tmp_path / 'c'}" in caplog.text
    assert server.asked == [] and server.runs == {}
    url = published.publish(tmp_path / "c", project="elsewhere")
    view, _ = saved(server)
    (run,) = server.runs
    assert (view["displayName"], view["projectName"]) == ("Later", "elsewhere")
    assert server.runs[run]["project"] == "elsewhere"
    assert {a["name"].rpartition("-")[2] for a in server.of_type("run_table")} == {"figures", "pareto", "samples"}
    again = published.publish(tmp_path / "c", project="elsewhere")
    assert again == url and server.views[-1]["id"] is not None and len(server.runs) == 1


def test_what_cannot_be_published_is_one_sentence(
    compared: report.Comparison,
    server: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(RunError, match="compare its runs with report=wandb"):
        published.publish(tmp_path)
    caplog.set_level("INFO", "steerfm")
    kept = report.log_comparison(compared, tmp_path / "c", mode="online")
    assert kept is not None and kept.name.startswith("run-")
    assert f"W&B Report: {server.url}/{ENTITY}/steerfm/reports/" in caplog.text
    server.mood = "unauthorised"
    with pytest.raises(RunError, match=r"W&B did not take the Report \(.*user is not logged in") as caught:
        published.publish(tmp_path / "c")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(published, "SECONDS_TO_SAVE", 1.0)
    server.mood = "silent"
    with pytest.raises(RunError, match=r"no answer within 1 s"):
        published.publish(tmp_path / "c")


def test_nothing_asks_for_a_key(
    compared: report.Comparison, server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    report.log_comparison(compared, tmp_path / "c", mode="offline")
    with pytest.raises(RunError, match="set WANDB_API_KEY"):
        published.publish(tmp_path / "c")
    assert server.asked == []
