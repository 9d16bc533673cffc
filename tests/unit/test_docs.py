"""The guide holds together: links, anchors and pictures, an API page for everything public, docstrings as written."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import steerfm
from steerfm import types

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# What the reference leaves out: the command line and what it alone needs.
NOT_PUBLIC = {
    "checking", "cli", "commands", "config", "files", "http_client", "logs", "names", "provenance", "recipe_files",
    "recipes",
}  # fmt: skip

sys.path.insert(0, str(DOCS))
from docstrings import as_rest  # noqa: E402


def prose(path: Path) -> str:
    """Return the text of a page without its code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the built guide make them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(path: Path) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("path", [*TEXTS, *NOTEBOOKS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One, two\n```\n# not a heading\n```\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one-two) [c](gone.md) [d](other.md#not-a-heading) ![e](gone.png) [f](#here)\n"
        "`[g](code.md)` [h](https://example.org/x.md)\n# Here\n",
        encoding="utf-8",
    )
    assert broken(page) == ["gone.md", "other.md#not-a-heading", "gone.png"]


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = (DOCS / "conf.py").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT).with_suffix("").as_posix() for path in [*DOCS.glob("*.md"), *NOTEBOOKS]]
    assert [page for page in pages if f"<{page}>" not in listed] == []


def documented() -> set[str]:
    """Return the modules that an API page documents."""
    text = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    found = re.findall(r"automodule:: (\S+)", text)
    assert len(found) == len(set(found)), "documented twice"
    return set(found)


def test_everything_public_has_an_api_page() -> None:
    parts = {path.stem for path in (ROOT / "steerfm").glob("*.py")} - {"__init__"}
    parts |= {path.parent.name for path in (ROOT / "steerfm").glob("*/__init__.py")} - {"rewards"}
    expected = {f"steerfm.{part}" for part in parts - NOT_PUBLIC}
    expected |= {f"steerfm.rewards.{path.stem}" for path in (ROOT / "rewards").glob("[a-z]*.py")}
    assert documented() ^ expected == set()
    assert set(steerfm._HOMES) <= documented()


def test_the_shapes_of_signatures_are_those_of_the_code() -> None:
    listed = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", (DOCS / "api" / "index.md").read_text(encoding="utf-8"), re.M)
    assert {name for name, _ in listed} == {name for name in vars(types) if name in dict(listed)}
    for name, written in listed:
        kind = getattr(types, name)
        assert written == f'{kind.__name__.partition("[")[0]}[Tensor, "{_dimensions(kind)}"]'
    every = [name for name, value in vars(types).items() if hasattr(value, "dim_str")]
    assert sorted(every) == sorted(name for name, _ in listed)


def _dimensions(kind: object) -> str:
    """Return a jaxtyping annotation's shape, with the space that a single name needs."""
    shape = str(getattr(kind, "dim_str"))  # noqa: B009
    return shape if " " in shape.strip() else f" {shape.strip()}"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("Return |x|² and *dim of x_t.", r"Return \|x\|² and \*dim of x\_t."),
        ("Use `a` and `b_c*`s.", r"Use ``a`` and ``b_c*``\ s."),
        ("A span `over\ntwo lines`.", "A span ``over two lines``."),
        ("See `Cost`, not `cost`.", "See :py:obj:`Cost <steerfm.types.Cost>`, not ``cost``."),
        ("A\\b <x>", r"A\\b \<x\>"),
    ],
)
def test_docstrings_show_every_character(text: str, written: str) -> None:
    assert as_rest(text.split("\n"), {"Cost": "steerfm.types.Cost"}) == [*written.split("\n"), ""]


def test_docstrings_keep_formulas_and_lists() -> None:
    text = "First.\n\n    dA = r |x|\n    *two*\n\nThen:\n- one `a`\n- two_"
    assert as_rest(text.split("\n"), {}) == [
        "First.", "", "::", "", "    dA = r |x|", "    *two*", "", "Then:", "- one ``a``", r"- two\_", "",
    ]  # fmt: skip


def test_notebooks_are_kept_without_outputs() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["comparing", "own_reward"]
    for path in NOTEBOOKS:
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), path.name
