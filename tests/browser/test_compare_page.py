"""The comparison page as a reader meets it: whole, sortable, readable on a phone and in the dark, and silent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_runs import METHODS, make_runs

from steerfm import report

pytestmark = pytest.mark.browser

PROMPTS = ("a handwritten seven", "<script>document.title = 'taken'</script> a long prompt, " + "very " * 40 + "long")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of six runs on two prompts, one of them hostile."""
    root = tmp_path_factory.mktemp("runs")
    folders = make_runs(root, prompts=PROMPTS, count=20)
    return report.write_comparison(report.compare(folders, root=root), root / "compared")


def first_column(browser) -> list[str]:
    script = "return [...document.querySelectorAll('table.figures tbody tr th')].map(cell => cell.innerText.trim())"
    return browser.run(script)


def test_the_page_shows_everything_and_asks_for_nothing(browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("return document.title") == "Comparison of 6 runs"
    assert browser.run("return [...document.images].every(image => image.complete && image.naturalWidth === 8)")
    assert browser.run("return document.images.length") == 6 * 12 * 2
    assert browser.run("return getComputedStyle(document.images[0]).imageRendering") == "pixelated"
    assert browser.run("return document.querySelectorAll('svg.chart .mark').length") == 12
    assert browser.run("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert [entry["message"] for entry in browser.log("browser")] == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    asked = [m["params"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    ours = [request["request"]["url"] for request in asked if request["documentURL"] == page.as_uri()]
    assert page.as_uri() in ours
    assert [url for url in ours if not url.startswith("data:")] == [page.as_uri()]


def test_headings_sort(browser, page: Path) -> None:
    browser.open(page)
    assert first_column(browser) == [*METHODS, "real data"]
    browser.click("table.figures th:nth-child(3) button")  # reward, the best first
    assert first_column(browser)[0] == "fine-tuned, T = 0.01"
    assert first_column(browser)[-1] == "real data"  # empty cells stay last
    browser.click("table.figures th:nth-child(3) button")
    assert first_column(browser)[0] == "base"
    assert first_column(browser)[-1] == "real data"
    assert browser.run("return document.querySelector('[aria-sort]').getAttribute('aria-sort')") == "ascending"
    browser.click("table.figures th:nth-child(1) button")
    assert first_column(browser) == sorted([*METHODS, "real data"], key=str.casefold)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_nothing_sticks_out_at_any_width(browser, page: Path, width: int, dark: bool, tmp_path: Path) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(18, 20, 23)" if dark else "rgb(251, 251, 250)"
    )
    texts = "[...document.querySelectorAll('svg.chart text')]"
    smallest = browser.run(f"return Math.min(...{texts}.map(text => text.getBoundingClientRect().height))")
    assert smallest >= (8 if width == 320 else 10)
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_ticks_and_titles_of_charts_do_not_overlap(browser, page: Path) -> None:
    browser.open(page)
    overlaps = """
        const found = [];
        for (const chart of document.querySelectorAll("svg.chart")) {
          const boxes = [...chart.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
          const frame = chart.getBoundingClientRect();
          boxes.forEach(([a, p], i) => {
            if (p.left < frame.left - 1 || p.right > frame.right + 1 || p.bottom > frame.bottom + 1) found.push([a]);
            boxes.slice(i + 1).forEach(([b, q]) => {
              if (p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom) found.push([a, b]);
            });
          });
        }
        return found;
    """
    assert browser.run(overlaps) == []


def test_the_keyboard_reaches_headings_and_recipes(browser, page: Path) -> None:
    browser.open(page)
    reachable = "return [...document.querySelectorAll('thead button, summary, .scroll')].every(e => e.tabIndex === 0)"
    assert browser.run(reachable)
    browser.click("details summary")
    assert browser.run("return document.querySelector('details[open] pre').innerText.includes('recipe: made')")
