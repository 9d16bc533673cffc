"""Networks and conditions: shapes, what the output depends on, where it starts, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import numbers, uniforms
from torch import Tensor, nn

from steerfm.conditions import Labels
from steerfm.errors import ConfigError
from steerfm.networks import MLP, DiT, PlainMLP, UNet, WordEncoder
from steerfm.networks.embeddings import TimeEmbedding
from steerfm.networks.mlp import randomise
from steerfm.types import Condition, Cost

MAKERS: dict[str, tuple[tuple[int, ...], Callable[..., nn.Module]]] = {
    "mlp on points": ((2,), lambda **o: MLP((2,), width=16, depth=2, **o)),
    "mlp on pictures": ((1, 4, 4), lambda **o: MLP((1, 4, 4), width=16, depth=1, **o)),
    "unet": ((3, 8, 8), lambda **o: UNet((3, 8, 8), channels=(8, 16, 24), blocks=2, **o)),
    "unet of one level": ((1, 5, 7), lambda **o: UNet((1, 5, 7), channels=(8,), **o)),
    "unet of patches": ((1, 8, 4), lambda **o: UNet((1, 8, 4), channels=(8, 16), patch=2, **o)),
    "dit": ((3, 8, 4), lambda **o: DiT((3, 8, 4), 2, 16, 2, 4, **o)),
    "dit with decoupled times": ((1, 4, 4), lambda **o: DiT((1, 4, 4), 2, 18, 3, 2, decoupled=1, **o)),
    "unet with attention": ((1, 4, 8), lambda **o: UNet((1, 4, 8), channels=(8, 16), attention_heads=4, **o)),
}
every_network = pytest.mark.parametrize("kind", list(MAKERS))


def made(kind: str, classes: int = 0) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Return a network with all weights drawn anew, and a batch of three for it."""
    shape, make = MAKERS[kind]
    network = make(num_classes=classes).double()
    randomise(network)
    return network, numbers(0, 3, *shape), uniforms(1, 3, 0.5, 1.0), uniforms(2, 3, 0.0, 0.5)


def labels(*numbers_: int) -> Condition:
    return Condition({"label": torch.tensor(numbers_)})


@every_network
def test_the_output_has_the_shape_of_the_state(kind: str):
    network, x, s, t = made(kind)
    assert network.data_shape == MAKERS[kind][0]
    for n in (3, 1):
        assert network(x[:n], s[:n], t[:n]).shape == x[:n].shape


@every_network
def test_the_output_starts_at_zero_and_learns_at_once(kind: str):
    shape, make = MAKERS[kind]
    network = make()
    x = torch.randn(2, *shape)
    output = network(x, torch.ones(2), torch.zeros(2))
    assert torch.equal(output, torch.zeros_like(x))
    (output - 1).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@every_network
def test_every_weight_takes_part(kind: str):
    network, x, s, t = made(kind, classes=2)
    """Each row of each weight: every feature, shift, scale and gate. A bias before a norm or of a key has no say."""
    network(x, s, t, labels(0, 1, 2)).square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            assert parameter.grad is not None, name
            assert (parameter.grad.flatten(1).abs().amax(1) > 0).all(), name


@every_network
def test_the_output_depends_on_the_state_and_on_each_time(kind: str):
    network, x, s, t = made(kind)
    output = network(x, s, t)
    others = {
        "state": (x.roll(1, 0), s, t),
        "source": (x, s - 0.1, t),
        "target": (x, s, t + 0.1),
        "both, one interval": (x, s - 0.1, t - 0.1),
        "direction": (x, t, s),
    }
    for name, arguments in others.items():
        assert ((network(*arguments) - output).flatten(1).norm(dim=1) > 1e-4).all(), name


@every_network
def test_samples_do_not_touch_each_other(kind: str):
    network, x, s, t = made(kind, classes=2)
    whole = network(x, s, t, labels(0, 1, 2))
    alone = torch.cat([network(x[i : i + 1], s[i : i + 1], t[i : i + 1], labels(i)) for i in range(3)])
    assert torch.allclose(whole, alone, atol=1e-12)


@every_network
def test_a_class_changes_the_output_and_no_condition_is_the_null_class(kind: str):
    network, x, s, t = made(kind, classes=2)
    outputs = [network(x, s, t, labels(i, i, i)) for i in range(3)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (outputs[i] - outputs[j]).norm() > 1e-3
    assert torch.equal(network(x, s, t), outputs[2])
    assert torch.equal(network(x, s, t, Labels(["one", "two"]).null(3)), outputs[2])


@every_network
def test_a_condition_that_the_network_does_not_take_is_refused(kind: str):
    network, x, s, t = made(kind)
    with pytest.raises(ConfigError, match=r"takes no condition, got one with \['label'\]: give it num_classes"):
        network(x, s, t, labels(0, 0, 0))


@pytest.mark.parametrize("shape", [(1, 6, 8), (1, 8, 6), (8, 8), (1, 1, 8, 8)])
def test_pictures_that_cannot_be_halved_are_refused(shape: tuple[int, ...]):
    with pytest.raises(
        ConfigError, match=r"3 levels and patch 1 needs pictures .* divisible by 4.*fewer levels or pad"
    ):
        UNet(shape, channels=(8, 16, 32))
    with pytest.raises(ConfigError, match=r"2 levels and patch 2 needs pictures .* divisible by 4"):
        UNet(shape, channels=(8, 16), patch=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data_shape": (1, 6, 8)}, "divisible by it"),
        ({"data_shape": (8, 8)}, "divisible by it"),
        ({"width": 2}, "width of at least 4"),
        ({"depth": 2, "decoupled": 2}, "fewer decoupled blocks"),
        ({"width": 10, "heads": 4}, "heads of attention must divide"),
    ],
)
def test_a_dit_that_cannot_be_is_refused(options: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        DiT(**{"data_shape": (1, 8, 8), "patch": 4, "width": 8, "heads": 2, "depth": 1, **options})


def test_decoupled_blocks_see_one_time_each():
    """Only the last block and the output are told t, the others s; on the diagonal nothing is told twice."""
    network = DiT((1, 4, 4), 2, 16, 3, 2, decoupled=1).double()
    randomise(network)
    told: list[tuple[float, ...]] = []
    network.time.register_forward_pre_hook(lambda _, times: told.append(tuple(float(each[0]) for each in times)))
    inputs: list[Tensor] = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[1]))
    x = numbers(0, 1, 1, 4, 4)
    network(x, torch.tensor([0.9]).double(), torch.tensor([0.2]).double())
    assert told == [(pytest.approx(0.9),) * 2, (pytest.approx(0.2),) * 2]
    assert torch.equal(inputs[0], inputs[1]) and not torch.equal(inputs[1], inputs[2])


