"""Parses directories of TIFF files and of Exif blocks, which are TIFF files too.

A directory may point anywhere in its file, also several times to the same place, so the sizes it claims can add up to
far more than the file. This module reads tags only on request. The decoder gets a file of one directory with only the
tags for the pixels (TIFF 6.0 of 1992; BigTIFF; DNG 1.7 and TIFF/EP for the signs of camera raw).
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .contents import MAX_PROFILE_BYTES, Calibrated, Contents, Icc, NotThisKind, Signal, Srgb, TooCostly, Unheeded
from .spaces import ADOBE_RGB

RAW = "a camera raw file, which holds a sensor's values; develop it to JPEG or TIFF first"

_MAX_DIRECTORIES = 1000
_MAX_TILE_BYTES = 64 * 2**20
_TYPES = {1: "B", 2: "B", 3: "H", 4: "I", 5: "II", 6: "b", 7: "B", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d", 13: "I"}
_TYPES |= {16: "Q", 17: "q", 18: "Q"}

SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 255, 256, 257, 258, 259, 262
ORIENTATION, SAMPLES, TILE_WIDTH, TILE_HEIGHT, SUB_DIRECTORIES = 274, 277, 322, 323, 330
TRANSFER, WHITE, PRIMARIES, EXIF, PROFILE, XMP, DNG_VERSION = 301, 318, 319, 34665, 34675, 700, 50706
COLOUR_SPACE, INTEROPERABILITY, GAMMA = 40961, 40965, 42240
_FILTER_ARRAY, _LINEAR_RAW = 32803, 34892
_RAW_COMPRESSIONS = {32767, 32769, 32770, 34713, 65000, 65535}  # of Sony, Samsung, Nikon, Kodak, Pentax

_PIXEL_TAGS = {
    *(WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, TILE_WIDTH, TILE_HEIGHT),
    *(266, 273, 278, 279, 284, 292, 293, 317, 320, 324, 325, 332, 334, 338, 339, 347),
    *range(512, 522),
    *(529, 530, 531, 532, 50674),
}
"""Fill order, strips, tiles, planes, fax options, predictor, palette, inks, sample format, JPEG tables, YCbCr, LERC."""


class Source(Protocol):
    """Bytes, or a file that is read in slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: slice, /) -> bytes: ...


def _unpack(layout: str, data: Source, at: int) -> tuple[Any, ...]:
    """The numbers at a position.

    Raises:
        struct.error: The position is outside of the data.
    """
    return struct.unpack(layout, data[at : at + struct.calcsize(layout)])


@dataclass(frozen=True)
class Directory:
    """One directory of a file: tags with type, count and position of their values."""

    data: Source
    order: str
    entries: dict[int, tuple[int, int, int]]
    raw: dict[int, bytes]

    def numbers(self, tag: int, most: int = 16) -> tuple[float, ...]:
        """The numbers of a tag, fractions divided; empty if it is missing, damaged or has more than `most`."""
        kind, count, place = self.entries.get(tag, (0, 0, 0))
        code = _TYPES.get(kind, "")
        if not code or not 0 < count <= most or place + count * struct.calcsize("=" + code) > len(self.data):
            return ()
        values = _unpack(f"{self.order}{count * len(code)}{code[0]}", self.data, place)
        if len(code) == 2:
            return tuple(top / bottom if bottom else 0.0 for top, bottom in zip(values[::2], values[1::2], strict=True))
        return values

    def number(self, tag: int, otherwise: int = 0) -> int:
        """The first number of a tag."""
        numbers = self.numbers(tag, most=65536)
        return int(numbers[0]) if numbers and numbers[0] == numbers[0] and abs(numbers[0]) < 2**64 else otherwise

    def text(self, tag: int, most: int = MAX_PROFILE_BYTES) -> bytes:
        """The bytes of a tag; empty if it is missing or has more than `most`."""
        kind, count, place = self.entries.get(tag, (0, 0, 0))
        code = _TYPES.get(kind, "")
        length = count * struct.calcsize("=" + code) if code else 0
        return self.data[place : place + length] if 0 < length <= most else b""

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.number(WIDTH) * self.number(HEIGHT)

    @property
    def is_reduced(self) -> bool:
        """Whether it is marked as a smaller copy of another picture in the file."""
        return bool(self.number(SUBFILE) & 1) or self.number(OLD_SUBFILE) == 2

    @property
    def is_mask(self) -> bool:
        """Whether it is marked as the opacity of another picture."""
        return bool(self.number(SUBFILE) & 4) or self.number(PHOTOMETRIC) == 4


