"""Keys and tokens in the environment: whatever is run, none comes out in a file, a page, a log or an error."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from served import served
from tiny_recipes import tiny

from steerfm.cli import main
from steerfm.rewards.simple import Brightness

SECRETS = {
    "WANDB_API_KEY": "canary0canary0canary0canary0canary0wandb",
    "STEERFM_REWARD_TOKEN": "canary-reward-token",
    "STEERFM_JUDGE_TOKEN": "canary-judge-token",
    "HF_TOKEN": "hf_canaryHuggingFace",
    "AWS_SECRET_ACCESS_KEY": "canary-of-a-cloud",
}


def test_no_secret_is_written_or_said(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    logged = ["logger=wandb", "logger.mode=offline", "trainer.log_every_n_steps=1"]
    remote = ["reward.reward=brightness", "reward.tries=1", "reward.pictures=png"]
    with caplog.at_level(logging.DEBUG, logger="steerfm"):
        with served(Brightness(), token=SECRETS["STEERFM_REWARD_TOKEN"]) as address:
            assert main([*tiny("digits"), "name=base", *logged]) == 0
            steered = [*tiny("digits_sample", "reward=remote"), "map=runs/base", *remote, f"reward.address={address}"]
            assert main([*steered, "name=steered", "logger=wandb", "logger.mode=offline"]) == 0
            assert main([*steered, "name=wrong", "reward.reward=nothing"]) != 0
            monkeypatch.setenv("STEERFM_REWARD_TOKEN", SECRETS["STEERFM_JUDGE_TOKEN"])
            assert main([*steered, "name=refused"]) != 0
        assert main([*steered, "name=down"]) != 0
        assert main(["compare", "runs=[steered]", "name=compared", "report=html"]) == 0
        assert main(["env"]) == 0
    said = capfd.readouterr()
    texts = {"what was printed": said.out + said.err, "what was logged": caplog.text}
    texts |= {str(path): path.read_bytes().decode("latin-1") for path in workplace.rglob("*") if path.is_file()}
    assert any("wandb" in name for name in texts)
    assert any(name.endswith("page.html") for name in texts)
    found = {(name, secret) for name, text in texts.items() for secret in SECRETS.values() if secret in text}
    assert not found
    assert "STEERFM_REWARD_TOKEN" in (workplace / "runs" / "steered" / "config.yaml").read_text()  # by name alone
