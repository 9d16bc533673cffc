"""`make docs`: a whole guide, every link in it alive, nothing from elsewhere, and any warning an error."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def build(source: Path, target: Path) -> subprocess.CompletedProcess:
    """Build the guide as `make docs` does, without running the notebooks, which have a test of their own."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8")
    (arguments,) = re.findall(r"sphinx-build (.*) -c docs -d build/doctrees \. build/docs", lines)
    places = ["-c", str(ROOT / "docs"), "-d", str(target / "doctrees"), str(source), str(target / "html")]
    command = [sys.executable, "-m", "sphinx", *arguments.split(), "-D", "nb_execution_mode=off", *places]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


class Page(HTMLParser):
    """Gather what a page links to, what it loads, and what can be linked to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag in ("link", "script", "img", "source", "iframe", "object"):
            self.loads += [found[name] for name in ("href", "src", "data") if name in found]


@cache
def read(path: Path) -> Page:
    return Page(path)


def dead(path: Path) -> list[str]:
    """Return the links and pictures of a built page that lead nowhere."""
    found = []
    for link in read(path).links + read(path).loads:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / unquote(name.partition("?")[0])).resolve() if name else path
        if not target.exists() or (anchor and target.suffix == ".html" and unquote(anchor) not in read(target).anchors):
            found.append(link)
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("docs")
    done = build(ROOT, target)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return target / "html"


def test_every_link_of_the_built_guide_is_alive(built: Path) -> None:
    pages = [path for path in built.rglob("*.html") if path.relative_to(built).parts[0] != "_modules"]
    assert len(pages) > 30
    assert {path.relative_to(built).as_posix(): links for path in pages if (links := dead(path))} == {}


def test_nothing_is_loaded_from_elsewhere(built: Path) -> None:
    loads = {load for path in built.rglob("*.html") for load in read(path).loads}
    assert not [load for load in loads if re.match(r"(https?:)?//", load)]
    styles = "".join(path.read_text(encoding="utf-8") for path in (built / "_static").rglob("*.css"))
    assert not re.findall(r"url\(['\"]?(?:https?:)?//[^)]*|@import[^;]*//[^;]*", styles)


def test_the_landing_page_is_the_readme(built: Path) -> None:
    assert (built / "index.html").read_bytes() == (built / "README.html").read_bytes()
    assert "docs/api/index.html" in read(built / "index.html").links


def test_signatures_and_docstrings_can_be_read(built: Path) -> None:
    text = (built / "docs" / "api" / "maps.html").read_text(encoding="utf-8")
    plain = re.sub(r"<[^>]+>", "", text)
    for found in ("TypeAlias", "jaxtyping", "ForwardRef", ":py:", "``", "\\_"):
        assert found not in plain, found
    assert "E[x0 | x_t]" in plain
    assert re.search(r"jump\(\s*x: State,\s*s: Times \| float,\s*t: Times \| float", plain)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a](gone.md)", "gone.md"),
        ("[a](README.md#gone)", "gone"),
        ("![a](gone.png)", "gone.png"),
        ("```{eval-rst}\n.. automodule:: steerfm.gone\n```", "steerfm.gone"),
        ("", ""),
    ],
)
def test_any_warning_is_an_error(text: str, said: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        page = source / (name if isinstance(name, str) else name.relative_to(ROOT))
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("# A page\n", encoding="utf-8")
    for name in ("api/index.md", "notebooks/comparing.ipynb", "notebooks/own_reward.ipynb"):
        page = source / "docs" / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text((ROOT / "docs" / name).read_text(encoding="utf-8") if "ipynb" in name else "# An index\n")
    (source / "README.md").write_text(f"# A page\n\n{text}\n", encoding="utf-8")
    done = build(source, tmp_path)
    if said:
        assert done.returncode != 0
        assert said in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, "")