def directories(data: Source) -> Iterator[Directory]:
    """Yields the readable directories of a TIFF file or Exif block, each once, at most 1000."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        return
    big = 43 in data[2:4]
    place = _unpack(order + ("Q" if big else "I"), data, 8 if big and len(data) >= 16 else 4)[0]
    seen = set[int]()
    while place and place not in seen and len(seen) < _MAX_DIRECTORIES:
        seen.add(place)
        entry = directory_at(data, place)
        if entry is None:
            return
        directory, place = entry
        yield directory


def directory_at(data: Source, place: int) -> tuple[Directory, int] | None:
    """The directory at a position, and the position of the next one (0 for none); None if there cannot be one."""
    order, big = {b"II": "<", b"MM": ">"}[data[:2]], 43 in data[2:4]
    layout = struct.Struct(order + ("HHQ8s" if big else "HHI4s"))
    head, pointer = (8, "Q") if big else (2, "I")
    if place + head > len(data):
        return None
    count = _unpack(order + ("Q" if big else "H"), data, place)[0]
    first = place + head
    count = min(count, 65535, (len(data) - first) // layout.size)
    entries, raw = dict[int, tuple[int, int, int]](), dict[int, bytes]()
    value_at = layout.size - (8 if big else 4)
    table = data[first : first + count * layout.size]
    for number, (tag, kind, length, value) in enumerate(layout.iter_unpack(table)):
        at = first + number * layout.size
        size = length * struct.calcsize("=" + _TYPES.get(kind, ""))
        where = at + value_at if size <= len(value) else struct.unpack(order + pointer, value)[0]
        entries[tag] = (kind, length, where)
        raw[tag] = table[number * layout.size : (number + 1) * layout.size]
    end = first + count * layout.size
    after = _unpack(order + pointer, data, end)[0] if end + (8 if big else 4) <= len(data) else 0
    return Directory(data, order, entries, raw), after


def examine(data: bytes) -> Contents:
    """The contents of a TIFF file; the decoder gets a TIFF file with only the main picture.

    Raises:
        NotThisKind: The file is a camera raw file.
        TooCostly: Tiles or tables are far larger than the picture.
    """
    pages, inside = _all(data)
    first = pages[0]
    if data[8:10] == b"CR" or DNG_VERSION in first.entries or any(map(_is_raw, [*pages, *inside])):
        raise NotThisKind(RAW)
    if data[:4] == b"MM\0+":
        raise NotThisKind("a BigTIFF file with its high bytes first, which Pillow does not read; save it as plain TIFF")
    page = _picture(pages, inside)
    notes = []
    if page is not first:
        size, small = (f"{one.number(WIDTH)} x {one.number(HEIGHT)}" for one in (page, first))
        notes.append(f"its first picture is a thumbnail of {small}, the one of {size} was used")
    elif len(pages) > 1:
        count = "more than 1000" if len(pages) >= _MAX_DIRECTORIES else len(pages)
        notes.append(f"first page of {count} used")
    if page.is_reduced:
        notes.append("it is marked as a reduced copy, and the file has no other picture")
    _check_extent(page)
    signals: list[Signal] = list(colour_of(page, "the numbers in its TIFF tags"))
    # A second picture has its own tags; a profile at the first picture only applies to both.
    if page is not first and not signals:
        signals = colour_of(first, "the numbers in its TIFF tags")
    return Contents(
        data=_alone(data, page),
        width=page.number(WIDTH),
        height=page.number(HEIGHT),
        bits=int(max(page.numbers(BITS), default=1)),
        orientation=page.number(ORIENTATION) or orientation_in(page.text(XMP, 2**20)) or 1,
        signals=signals,
        notes=notes,
        white_is_zero=page.number(PHOTOMETRIC, 1) == 0,
    )


def pixels_of(data: Source) -> int:
    """The number of pixels of all pictures in a TIFF file; 0 if that tells little about its size, as for camera raw."""
    pages, inside = _all(data)
    if len(pages) >= _MAX_DIRECTORIES or DNG_VERSION in pages[0].entries or any(map(_is_raw, [*pages, *inside])):
        return 0
    return sum(one.pixels for one in (*pages, *inside))


def _all(data: Source) -> tuple[list[Directory], list[Directory]]:
    """The directories in the chain of a TIFF file, at least one, and the directories inside the first few of them.

    Raises:
        ValueError: The file has no directory.
    """
    pages = list(directories(data))
    if not pages:
        raise ValueError("no directory of tags")
    places = [int(place) for page in pages[:4] for place in page.numbers(SUB_DIRECTORIES)]
    return pages, [entry[0] for place in places if (entry := directory_at(data, place)) is not None]


def _is_raw(directory: Directory) -> bool:
    # A full-size picture in a camera maker's own compression; in previews some of these numbers have other meanings.
    own_way = directory.number(COMPRESSION, 1) in _RAW_COMPRESSIONS and not directory.is_reduced
    return own_way or directory.number(PHOTOMETRIC) in (_FILTER_ARRAY, _LINEAR_RAW)


def _picture(pages: Sequence[Directory], inside: Sequence[Directory]) -> Directory:
    """The directory of the main picture: the first, unless that is a thumbnail of another."""
    first = pages[0]
    others = [one for one in (*pages[1:], *inside) if not one.is_mask and one.pixels > first.pixels]
    if first.is_reduced:
        whole = [one for one in others if not one.is_reduced] or others
        return max(whole, key=lambda one: one.pixels, default=first)
    width, height = first.number(WIDTH), first.number(HEIGHT)
    if 0 < max(width, height) <= 640 and min(width, height):
        aspect = width / height
        for one in others:
            wide, high = one.number(WIDTH), one.number(HEIGHT)
            # Thumbnails are rounded to whole pixels, so the aspect is equal within one pixel.
            alike = abs(wide / high / aspect - 1) <= 1.5 / min(width, height)
            if alike and wide >= 2 * width and not one.is_reduced:
                return one
    return first


def _check_extent(page: Directory) -> None:
    """Checks that tiles and tables are not far larger than the picture.

    Raises:
        TooCostly: They are far larger.
    """
    claimed = sum(count * struct.calcsize("=" + _TYPES.get(kind, "")) for kind, count, _ in _pixel_entries(page))
    if claimed > len(page.data) + 65536:
        raise ValueError(f"tags that claim {claimed} bytes")
    sample_bytes = max(1.0, max(page.numbers(BITS, most=64), default=8) * max(1, page.number(SAMPLES, 1)) / 8)
    tile = page.number(TILE_WIDTH) * page.number(TILE_HEIGHT) * sample_bytes
    # Tiles at the edges are whole, so one tile may be larger than the picture.
    if tile > _MAX_TILE_BYTES and tile > 4 * page.pixels * sample_bytes:
        size = f"{page.number(TILE_WIDTH)} x {page.number(TILE_HEIGHT)}"
        raise TooCostly(f"tiles of {size} pixels around {page.number(WIDTH)} x {page.number(HEIGHT)}")


def _pixel_entries(page: Directory) -> list[tuple[int, int, int]]:
    return [entry for tag, entry in page.entries.items() if tag in _PIXEL_TAGS]


def _alone(data: bytes, page: Directory) -> bytes:
    """A TIFF file with a single directory: the tags for the pixels of a page."""
    order, big = page.order, 43 in data[2:4]
    kept = sorted((tag, raw) for tag, raw in page.raw.items() if tag in _PIXEL_TAGS)
    place = len(data) + len(data) % 2
    count = struct.pack(order + ("Q" if big else "H"), len(kept))
    table = b"".join(raw for _, raw in kept)
    head = data[:8] + struct.pack(order + "Q", place) if big else data[:4] + struct.pack(order + "I", place)
    return b"".join((head, memoryview(data)[len(head) :], bytes(len(data) % 2), count, table, bytes(8)))


def colour_of(directory: Directory, words: str) -> list[Signal]:
    """Colour signals of a TIFF directory, or of an Exif block with this first directory."""
    signals = list[Signal]()
    if profile := directory.text(PROFILE):
        signals.append(Icc(profile))
    elif PROFILE in directory.entries:
        signals.append(Unheeded("its colour profile is damaged or too large and was ignored"))
    exif = _at(directory, EXIF)
    gamma, interoperability, space = None, b"", 0
    if exif is not None:
        space = exif.number(COLOUR_SPACE)
        gamma = next((value for value in exif.numbers(GAMMA) if 0.1 <= value <= 10), None)
        inner = _at(exif, INTEROPERABILITY)
        interoperability = inner.text(1, 64)[:3] if inner is not None else b""
    if space == 2 or (interoperability == b"R03" and space != 1):
        # Exif 2.32, 4.6.5; DCF 2.0: the optional colour space is Adobe RGB (1998). Some cameras write 2.
        signals.append(Calibrated("Adobe RGB, by its Exif data", 563 / 256, None, ADOBE_RGB))
    elif space == 1:
        signals.append(Srgb())
    white, primaries = directory.numbers(WHITE), directory.numbers(PRIMARIES)
    around = (*white, *primaries) if len(white) == 2 and len(primaries) == 6 else None
    curves = _curves(directory)
    if around or curves is not None or gamma:
        signals.append(Calibrated(words, gamma, curves, around))
    if space not in (0, 1, 2):
        signals.append(Unheeded("its Exif data name no known colour space, so it was taken for sRGB"))
    return signals


def _at(directory: Directory, tag: int) -> Directory | None:
    """The directory that a tag points to."""
    entry = directory_at(directory.data, place) if 0 < (place := directory.number(tag)) < 2**63 else None
    return None if entry is None else entry[0]


def _curves(directory: Directory) -> np.ndarray | None:
    """The transfer function (TIFF 6.0, section 20) as linear light from 0 to 1, [1 or 3, entries]."""
    entries = 2 ** int(min(max(directory.numbers(BITS), default=8), 16))
    table = directory.numbers(TRANSFER, most=3 * entries)
    if len(table) not in (entries, 3 * entries):
        return None
    return np.array(table, np.float64).reshape(-1, entries) / 65535


def orientation_in(xmp: bytes) -> int:
    """The orientation in an XMP packet, 0 for none."""
    at = xmp.find(b"tiff:Orientation")
    digits = xmp[at + 16 : at + 20].lstrip(b"=>\"'") if at >= 0 else b""
    return digits[0] - 48 if digits[:1].isdigit() else 0


def exif_of(block: bytes) -> tuple[int, list[Signal]]:
    """Orientation (0 for none) and colour signals of an Exif block, with or without the ``Exif`` prefix."""
    while block.startswith(b"Exif\0\0"):  # some programs write it twice
        block = block[6:]
    first = next(directories(block), None)
    if first is None:
        return 0, []
    return first.number(ORIENTATION), [
        one for one in colour_of(first, "the numbers in its Exif data") if not isinstance(one, Icc)
    ]
