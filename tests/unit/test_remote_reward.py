"""A reward that a server scores, over real sockets: what it gives is what the reward gives here."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from served import served
from tiny_service import Asked, Told, service
from torch import Tensor

from steerfm import MLP, FlowMap, SteeredSampling
from steerfm.commands.reward import tinted_digits
from steerfm.errors import ConfigError, RewardError
from steerfm.images import to_uint8
from steerfm.reward import Reward, Scores, as_reward, check, parts_of
from steerfm.reward_algebra import Clipped, Ensemble, MemorySaving
from steerfm.rewards.remote import Remote
from steerfm.rewards.simple import Brightness, Contrast, JPEGSize, Redness, Sharpness

PICTURES, PROMPTS = tinted_digits(5)


class Picky(Reward):
    """Score the mean, and nothing of prompts that start with "no"."""

    abstains = True

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        silent = torch.tensor([prompt.startswith("no") for prompt in prompts])
        return torch.where(silent, torch.nan, images.square().mean((1, 2, 3)))


class Wordy(Reward):
    """Score the mean times the length of the prompt."""

    needs_prompt = True
    native_range = (0.0, float("inf"))

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        return images.mean((1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in prompts])


class Loss(Reward):
    """Score the mean, of which less is better."""

    higher_is_better = False

    def score(self, images: Tensor, prompts: Sequence[str], **metadata: Any) -> Tensor:
        return images.square().mean((1, 2, 3))


LOCAL: dict[str, Reward] = {
    each.name: each
    for each in (
        Brightness(),
        Picky(),
        Wordy(),
        Loss(),
        JPEGSize(),
        0.5 * Brightness() + 2.0 * Redness() - Contrast(),
        1.0 * Picky(name="quiet") + 0.5 * Picky(name="silent"),
        Ensemble([Brightness(), Contrast()]),
        Clipped(Sharpness(), high=0.01),
        MemorySaving(Contrast(), micro_batch=2, recompute=False),
    )
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(*LOCAL.values()) as found:
        yield found


def scored(reward: Reward, images: Tensor, prompts: list[str]) -> tuple[Scores, Tensor | None]:
    """Return the scores, and the gradient of their sum where there is one."""
    leaf = images.clone().requires_grad_(reward.differentiable)
    scores = reward(leaf, prompts)
    gradient = torch.autograd.grad(scores.total.sum(), leaf)[0] if reward.differentiable else None
    return scores, gradient


SUM = next(name for name in LOCAL if "redness" in name)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in LOCAL), *((SUM, dtype) for dtype in (torch.float64, torch.float16))],
)
def test_served_is_local_to_the_last_bit(name: str, dtype: torch.dtype, address: str):
    images, prompts = PICTURES.to(dtype), ["no " + PROMPTS[0], *PROMPTS[1:]]
    (here, gradient), (there, sent) = (
        scored(r, images, prompts) for r in (LOCAL[name], Remote(address, name, batch_size=5))
    )
    assert here.total.dtype == there.total.dtype
    assert torch.equal(here.total, there.total)
    assert here.parts.keys() == there.parts.keys()
    assert all(torch.equal(here.parts[n].nan_to_num(-9.0), there.parts[n].nan_to_num(-9.0)) for n in here.parts)
    assert (gradient is None and sent is None) or torch.equal(gradient, sent)  # type: ignore[arg-type]


def test_batches_and_weights_change_rounding_alone(address: str):
    """A backward pass multiplies here what was differentiated there, so the last bit may differ: 1e-6 of it."""
    weights = torch.tensor([0.3, -1.7, 2.0, 0.1, 5.0])
    found = []
    for reward in (Contrast(), Remote(address, "contrast", batch_size=2)):
        leaf = PICTURES.clone().requires_grad_()
        (reward(leaf, PROMPTS).total * weights).sum().backward()
        found.append(leaf.grad)
    assert torch.allclose(found[0], found[1], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", LOCAL)
def test_what_is_declared_is_declared_here(name: str, address: str):
    local, remote = LOCAL[name], Remote(address, name)
    for attribute in ("name", "differentiable", "higher_is_better", "needs_prompt", "native_range"):
        assert getattr(remote, attribute) == getattr(local, attribute)
    assert [part.name for part in parts_of(remote)] == [part.name for part in parts_of(local)]
    assert remote.abstains == any(part.abstains for part in parts_of(local))


@pytest.mark.parametrize("name", ["picky", "jpeg_size", "contrast"])
def test_the_check_finds_what_it_finds_here(name: str, address: str):
    remote = check(Remote(address, name), PICTURES, PROMPTS)
    assert [(f.part, f.subject, f.fault) for f in remote] == [
        (f.part, f.subject, f.fault) for f in check(LOCAL[name], PICTURES, PROMPTS)
    ]
    assert not any(finding.fault for finding in remote)


def test_it_is_a_reward_like_any_other(address: str):
    there = Remote(address, "brightness")
    total = (0.5 * there + Redness())(PICTURES, PROMPTS)
    assert torch.equal(total.total, (0.5 * Brightness() + Redness())(PICTURES, PROMPTS).total)
    with pytest.raises(ConfigError, match="Two rewards of a sum are called 'brightness'"):
        _ = there + Brightness()
    named = Remote(address, "brightness", name="elsewhere")(PICTURES, PROMPTS)
    assert list(named.parts) == ["elsewhere"]


def test_a_part_of_a_sum_can_be_had_alone(address: str):
    assert torch.equal(Remote(address, SUM, "redness")(PICTURES, PROMPTS).total, Redness()(PICTURES, PROMPTS).total)
    with pytest.raises(RewardError, match=r"has no 'rednes'; did you mean 'redness'\? It has: brightness, redness"):
        Remote(address, SUM, "rednes")


def test_rounded_pictures_are_scored_without_a_gradient(address: str):
    remote = Remote(address, "brightness", pictures="png")
    leaf = PICTURES.clone().requires_grad_()
    rounded = torch.from_numpy(to_uint8(PICTURES)).permute(0, 3, 1, 2).float() / 255
    total = remote(leaf, PROMPTS).total
    assert not remote.differentiable
    assert not total.requires_grad
    assert torch.allclose(total, Brightness()(rounded, PROMPTS).total, rtol=1e-6)
    grey = PICTURES[:, :1]
    assert torch.allclose(remote(grey, PROMPTS).total, Brightness()(grey, PROMPTS).total, atol=0.5 / 255)
    assert torch.isnan(Remote(address, "picky", pictures="png")(PICTURES, ["no"] * 5).parts["picky"]).all()


def test_a_copy_asks_the_same_server(address: str):
    remote = Remote(address, "brightness")
    for copied in (copy.deepcopy(remote), pickle.loads(pickle.dumps(remote))):  # noqa: S301, TID251
        assert torch.equal(copied(PICTURES, PROMPTS).total, remote(PICTURES, PROMPTS).total)
    assert remote.state_dict() == {}


def test_what_the_reward_refuses_is_told_in_its_own_words(address: str):
    with pytest.raises(RewardError, match=r"/score answers with status 422 \('redness' needs pictures of 3 channels"):
        Remote(address, SUM)(PICTURES[:, :1], PROMPTS)
    with pytest.raises(RewardError, match="that of sample 1 is empty"):
        Remote(address, "wordy")(PICTURES[:2], ["a", " "])
    with pytest.raises(RewardError, match=r"status 422 \(Pixels lie in \[0, 1\], got values in"):
        Remote(address, "brightness")(PICTURES * 2 - 1, PROMPTS)
    with pytest.raises(RewardError, match=r"is sent pictures \(B, C, H, W\), B > 0, got the shape \(5, 2\)"):
        Remote(address, "brightness")(torch.zeros(5, 2), PROMPTS)


def test_what_is_not_there_is_said_when_it_is_made(address: str):
    with pytest.raises(RewardError, match=f"{address} has no 'brightnes'; did you mean 'brightness'"):
        Remote(address, "brightnes")
    with pytest.raises(
        RewardError, match=r"http://127.0.0.1:1/rewards gave no answer in 1 try .*: start it or correct"
    ):
        Remote("http://127.0.0.1:1", "brightness", tries=1)
    with pytest.raises(RewardError, match="'exact' or 'png', got 0 and 'exact'"):
        Remote(address, "brightness", batch_size=0)


def test_a_server_that_dies_is_an_error_after_the_tries():
    with served(Brightness()) as there:
        remote = Remote(there, "brightness", tries=2)
        remote(PICTURES, PROMPTS)
    with pytest.raises(RewardError, match=f"{there}/score gave no answer in 2 tries"):
        remote(PICTURES, PROMPTS)


def test_a_token_is_passed_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STEERFM_REWARD_TOKEN", "right")
    with served(Brightness(), token="right") as there:
        assert torch.equal(Remote(there, "brightness")(PICTURES, PROMPTS).total, PICTURES.mean((1, 2, 3)))
        monkeypatch.setenv("STEERFM_REWARD_TOKEN", "wrong")
        with pytest.raises(RewardError, match=r"status 401 .*the right token into .* STEERFM_REWARD_TOKEN"):
            Remote(there, "brightness")


LISTED = b'{"rewards": [{"name": "b", "differentiable": true, "needs_prompt": false}]}'


@pytest.mark.parametrize(
    ("listed", "answer", "said"),
    [
        (b"[]", b"", "no sound list of rewards: A JSON object was expected, got list"),
        (b'{"rewards": [{"name": "b"}]}', b"", "'differentiable' of the reward 'b' is true or false, got None"),
        (LISTED, b'{"total": [1, 2], "parts": {"b": [1]}}', r"'b' must return the shape \(1,\), got \(2,\)"),
        (LISTED, b'{"total": [null], "parts": {"b": [1]}}', "'b' gave nan for sample 0"),
        (LISTED, b'{"total": [1e999], "parts": {"b": [1]}}', "'b' gave inf for sample 0"),
        (LISTED, b'{"total": [true], "parts": {"b": [1]}}', "Scores are lists of numbers"),
        (LISTED, b'{"total": [1], "parts": {}}', "The parts of 'b' are its values alone, got 0"),
        (LISTED, b'{"total": [1]', "no sound scores: This is no JSON"),
    ],
)
def test_nonsense_of_a_server_is_an_error_that_names_it(listed: bytes, answer: bytes, said: str):
    def answering(asked: Asked) -> Told:
        return Told(body=listed if asked.path == "/rewards" else answer)

    with service(answering) as there, pytest.raises(RewardError, match=f"The server at {there.address} .*{said}"):
        Remote(there.address, "b", pictures="png")(PICTURES[:1], PROMPTS[:1])


def test_a_recipe_names_it(address: str, workplace: Path):
    from steerfm import config

    lines = ["recipe=shapes_sample", "reward=remote", f"reward.address={address}", "reward.reward=brightness"]
    reward = as_reward(config.compose("sample", lines).build("reward"))
    assert torch.equal(reward(PICTURES, PROMPTS).total, Brightness()(PICTURES, PROMPTS).total)


def test_samples_that_leave_the_range_are_scored_as_they_are_seen(address: str):
    flow_map = FlowMap(MLP((3, 8, 8), width=8, depth=1))  # its samples are noise, and reach beyond [0, 1]
    batch = {"prompt": PROMPTS[:2], "seed": [0, 1]}
    near = SteeredSampling(flow_map, reward=Brightness()).predict_step(batch)
    assert near.rewards_unclamped is not None
    far = SteeredSampling(flow_map, reward=Remote(address, "brightness")).predict_step(batch)
    torch.testing.assert_close(far.rewards, near.rewards)
    mixed = SteeredSampling(flow_map, reward=Remote(address, "brightness") + Redness()).predict_step(batch)
    assert far.rewards_unclamped is None and mixed.rewards_unclamped is None