def test_places_tell_every_token_from_every_other():
    network = DiT((1, 12, 8), 2, 16, 1, 2)
    gaps = torch.cdist(network.places, network.places) + 10 * torch.eye(24)
    assert network.places.shape == (24, 16) and gaps.min() > 0.1


def test_heads_must_divide_the_channels_and_groups_are_made_to():
    with pytest.raises(ConfigError, match="attention_heads must divide the last of channels, 10: got 4"):
        UNet((1, 4, 4), channels=(10,), attention_heads=4)
    network = UNet((1, 4, 4), channels=(6, 10), attention_heads=5, groups=4)
    assert network(torch.randn(2, 1, 4, 4), torch.ones(2), torch.zeros(2)).shape == (2, 1, 4, 4)


def test_times_are_embedded_with_their_signed_interval():
    embed = TimeEmbedding(8).double()
    times = torch.tensor([0.2, 0.7], dtype=torch.float64)
    forward, back = embed(times, times.flip(0))
    assert (forward - back).norm() > 1e-3
    assert embed(times, times).shape == (2, 8)
    assert embed.rates.min() == pytest.approx(0.5)
    assert embed.rates.max() == pytest.approx(32.0)
    assert not any("rates" in name for name in embed.state_dict())  # made anew, so never saved


# --- conditions -----------------------------------------------------------------------------------------------

DIGITS = ["a handwritten zero", "a handwritten one", "a handwritten two"]


def test_a_prompt_names_a_class_by_its_caption_or_last_word():
    condition = Labels(DIGITS)(["a handwritten two", " One ", "ZERO", ""])
    assert condition["label"].tolist() == [2, 1, 0, 3]


def test_last_words_count_only_where_they_are_different():
    conditioner = Labels(["red circle", "blue circle"])
    assert conditioner(["red circle"])["label"].tolist() == [0]
    with pytest.raises(ConfigError, match="No class is called 'circle'"):
        conditioner(["circle"])


def test_an_unknown_prompt_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="No class is called 'a handwriten two'; did you mean 'a handwritten two'"):
        Labels(DIGITS)(["a handwriten two"])


def test_conditions_are_picked_repeated_joined_and_mixed():
    condition = Condition({"label": torch.tensor([0, 1, 2]), "features": numbers(3, 3, 2)})
    assert len(condition) == 3
    assert condition.select(torch.tensor([2, 0]))["label"].tolist() == [2, 0]
    assert condition.repeat_interleave(2)["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert Condition.cat([condition, condition])["features"].shape == (6, 2)
    null = Condition({"label": torch.full((3,), 9), "features": torch.zeros(3, 2, dtype=torch.float64)})
    mixed = condition.where(torch.tensor([True, False, True]), null)
    assert mixed["label"].tolist() == [0, 9, 2]
    assert torch.equal(mixed["features"][1], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(mixed["features"][0], condition["features"][0])


@pytest.mark.parametrize("tensors", [{"a": torch.zeros(2), "b": torch.zeros(3)}, {}], ids=["two sizes", "nothing"])
def test_conditions_need_one_batch_size(tensors: dict[str, Tensor]):
    with pytest.raises(ConfigError, match="tensors of one batch size"):
        Condition(tensors)


def test_costs_add_up():
    assert Cost(1, 2, 3, 4.0) + Cost(10, 20, 30, 40.0) == Cost(11, 22, 33, 44.0)


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (lambda n: MLP((2,), width=4, depth=n), "depth"),
        (lambda n: PlainMLP((2,), width=4, depth=n), "depth"),
        (lambda n: DiT((1, 4, 4), patch=2, width=8, depth=n, heads=2), "depth"),
        (lambda n: UNet((1, 4, 4), channels=(8, 8), blocks=n), "blocks"),
        (lambda n: WordEncoder(5, width=8, layers=n, heads=2), "layers"),
    ],
    ids=["mlp", "plain", "dit", "unet", "words"],
)
def test_more_layers_than_can_be_made_are_refused_at_once(made: Callable[[int], Any], what: str) -> None:
    with pytest.raises(ConfigError, match=f"{what} is at most 1000, got 2147483648"):
        made(2**31)
