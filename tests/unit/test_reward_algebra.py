"""What is made of rewards, by values worked out by hand: declared attributes, clips, norms, ensembles, less memory."""

import math

import pytest
import torch
from torch import Tensor, nn

from steerfm.errors import ConfigError, RewardError
from steerfm.reward import FunctionReward, Reward, as_reward, parts_of
from steerfm.reward_algebra import Ensemble, MemorySaving, Normalised

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c", "d", "e"]


class Given(Reward):
    """Give fixed values, with a gradient of one in the mean of each picture; NaN where it has no opinion."""

    abstains = True

    def __init__(self, values: list[float], name: str) -> None:
        super().__init__(name)
        self.values = torch.tensor(values)

    def score(self, images, prompts, **metadata):
        mean = images.mean((1, 2, 3))
        return self.values + mean - mean.detach()


class Distance(Reward):
    """Less is better."""

    higher_is_better = False

    def score(self, images, prompts, **metadata):
        return images.mean((1, 2, 3))


class Network(Reward):
    def __init__(self, name: str | None = None):
        super().__init__(name)
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.GELU(), nn.Linear(64, 64), nn.Tanh())
        self.last = nn.Linear(64, 1)
        self.sizes: list[int] = []

    def score(self, images, prompts, **metadata):
        self.sizes.append(len(images))
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return self.last(self.net(images)).squeeze(1) * lengths + metadata.get("offset", torch.zeros(len(images)))


def gradient(
    reward: Reward, images: Tensor = IMAGES, prompts: list[str] = PROMPTS, **metadata
) -> tuple[Tensor, Tensor]:
    """Return the totals and each sample's gradient with respect to the mean of its picture."""
    leaf = images.clone().requires_grad_(True)
    total = reward(leaf, prompts, **metadata).total
    return total.detach(), torch.autograd.grad(total.sum(), leaf)[0]


def slope(reward: Reward) -> list[float]:
    return gradient(reward)[1].sum((1, 2, 3)).tolist()


NAN = math.nan


# What a reward declares


def test_less_is_better_counts_negative_and_is_logged_as_it_is():
    distance = Distance()
    scores = (2.0 * distance)(IMAGES, PROMPTS)
    assert torch.equal(scores.total, -2 * IMAGES.mean((1, 2, 3)))
    assert torch.equal(scores.parts["distance"], IMAGES.mean((1, 2, 3)))


def test_an_empty_prompt_is_refused_where_one_is_needed():
    reward = FunctionReward(lambda images, prompts: images.mean((1, 2, 3)), "judge")
    reward.needs_prompt = True
    both = reward.clip(0, 1) + Distance()
    assert both.needs_prompt
    with pytest.raises(
        RewardError, match="'judge' compares pictures with their prompts, and that of sample 1 is empty"
    ):
        both(IMAGES, ["a", " ", "c", "", "e"])
    assert both(IMAGES, PROMPTS).total.shape == (5,)


def test_a_function_declares_by_its_attributes():
    def distance(images, prompts):
        return images.mean((1, 2, 3))

    for name, value in {"higher_is_better": False, "native_range": (0.0, 1.0)}.items():
        setattr(distance, name, value)
    reward = as_reward(distance)
    assert (reward.differentiable, reward.higher_is_better, reward.native_range) == (True, False, (0.0, 1.0))
    assert torch.equal(reward(IMAGES, PROMPTS).total, -IMAGES.mean((1, 2, 3)))


# No opinion


def test_silence_adds_nothing_and_shows_as_nan_in_the_parts():
    one, two = Given([1.0, NAN, 3.0, NAN, 5.0], "one"), Given([10.0, 20.0, NAN, NAN, 50.0], "two")
    scores = (2.0 * one + two)(IMAGES, PROMPTS)
    assert scores.total.tolist() == [12.0, 20.0, 6.0, 0.0, 60.0]
    assert torch.equal(scores.parts["one"].isnan(), torch.tensor([False, True, False, True, False]))
    assert slope(2.0 * one + two) == pytest.approx([3.0, 1.0, 2.0, 0.0, 3.0])


def test_silence_is_the_mean_once_normalised():
    reward = Given([7.0, NAN, 3.0, 5.0, 5.0], "one").normalised(5.0, 2.0)
    assert reward(IMAGES, PROMPTS).total.tolist() == [1.0, 0.0, -1.0, 0.0, 0.0]
    assert (3.0 * reward)(IMAGES, PROMPTS).total.tolist() == [3.0, 0.0, -3.0, 0.0, 0.0]


