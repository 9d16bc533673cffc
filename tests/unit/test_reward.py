"""The reward contract: what is accepted, what is refused and in which words, sums, loading, and the check."""

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steerfm.errors import ConfigError, RewardError, TrustError
from steerfm.reward import FunctionReward, Reward, Scores, WeightedSum, as_reward, check, load_reward, parts_of

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c", "d"]


def bright(images, prompts):
    return images.mean((1, 2, 3))


def length(images, prompts):
    return torch.tensor([float(len(prompt)) for prompt in prompts])


class Red(Reward):
    def score(self, images, prompts, **metadata):
        return images[:, 0].mean((1, 2))


class MLPScore2(Reward):
    """Holds a network, as most rewards do."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.scale = nn.Parameter(torch.ones(()))

    def score(self, images, prompts, **metadata):
        return self.scale * self.net(images).squeeze(1)


def total(reward, images: Tensor = IMAGES, prompts: list[str] = PROMPTS) -> Tensor:
    return as_reward(reward)(images, prompts).total


# The contract


def test_a_reward_gives_its_total_and_its_part():
    scores = Red()(IMAGES, PROMPTS)
    assert isinstance(scores, Scores)
    assert torch.equal(scores.total, IMAGES[:, 0].mean((1, 2)))
    assert list(scores.parts) == ["red"]
    assert torch.equal(scores.parts["red"], scores.total)


def test_names_come_from_the_class_or_function_unless_given():
    assert (Red().name, Red("mine").name, MLPScore2().name) == ("red", "mine", "mlp_score2")
    assert (as_reward(bright).name, as_reward(bright, "b").name) == ("bright", "b")
    assert as_reward(functools.partial(functools.partial(bright))).name == "bright"


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda v: v[:, None], r"must return the shape \(4,\), got \(4, 1\): add .flatten\(\)"),
        (lambda v: v.mean(), r"got \(\): give one value a picture"),
        (lambda v: v[:3], r"got \(3,\)"),
        (lambda v: v.repeat(2), r"got \(8,\)"),
        (lambda v: v.round().long(), "floating-point values, got torch.int64"),
        (lambda v: v > 0.5, "floating-point values, got torch.bool"),
        (lambda v: None, r"must return a tensor of shape \(4,\), got NoneType"),
        (lambda v: 0.5, "got float"),
        (lambda v: v.tolist()[:2], r"got \(2,\)"),
        (lambda v: torch.where(torch.arange(4) == 2, torch.nan, v), "gave nan for sample 2"),
        (lambda v: torch.where(torch.arange(4) >= 1, -torch.inf, v), "gave -inf for sample 1"),
    ],
)
def test_a_broken_result_is_refused_by_name(returned, said):
    with pytest.raises(RewardError, match=f"'broken'.*{said}"):
        total(FunctionReward(lambda images, prompts: returned(bright(images, prompts)), "broken"))


def test_a_squeezed_batch_of_one_is_explained():
    with pytest.raises(RewardError, match=r"squeeze\(\) drops a batch of one"):
        total(lambda images, prompts: bright(images, prompts)[:, None].squeeze(), IMAGES[:1], ["a"])


def test_low_precision_is_raised_and_double_kept():
    assert total(lambda images, prompts: bright(images, prompts).bfloat16()).dtype == torch.float32
    assert total(bright, IMAGES.double()).dtype == torch.float64


def test_prompts_must_be_one_a_picture():
    with pytest.raises(RewardError, match="4 pictures and 2 prompts"):
        total(bright, prompts=["a", "b"])
    with pytest.raises(RewardError, match="one string for its prompts"):
        total(bright, prompts="abcd")  # type: ignore[arg-type]


def test_points_are_scored_like_pictures():
    points = torch.randn(5, 2, requires_grad=True)
    values = total(lambda images, prompts: images @ torch.tensor([1.2, -0.8]), points, [""] * 5)
    (gradient,) = torch.autograd.grad(values.sum(), points)
    assert torch.equal(gradient, torch.tensor([1.2, -0.8]).expand(5, 2))


def test_a_reward_without_score_says_so():
    with pytest.raises(NotImplementedError, match="needs a method score"):
        Reward()(IMAGES, PROMPTS)


# Gradients and freezing


def test_what_is_declared_differentiable_must_be():
    images = IMAGES.clone().requires_grad_(True)
    with pytest.raises(RewardError, match="'detached' gave values without a gradient"):
        total(FunctionReward(lambda images, prompts: bright(images.detach(), prompts), "detached"), images)
    with torch.no_grad():
        assert not total(bright, images).requires_grad
    black_box = FunctionReward(lambda images, prompts: bright(images, prompts).tolist(), differentiable=False)
    assert not total(black_box, images).requires_grad


def test_parameters_are_frozen_and_gradients_reach_the_pictures():
    reward = MLPScore2().train()
    assert not any(module.training for module in reward.modules())
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    images = IMAGES.clone().requires_grad_(True)
    reward(images, PROMPTS).total.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert torch.equal(total(reward), total(reward))  # no dropout


def test_a_wrapped_module_is_frozen_too():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Flatten(0)).train()
    reward = as_reward(net)
    assert reward.name == "sequential"
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert total(reward).shape == (4,)


def test_a_reward_can_ask_to_stay_trainable_in_a_sum_too():
    class Learning(MLPScore2):
        frozen = False

    reward = Learning()
    both = reward + MLPScore2()
    both.train()
    assert [part.training for part in parts_of(both)] == [True, False]
    assert [all(p.requires_grad for p in part.parameters()) for part in parts_of(both)] == [True, False]


# Sums and scales


def test_sums_weigh_the_total_and_keep_the_parts_unweighted():
    scores = (1.0 * Red() + 0.25 * as_reward(length))(IMAGES, ["a", "bb", "ccc", "dddd"])
    red, count = IMAGES[:, 0].mean((1, 2)), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.allclose(scores.total, red + 0.25 * count)
    assert torch.equal(scores.parts["red"], red)
    assert torch.equal(scores.parts["length"], count)


def test_sums_of_sums_are_flat():
    reward = 2 * (Red("a") - 0.5 * (Red("b") + -Red("c"))) * 3
    assert [part.name for part in parts_of(reward)] == ["a", "b", "c"]
    assert reward.weights == (6.0, -3.0, 3.0)
    assert torch.allclose(total(reward), 6 * total(Red()))


def test_sums_take_plain_callables_from_either_side_and_builtin_sum():
    assert torch.equal(total(Red() + bright), total(bright + Red()))
    assert torch.equal(total(sum([Red("a"), Red("b")])), 2 * total(Red()))


def test_one_reward_twice_is_one_part_with_both_weights():
    red = Red()
    reward = red + 0.5 * red
    assert isinstance(reward, WeightedSum)
    assert (reward.names, reward.weights) == (["red"], (1.5,))


def test_two_rewards_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="Two rewards of a sum are called 'red': give one of them another name="):
        WeightedSum([(1.0, Red()), (2.0, Red())])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), True, "2"])
def test_a_weight_is_a_finite_number(weight):
    with pytest.raises((ConfigError, TypeError)):
        WeightedSum([(weight, Red())])


def test_an_empty_sum_is_refused():
    with pytest.raises(ConfigError, match="at least one"):
        WeightedSum([])


def test_a_sum_is_differentiable_if_every_part_that_counts_is():
    black_box = FunctionReward(length, differentiable=False)
    assert not (Red() + black_box).differentiable
    watched = Red() + 0.0 * black_box
    assert watched.differentiable
    images = IMAGES.clone().requires_grad_(True)
    assert watched(images, PROMPTS).total.requires_grad


def test_a_sum_names_the_part_that_broke():
    broken = FunctionReward(lambda images, prompts: bright(images, prompts) / 0.0 - torch.inf, "broken")
    with pytest.raises(RewardError, match="'broken' gave nan for sample 0"):
        total(Red() + 0.1 * broken)


def test_a_sum_that_overflows_is_named():
    big = FunctionReward(lambda images, prompts: bright(images, prompts) * 0 + 3e38, "big")
    with pytest.raises(RewardError, match=r"'10 \* big' gave inf"):
        total(10 * big)


# Callables of every signature


def swapped(prompts, images):
    return bright(images, prompts)


def alone(images):
    return bright(images, None)


def other_words(pictures, texts):
    assert texts == PROMPTS
    return bright(pictures, texts)


def keywords(*, prompts, images):
    return bright(images, prompts)


def anything(*inputs, **more):
    images, prompts = inputs
    assert prompts == PROMPTS
    return bright(images, prompts)


def default_stays(x, power=1.0):
    return bright(x, None) ** power


class Called:
    def __call__(self, images, prompts):
        return bright(images, prompts)


class Module(nn.Module):
    def forward(self, images):
        return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    "function",
    [bright, swapped, alone, other_words, keywords, anything, default_stays, Called(), Module(), Called().__call__],
)
def test_a_callable_is_given_what_it_takes(function):
    reward = as_reward(function)
    values = reward(IMAGES, PROMPTS, seeds=[1, 2, 3, 4]).total  # metadata that none of these knows
    assert torch.equal(values, IMAGES.mean((1, 2, 3)))


def test_metadata_go_to_those_who_take_them():
    def with_answer(images, prompts, answer, weight=2.0):
        return torch.tensor(answer) * weight

    def with_all(images, prompts, **metadata):
        return torch.tensor(metadata["answer"])

    answer = [1.0, 2.0, 3.0, 4.0]
    reward = as_reward(with_answer) + as_reward(with_all) + as_reward(alone)
    parts = reward(IMAGES, PROMPTS, answer=answer, other=3).parts
    assert parts["with_answer"].tolist() == [2.0, 4.0, 6.0, 8.0]
    assert parts["with_all"].tolist() == answer
    with pytest.raises(RewardError, match="'with_answer' needs 'answer' beside pictures and prompts"):
        reward(IMAGES, PROMPTS)


def test_lists_and_arrays_are_made_tensors():
    assert torch.equal(total(lambda images, prompts: [1, 2, 3, 4]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(total(lambda images, prompts: np.arange(4)), torch.arange(4.0))


@pytest.mark.parametrize("function", [lambda: 0, lambda prompts: 0, lambda *, prompts: 0])
def test_a_callable_without_pictures_is_refused(function):
    with pytest.raises(ConfigError, match="takes no pictures"):
        as_reward(function)


@pytest.mark.parametrize(("thing", "fix"), [(Red, r"write Red\(...\)"), (0.5, "pass a function"), ("red", "pass a")])
def test_what_cannot_be_called_is_refused(thing, fix):
    with pytest.raises(ConfigError, match=fix):
        as_reward(thing)


# Loading


@pytest.fixture
def own_module(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that writes a module into the current directory, which is not on the path."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(workplace))])
    before = set(sys.modules)

    def write(name: str, source: str) -> None:
        (workplace / f"{name}.py").write_text(source, encoding="utf-8")

    yield write
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(workplace) in str(sys.modules[name].__file__):
            del sys.modules[name]


SOURCE = """
from steerfm.reward import Reward
def redness(images, prompts):
    return images[:, 0].mean((1, 2))
