r"""Text from a file, a name or a configuration, made safe to show to a person.

A sentence, a file name or a message of a library may hold anything: escape codes that a terminal obeys, line ends that
forge a line of a listing, marks that reverse the text after them, invisible letters. `shown` is the one place that
makes them visible; everything that prints, labels or lists such text calls it. Data (JSON, the edit file, a picture's
text entries) keeps the exact text.

Letters of every script stay, right-to-left ones too, and so do accents and the joiners that some scripts and emoji
need. Characters that this Python's Unicode tables do not know are escaped.
"""

import re
from unicodedata import category

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Categories without a shape of their own: controls, formats, surrogates, private, unassigned, line ends."""
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters and marks without a visible shape."""
_SIGNS = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd")
"""Formats that are signs, seen under or around numbers."""
_JOINERS = "\u200c\u200d"
_LINE_ENDS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")


def shown(text: str) -> str:
    r"""The text on one line, with everything in it that could mislead the reader of a terminal escaped, as ``\u202e``.

    Controls, line ends, marks of direction, invisible and unknown characters and halves of surrogate pairs. Applied
    twice it changes nothing more.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if _misleads(text, place) else c for place, c in enumerate(text))


def one_line(text: str) -> str:
    r"""The exact text, except for its line ends, which are escaped: for formats in which a line has a meaning."""
    return _LINE_ENDS.sub(lambda end: _escaped(end[0]), text)


def _misleads(text: str, place: int) -> bool:
    """Whether the character at a place has to be escaped."""
    character = text[place]
    if character in _JOINERS:
        return not (0 < place < len(text) - 1 and _joins(text[place - 1]) and _joins(text[place + 1]))
    return character in _BLANK or (category(character) in _HIDDEN and character not in _SIGNS)


def _joins(character: str) -> bool:
    """Whether a joiner beside this character has an effect: scripts from Arabic to Khmer and Mongolian, and emoji."""
    kind = category(character)
    if kind[0] in "LM":
        return "\u0600" <= character <= "\u1cff" or character == "\ufe0f" or "\ua840" <= character <= "\uabff"
    return kind in ("So", "Sk") and character not in _BLANK


def _escaped(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode() if character > "\xff" else ascii(character)[1:-1]