def test_silence_of_a_whole_sum_is_silence_inside_another_reward():
    both = (Given([1.0, NAN, NAN, 1.0, 1.0], "one") + Given([1.0, NAN, 2.0, 1.0, 1.0], "two")).normalised(4.0, 2.0)
    assert both(IMAGES, PROMPTS).total.tolist() == [-1.0, 0.0, -1.0, -1.0, -1.0]


def test_undeclared_silence_and_infinity_are_errors():
    silent = Given([1.0, NAN, 3.0, 4.0, 5.0], "mute")
    silent.abstains = False
    with pytest.raises(RewardError, match=r"'mute' gave nan for sample 1.*abstains = True"):
        (Distance() + silent)(IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="'loud' gave inf for sample 2"):
        Given([1.0, NAN, math.inf, 4.0, 5.0], "loud")(IMAGES, PROMPTS)


# Clips and norms


def test_clip_holds_values_and_stops_gradients_beyond():
    inner = Given([-1.0, 0.2, 0.5, 0.8, 2.0], "one")
    reward = inner.clip(0.0, 1.0)
    scores = reward(IMAGES, PROMPTS)
    assert scores.total.tolist() == pytest.approx([0.0, 0.2, 0.5, 0.8, 1.0])
    assert scores.parts["one"].tolist() == pytest.approx([-1.0, 0.2, 0.5, 0.8, 2.0])
    assert slope(reward) == pytest.approx([0.0, 1.0, 1.0, 1.0, 0.0])
    assert slope(inner.clip(high=0.6)) == pytest.approx([1.0, 1.0, 1.0, 0.0, 0.0])
    assert reward.name == "one.clip(0.0, 1.0)"
    assert (inner + Distance()).clip(0.0, 1.0).name == "(1 * one + 1 * distance).clip(0.0, 1.0)"


@pytest.mark.parametrize(("low", "high", "said"), [(None, None, "needs a bound"), (1.0, 1.0, "low < high")])
def test_bounds_that_bound_nothing_are_refused(low, high, said):
    with pytest.raises(ConfigError, match=said):
        Distance().clip(low, high)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), (NAN, 1.0), (0.0, math.inf)])
def test_norms_that_cannot_be_are_refused(mean, std):
    with pytest.raises(ConfigError, match="a finite mean and a positive std"):
        Normalised(Distance(), mean, std)


def test_norms_and_clips_go_into_sums_with_weights_of_their_own():
    one = Given([7.0, 9.0, 3.0, 5.0, 5.0], "one")
    reward = 0.5 * one.normalised(5.0, 2.0).clip(-1.0, 1.0) + 2.0 * Distance()
    mean = IMAGES.mean((1, 2, 3))
    expected = 0.5 * torch.tensor([1.0, 1.0, -1.0, 0.0, 0.0]) - 2 * mean
    assert torch.allclose(reward(IMAGES, PROMPTS).total, expected)
    assert [part.name for part in parts_of(reward)] == ["one", "distance"]


def test_names_inside_wrappers_must_differ_too():
    with pytest.raises(ConfigError, match="Two rewards of a sum are called 'distance'"):
        Distance().clip(0, 1).__add__(Distance())
    same = Distance()
    assert len(parts_of(same.clip(0, 1) + same)) == 1


# Ensembles

FIRST, SECOND, THIRD = [1.0, 2.0, NAN, NAN, 4.0], [3.0, NAN, NAN, 5.0, 4.0], [8.0, 6.0, NAN, NAN, 4.0]
COMBINED = {
    "mean": [4.0, 4.0, 0.0, 5.0, 4.0],
    "minimum": [1.0, 2.0, 0.0, 5.0, 4.0],
    "lower_bound": [4.0 - 2 * math.sqrt(26 / 3), 4.0 - 2 * 2.0, 0.0, 5.0, 4.0],
}


def members() -> list[Reward]:
    return [Given(FIRST, "a"), Given(SECOND, "b"), Given(THIRD, "c")]


@pytest.mark.parametrize("combine", COMBINED)
def test_an_ensemble_combines_those_who_speak(combine):
    reward = Ensemble(members(), combine, width=2.0)
    scores = reward(IMAGES, PROMPTS)
    assert scores.total.tolist() == pytest.approx(COMBINED[combine])
    assert list(scores.parts) == ["a", "b", "c", f"{combine}(a, b, c)"]
    assert scores.parts[reward.name].isnan().tolist() == [False, False, True, False, False]
    assert slope(reward) == pytest.approx([1.0, 1.0, 0.0, 1.0, 1.0], abs=1e-5)  # the members move as one


