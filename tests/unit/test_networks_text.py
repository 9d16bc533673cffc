"""How networks read texts and pictures: derivatives, null rows, padding, gradients, and independence of samples."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import numbers, uniforms
from torch import Tensor, nn

from steerfm.conditions import CaptionWords, SceneAttributes
from steerfm.derivatives import directional_derivative
from steerfm.errors import ConfigError
from steerfm.networks import DiT, SlotEncoder, TextEmbeddings, UNet, WordEncoder
from steerfm.networks.attention import Attention
from steerfm.networks.mlp import randomise
from steerfm.types import Condition

SHAPE = (2, 8, 4)
VALUES = SceneAttributes.values


def text_condition(n: int = 4) -> Condition:
    """Return n rows with 5 tokens' room, each with fewer tokens than the one before, the last with none."""
    mask = torch.arange(5)[None] < torch.tensor([4, 3, 1, 0])[:n, None]
    return Condition({"embedding": numbers(5, 4, 5, 6)[:n] * mask[:, :, None], "embedding_mask": mask})


def word_condition(n: int = 4) -> Condition:
    return CaptionWords(["a", "red", "blue", "circle"], 5)(["a red circle a", "blue circle a", "red", ""][:n])


def slot_condition(n: int = 4) -> Condition:
    return SceneAttributes()(["a red circle left of a small cross", "two blue squares", "a cross", ""][:n])


def with_picture(condition: Condition) -> Condition:
    picture = numbers(6, 4, 2, *SHAPE[1:])[: len(condition)]
    picture[:, 1] = torch.tensor([1.0, 0.0, 1.0, 0.0]).double()[: len(condition), None, None]
    return Condition({**condition.tensors, "picture": picture * picture[:, 1:]})


def classes(n: int = 4) -> Condition:
    return Condition({"label": torch.tensor([0, 1, 0, 2])[:n]})


TEXTS: dict[str, tuple[Callable[[], Any], Callable[..., Condition]]] = {
    "words": (lambda: WordEncoder(4, 5, width=8, layers=2, heads=2), word_condition),
    "embeddings": (lambda: TextEmbeddings(6, width=8, layers=2, heads=2), text_condition),
    "slots": (lambda: SlotEncoder(VALUES, width=8, layers=1, heads=2), slot_condition),
}
every_text = pytest.mark.parametrize("kind", list(TEXTS))


def unet(text: nn.Module | None = None, **options: Any) -> UNet:
    return UNet(SHAPE, channels=(8, 16), attention_heads=2, text=text, text_heads=2, **options)


def dit(text: nn.Module | None = None, **options: Any) -> DiT:
    return DiT(SHAPE, 2, 8, 2, 2, text=text, **options)


def picture_unet() -> tuple[UNet, Condition]:
    return unet(picture_channels=1, patch=2), Condition({"picture": with_picture(classes())["picture"]})


