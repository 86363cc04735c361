"""Messages with the command line's flags in place of the names of settings."""

import re

from ..errors import SETTING
from ..settings.options import OPTIONS

_FLAGS = {place.rpartition(".")[2]: option.flag for option in OPTIONS for place in option.fills if "sample." in place}
"""Flags by the names of options and of the settings they fill; sampling settings also without their stage."""
_FLAGS |= {place: option.flag for option in OPTIONS for place in option.fills}
_FLAGS |= {option.name: option.flag for option in OPTIONS}


def with_flags(text: str) -> str:
    """A message with the command line's flags in place of the names of settings."""

    def flag(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if name not in _FLAGS:
            return match[0]
        return _FLAGS[name] if value is None else f"{_FLAGS[name]} {value}"

    return SETTING.sub(flag, text)
