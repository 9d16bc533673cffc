"""A comparison as files for a paper: what the tables say, what hostile names become, and pictures in their places."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import altair
import numpy as np
import pytest
import torch
import vl_convert
from made_runs import make_run, make_runs
from PIL import Image

from steerfm import report
from steerfm.errors import ConfigError, RunError, SteerfmError
from steerfm.report import latex
from steerfm.report.columns import column_groups
from steerfm.report.export import export
from steerfm.report.grid import CELL, GAP, grid
from steerfm.report.reopen import changed, reopen
from steerfm.runs import Run
from steerfm.types import Cost, Samples

NAMES = ["base", "best-of-16", "guidance--T---0-1", "tilting--T---0-1", "fine-tuned--T---0-1", "fine-tuned--T---0-01"]
OWN_SEVENS = {"label": "base, its own sevens", "run": "base", "where": "held_out.judge p(7)", "above": 0.5}
HOSTILE = r"""\input{x} & 50% _a_ #1 $x^2$ {~} --- '' "q" <b>|`"""
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of six finished runs and a comparison of them."""
    folder = tmp_path_factory.mktemp("runs")
    make_runs(folder)
    comparison = report.compare(NAMES, subsets=[OWN_SEVENS], root=folder)
    report.write_comparison(comparison, folder / "compared")
    return folder


@pytest.fixture(scope="module")
def compared(root: Path) -> report.Comparison:
    return reopen(Run.open("compared", root))


def pair_of_runs(root: Path, first: str, second: str, gap: float = 1.0, count: int = 24) -> report.Comparison:
    """Return the comparison of two runs with these labels, whose rewards differ by `gap` and noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 1, 8, 8, generator=generator)
    for name, label, mean in (("a", first, 0.0), ("b", second, gap)):
        rewards = mean + 0.5 * torch.randn(count, generator=generator)
        samples = Samples(x * 2 - 1, x, [""] * count, list(range(count)), Cost(4), rewards=rewards)
        with Run.start(name, command="sample", config={}, recipe="made", label=label, root=root) as run:
            run.write_samples(samples)
    return report.compare(["a", "b"], root=root)


def cells(table: str) -> list[list[str]]:
    """Return the cells of a LaTeX table, its head first."""
    lines = [line for line in table.splitlines() if line.endswith(r"\\")]
    return [re.split(r"(?<!\\) & ", line.removesuffix(r" \\")) for line in lines]


def test_a_comparison_is_read_again_as_it_was(root: Path, compared: report.Comparison) -> None:
    first = report.compare(NAMES, subsets=[OWN_SEVENS], root=root)
    assert compared.records() == first.records()
    assert compared.pairs == first.pairs
    assert changed(Run.open("compared", root)) == []


def test_it_is_found_again_where_the_runs_were_moved(root: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(root, tmp_path / "elsewhere"))
    again = reopen(Run.open("compared", moved))
    assert {source.folder.parent for source in again.sources} == {moved}


def test_a_run_that_changed_is_named(tmp_path: Path) -> None:
    make_run(tmp_path, "base")
    make_run(tmp_path, "best of 16")
    report.write_comparison(report.compare(["base", "best-of-16"], root=tmp_path), tmp_path / "compared")
    shutil.rmtree(tmp_path / "best-of-16")
    make_run(tmp_path, "fine-tuned, T = 0.1", name="best-of-16")
    assert changed(Run.open("compared", tmp_path)) == [str(tmp_path / "best-of-16")]
    shutil.rmtree(tmp_path / "best-of-16")
    with pytest.raises(RunError, match="No run at"):
        reopen(Run.open("compared", tmp_path))


def test_lines_are_read_again(root: Path, tmp_path: Path) -> None:
    lines = {"one": {"picking": ["best-of-16"]}, "two": {"tilting": ["tilting--T---0-1", "guidance--T---0-1"]}}
    comparison = report.compare(NAMES, lines=lines, root=root)
    report.write_comparison(comparison, root / "with_lines")
    assert reopen(Run.open("with_lines", root)).lines == comparison.lines


def test_what_is_no_comparison_is_refused(root: Path) -> None:
    with pytest.raises(RunError, match=r"of 'steerfm sample', and a finished comparison is needed: steerfm compare"):
        reopen(Run.open("base", root))


def test_the_data_frame_holds_the_records(compared: report.Comparison) -> None:
    frame, records = compared.table(), compared.records()
    assert list(frame.index) == [record["label"] for record in records]
    for record in records:
        for name in frame.columns:
            found = frame.loc[record["label"], name]
            assert found == record[name] or (record[name] is None and np.isnan(found)), (record["label"], name)
    assert "frechet_equal" not in frame, "a column that no row fills"
    assert frame.drop(columns=["kind", "run", "note"]).dtypes.map(lambda kind: kind.kind in "ifb").all()
    assert frame.loc["best of 16", "reward"] > frame.loc["base", "reward"]


