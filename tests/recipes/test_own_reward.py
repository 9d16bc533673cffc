"""A reward of five lines in a user's folder: it steers, fine-tunes and is compared."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_recipes import tiny

from steerfm.cli import main

FIVE_LINES = """
def lightness_above(images, prompts):
    upper, lower = images.chunk(2, dim=2)
    return upper.mean((1, 2, 3)) - lower.mean((1, 2, 3))
"""


def rewards(run: Path) -> list[float]:
    return [json.loads(line)["reward"] for line in (run / "samples.jsonl").read_text().splitlines()]


def test_five_lines_steer_fine_tune_and_are_compared(here: Path):
    (here / "own_lightness.py").write_text(FIVE_LINES)
    own = "reward=own_lightness:lightness_above"
    assert main(tiny("digits_finetune", own, "name=five_tuned")) == 0
    tuned = here / "runs" / "five_tuned"
    assert "reward" in json.loads((tuned / "metrics.json").read_text())
    for name, map_of in (("five_steered", "digits"), ("five_both", "five_tuned")):
        assert main([*tiny("digits_steer", own, f"name={name}"), f"map=runs/{map_of}"]) == 0
        assert all(-1 <= value <= 1 for value in rewards(here / "runs" / name))
    best = tiny("digits_steer", own, "method=best_of_n", "method.n=64", "name=five_best")
    assert main([text for text in best if not text.startswith("method.jumps")]) == 0
    plain = tiny("digits_sample", own, "name=five_plain")
    assert main(plain) == 0
    assert sum(rewards(here / "runs" / "five_best")) > sum(rewards(here / "runs" / "five_plain"))
    assert main(["compare", "runs=[five_plain,five_steered,five_both,five_best]", "name=five_compared"]) == 0
    page = (here / "runs" / "five_compared" / "page.html").read_text()
    assert "lightness_above" in page
