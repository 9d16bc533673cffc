"""Captions of scenes: what a caption says, ways to say it, reading it back, and whether a scene follows it.

A caption asks for one to three objects, perhaps with where one lies from another: "a red circle left of a blue
square", "two green crosses and a small yellow square", "below a cyan circle there is a square that is red".
Which parts are scored is GenEval's list: objects, counting, colours, position, and attributes bound to the right
object (Ghosh et al. 2023, arXiv 2310.11513).
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from steerfm.errors import DataError, nearest
from steerfm.shapes import COLORS, LEAST_FIT, SHAPES, SIZES, Object, Scene, lies, relation

PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3}
BEFORE = ("left of", "above")  # the two relations that a description is written in; the others are their inverses
INVERSE = {"left of": "right of", "above": "below"}
PLACES = {
    "left": ("left of", False),
    "right": ("left of", True),
    "above": ("above", False),
    "over": ("above", False),
    "below": ("above", True),
    "under": ("above", True),
}
FILLERS = ("the", "to", "of", "there", "also")
NOUNS = {noun: shape for shape in SHAPES for noun in (shape, PLURALS[shape])}

VOCABULARY = (*NUMBERS, *SIZES, *COLORS, *NOUNS, *PLACES, *FILLERS, "is", "are", "that", "and")


@dataclass(frozen=True, order=True)
class Wanted:
    """One object that a caption asks for; an empty colour or size may be any."""

    shape: str
    color: str = ""
    size: str = ""

    def fits(self, item: Object) -> bool:
        """Say whether an object is what is wanted."""
        kind = item.shape == self.shape and self.color in ("", item.color)
        return kind and self.size in ("", item.size)


@dataclass(frozen=True)
class Description:
    """What a caption says: objects, and where the first lies from the second ("left of", "above" or "").

    Equal descriptions are written alike: without a place the objects are sorted, with one those after the second
    are, and "right of" and "below" become their inverses.
    """

    objects: tuple[Wanted, ...]
    place: str = ""

    @staticmethod
    def of(objects: Iterable[Wanted], place: str = "") -> Description:
        """Return the description with its parts in order; `place` is any of the four. Raises DataError for others."""
        first = list(objects)
        if place and (place not in (*INVERSE, *INVERSE.values()) or len(first) < 2):
            raise DataError(
                f"A place is one of {', '.join([*INVERSE, *INVERSE.values()])}, of two objects: got '{place}' and "
                f"{len(first)}."
            )
        for before, inverse in INVERSE.items():
            if place == inverse:
                first[:2], place = [first[1], first[0]], before
        kept = 2 if place else 0
        return Description((*first[:kept], *sorted(first[kept:])), place)


@dataclass(frozen=True)
class Followed:
    """How well a scene follows a caption, each part in [0, 1].

    color, shape: shares of the wanted colours and shapes that are there; count: 1 where there are as many objects
    as wanted and nothing else of their size; binding: share of wanted objects that are there with all their
    attributes; position: 1 where the wanted objects lie as asked, None where no place was asked for; correct: 1
    where all of it is right.
    """

    color: float
    shape: float
    count: float
    binding: float
    position: float | None
    correct: float


def describe(scene: Scene, generator: np.random.Generator) -> Description:
    """Return a random true description of a scene: all its objects, some sizes, and often a place."""
    kinds = [(item.shape, item.color) for item in scene]
    repeated = len(set(kinds)) < len(kinds)
    wanted = [
        Wanted(item.shape, item.color, item.size if not repeated and generator.random() < 0.3 else "") for item in scene
    ]
    if len(scene) == 1 or repeated or generator.random() < 0.4:
        return Description.of(wanted)
    order = generator.permutation(len(scene)).tolist()
    return Description.of([wanted[i] for i in order], relation(scene[order[0]], scene[order[1]]))


def say(description: Description, generator: np.random.Generator) -> str:
    """Return a caption that says a description, in one of many wordings."""
    if not description.place:
        groups = list(Counter(description.objects).items())
        phrases = [_phrase(groups[i][0], groups[i][1], generator) for i in generator.permutation(len(groups))]
        return _listed(phrases)
    a, b = (_phrase(item, 1, generator) for item in description.objects[:2])
    others = [_phrase(item, 1, generator) for item in description.objects[2:]]
    return ", and ".join([_placed(a, b, description.place, generator), *others])


def plain(description: Description) -> str:
    """Return the shortest usual caption of a description, always the same."""
    if not description.place:
        return _listed([_named(item, number) for item, number in Counter(description.objects).items()])
    a, b, *others = (_named(item, 1) for item in description.objects)
    return ", and ".join([f"{a} {description.place} {b}", *others])


def paraphrases(caption: str, ways: int = 8) -> list[str]:
    """Return several ways to say a caption, always the same; raises DataError as `read` does."""
    description = read(caption)
    return [say(description, np.random.default_rng(i)) for i in range(ways)]


def _listed(phrases: Sequence[str]) -> str:
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _named(item: Wanted, number: int) -> str:
    noun = item.shape if number == 1 else PLURALS[item.shape]
    determiner = "a" if number == 1 else {2: "two", 3: "three"}[number]
    return " ".join(word for word in (determiner, item.size, item.color, noun) if word)


def _phrase(item: Wanted, number: int, generator: np.random.Generator) -> str:
    """Return a noun phrase, one time in four with its attributes behind the noun."""
    if generator.random() < 0.75 or not (item.color or item.size):
        phrase = _named(item, number)
        return "one" + phrase[1:] if number == 1 and generator.random() < 0.1 else phrase
    attributes = [word for word in (item.color, item.size) if word]
    if len(attributes) == 2 and generator.random() < 0.5:
        attributes.reverse()
    verb = "is" if number == 1 else "are"
    return f"{_named(Wanted(item.shape), number)} that {verb} {' and '.join(attributes)}"


def _placed(a: str, b: str, place: str, generator: np.random.Generator) -> str:
    """Return a sentence that says where a lies from b, from either end."""
    if generator.random() < 0.5:
        a, b, place = b, a, INVERSE[place]
    words = {
        "left of": ("left of", "to the left of"),
        "right of": ("right of", "to the right of"),
        "above": ("above", "over"),
        "below": ("below", "under"),
    }[place]
    word = words[generator.integers(2)]
    form = generator.random()
    if form < 0.6:
        return f"{a} {word} {b}"
    return f"{word} {b} is {a}" if form < 0.8 else f"{word} {b} there is {a}"


# ---- reading ---------------------------------------------------------------------------------------------------


def read(caption: str) -> Description:
    """Return what a caption says. Raises DataError, naming the word, where it cannot be read."""
    return _Reader(caption).sentence()


class _Reader:
    """Read one caption from left to right.

    sentence: part (["and"] part)*;  part: ["is"] phrase | phrase ["is"] place phrase | place phrase ["is"] phrase;
    phrase: [number] attribute* noun ["that" "is" attribute* ("and" attribute)*]. "are" is read as "is" is.
    """

    def __init__(self, caption: str) -> None:
        self.caption = caption
        self.words = [word for word in re.findall(r"[\w'-]+", caption.lower()) if word not in FILLERS]
        self.at = 0

    def sentence(self) -> Description:
        objects: list[Wanted] = []
        place, placed = "", []
        while True:
            found, where = self.part()
            if where and place:
                raise self.error("it says two places, and one is the most")
            if where:
                place, placed = where, found
            else:
                objects += found
            if not self.take("and") and self.word() == "":
                break
        if len(placed) + len(objects) > 3:
            raise self.error(f"it asks for {len(placed) + len(objects)} objects, and three is the most")
        return Description.of([*placed, *objects], place)

    def part(self) -> tuple[list[Wanted], str]:
        """Return the objects of one part, and the place of the first from the second ("" for none)."""
        if self.word() in PLACES:
            place = self.words[self.at]
            self.at += 1
            b = self.phrase()
            self.take("is", "are")
            return self.placed(self.phrase(), b, place)
        self.take("is", "are")  # of "there is"
        a = self.phrase()
        self.take("is", "are")
        if self.word() not in PLACES:
            return a, ""
        place = self.words[self.at]
        self.at += 1
        return self.placed(a, self.phrase(), place)

    def placed(self, a: list[Wanted], b: list[Wanted], word: str) -> tuple[list[Wanted], str]:
        if len(a) != 1 or len(b) != 1:
            raise self.error("a place is between two single objects")
        place, swapped = PLACES[word]
        return ([*b, *a] if swapped else [*a, *b]), place

    def phrase(self) -> list[Wanted]:
        number = NUMBERS.get(self.word(), 0)
        self.at += number > 0
        attributes = self.attributes()
        noun = self.word()
        if noun not in NOUNS:
            raise self.error(
                f"a shape was expected at '{noun}'{nearest(noun, NOUNS)}" if noun else "a shape is missing"
            )
        if number < 2 and noun != NOUNS[noun]:
            raise self.error(f"'{noun}' are several: say 'two {noun}' or 'three {noun}'")
        self.at += 1
        if self.take("that"):
            self.take("is", "are")
            attributes += self.attributes()
            while self.word() == "and" and self.word(1) in (*COLORS, *SIZES):
                self.at += 1
                attributes += self.attributes()
        return [self.wanted(NOUNS[noun], attributes)] * max(number, 1)

    def wanted(self, shape: str, attributes: Sequence[str]) -> Wanted:
        colors = [word for word in attributes if word in COLORS]
        sizes = [word for word in attributes if word in SIZES]
        if len(colors) > 1 or len(sizes) > 1:
            raise self.error(f"one {shape} has several colours or sizes: {', '.join(attributes)}")
        return Wanted(shape, "".join(colors), "".join(sizes))

    def attributes(self) -> list[str]:
        found = []
        while self.word() in COLORS or self.word() in SIZES:
            found.append(self.word())
            self.at += 1
        return found

    def word(self, ahead: int = 0) -> str:
        return self.words[self.at + ahead] if self.at + ahead < len(self.words) else ""

    def take(self, *words: str) -> bool:
        taken = self.word() in words
        self.at += taken
        return taken

    def error(self, reason: str) -> DataError:
        return DataError(
            f"The caption '{self.caption}' cannot be read as a scene: {reason.removesuffix('?')}"
            + ("?" if reason.endswith("?") else ".")
        )


# ---- judging ---------------------------------------------------------------------------------------------------


def follow(description: Description, scene: Scene) -> Followed:
    """Return how well a scene, parsed or true, follows a description.

    Of a scene from `shapes.patches`, the patches that fit no shape are no objects, but spoil the count.
    """
    wanted, patches = description.objects, scene
    scene = tuple(item for item in patches if item.fit >= LEAST_FIT)
    color = _share([item.color for item in wanted if item.color], [item.color for item in scene])
    shape = _share([item.shape for item in wanted], [item.shape for item in scene])
    count = float(len(patches) == len(scene) == len(wanted))
    binding, placed = _matched(description, scene)
    position = placed if description.place else None
    correct = float(count == 1 and binding == 1 and position != 0)
    return Followed(color, shape, count, binding, position, correct)


def _share(wanted: Sequence[str], found: Sequence[str]) -> float:
    """Return the share of wanted names that are found, each as often as wanted."""
    return (Counter(wanted) & Counter(found)).total() / len(wanted) if wanted else 1.0


def _matched(description: Description, scene: Scene) -> tuple[float, float]:
    """Return the share of wanted objects that are found, and 1 if those of the place lie so, for the best match."""
    wanted = description.objects
    choices = [[*(i for i in range(len(scene)) if want.fits(scene[i])), None] for want in wanted]
    best = (0.0, 0.0)
    for chosen in itertools.product(*choices):
        taken = [i for i in chosen if i is not None]
        if len(set(taken)) < len(taken):
            continue
        best = max(best, (len(taken) / len(wanted), _lies(description, scene, chosen)))
    return best


def _lies(description: Description, scene: Scene, chosen: Sequence[int | None]) -> float:
    """Return 1 if the first two chosen objects lie as a description asks, else 0."""
    if not description.place or chosen[0] is None or chosen[1] is None:
        return 0.0
    return float(lies(scene[chosen[0]], scene[chosen[1]], description.place))
