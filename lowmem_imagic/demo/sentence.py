"""Reads a sentence about the bundled world, word by word; a sentence that is not wholly understood is refused.

Words that describe stand directly before the shape they belong to ("a small red cube"); a pose may also follow it ("a
cone lying on sand"). A pattern follows its object, with its own colour before it ("with cyan stripes"). A floor and a
backdrop belong to the scene, wherever they stand.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import PromptError
from .attributes import COLORS, FLOORS, LYING_SHAPES, MATERIALS, POSES, SHAPES, SIZES
from .strangers import GROUNDS, LETTERS, PAINTS, PATTERNS, SCREENS

WORDS: Mapping[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": (*COLORS, *PAINTS),
    "material": MATERIALS,
    "size": tuple(SIZES),
    "pose": POSES,
    "pattern": PATTERNS,
    "floor": (*FLOORS, *GROUNDS),
    "backdrop": SCREENS,
}
"""The words that a sentence may have, by their kind."""
_KINDS = {word: kind for kind, words in WORDS.items() for word in words}
_OTHER_FORMS = {
    **{"ball": "sphere", "box": "cube", "block": "cube"},
    **{"wood": "wooden", "tile": "tiled", "tiles": "tiled", "rock": "stone", "lawn": "grass"},
    **{"stripe": "stripes", "ring": "rings", "dot": "dots", "check": "checks", "half": "halves"},
    **{"hill": "hills", "curtains": "curtain", "walls": "wall", "fences": "fence", "gray": "grey"},
}
_SCENERY = ("floor", "backdrop")
_PLACES = {"on": "floor", "front": "backdrop", "before": "backdrop"}
"""Words of place, and the kind of thing that they need: two objects always stand side by side."""
_FLOOR_NOUNS = ("floor", "ground")
_CAPTION_WORDS = ("a", "an", "the", "of", "and", "with", "photo", "photograph", "picture", "image", "background")
_JOINING_WORDS = ("in", "at", "to", "next", "beside", "near", "there", "is", "are", "that", "which")
_FILLERS = {*_CAPTION_WORDS, *_JOINING_WORDS, *_FLOOR_NOUNS, *_PLACES}
_PUNCTUATION = re.compile(r"""[\s.,;:!?'"()\[\]/\u2018\u2019\u201c\u201d\u2013\u2014-]+""")
_EXAMPLE = "as in 'a red cube with cyan stripes on a wooden floor'"


@dataclass
class ObjectWords:
    """What a sentence says of one object."""

    said: dict[str, str]
    """Words by their kind; the shape is always there."""
    pattern_color: str | None = None
    letter: str | None = None
    """One of `LETTERS`, with the pattern "letter"."""


@dataclass
class Reading:
    """What a sentence says."""

    objects: list[ObjectWords] = field(default_factory=list)
    """One or two."""
    scenery: dict[str, str] = field(default_factory=dict)
    """Words for floor and backdrop, by their kind."""


def known_words() -> str:
    """All words that a sentence may have, by their kind, on one line."""
    return "; ".join(f"{kind}s {', '.join(map(_shown, words))}" for kind, words in WORDS.items())


def read_sentence(sentence: str) -> Reading:
    """What the sentence says.

    Raises:
        PromptError: the sentence has words that are unknown, belong to nothing or contradict each other, or other than
            one or two shapes; names all of these words.
    """
    reader = _Reader([word for word in _PUNCTUATION.split(sentence) if word])
    problems, count = [], len(reader.reading.objects)
    if not 1 <= count <= 2:
        problems.append(
            f"found {count} shapes in {sentence!r}; a scene has one or two of {', '.join(SHAPES)}, "
            'as in "a red cube on a wooden floor"'
        )
    problems += reader.problems
    if reader.unknown:
        unknown = ", ".join(map(repr, dict.fromkeys(reader.unknown)))
        problems.append(f"unknown: {unknown}; known: {known_words()}")
    if problems:
        raise PromptError("; ".join(dict.fromkeys(problems)))
    return reader.reading


class _Reader:
    """Reads words from the first to the last, and collects what is wrong with them."""

    def __init__(self, words: list[str]) -> None:
        self.reading = Reading()
        self.problems: list[str] = []
        self.unknown: list[str] = []
        self._waiting: dict[str, str] = {}
        """Words that describe what has not come yet, by their kind."""
        self._place = ""
        """The last word of place, until the thing has come that it needs."""
        self._rest = iter(words)
        self._ahead = next(self._rest, "")
        while self._ahead:
            self._take(self._advance())
        self._end_phrase()
        self._arrive("")

    def _advance(self) -> str:
        word, self._ahead = self._ahead, next(self._rest, "")
        return word

    def _take(self, said: str) -> None:
        """Reads one word, and the letter after "letter"."""
        word = _plain(said)
        kind = _KINDS.get(word)
        if kind is None and word not in _FILLERS:
            self.unknown.append(said)
            # What was waiting belongs to the unknown word.
            self._waiting.clear()
            self._place = ""
        elif kind is None:
            if word != "and":
                self._end_phrase()
            if word in _FLOOR_NOUNS:
                self._arrive("floor")
            self._place = word if word in _PLACES else self._place
        elif kind == "shape":
            self._arrive(kind)
            self._shape(word)
        elif kind == "pattern":
            self._arrive(kind)
            self._pattern(word)
            self._check_end(said, kind)
        elif kind in _SCENERY:
            self._end_phrase()
            self._arrive(kind)
            self._say(self.reading.scenery, kind, word, "a scene")
            self._check_end(said, kind)
        else:
            self._say(self._waiting, kind, word, "an object")

    def _shape(self, shape: str) -> None:
        if self._waiting.get("pose") == "lying" and shape not in LYING_SHAPES:
            self.problems.append(_cannot_lie(shape))
        self.reading.objects.append(ObjectWords({**self._waiting, "shape": shape}))
        self._waiting = {}

    def _pattern(self, pattern: str) -> None:
        color = self._waiting.pop("colour", None)
        self._end_phrase()
        letter = None
        if pattern == "letter" and len(self._ahead) == 1:
            letter = self._advance().upper()
            if letter not in LETTERS:
                self.problems.append(f"no letter {letter} can be painted on an object, only {', '.join(LETTERS)}")
        if self.reading.objects:
            owner = self.reading.objects[-1]
            self._say(owner.said, "pattern", pattern, "an object")
            owner.pattern_color, owner.letter = color, letter
        elif not self.unknown:
            self.problems.append(f"{pattern!r} comes before any object; say it after its object, {_EXAMPLE}")

    def _say(self, place: dict[str, str], kind: str, word: str, owner: str) -> None:
        """Notes a word of which `owner` has one."""
        if place.setdefault(kind, word) != word:
            self.problems.append(
                f"{place[kind]!r} and {word!r} contradict each other, because {owner} has one {kind}; "
                f"say one of {', '.join(map(_shown, WORDS[kind]))}"
            )

    def _end_phrase(self) -> None:
        """Gives a pose to the object before it; no other word may be left."""
        for kind, word in self._waiting.items():
            if kind == "pose" and self.reading.objects:
                owner = self.reading.objects[-1].said
                if word == "lying" and owner["shape"] not in LYING_SHAPES:
                    self.problems.append(_cannot_lie(owner["shape"]))
                self._say(owner, kind, word, "an object")
            else:
                self.problems.append(f"{word!r} belongs to no object; say it directly before a shape, {_EXAMPLE}")
        self._waiting = {}

    def _arrive(self, kind: str) -> None:
        """Checks that a thing of this kind may follow the last word of place."""
        if self._place and kind != _PLACES[self._place]:
            needed = _PLACES[self._place]
            self.problems.append(
                f"{self._place!r} needs a {needed}, one of {', '.join(WORDS[needed])}; objects stand side by side"
            )
        self._place = ""

    def _check_end(self, said: str, kind: str) -> None:
        """Checks that the word, a noun, does not describe the next word, as in "a wooden cube"."""
        following = _KINDS.get(_plain(self._ahead))
        if following is not None and following != kind and following != "pose":
            self.problems.append(f"{said!r} is a {kind} and cannot describe {self._ahead!r}")


def _plain(word: str) -> str:
    """The known form of a word."""
    word = word.lower()
    return _OTHER_FORMS.get(word, word)


def _shown(word: str) -> str:
    """A known word as lists of words have it."""
    return f"letter {'/'.join(LETTERS)}" if word == "letter" else word


def _cannot_lie(shape: str) -> str:
    return f"a {shape} cannot lie, only {' and '.join(LYING_SHAPES)} can"
