"""Reads and writes JSON that is bounded, finite and unambiguous.

The standard parser accepts duplicate keys and NaN, recurses to any depth, and takes quadratic time for a long
integer; this module refuses all of these.
"""

import json
import math
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..errors import EditHeaderError

MAX_JSON_DEPTH = 16
"""Deepest nesting of objects and arrays in one JSON text."""
MAX_JSON_TOKENS = 1_000_000
"""Most quotes, escapes, brackets and commas in one JSON text; limits the time and memory of parsing."""

_JSON_TOKEN = re.compile(r'["\[\]{},]|\\.', re.DOTALL)
# C0 and C1 controls except tab, line feed and carriage return, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def canonical_json(value: object) -> str:
    """Returns compact JSON with sorted keys: equal texts mean equal values of equal types."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))


def dump_json(value: object, where: str) -> str:
    """Returns canonical JSON that :func:`load_json` accepts.

    Raises:
        EditHeaderError: `value` is too deep or too long; `where` names it in the message.
    """
    text = canonical_json(value)
    _check_extent(text, where)
    return text


def load_json(text: str, where: str) -> Any:
    """Returns the value of a JSON text without duplicate keys, non-finite numbers or integers above 64 bits.

    Raises:
        EditHeaderError: The text is anything else; `where` names it in the message.
    """
    _check_extent(text, where)
    return parse_json(text, where)


def parse_json(text: str, where: str) -> Any:
    """Returns the value of a JSON text like :func:`load_json`; the caller limits the text's size and depth.

    Raises:
        EditHeaderError: See :func:`load_json`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise EditHeaderError(f"{where}: key {reprlib.repr(twice)} occurs twice")
        return values

    def finite(digits: str) -> float:
        if math.isinf(number := float(digits)):
            raise EditHeaderError(f"{where}: number {reprlib.repr(digits)} is too large")
        return number

    def bounded(digits: str) -> int:
        if len(digits) > 20 or abs(number := int(digits)) >= 2**64:
            raise EditHeaderError(f"{where}: integer {reprlib.repr(digits)} is too large")
        return number

    def refuse(name: str) -> None:
        raise EditHeaderError(f"{where}: found {name}, expected finite numbers")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_int=bounded, parse_constant=refuse)
    except RecursionError as error:
        raise EditHeaderError(f"{where}: nested too deeply") from error
    except ValueError as error:
        raise EditHeaderError(f"{where}: not valid JSON ({error})") from error


def plain_json(value: object, where: str, depth: int = 1) -> Any:
    """Returns a deep copy of `value` made only of dict, list, str, int, float, bool and None.

    Args:
        value: Nested mappings, lists and tuples of JSON-able scalars.
        where: Names the value in messages; parts are appended to it.
        depth: Nesting level that `value` itself has in the final JSON text.

    Raises:
        EditHeaderError: A part is of another type, not finite, not printable, or nested too deeply.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if _UNPRINTABLE.search(value):
            raise EditHeaderError(f"{where}: found control characters in {reprlib.repr(str.__str__(value))}")
        return str.__str__(value)  # the plain text of a string enumeration
    if isinstance(value, int | float):
        if not abs(value) <= (2**64 - 1 if isinstance(value, int) else sys.float_info.max):
            raise EditHeaderError(f"{where}: found a number that is not finite or too large")
        return int(value) if isinstance(value, int) else float(value)
    if depth > MAX_JSON_DEPTH:
        raise EditHeaderError(f"{where}: nested more than {MAX_JSON_DEPTH} levels deep")
    if isinstance(value, list | tuple):
        return [plain_json(part, f"{where}[{i}]", depth + 1) for i, part in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or len(key) > 200 or _UNPRINTABLE.search(key):
                raise EditHeaderError(f"{where}: key {reprlib.repr(key)} is not printable text of up to 200 characters")
        return {str.__str__(key): plain_json(part, f"{where}.{key}", depth + 1) for key, part in value.items()}
    raise EditHeaderError(f"{where}: found a {type(value).__name__}, expected numbers, text, lists or mappings")


def _check_extent(text: str, where: str) -> None:
    """Checks depth and size before the JSON parser runs, as the parser recurses and allocates."""
    depth = 0
    inside_string = False
    for count, match in enumerate(_JSON_TOKEN.finditer(text)):
        token = match.group()
        if token == '"':
            inside_string = not inside_string
        elif not inside_string and token in "[{":
            depth += 1
        elif not inside_string and token in "]}":
            depth -= 1
        if depth > MAX_JSON_DEPTH:
            raise EditHeaderError(f"{where}: nested more than {MAX_JSON_DEPTH} levels deep")
        if count >= MAX_JSON_TOKENS:
            raise EditHeaderError(f"{where}: more than {MAX_JSON_TOKENS} JSON tokens")