def test_the_plot_is_a_chart_of_the_specification(compared: report.Comparison) -> None:
    chart = compared.plot()
    assert isinstance(chart, altair.TopLevelMixin)
    assert json.loads(json.dumps(chart.to_dict()))


@pytest.mark.parametrize(("package", "method"), [("pandas", "table"), ("altair", "plot")])
def test_a_missing_package_names_the_extra(
    compared: report.Comparison, package: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SteerfmError, match=rf"'{package}', which is not installed: pip install 'steerfm\[report\]'"):
        getattr(compared, method)()


def test_the_tables_hold_what_the_terminal_shows(compared: report.Comparison) -> None:
    found = latex.tables(compared)
    assert list(found) == ["quality.tex", "costs.tex", "differences.tex"]
    for group, text in zip(column_groups(compared), found.values(), strict=False):
        head, *body = cells(text)
        assert len(head) == len(group)
        assert {len(line) for line in body} == {len(group)}
        shown = {line[0]: line for line in body}
        for row in compared.rows:
            if row.label in shown and row.kind == "run":
                plain = [re.sub(r"\\textbf\{(.*)\}", r"\1", cell).replace(r"$\pm$", "±") for cell in shown[row.label]]
                assert plain == [column.text(row).replace("%", r"\%").replace("–", "--") for column in group]
    assert r"$+$0.33 $\pm$ 0.12" in found["differences.tex"]
    assert "minus base & reward & judge p(7)" in found["differences.tex"]


def test_only_the_surely_best_is_bold(compared: report.Comparison, tmp_path: Path) -> None:
    assert latex.best_runs(compared) == {"reward": "fine-tuned, T = 0.01"}  # the judge prefers others, none for sure
    assert latex.tables(compared)["quality.tex"].count(r"\textbf") == 1
    assert latex.best_runs(pair_of_runs(tmp_path / "apart", "x", "y")) == {"reward": "y"}
    alike = pair_of_runs(tmp_path / "alike", "x", "y", gap=0.0)
    assert latex.best_runs(alike) == {}
    assert "bold" not in latex.tables(alike)["quality.tex"]


def test_one_run_alone_is_not_the_best(root: Path) -> None:
    alone = report.compare(["base"], root=root)
    assert latex.best_runs(alone) == {}
    assert list(latex.tables(alone)) == ["quality.tex", "costs.tex"]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a & b_c", r"a \& b\_c"),
        ("50% #1 $x$", r"50\% \#1 \$x\$"),
        (r"\input{x}", r"\textbackslash{}input\{x\}"),
        ("a~b^c", r"a\textasciitilde{}b\textasciicircum{}c"),
        ("[b]", "{[}b]"),
        ("* all", "{*} all"),
        ("a---b", "a-{}-{}-b"),
        ("T = ½, α ≤ 2", r"T = $\frac12$, $\alpha$ $\leq$ 2"),
        ("two\nlines\t\u202eback", "two lines back"),
        ("Fréchet", "Fréchet"),
        ("Fre\u0301chet", "Fréchet"),
        ("", ""),
    ],
)
def test_text_is_set_as_it_is(text: str, written: str) -> None:
    assert latex.escaped(text) == written


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("–", "--"),
        ("-0.040 ± 0.015", r"$-$0.040 $\pm$ 0.015"),
        ("8.9e-05", r"8.9$\cdot10^{-5}$"),
        ("+1.5e+07", r"$+$1.5$\cdot10^{7}$"),
        ("5.24 (112%)", r"5.24 (112\%)"),
        ("2,496", "2,496"),
        ("+0.1 ± 0.2 (within noise)", r"$+$0.1 $\pm$ 0.2 (within noise)"),
    ],
)
def test_figures_have_signs_and_powers(text: str, written: str) -> None:
    assert latex.cell(text) == written


def assert_balanced(text: str, columns: int) -> None:
    """Assert that braces, cells and mathematics are whole, with every special character escaped."""
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    bare = re.sub(r"\\[{}$&%#_]", "", body)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert not set("%#_~|`") & set(re.sub(r"\\\w+(\{\})?", "", bare)) - {"`"}
    assert body.count(r"\begin{") == body.count(r"\end{") == 1
    for line in body.splitlines():
        if line.endswith(r"\\"):
            assert re.sub(r"\\&", "", line).count("&") == columns - 1


def test_hostile_labels_leave_the_tables_whole(tmp_path: Path) -> None:
    comparison = pair_of_runs(tmp_path, HOSTILE, "猫 [x] \u202e* 🐈 1e-5")
    for group, (name, text) in zip(column_groups(comparison), latex.tables(comparison).items(), strict=False):
        assert_balanced(text, len(group))
        assert r"\input" not in text, name
        assert "% has 猫 🐈: needs LuaLaTeX or XeLaTeX" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")
