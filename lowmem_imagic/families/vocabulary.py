"""The words of a base that knows only a few: what it can be told, and what its training sentences said."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import IncompleteModelError
from .files.source import WORDS

MAX_GROUPS = 16
MAX_WORDS = 64
"""Most words of a group, and most letters of a word or piece."""
_WORD = re.compile(r"[a-z]{1,64}")
_WORDS = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_GAP = re.compile(r"\{([a-z]+)\}")
_PIECE = re.compile(r"[a-z ]*(\{[a-z]+\})?[a-z ]*")
_ARTICLE = re.compile(r"\ba (?=[aeiou])")
_FILLERS = frozenset(("a", "an", "the", "of", "on", "in", "at", "by", "to", "with", "and", "is", "it", "its", "this"))
"""English words that name nothing; a sentence may have them, known or not."""


@dataclass(frozen=True)
class Vocabulary:
    """The words that a base knows, by kind, and the sentences that it was trained with.

    Raises:
        IncompleteModelError: pieces and groups do not belong together, or there are too many.
    """

    groups: Mapping[str, tuple[str, ...]]
    """Words by their kind, such as "colour"; the kind that a sentence cannot do without comes first."""
    pieces: tuple[str, ...]
    """The parts of a full sentence, each with the gap of one kind, as ``on a {floor} floor``, or with none."""

    def __post_init__(self) -> None:
        gaps = [gap for piece in self.pieces for gap in _GAP.findall(piece)]
        sound = (
            1 <= len(self.groups) <= MAX_GROUPS
            and sorted(gaps) == sorted(self.groups)
            and all(_WORD.fullmatch(name) and 1 <= len(words) <= MAX_WORDS for name, words in self.groups.items())
            and all(_WORD.fullmatch(word) for words in self.groups.values() for word in words)
            and all(len(piece) <= MAX_WORDS and _PIECE.fullmatch(piece) for piece in self.pieces)
        )
        if not sound:
            raise IncompleteModelError(
                f"{WORDS} is unusable; expected groups of words, and pieces of a sentence with a gap for each group"
            )

    @staticmethod
    def of(values: Mapping[str, Any]) -> "Vocabulary":
        """The vocabulary that a model's file describes: ``{"groups": {...}, "pieces": [...]}``.

        Raises:
            IncompleteModelError: it describes none.
        """
        groups, pieces = values.get("groups"), values.get("pieces")
        lists = [pieces, *groups.values()] if isinstance(groups, dict) else [None]
        if not all(isinstance(some, list) and all(isinstance(one, str) for one in some) for some in lists):
            raise IncompleteModelError(f"{WORDS} is unusable; expected groups and pieces, each a list of texts")
        assert isinstance(groups, dict) and isinstance(pieces, list)
        return Vocabulary({name: tuple(words) for name, words in groups.items()}, tuple(pieces))

    def sentence(self, chosen: Mapping[str, str]) -> str:
        """The sentence with one word for each of some kinds; the pieces of other kinds are left out."""
        said = []
        for piece in self.pieces:
            gap = _GAP.search(piece)
            if gap is None:
                said.append(piece)
            elif gap[1] in chosen:
                said.append(piece.replace(gap[0], chosen[gap[1]]))
        return _ARTICLE.sub("an ", " ".join(said))

    def unknown(self, sentence: str) -> list[str]:
        """The words of a sentence that the base does not know, each once, in lower case."""
        known = {word for words in self.groups.values() for word in words} | _FILLERS
        known |= {word for piece in self.pieces for word in _WORDS.findall(_GAP.sub("", piece))}
        return [word for word in dict.fromkeys(_WORDS.findall(sentence.lower())) if word not in known]

    def __str__(self) -> str:
        """The words by kind, in one line."""
        return "; ".join(f"{name}: {', '.join(words)}" for name, words in self.groups.items())
