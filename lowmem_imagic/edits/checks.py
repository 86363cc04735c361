"""Checks of single values, for the constructors of an edit and the reader of its file alike.

Errors name the value's place in the file (`key`), the value, and the expected form.
"""

import re
import reprlib
import sys
from collections.abc import Mapping, Set
from datetime import datetime
from typing import Any

from ..errors import EditHeaderError
from ..storage.strict_json import plain_json

_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}:[0-9]{2}(Z|[+-][0-9]{2}:[0-9]{2})?)?")


def wrong(key: str, value: object, expected: str) -> EditHeaderError:
    """Returns the error for an unusable value, in one line of bounded length."""
    return EditHeaderError(f"{key}: found {reprlib.repr(value)}, expected {expected}")


def require(ok: object, key: str, value: object, expected: str) -> None:
    """Guarantees that `ok` holds."""
    if not ok:
        raise wrong(key, value, expected)


def text(value: object, key: str, limit: int, *, lines: bool = False) -> str:
    """Returns `value`, checked to be printable, not blank, not too long, and one line unless `lines`."""
    ok = isinstance(value, str) and 1 <= len(value) <= limit and not value.isspace()
    ok = ok and (lines or not set("\t\n\r") & set(str(value)))
    require(ok, key, value, f"{'text' if lines else 'one line'} of 1 to {limit} characters")
    return str(plain_json(value, key))


def is_text(value: object, limit: int) -> bool:
    """Returns whether `text` would return a value as it is."""
    try:
        return text(value, "", limit) == value
    except EditHeaderError:
        return False


def exactly(value: object, key: str, names: Set[str]) -> dict[str, Any]:
    """Returns `value`, checked to be a JSON object with exactly the named members."""
    if not isinstance(value, dict):
        raise EditHeaderError(f"{key}: expected a JSON object")
    if unlike := sorted(set(value) ^ names):
        fault = "missing" if unlike[0] in names else "not a member of this format"
        raise EditHeaderError(f"{key}: {reprlib.repr(unlike[0])} is {fault}")
    return value


def matches(value: object, pattern: re.Pattern[str], key: str, expected: str) -> None:
    """Guarantees text of the given form."""
    require(isinstance(value, str) and pattern.fullmatch(value), key, value, expected)


def integer(value: object, key: str, low: int, high: int) -> int:
    """Returns `value`, checked to be an integer in the closed range."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return int(value)
    raise wrong(key, value, f"an integer from {low} to {high}")


def number(value: object, key: str) -> float:
    """Returns `value` as a float, checked to be finite."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    raise wrong(key, value, "a finite number")


def mapping(value: object, key: str) -> Mapping[str, Any]:
    """Returns `value`, checked to be a mapping."""
    if not isinstance(value, Mapping):
        raise EditHeaderError(f"{key}: found a {type(value).__name__}, expected a mapping")
    return value


def date(created: object) -> None:
    """Guarantees an existing date in ISO 8601."""
    try:
        valid = isinstance(created, str) and _DATE.fullmatch(created)
        if valid and datetime.fromisoformat(str(created).replace("Z", "+00:00")):
            return
    except ValueError:  # well formed, but not in the calendar
        pass
    raise EditHeaderError(f"modelspec.date: found {reprlib.repr(created)}, expected a date as 2025-12-31")
