"""Samples that are written batch by batch: the same run folder as without, and nothing drawn twice."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainers import digit_map

from steerfm import records
from steerfm.cli import main
from steerfm.commands.sample_parts import SampleParts
from steerfm.errors import RunError
from steerfm.reward import as_reward
from steerfm.steering import FlowMapTilting, Watch
from steerfm.types import Samples

REWARDS = """\
from pathlib import Path

def impatient(images, prompts):
    with open("calls", "a") as stream:
        stream.write("x")
    if len(list(Path("runs/stopped/parts").glob("*"))) == 2 and not Path("stopped").exists():
        Path("stopped").touch()
        raise KeyboardInterrupt
    return images.mean((1, 2, 3))
"""


def drawn(seeds: Sequence[int]) -> Samples:
    method, reward = FlowMapTilting(4, 2, temperature=0.1), as_reward(lambda images: images.mean((1, 2, 3)))
    prompts = ["", "eight"][: len(seeds)]
    out = method(digit_map().double(), reward, prompts=prompts, seeds=seeds, watch=Watch(look_aheads=True))
    return replace(out, held_out={"other": torch.tensor(seeds) / 10}, rewards_unclamped=out.rewards, note="nominal")


def lines(batches: list[Samples]) -> str:
    held_out = {"other": torch.cat([batch.held_out["other"] for batch in batches])}
    unclamped = [batch.rewards_unclamped for batch in batches]
    return records.lines(batches, held_out, torch.cat([values for values in unclamped if values is not None]))


def test_what_is_read_makes_the_same_folder(tmp_path: Path) -> None:
    """Written out of order, and one of them twice: lines, pictures, states, look-aheads and note are the batches'."""
    batches, parts = [drawn([5, 6]), drawn([7])], SampleParts(tmp_path / "parts")
    parts.write(batches[1], [2])
    parts.write(batches[0], [0, 1])
    parts.write(batches[0], [0, 3])  # from before the run went on with other batches
    assert parts.done() == {0, 1, 2, 3}
    joined = parts.joined(3)
    assert lines(joined) == lines(batches)
    assert list(records.pictures(joined)) == list(records.pictures(batches))
    assert torch.equal(torch.cat([each.x0 for each in joined]), torch.cat([each.x0 for each in batches]))
    assert torch.equal(joined[0].trace["look_ahead"], batches[0].trace["look_ahead"])
    assert {each.note for each in joined} == {"nominal"}


def test_missing_and_damaged_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = SampleParts(tmp_path)
    parts.write(drawn([5]), [0])
    with pytest.raises(RunError, match=r"samples of 2 of 3 pairs are not in .*one folder that all of them see"):
        parts.joined(3)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"half of it")
    assert parts.done() == set()
    assert "is damaged" in caplog.text


def test_a_stopped_run_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("tempers_of_parts.py").write_text(REWARDS)
    digit_map().save("map")

    def steer(name: str) -> int:
        values = ["recipe=digits_steer", "map=map", "method=best_of_n", "method.n=2", "seeds=5", "data.batch_size=1"]
        more = ["reference=null", "held_out={}", "trainer.enable_progress_bar=false", f"name={name}"]
        return main(["steer", "reward=tempers_of_parts:impatient", *values, *more])

    assert steer("stopped") == 130
    assert len(list(Path("runs/stopped/parts").iterdir())) == 2
    before = len(Path("calls").read_text())
    assert steer("stopped") == 0
    spent = len(Path("calls").read_text()) - before
    Path("calls").write_text("calls so far")
    assert steer("whole") == 0
    assert spent * 5 == (len(Path("calls").read_text()) - len("calls so far")) * 3  # three of five were left
    assert not Path("runs/stopped/parts").exists()
    texts = [Path("runs", name, "samples.jsonl").read_text() for name in ("stopped", "whole")]
    rows = [[json.loads(line) for line in text.splitlines()] for text in texts]
    for row in rows[0] + rows[1]:
        row["cost"].pop("seconds")
    assert rows[0] == rows[1]
    for file in sorted(Path("runs/whole/images").iterdir()):
        assert file.read_bytes() == Path("runs/stopped/images", file.name).read_bytes()