def test_latex_sets_the_tables(tmp_path: Path) -> None:
    found = latex.tables(pair_of_runs(tmp_path / "runs", HOSTILE, "[a] * 1 < 2"))
    text = r"\documentclass{article}\usepackage{booktabs}\begin{document}" + "\n\n".join(found.values())
    (tmp_path / "paper.tex").write_text(text + r"\end{document}", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_grid_has_every_picture_in_its_place(root: Path, compared: report.Comparison) -> None:
    text = grid(compared, seeds=5)
    assert text is not None
    drawn = ElementTree.fromstring(text)
    words = [element.text for element in drawn.iter(f"{SVG}text")]
    assert words == ["a handwritten seven", *(source.label for source in compared.sources)]
    assert len(list(drawn.iter(f"{SVG}image"))) == 5 * len(NAMES)
    with Image.open(io.BytesIO(vl_convert.svg_to_png(text))) as image:
        whole = np.asarray(image.convert("L"), dtype=float)
    left = {int(element.get("x", "")) for element in drawn.iter(f"{SVG}image")}
    top = sorted({int(element.get("y", "")) for element in drawn.iter(f"{SVG}image")})
    for label, y in zip(list(drawn.iter(f"{SVG}text"))[1:], top, strict=True):
        assert y + CELL / 2 <= float(label.get("y", "")) <= y + CELL / 2 + GAP, "a label stands beside its row"
    assert top[-1] + CELL <= int(drawn.get("height", ""))
    for row, name in enumerate(NAMES):
        for column, x in enumerate(sorted(left)):
            with Image.open(root / name / "images" / f"{column:06d}.png") as image:
                pixels = np.asarray(image.convert("L"), dtype=float)
            middles = np.arange(8) * CELL // 8 + CELL // 16
            assert np.abs(whole[top[row] + middles[:, None], x + middles[None]] - pixels).max() <= 2, (name, column)


def test_the_grid_has_a_block_a_prompt_and_leaves_gaps(tmp_path: Path) -> None:
    prompts = ["a <seven> & 'one'", "an eight \x00" + "so very long " * 20]
    make_run(tmp_path, "base", count=3, prompts=prompts)
    make_run(tmp_path, "best of 16", count=2, prompts=prompts[:1])
    text = grid(report.compare(["base", "best-of-16"], root=tmp_path))
    assert text is not None
    drawn = ElementTree.fromstring(text)
    words = [element.text or "" for element in drawn.iter(f"{SVG}text")]
    assert words[0] == prompts[0]
    assert words.count("base") == 2
    assert all(len(line) <= 100 for line in words)
    assert len(list(drawn.iter(f"{SVG}image"))) == 3 + 2 + 3
    width = int(drawn.get("width", ""))
    assert all(int(element.get("x", "")) + CELL + GAP <= width for element in drawn.iter(f"{SVG}image"))


def test_every_file_is_what_its_name_says(compared: report.Comparison, tmp_path: Path) -> None:
    written = export(compared, tmp_path / "paper")
    names = {path.name for path in written}
    figures = {f"{stem}.{kind}" for stem in ("pictures", "plots") for kind in ("png", "pdf", "svg")}
    assert names == figures | {"quality.tex", "costs.tex", "differences.tex", "table.md"}
    for path in written:
        data = path.read_bytes()
        if path.suffix == ".pdf":
            assert data.startswith(b"%PDF-")
            assert b"/FontFile" in data or b"/Font" in data, "words are pictures of words"
        elif path.suffix == ".svg":
            assert ElementTree.fromstring(data).tag == f"{SVG}svg"
            assert not re.search(rb'(href|src)="(?!data:|#)', data)
        elif path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width > 500
                assert len(set(image.convert("L").tobytes())) > 16
    assert (tmp_path / "paper" / "table.md").read_text(encoding="utf-8") == report.markdown(compared)
    assert export(compared, tmp_path / "paper", ["md"]) == [tmp_path / "paper" / "table.md"]


def test_points_have_no_grid(tmp_path: Path) -> None:
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    with Run.start("points", command="sample", config={}, recipe="points", root=tmp_path) as run:
        run.write_samples(Samples(x, x, [""] * 16, list(range(16)), Cost(4)))
    comparison = report.compare(["points"], root=tmp_path)
    assert grid(comparison) is None
    names = {path.name for path in export(comparison, tmp_path / "paper", ["png", "tex"])}
    assert names == {"quality.tex", "costs.tex"}, "one run without a reward has nothing to plot"


def test_wrong_wishes_are_refused_before_anything_is_written(compared: report.Comparison, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown format 'pgn'; did you mean 'png'"):
        export(compared, tmp_path / "paper", ["pgn"])
    with pytest.raises(ConfigError, match="at least 1 prompt and 1 seed, got 0 and 8"):
        export(compared, tmp_path / "paper", prompts=0)
    assert not (tmp_path / "paper").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Cannot write"):
        export(compared, tmp_path / "file" / "paper", ["md"])