CASES: dict[str, Callable[[], tuple[UNet | DiT, Condition]]] = {
    **{f"{kind}": lambda make=make, condition=condition: (unet(make()), condition())
       for kind, (make, condition) in TEXTS.items()},
    **{f"dit, {kind}": lambda make=make, condition=condition: (dit(make()), condition())
       for kind, (make, condition) in TEXTS.items()},
    "dit, words, picture, decoupled": lambda: (
        dit(TEXTS["words"][0](), picture_channels=1, decoupled=1), with_picture(word_condition())
    ),
    "words, patch": lambda: (unet(TEXTS["words"][0](), patch=2), word_condition()),
    "words on one level": lambda: (unet(TEXTS["words"][0](), text_levels=1), word_condition()),
    "picture": lambda: (unet(picture_channels=1), Condition({"picture": with_picture(classes())["picture"]})),
    "picture, patch": picture_unet,
    "words and picture": lambda: (unet(TEXTS["words"][0](), picture_channels=1), with_picture(word_condition())),
    "embeddings and picture, patch": lambda: (
        unet(TEXTS["embeddings"][0](), picture_channels=1, patch=2), with_picture(text_condition())
    ),
    "words and classes": lambda: (
        unet(TEXTS["words"][0](), num_classes=2), Condition({**word_condition().tensors, **classes().tensors})
    ),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", list(CASES))


def made(case: str) -> tuple[Any, Condition, Tensor, Tensor, Tensor]:
    network, condition = CASES[case]()
    network = network.double()
    randomise(network, scale=0.2)
    return network, condition, numbers(0, 4, *SHAPE), uniforms(1, 4, 0.5, 1.0), uniforms(2, 4, 0.0, 0.5)


# --- the U-Net with texts and pictures ------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("told", [True, False], ids=["told", "free"])
def test_the_derivative_is_that_of_central_differences(case: str, told: bool):
    """Steps of 1e-6 in float64: the error h^2 f''' / 6 is below 1e-8 of f' at rates up to 32, rounding about 1e-9."""
    network, condition, x, s, t = made(case)
    tangents = (numbers(3, 4, *SHAPE), uniforms(4, 4), -uniforms(5, 4))

    def u(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return network(x, s, t, condition if told else None)

    value, exact = directional_derivative(u, (x, s, t), tangents)
    _, central = directional_derivative(u, (x, s, t), tangents, method="central", step=1e-6)
    assert torch.allclose(value, u(x, s, t), atol=1e-12)  # the derivative's attention is another kernel
    assert exact.norm() > 1e-2
    assert (exact - central).norm() < 1e-7 * exact.norm()


@every_case
def test_samples_do_not_touch_each_other(case: str):
    network, condition, x, s, t = made(case)
    whole = network(x, s, t, condition)
    rows = [slice(i, i + 1) for i in range(4)]
    alone = torch.cat([network(x[i], s[i], t[i], condition.select(i)) for i in rows])
    assert torch.allclose(whole, alone, atol=1e-12)


@every_case
def test_no_condition_is_the_null_condition(case: str):
    """The last row is null in every case; a sum over no tokens and over masked ones may round differently."""
    network, condition, x, s, t = made(case)
    free = network(x, s, t)
    told = network(x, s, t, condition)
    assert torch.allclose(told[3], free[3], atol=1e-12)
    assert ((told[:1] - free[:1]).flatten(1).norm(dim=1) > 1e-4).all()


@every_case
def test_what_is_told_reaches_every_row_of_the_weights_that_read_it(case: str):
    network, condition, x, s, t = made(case)
    network(x, s, t, condition).square().sum().backward()
    reads = dict(network.named_parameters())
    assert any(name.startswith("text.") for name in reads) == (network.text is not None)
    for name, parameter in reads.items():
        if parameter.ndim > 1 and name not in ("text.table.weight", "text.words.weight", "text.places"):
            assert parameter.grad is not None, name
            assert (parameter.grad.flatten(1).abs().amax(1) > 0).all(), name


def test_gradients_reach_the_words_that_were_said_and_no_others():
    network, condition, x, s, t = made("words")
    network(x, s, t, condition).square().sum().backward()
    moved = network.text.words.weight.grad.abs().amax(1) > 0
    assert moved.tolist() == [False, False, True, True, True, True]  # padding and the unknown word were not
    network, condition, x, s, t = made("slots")
    network(x, s, t, condition).square().sum().backward()
    said = set((condition["slots"] + network.text.starts)[condition["slots"] > 0].tolist())
    moved = network.text.table.weight.grad.abs().amax(1) > 0
    assert set(moved.nonzero().flatten().tolist()) == said


def test_a_picture_changes_the_output_where_it_lies_and_its_mask_counts():
    network, condition, x, s, t = made("picture")
    empty = Condition({"picture": condition["picture"] * 0})
    black = Condition({"picture": torch.cat([condition["picture"][:, :1] * 0, condition["picture"][:, 1:]], 1)})
    changed = [
        (network(x, s, t, c) - network(x, s, t, empty)).flatten(1).norm(dim=1) > 1e-4 for c in (condition, black)
    ]
    assert [rows.tolist() for rows in changed] == [[True, False, True, False]] * 2


def test_pictures_of_another_size_are_refused():
    network, _, x, s, t = made("picture")
    for shape in ((4, 3, 8, 4), (4, 2, 4, 4), (4, 2, 8, 8)):
        with pytest.raises(ConfigError, match=r"pictures \(2, 8, 4\), mask .* write Pictures\(channels=1, size=\(8, 4"):
            network(x, s, t, Condition({"picture": torch.zeros(shape)}))
    with pytest.raises(ConfigError, match=r"reads 'picture', and the condition has \['label'\]: give the map the cond"):
        network(x, s, t, classes())


# --- the readers of texts -------------------------------------------------------------------------------------


def reader(kind: str) -> tuple[Any, Condition]:
    make, condition = TEXTS[kind]
    text = make().double()
    randomise(text, scale=0.3)
    return text, condition()


@every_text
def test_the_first_token_stands_for_the_whole_text(kind: str):
    text, condition = reader(kind)
    tokens, mask = text(condition, numbers(0, 4, 8))
    assert tokens.shape == (*mask.shape, text.width)
    assert mask[:, 0].all()
    assert not mask[3, 1:].any()
    first = tokens[:, 0]
    assert (torch.cdist(first, first) + 9 * torch.eye(4)).min() > 1e-3
    none, only = text(None, numbers(0, 4, 8))
    assert torch.allclose(none[:, 0], tokens[3:, 0].expand(4, -1), atol=1e-12)
    assert (only.sum(1) == 1).all()


def test_what_is_padded_has_no_say():
    text, condition = reader("embeddings")
    tokens, mask = text(condition, numbers(0, 4, 8))
    filled = torch.where(condition["embedding_mask"][:, :, None], condition["embedding"], 100 * numbers(9, 4, 5, 6))
    others, _ = text(Condition({**condition.tensors, "embedding": filled}), numbers(0, 4, 8))
    assert torch.equal(tokens[mask], others[mask])
    longer = {name: torch.cat([tensor, tensor[:1].expand_as(tensor)], 1) for name, tensor in condition.tensors.items()}
    longer["embedding_mask"][:, 5:] = False
    more, room = text(Condition(longer), numbers(0, 4, 8))
    assert torch.allclose(more[room], tokens[mask], atol=1e-12)
    text, condition = reader("words")
    short = Condition({"words": condition["words"][:, :4]})
    more, room = text(short, numbers(0, 4, 8))
    tokens, mask = text(condition, numbers(0, 4, 8))
    assert torch.allclose(more[room], tokens[mask], atol=1e-12)


def test_embeddings_are_read_in_the_type_of_the_network():
    text = TextEmbeddings(6, width=8, heads=2)
    single = Condition({**text_condition().tensors, "embedding": text_condition()["embedding"].float()})
    for dtype in (torch.float64, torch.bfloat16):
        tokens, _ = text.to(dtype)(single, torch.zeros(4, 8, dtype=dtype))
        assert tokens.dtype == dtype


def test_the_same_value_in_another_slot_is_another_token():
    text, _ = reader("slots")
    rows = torch.eye(len(VALUES), dtype=torch.long)
    tokens, mask = text(Condition({"slots": rows}), numbers(0, len(rows), 8))
    assert mask[:, 1:].equal(rows > 0)
    first = tokens[:, 0]
    assert (torch.cdist(first, first) + 9 * torch.eye(len(rows))).min() > 1e-3
    last = torch.tensor(VALUES)[None] - 1
    assert text(Condition({"slots": last}), numbers(0, 1, 8))[0].shape == (1, len(VALUES) + 1, 8)


@every_text
def test_another_condition_is_refused(kind: str):
    text, _ = reader(kind)
    with pytest.raises(ConfigError, match=r"and the condition has \['label'\]: give the map the conditioner"):
        text(classes(), numbers(0, 4, 8))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="at least 1 layer, in which its first token sees the others: got 0"):
        TextEmbeddings(6, layers=0)
    with pytest.raises(ConfigError, match="heads of attention must divide its width, 10: got 4"):
        SlotEncoder(VALUES, width=10)
    other = Condition({"embedding": torch.zeros(1, 2, 7), "embedding_mask": torch.ones(1, 2, dtype=torch.bool)})
    with pytest.raises(ConfigError, match=r"dimension 6, and the encoder gives 7: write TextEmbeddings\(7\)"):
        TextEmbeddings(6, width=8)(other, torch.zeros(1, 8))


def test_attention_is_softmax_of_scaled_products_over_what_counts():
    """By its definition (Vaswani et al. 2017, arXiv 1706.03762, eq. 1), written out for each head."""
    attention = Attention(6, 2, other=4).double()
    x, other = numbers(0, 2, 3, 6), numbers(1, 2, 5, 4)
    mask = torch.tensor([[True, False, True, True, False], [True] * 5])
    q, (k, v) = attention.query(x), attention.key_value(other).chunk(2, -1)
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        products = q[..., part] @ k[..., part].transpose(1, 2) / 3**0.5
        heads.append(products.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ v[..., part])
    assert torch.allclose(attention(x, other, mask), attention.leave(torch.cat(heads, -1)), atol=1e-12)
