"""Recognises pictures in a folder that are no photos, from a few of their bytes."""

import os
import struct

from ..storage.regular_files import open_regular
from .containers import png_chunks

_APPLE_DOUBLE = b"\x00\x05\x16\x07"
_HEAD_BYTES = 1 << 16


def is_apple_double(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a companion file of macOS, written on foreign disks."""
    return _head(path, 4) == _APPLE_DOUBLE


def png_text(path: str | os.PathLike[str]) -> dict[str, str]:
    """The short plain texts before the pixels of a PNG file; empty for any other file."""
    data = _head(path, _HEAD_BYTES)
    texts = dict[str, str]()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return texts
    try:
        for kind, start, end in png_chunks(data):
            if kind == b"IDAT":
                break
            if kind == b"tEXt" and end - start <= 1024:
                keyword, _, text = data[start:end].partition(b"\0")
                texts[keyword.decode("latin-1")] = text.decode("latin-1")
    except struct.error:
        pass
    return texts


def _head(path: str | os.PathLike[str], count: int) -> bytes:
    """The first bytes of a regular file; empty if it cannot be read."""
    try:
        with open_regular(path) as (file, _):
            return file.read(count)
    except (OSError, ValueError):
        return b""
