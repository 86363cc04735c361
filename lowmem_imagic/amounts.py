"""Amounts in words for a person."""

import math


def duration(seconds: float) -> str:
    """A time in words, rounded: seconds, minutes, or hours and minutes. Only no time at all is "0 s"."""
    if seconds < 90:
        return f"{math.ceil(seconds) if seconds < 1 else round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
