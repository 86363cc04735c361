"""Parses any supported file by its format."""

import struct
import zlib
from collections.abc import Callable, Mapping

from . import boxes, containers, tiff
from .contents import Contents
from .formats import Format

UNREADABLE = (ValueError, LookupError, ArithmeticError, struct.error, zlib.error)
"""Errors of these functions on damaged bytes."""

_BY_NAME: Mapping[str, Callable[[bytes, int], Contents]] = {
    "JPEG": containers.examine_jpeg,
    "PNG": containers.examine_png,
    "WEBP": containers.examine_webp,
    "GIF": containers.examine_gif,
    "TIFF": lambda data, _: tiff.examine(data),
    "AVIF": boxes.examine_heif,
    "HEIF": boxes.examine_heif,
    "BMP": containers.examine_bmp,
    "JPEG2000": boxes.examine_jpeg2000,
    "PPM": containers.examine_ppm,
}


def examine(data: bytes, kind: Format, *, max_pixels: int) -> Contents:
    """The contents of a file in a format, without decoding pixels.

    Raises:
        NotThisKind: The file looks like the format but is of another kind.
        TooCostly: Decoding would take more than a photo does.
        UNREADABLE: The file is damaged.
    """
    return _BY_NAME[kind.name](data, max_pixels)
