"""A sweep whose points are jobs of submitit's, on this machine; SLURM is the same with another cluster's name."""

import json
from pathlib import Path

import pytest
from tiny_recipes import tiny

from steerfm.cli import main


@pytest.mark.slow
def test_every_point_of_a_sweep_is_a_job(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*tiny("digits_steer", "method=best_of_n", "method.n=1,2"), "name=jobs", "-m", "launcher=local"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "runs jobs/n-1:" in said and "Saved runs/jobs/n-2" in said
    for n in (1, 2):
        first = (here / "runs" / "jobs" / f"n-{n}" / "samples.jsonl").read_text().splitlines()[0]
        assert json.loads(first)["cost"]["reward_calls"] == n
    assert "launcher" not in (here / "runs" / "jobs" / "n-1" / "config.yaml").read_text()


@pytest.mark.slow
def test_a_job_that_fails_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*tiny("digits_steer", "method=best_of_n", "map=nowhere"), "name=bad", "launcher=local"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "which ran bad, failed (Nothing found at nowhere" in error and "goes on with what is not finished" in error
    assert "Traceback" not in error
    wrong = [
        *tiny("digits_steer", "method=best_of_n"),
        "name=wrong",
        "launcher=local",
        "launcher.parameters.timeout_min=x",
    ]
    assert main([*wrong, "launcher.cluster=moon"]) == 2
    assert "one of slurm, local, debug; got 'moon'" in capsys.readouterr().err
