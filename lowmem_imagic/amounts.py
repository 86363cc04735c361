"""Amounts in words for a person."""

import math


def counted(count: int, noun: str) -> str:
    """A number of things in words, as "1 picture" or "2 pictures"; the plural of `noun` has an s at its end."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time in words, rounded: seconds, minutes, or hours and minutes. Only no time at all is "0 s"."""
    if seconds < 90:
        return f"{math.ceil(seconds) if seconds < 1 else round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