def test_the_lower_bound_has_the_gradient_of_its_formula():
    def steep(images, prompts):
        return 3 * images.mean((1, 2, 3))

    first, second = FunctionReward(lambda x: x.mean((1, 2, 3)), "flat"), as_reward(steep)
    m = IMAGES.mean((1, 2, 3))
    total, found = gradient(Ensemble([first, second], width=0.5))
    assert torch.allclose(total, 2 * m - 0.5 * m)  # mean 2m, deviation m
    assert torch.allclose(found.sum((1, 2, 3)), torch.full((5,), 1.5), atol=1e-5)


def test_ensembles_that_are_none_are_refused():
    one = Distance()
    with pytest.raises(ConfigError, match="at least two different rewards, got 1"):
        Ensemble([one, one])
    with pytest.raises(ConfigError, match="combine is one of mean, minimum, lower_bound; got 'median'"):
        Ensemble(members(), "median")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="width"):
        Ensemble(members(), width=-1.0)
    with pytest.raises(ConfigError, match="both called 'a'"):
        Ensemble(members(), name="a")


def test_an_ensemble_is_differentiable_if_every_member_is():
    black_box = FunctionReward(lambda images: images.mean((1, 2, 3)).tolist(), "box", differentiable=False)
    assert not Ensemble([Distance(), black_box]).differentiable
    assert not black_box.clip(0, 1).differentiable


# Less memory


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [None, 1, 2, 5, 7])
def test_micro_batches_change_neither_values_nor_gradients(size, recompute):
    inner = Network() + 0.5 * Distance()
    whole, expected = gradient(inner, offset=torch.arange(5.0))
    network = parts_of(inner)[0]
    assert isinstance(network, Network)
    network.sizes.clear()
    total, found = gradient(MemorySaving(inner, size, recompute), offset=torch.arange(5.0))
    assert torch.allclose(total, whole, atol=1e-6)
    assert torch.allclose(found, expected, atol=1e-6)
    step = size or 5
    pieces = [len(IMAGES[i : i + step]) for i in range(0, 5, step)]
    assert network.sizes == (pieces + pieces[::-1] if recompute else pieces)


def test_weights_that_rest_on_the_cpu_score_alike():
    inner = Network() + 0.5 * Distance()
    whole, expected = gradient(inner, offset=torch.arange(5.0))
    resting = MemorySaving(inner, 2, offload=True)
    total, found = gradient(resting, offset=torch.arange(5.0))
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(found, expected)
    assert not list(resting.parameters())  # nothing of it moves, or is saved
    assert [part.name for part in parts_of(resting)] == [part.name for part in parts_of(inner)]
    if torch.cuda.is_available():
        resting.to("cuda")(IMAGES.cuda(), PROMPTS, offset=torch.arange(5.0))
        assert next(parts_of(inner)[0].parameters()).device.type == "cpu"


def test_recomputing_keeps_no_activations():
    def kept(reward: Reward) -> int:
        sizes: list[int] = []
        leaf = IMAGES.clone().requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            reward(leaf, PROMPTS)
        return sum(sizes)

    assert kept(MemorySaving(Network(), recompute=True)) < 0.2 * kept(MemorySaving(Network(), recompute=False))


def test_autocast_computes_in_the_type_that_was_asked_for():
    inner = Network()
    total, found = gradient(MemorySaving(inner, 2, dtype="bfloat16"))
    leaf = IMAGES.clone().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = inner(leaf, PROMPTS).total
    assert total.dtype == torch.float32
    assert torch.allclose(total, expected, rtol=0.02)
    assert not torch.allclose(total, gradient(inner)[0], rtol=1e-5)
    (exact,) = torch.autograd.grad(expected.sum(), leaf)
    assert torch.allclose(found, exact, atol=0.02 * float(exact.abs().max()))


def test_metadata_of_one_entry_a_sample_are_cut_along():
    def asked(images, prompts, answer, table):
        assert len(table) == 2
        return images.mean((1, 2, 3)) + torch.tensor(answer)

    total = MemorySaving(asked, 2)(IMAGES, PROMPTS, answer=[0.0, 1.0, 2.0, 3.0, 4.0], table=[1, 2]).total
    assert torch.allclose(total, IMAGES.mean((1, 2, 3)) + torch.arange(5.0))


def test_no_picture_is_no_piece():
    assert MemorySaving(Distance(), 2)(IMAGES[:0], []).total.shape == (0,)


@pytest.mark.parametrize(("options", "said"), [({"micro_batch": 0}, "at least 1"), ({"dtype": "int8"}, "dtype is one")])
def test_memory_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        MemorySaving(Distance(), **options)