class Red(Reward):
    def score(self, images, prompts, **metadata):
        return images[:, 0].mean((1, 2))
class Needy(Reward):
    def __init__(self, weights):
        super().__init__()
made = Red("made")
number = 3
"""


def test_module_and_function_are_found_in_the_current_directory(own_module):
    own_module("my_own_rewards", SOURCE)
    for spec, name in [("redness", "redness"), ("Red", "red"), ("made", "made")]:
        reward = load_reward(f"my_own_rewards:{spec}")
        assert reward.name == name
        assert torch.equal(total(reward), IMAGES[:, 0].mean((1, 2)))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("my_own_rewards:rednes", "'my_own_rewards' has no 'rednes'; did you mean 'redness'"),
        ("my_own_rewards:Needy", "cannot be made without arguments.*weights"),
        ("my_own_rewards:number", "A reward is a callable, got 3"),
        ("no_such_rewards:f", "No module 'no_such_rewards' in .* or among the installed packages"),
        ("lacking:f", "'lacking' imports 'no_such_package', which is not installed"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(own_module, spec, said):
    own_module("my_own_rewards", SOURCE)
    own_module("lacking", "import no_such_package")
    with pytest.raises(ConfigError, match=said) as caught:
        load_reward(spec)
    assert "\n" not in str(caught.value)


def test_a_dotted_path_follows_the_trust_rule(own_module):
    assert load_reward("steerfm.rewards.simple.Brightness").name == "brightness"
    own_module("my_own_rewards", SOURCE + "\nopen('ran', 'w').close()")
    with pytest.raises(TrustError, match="--trust my_own_rewards"):
        load_reward("my_own_rewards.redness")
    with pytest.raises(TrustError):
        load_reward("os.system")
    assert not Path("ran").exists()


def test_our_own_folder_is_not_loaded_a_second_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigError, match=r"write steerfm\.rewards"):
        load_reward("rewards.simple:Brightness")


# The check


def in_place(images, prompts):
    return images.mul_(0.5).mean((1, 2, 3))


def batch_normalised(images, prompts):
    values = images.mean((1, 2, 3))
    return values - values.mean()


def by_place(images, prompts):
    return images.mean((1, 2, 3)) + torch.arange(len(images))


def random(images, prompts):
    return images.mean((1, 2, 3)) + torch.rand(len(images))


def squeezing(images, prompts):
    return images.mean((2, 3))[:, :1].squeeze()


def detached(images, prompts):
    return images.detach().mean((1, 2, 3))


def rounded(images, prompts):
    return (images * 255).round().mean((1, 2, 3))


def numpyed(images, prompts):
    return torch.from_numpy(images.numpy().mean((1, 2, 3)))


def infinite_slope(images, prompts):
    return (images.mean((1, 2, 3)) - images.mean((1, 2, 3))).sqrt() + images.mean((1, 2, 3))


def other_gradient(images, prompts):
    """Depend on the neighbours by the gradient alone."""
    values = images.mean((1, 2, 3))
    return values + (values.mean() - values.mean().detach())


def constant_parameter(images, prompts):
    return torch.ones(len(images), requires_grad=True) * len(images)


def declares(**declared):
    """Return a decorator that gives a function attributes."""

    def give(function):
        for name, value in declared.items():
            setattr(function, name, value)
        return function

    return give


def wrong_slope(images, prompts):
    """Give a gradient that is half too large."""
    values = images.mean((1, 2, 3))
    return values + 0.5 * (values - values.detach())


@declares(native_range=(0.0, 1.0))
def beyond(images, prompts):
    return 2 * images.mean((1, 2, 3)) + 0.5


@declares(needs_prompt=True)
def deaf(images, prompts):
    return images.mean((1, 2, 3))


def in_fours(images, prompts):
    """Score no more than four pictures rightly."""
    values = images.mean((1, 2, 3))
    return torch.cat([values[:4], values[4:] * 0.5])


def by_spread(images, prompts):
    """Divide by the spread of the pixels, which a flat picture lacks."""
    centred = images - images.mean((1, 2, 3), keepdim=True)
    return centred[:, 0].mean((1, 2)) / centred.square().mean((1, 2, 3)).sqrt()


@declares(abstains=True)
def at_random_silent(images, prompts):
    return torch.where(torch.rand(len(images)) > 0.5, torch.nan, images.mean((1, 2, 3)))


GALLERY = [
    (lambda images, prompts: images.mean((2, 3)), {"contract"}, "got (4, 3)"),
    (lambda images, prompts: images.mean((1, 2, 3)).long(), {"contract"}, "floating-point"),
    (lambda images, prompts: images.mean((1, 2, 3)) * torch.nan, {"contract"}, "gave nan for sample 0"),
    (lambda images, prompts: images[:, 7], {"contract"}, "fails with IndexError"),
    (in_place, {"in place"}, "images.clone()"),
    (batch_normalised, {"neighbours", "gradient leak"}, "alone"),
    (by_place, {"neighbours", "order", "larger batch"}, "another order"),
    (random, {"repeatable", "neighbours", "order", "larger batch"}, "it is random"),
    (squeezing, {"batch of one"}, "squeeze(1)"),
    (detached, {"gradient"}, "detaches or rounds"),
    (rounded, {"gradient"}, "zero everywhere"),
    (numpyed, {"gradient"}, "requires grad"),
    (infinite_slope, {"gradient"}, "not finite"),
    (other_gradient, {"gradient leak"}, "within its sample"),
    (wrong_slope, {"finite difference"}, "its values do not follow"),
    (beyond, {"range"}, "declares the range [0, 1] and gives sample 0"),
    (deaf, {"prompts"}, "declares needs_prompt and gives the same scores"),
    (in_fours, {"larger batch"}, "in a batch of 4 and"),
    (by_spread, {"flat pictures"}, "black pictures"),
    (constant_parameter, {"neighbours", "larger batch", "gradient"}, "none that reaches its pictures"),
]


@pytest.mark.parametrize(("function", "subjects", "said"), GALLERY, ids=lambda value: getattr(value, "__name__", ""))
def test_the_check_names_what_is_wrong(function, subjects, said):
    images = IMAGES.clone()
    faults = [finding for finding in check(FunctionReward(function, "broken"), images, PROMPTS) if finding.fault]
    assert {finding.subject for finding in faults} == subjects
    assert {finding.part for finding in faults} == {"broken"}
    assert any(said in finding.message for finding in faults), faults


def test_silence_by_chance_is_found_and_silence_by_rule_is_not():
    (repeatable,) = (f for f in check(at_random_silent, IMAGES, PROMPTS) if f.subject == "repeatable")
    assert "nan" in repeatable.message
    dark = declares(abstains=True)(lambda images: torch.where((x := images.mean((1, 2, 3))) < 0.5, torch.nan, x))
    assert 0 < int(total(dark).eq(0).sum()) < 4
    assert not any(finding.fault for finding in check(dark, IMAGES, PROMPTS))


def test_a_sound_reward_has_no_findings():
    def sound(images, prompts):
        return images.mean((1, 2, 3)) * torch.tensor([float(len(prompt)) for prompt in prompts])

    assert check(sound, IMAGES, PROMPTS) == []
    assert check(MLPScore2(), IMAGES, PROMPTS)[0].message == "does not look at the prompts."


def test_remarks_are_no_faults():
    findings = check(bright, IMAGES, PROMPTS) + check(FunctionReward(bright, differentiable=False), IMAGES, PROMPTS)
    assert [(finding.subject, finding.fault) for finding in findings] == [
        ("prompts", False),
        ("gradient", False),
        ("prompts", False),
    ]
    constant = FunctionReward(lambda images, prompts: images.sum((1, 2, 3)) * 0 + 1, differentiable=False)
    assert "spread" in {finding.subject for finding in check(constant, IMAGES, PROMPTS)}


def test_a_gradient_missing_at_one_sample_is_a_remark():
    images = IMAGES.clone()
    images[2] = 1.0
    findings = check(lambda images, prompts: images.clamp(max=0.99).mean((1, 2, 3)), images, PROMPTS)
    assert ["at sample 2" in finding.message for finding in findings if finding.subject == "gradient"] == [True]
    assert not any(finding.fault for finding in findings)


def test_every_part_of_a_sum_is_checked():
    findings = check(Red() + 0.1 * FunctionReward(rounded, "rounded"), IMAGES, PROMPTS)
    assert [finding.part for finding in findings if finding.fault] == ["rounded"]


def test_the_check_leaves_the_pictures_as_they_were():
    images = IMAGES.clone()
    check(in_place, images, PROMPTS)
    assert torch.equal(images, IMAGES)
