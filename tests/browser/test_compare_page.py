"""The comparison page as a reader meets it: whole, quick with thousands of pictures, usable by anyone, and silent.

Screenshots are kept in build/screenshots, to be looked at.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chromium import SCREENSHOTS, Browser
from made_runs import METHODS, make_runs
from tiny_recipes import tiny

from steerfm import report
from steerfm.cli import main

pytestmark = pytest.mark.browser

HOSTILE = (
    "a handwritten seven",
    "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">",
    "a long prompt, " + "very " * 200 + "long",
    "onewordwithoutanyspace" * 30,
    "שבע בכתב יד, מימין לשמאל",
    "a seven 7️⃣ with 🎉 and 👩‍👩‍👧",
)
PER_RUN = 504  # six runs: 3,024 pictures
ARROWS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015", "escape": "\ue00c", "enter": "\ue007"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of six runs of 504 pictures each, on hostile prompts."""
    root = tmp_path_factory.mktemp("runs")
    folders = make_runs(root, prompts=HOSTILE, count=PER_RUN // len(HOSTILE))
    return report.write_comparison(report.compare(folders, root=root), root / "compared")


def opened(browser: Browser, page: Path, **options) -> float:
    """Open the page and return after how many seconds it answered: drawn, and its filter working."""
    browser.log("browser")
    browser.open(page, **options)
    browser.wait("return document.documentElement.dataset.drawn > 0")
    return browser.run("return performance.now()") / 1000


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.run(f"return [...document.querySelectorAll('{selector}')].map(each => each.innerText.trim())")


def first_column(browser: Browser) -> list[str]:
    return texts(browser, "table.figures tbody tr th")


def choose(browser: Browser, name: str, value: str) -> None:
    browser.run(
        f"const e = document.getElementById('{name}'); e.value = {json.dumps(value)}; "
        "e.dispatchEvent(new Event('input', {bubbles: true}))"
    )


def rewards(browser: Browser, run: int) -> list[float]:
    """Return the rewards below the drawn pictures of a run, in order."""
    captions = f"document.querySelectorAll('.shot[data-run=\"{run}\"] .caption')"
    return [float(text) for text in browser.run(f"return [...{captions}].map(each => each.textContent)")]


def test_three_thousand_pictures_open_within_three_seconds_and_ask_for_nothing(browser: Browser, page: Path) -> None:
    browser.log("performance")
    assert opened(browser, page) < 3
    assert browser.run("return document.title") == "Comparison of 6 runs"
    assert texts(browser, "#count") == ["504 samples"]
    assert browser.run("return document.images.length") < 1000, "what is far below is not drawn yet"
    assert browser.run("return getComputedStyle(document.images[0]).imageRendering") == "pixelated"
    assert browser.run("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert [entry["message"] for entry in browser.log("browser")] == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    asked = [m["params"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    ours = [request["request"]["url"] for request in asked if request["documentURL"] == page.as_uri()]
    assert page.as_uri() in ours
    assert [url for url in ours if not url.startswith("data:")] == [page.as_uri()]


def test_it_works_with_the_network_off(browser: Browser, page: Path) -> None:
    off = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.devtools("Network.enable", {})
    browser.devtools("Network.emulateNetworkConditions", off)
    try:
        opened(browser, page)
        assert browser.run("return [...document.images].every(image => image.complete && image.naturalWidth === 8)")
        assert browser.run("return document.querySelectorAll('.chart svg').length") == 3
        assert browser.log("browser") == []
    finally:
        browser.devtools("Network.emulateNetworkConditions", {**off, "offline": False, "downloadThroughput": -1})


def test_hostile_prompts_are_text(browser: Browser, page: Path) -> None:
    opened(browser, page)
    shown = set()
    for prompt in HOSTILE:
        choose(browser, "search", prompt)
        shown |= set(browser.run("return [...document.querySelectorAll('.prompt')].map(each => each.textContent)"))
    assert shown == set(HOSTILE)
    assert browser.run("return document.title") == "Comparison of 6 runs"
    assert browser.run("return document.querySelectorAll('img[src=x]').length") == 0


def test_headings_sort(browser: Browser, page: Path) -> None:
    opened(browser, page)
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


def test_samples_filter_and_sort(browser: Browser, page: Path) -> None:
    opened(browser, page)
    browser.type("#search", "HANDWRITTEN")
    assert texts(browser, "#count") == ["84 of 504 samples"]
    choose(browser, "run", "5")
    choose(browser, "sort", "high")
    shown = rewards(browser, 5)
    assert shown == sorted(shown, reverse=True) and len(shown) >= 30
    choose(browser, "sort", "low")
    assert rewards(browser, 5)[0] < shown[-1]
    choose(browser, "least", "1.4")
    assert min(rewards(browser, 5)) >= 1.4
    choose(browser, "least", "")
    choose(browser, "only", "parted")
    parted = int(texts(browser, "#count")[0].split(" ")[0])
    assert 0 < parted < 84
    choose(browser, "only", "missing")
    assert texts(browser, "#count") == ["0 of 504 samples"]
    browser.click("#clear")
    assert texts(browser, "#count") == ["504 samples"]
    choose(browser, "sort", "gain")
    gains = [b - a for a, b in zip(rewards(browser, 0), rewards(browser, 5), strict=True)]
    assert gains == sorted(gains, reverse=True)
    choose(browser, "sort", "disagreement")
    assert browser.run("return document.querySelectorAll('.card').length") >= 36
    assert browser.log("browser") == []


def test_views_switch_runs_in_place(browser: Browser, page: Path) -> None:
    opened(browser, page)
    browser.click("#view-one")
    assert browser.run("return new Set([...document.querySelectorAll('.shot')].map(e => e.dataset.run)).size") == 1
    place = "const b = document.querySelector('.shot').getBoundingClientRect(); return [b.left, b.top, b.width]"
    before, picture = browser.run(place), browser.run("return document.querySelector('.shot img').src")
    choose(browser, "run-slider", "3")
    assert texts(browser, "#count") == ["504 samples, tilting, T = 0.1"]
    assert browser.run(place) == before
    assert browser.run("return document.querySelector('.shot img').src") != picture
    browser.run("document.activeElement.blur()")
    browser.press(ARROWS["right"])
    assert texts(browser, "#count") == ["504 samples, fine-tuned, T = 0.1"]
    browser.press("v")
    assert browser.run("return document.getElementById('view-wipe').checked")
    choose(browser, "right", "4")
    choose(browser, "wipe", "25")
    over = "const style = getComputedStyle(document.querySelector('.wipe .over')); return style.clipPath"
    assert browser.run(over) == "inset(0px 0px 0px 25%)"
    assert browser.run("return document.querySelectorAll('.card:first-child img').length") == 2
    browser.run("document.getElementById('samples').scrollIntoView()")
    browser.screenshot(SCREENSHOTS / "before-and-after.png")
    assert browser.log("browser") == []


def test_runs_switch_off_in_samples_and_charts(browser: Browser, page: Path) -> None:
    opened(browser, page)
    browser.click('.legend button[data-run="5"]')
    assert browser.run("return document.querySelectorAll('.shot[data-run=\"5\"]').length") == 0
    browser.wait("return document.querySelectorAll('#chart-0 .mark-symbol path').length === 5")
    browser.click('.legend button[data-run="5"]')
    browser.wait("return document.querySelectorAll('#chart-0 .mark-symbol path').length === 6")
    assert browser.run("return document.querySelectorAll('.card:first-child .shot').length") == 6


def test_hovering_shows_all_figures_and_a_click_the_sample(browser: Browser, page: Path) -> None:
    opened(browser, page)
    browser.run("document.getElementById('samples').scrollIntoView()")
    browser.run(
        "document.querySelector('.shot[data-run=\"2\"]').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))"
    )
    assert texts(browser, "#tip strong") == ["guidance, T = 0.1"]
    assert texts(browser, "#tip dt") == ["reward", "judge p(7) (held out)"]
    browser.screenshot(SCREENSHOTS / "figures-of-a-sample.png")
    browser.run("document.querySelector('.shot[data-run=\"2\"]').focus()")
    browser.press(ARROWS["enter"])
    assert browser.run("return document.getElementById('dialog').open")
    browser.press(ARROWS["right"])
    assert texts(browser, "#dialog-run") == ["tilting, T = 0.1, seed 0"]
    browser.press(ARROWS["down"])
    assert texts(browser, "#dialog-run") == ["tilting, T = 0.1, seed 1"]
    browser.screenshot(SCREENSHOTS / "a-sample.png")
    browser.press(ARROWS["escape"])
    browser.wait("return !document.getElementById('dialog').open")
    assert browser.run("return document.activeElement.dataset.run") == "2", "the focus is back where it was"


def test_scrolling_draws_the_rest(browser: Browser, page: Path) -> None:
    opened(browser, page)
    script = "document.getElementById('more').scrollIntoView(); return document.getElementById('more').hidden"
    browser.wait(script, seconds=30)
    assert browser.run("return document.querySelectorAll('.card').length") == 504
    assert browser.run("return document.images.length") == 3024
    assert browser.log("browser") == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_nothing_sticks_out_and_nobody_is_left_out(browser: Browser, page: Path, width: int, dark: bool) -> None:
    opened(browser, page, width=width, dark=dark)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == (
        "rgb(18, 20, 23)" if dark else "rgb(251, 251, 250)"
    )
    name = f"{'phone' if width < 600 else 'desktop'}-{width}-{'dark' if dark else 'light'}"
    browser.screenshot(SCREENSHOTS / f"{name}.png")
    browser.run("document.getElementById('samples').scrollIntoView()")
    browser.screenshot(SCREENSHOTS / f"{name}-samples.png")
    assert browser.faults() == []


def test_the_page_that_ends_a_demo(browser: Browser, workplace: Path) -> None:
    """Made by the demo's own recipes, trained for two steps."""
    for recipe in ("digits", "digits_clip", "digits_sample"):
        assert main(tiny(recipe)) == 0
    methods = ("best_of_n", "guidance", "tilting")
    for method in methods:
        assert main([*tiny("digits_steer", f"method={method}"), f"name={method}", f"label={method}"]) == 0
    assert main(["compare", f"runs=[digits_sample,{','.join(methods)}]", "name=comparison"]) == 0
    page = workplace / "runs" / "comparison" / "page.html"
    assert opened(browser, page) < 3
    assert texts(browser, "#count") == ["2 samples"]
    browser.click("#view-one")
    choose(browser, "run-slider", "3")
    assert texts(browser, "#count") == ["2 samples, tilting"]
    choose(browser, "search", "eight")
    choose(browser, "sort", "high")
    assert browser.run("return document.querySelectorAll('.chart svg').length") >= 2
    assert browser.faults() == []
    assert browser.log("browser") == []


def test_the_theme_can_be_chosen(browser: Browser, page: Path) -> None:
    opened(browser, page)
    ground = "return getComputedStyle(document.body).backgroundColor"
    ink = "return document.querySelector('#chart-0 .role-axis-title text').getAttribute('fill')"
    assert browser.run(ink) == "#1c1f23"
    for _ in range(2):
        browser.click("#theme")
    assert browser.run(ground) == "rgb(18, 20, 23)"
    browser.wait(f"{ink} === '#e8e9ea'")
    browser.click("#theme")
    assert browser.run(ground) == "rgb(251, 251, 250)"


def test_ticks_and_titles_of_charts_do_not_overlap(browser: Browser, page: Path) -> None:
    for width in (1280, 390):
        opened(browser, page, width=width)
        overlaps = """
            const found = [];
            for (const chart of document.querySelectorAll(".chart svg")) {
              const seen = (text) => text.textContent && +getComputedStyle(text).opacity;
              const shown = [...chart.querySelectorAll("text")].filter(seen);
              const boxes = shown.map(t => [t.textContent, t.getBoundingClientRect()]);
              const frame = chart.getBoundingClientRect();
              boxes.forEach(([a, p], i) => {
                const out = p.left < frame.left - 1 || p.right > frame.right + 1 || p.bottom > frame.bottom + 1;
                if (out) found.push([a]);
                boxes.slice(i + 1).forEach(([b, q]) => {
                  if (p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom) found.push([a, b]);
                });
              });
            }
            return found;
        """
        assert browser.run(overlaps) == []


def test_the_keyboard_reaches_everything(browser: Browser, page: Path) -> None:
    opened(browser, page)
    reachable = (
        "return [...document.querySelectorAll('button, select, input, summary, .scroll')].every(e => e.tabIndex === 0)"
    )
    assert browser.run(reachable)
    browser.press("/")
    assert browser.run("return document.activeElement.id") == "search"
    browser.run("document.activeElement.blur()")
    browser.click("details summary")
    assert browser.run("return document.querySelector('details[open] pre').innerText.includes('recipe: made')")
