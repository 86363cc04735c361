"""Parses boxes of ISO base media files (ISO/IEC 14496-12), used by AVIF, HEIC and JPEG 2000.

Reads only the few boxes that describe the picture: its sizes, its colour (`colr`), and the presence of a gain map
(ISO/IEC 23008-12; AV1 Image File Format 1.1; ISO 21496-1).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from .contents import MAX_PROFILE_BYTES, Calibrated, Cicp, Contents, Icc, Signal, TooCostly, Unheeded
from .spaces import ROMM_RGB

_MAX_BOXES = 20_000
_MAX_META_BYTES = 16 * 2**20


def boxes(data: bytes, start: int = 0, end: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Yields kind, start and end of the contents of every box between two positions; a cut-off last box ends there."""
    end = len(data) if end is None else min(end, len(data))
    for _ in range(_MAX_BOXES):
        if start + 8 > end:
            return
        size, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1 and start + 16 <= end:
            size, head = struct.unpack_from(">Q", data, start + 8)[0], 16
        elif size == 0:
            size = end - start
        if size < head:
            return
        yield kind, start + head, min(start + size, end)
        start += size


def find(data: bytes, path: bytes, start: int = 0, end: int | None = None) -> tuple[int, int] | None:
    """Start and end of the first box at a path of four-letter names, joined without separators."""
    for kind, first, last in boxes(data, start, end):
        if kind == path[:4]:
            return (first, last) if len(path) == 4 else find(data, path[4:], first, last)
    return None


@dataclass
class _Meta:
    """The picture item of a HEIF file, with its properties and those of its first tile."""

    primary: int = 0
    kinds: dict[int, bytes] = field(default_factory=dict)
    properties: list[tuple[bytes, int, int]] = field(default_factory=list)
    of_item: dict[int, list[int]] = field(default_factory=dict)
    tile: int = 0

    def of(self, item: int) -> list[tuple[bytes, int, int]]:
        """The properties of an item."""
        return [self.properties[n - 1] for n in self.of_item.get(item, []) if 0 < n <= len(self.properties)]


def examine_heif(data: bytes, max_pixels: int) -> Contents:
    """The contents of an AVIF or HEIC file.

    Its Exif is hidden from the decoder: the format's own properties give the orientation, and readers follow those.

    Raises:
        TooCostly: A tile or another picture of the file is larger than the cap.
    """
    notes, signals = list[str](), list[Signal]()
    sequence, place = find(data, b"moov"), find(data, b"meta")
    is_av1 = data[8:11] == b"avi"
    lean = data
    if place is not None:
        meta = _meta(data, *place)
        is_av1 = is_av1 or b"av01" in meta.kinds.values()
        for width, height in _sizes(data, meta):
            if width * height > max_pixels:
                raise TooCostly(f"{width} x {height} pixels ({width * height / 1e6:.1f} million)")
        signals = _colours(data, meta.of(meta.primary)) or _colours(data, meta.of(meta.tile))
        if b"tmap" in meta.kinds.values() or any(
            kind == b"auxC" and b"gainmap" in data[start:end].lower() for kind, start, end in meta.properties
        ):
            notes.append("its HDR gain map was ignored, the standard picture was used")
        described = data[place[0] : place[1]]
        if b"Exif" in described:
            lean = b"".join((data[: place[0]], described.replace(b"Exif", b"Exix"), memoryview(data)[place[1] :]))
    if not signals and sequence is not None:
        at = data.find(b"colrnclx", *sequence)
        signals = _colours(data, [(b"colr", at + 4, at + 15)]) if at >= 0 else []
    if is_av1:
        # Also checks the size in this header, since a decoder allocates frames of that size.
        stated = _of_av1(data, max_pixels)
        signals = signals or ([stated] if stated is not None else [])
    return Contents(data=lean, signals=signals, notes=notes)


def largest_pixels(data: bytes) -> int:
    """The number of pixels of the largest picture in an AVIF or HEIC file; 0 if none is described."""
    if (place := find(data, b"meta")) is None:
        return 0
    return max((width * height for width, height in _sizes(data, _meta(data, *place))), default=0)


def _sizes(data: bytes, meta: _Meta) -> Iterator[tuple[int, int]]:
    """Width and height of every picture, tiles included."""
    for kind, start, end in meta.properties:
        if kind == b"ispe" and end - start >= 12:
            width, height = struct.unpack_from(">II", data, start + 4)
            yield width, height


def _meta(data: bytes, start: int, end: int) -> _Meta:
    """The relevant boxes of a `meta` box."""
    if end - start > _MAX_META_BYTES:
        raise TooCostly(f"{end - start} bytes of descriptions")
    meta = _Meta()
    for kind, first, last in boxes(data, start + 4, end):
        version = data[first] if first < last else 0
        if kind == b"pitm":
            meta.primary = int.from_bytes(data[first + 4 : first + (8 if version else 6)], "big")
        elif kind == b"iinf":
            for entry, here, _ in boxes(data, first + (8 if version else 6), last):
                if entry == b"infe" and data[here] >= 2:
                    wide = 4 if data[here] >= 3 else 2
                    item = int.from_bytes(data[here + 4 : here + 4 + wide], "big")
                    meta.kinds[item] = data[here + 6 + wide : here + 10 + wide]
        elif kind == b"iref":
            wide = 4 if version else 2
            for reference, here, stop in boxes(data, first + 4, last):
                if reference == b"dimg" and int.from_bytes(data[here : here + wide], "big") == meta.primary:
                    meta.tile = int.from_bytes(data[here + wide + 2 : min(here + 2 * wide + 2, stop)], "big")
        elif kind == b"iprp":
            for part, here, stop in boxes(data, first, last):
                if part == b"ipco":
                    meta.properties = list(boxes(data, here, stop))
                elif part == b"ipma":
                    meta.of_item |= _associations(data, here, stop)
    return meta


def _associations(data: bytes, start: int, end: int) -> dict[int, list[int]]:
    """The numbers of each item's properties (from 1), from an `ipma` box."""
    wide = 4 if data[start] else 2
    long = data[start + 3] & 1
    count, at = struct.unpack_from(">I", data, start + 4)[0], start + 8
    properties = dict[int, list[int]]()
    for _ in range(min(count, 65536)):
        if at + wide + 1 > end:
            break
        item, number = int.from_bytes(data[at : at + wide], "big"), data[at + wide]
        at += wide + 1
        step = 2 if long else 1
        places = range(at, min(at + number * step, end - step + 1), step)
        mask = 0x7FFF if long else 0x7F
        properties[item] = [int.from_bytes(data[place : place + step], "big") & mask for place in places]
        at += number * step
    return properties


def _colours(data: bytes, properties: list[tuple[bytes, int, int]]) -> list[Signal]:
    """Colour signals of `colr` boxes: a profile takes precedence over code points (ISO/IEC 23008-12, 6.5.5)."""
    profiles, points = list[Signal](), list[Signal]()
    for kind, start, end in properties:
        if kind != b"colr":
            continue
        if data[start : start + 4] in (b"prof", b"rICC") and end - start - 4 <= MAX_PROFILE_BYTES:
            profiles.append(Icc(data[start + 4 : end]))
        elif data[start : start + 4] == b"nclx" and end - start >= 11:
            primaries, transfer, matrix, flags = struct.unpack_from(">HHHB", data, start + 4)
            points.append(Cicp(primaries, transfer, matrix, bool(flags & 128), decoded=True))
    return profiles + points


# Enumerated colour spaces of JPEG 2000 (ISO/IEC 15444-1 and -2) that mean sRGB or have no colour.
_JPEG2000_PLAIN = {0, 12, 14, 15, 16, 17, 18}
_JPEG2000_ROMM = 21
_JPEG2000_NAMES = {20: "e-sRGB", 24: "e-sYCC"}
_MAX_TILES = 4096
_MAX_COMPONENTS = 8


def examine_jpeg2000(data: bytes, max_pixels: int) -> Contents:
    """The contents of a JPEG 2000 file or bare codestream.

    Raises:
        TooCostly: The file has more tiles or components than any picture.
    """
    signals = list[Signal]()
    start = 0
    if data[4:8] == b"jP  ":
        for kind, first, last in boxes(data, *(find(data, b"jp2h") or (0, 0))):
            if kind != b"colr" or signals:
                continue
            if data[first] in (2, 3) and last - first - 3 <= MAX_PROFILE_BYTES:
                signals.append(Icc(data[first + 3 : last]))
            elif data[first] == 1 and last - first >= 7:
                space = struct.unpack_from(">I", data, first + 3)[0]
                if space == _JPEG2000_ROMM:
                    signals.append(Calibrated("ROMM RGB", 1.8, None, ROMM_RGB))
                elif space not in _JPEG2000_PLAIN:
                    name = _JPEG2000_NAMES.get(space, f"number {space}")
                    signals.append(Unheeded(f"its colour space ({name}) is not known here, it was taken for sRGB"))
        start = (find(data, b"jp2c") or (0, 0))[0]
    # SIZ comes first: sizes and offsets of the picture and its tiles, then the components (15444-1, A.5.1).
    at = start + 2
    if data[at : at + 2] != b"\xff\x51":
        raise ValueError("no size marker")
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, components = struct.unpack_from(
        ">8IH", data, at + 6
    )
    width, height = right - left, bottom - top
    if width <= 0 or height <= 0 or not tile_width or not tile_height:
        raise ValueError("a size of nothing")
    tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    if tiles > _MAX_TILES and tiles * 4096 > width * height:
        raise TooCostly(f"{tiles} tiles in {width} x {height} pixels")
    if components > _MAX_COMPONENTS:
        raise TooCostly(f"{components} components, expected at most {_MAX_COMPONENTS}")
    bits = 1 + max((depth & 127 for depth in data[at + 40 : at + 40 + 3 * components : 3]), default=7)
    return Contents(data=data, width=width, height=height, bits=bits, signals=signals)


class _Bits:
    """Reader of the bits of an OBU, highest bit first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), len(data) * 8

    def __call__(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise ValueError("an OBU that ends early")
        return self._value >> self._left & ((1 << count) - 1)


def _of_av1(data: bytes, max_pixels: int) -> Cicp | None:
    """Code points of the first AV1 sequence header in a file; None if there are none (AV1 specification, 5.5).

    Raises:
        TooCostly: The header allows frames larger than the cap.
    """
    sequence = _sequence_header(data)
    if sequence is None:
        return None
    bits = _Bits(sequence)
    profile = bits(3)
    bits(1)
    reduced = bits(1)
    order_hint = 0
    if reduced:
        bits(5)
    else:
        if bits(1):
            return None  # only videos have timing and decoder models
        delayed = bits(1)
        for _ in range(bits(5) + 1):
            bits(12)
            if bits(5) > 7:
                bits(1)
            if delayed and bits(1):
                bits(4)
    wide, high = bits(4) + 1, bits(4) + 1
    width, height = bits(wide) + 1, bits(high) + 1
    if width * height > max_pixels:
        raise TooCostly(f"frames of up to {width} x {height} pixels")
    if not reduced and bits(1):
        bits(7)
    bits(3)
    if not reduced:
        bits(4)
        order_hint = bits(1)
        if order_hint:
            bits(2)
        screen = 2 if bits(1) else bits(1)
        if screen and not bits(1):
            bits(1)
        if order_hint:
            bits(3)
    bits(3)
    deep = bits(1)
    if profile == 2 and deep:
        bits(1)
    if profile != 1:
        bits(1)
    return Cicp(bits(8), bits(8), bits(8), decoded=True) if bits(1) else None


def _sequence_header(data: bytes) -> bytes | None:
    """The first sequence header OBU in the media data of a file."""
    place = find(data, b"mdat")
    if place is None:
        return None
    at, end = place
    if data[at : at + 2] == b"\x12\x00":  # a temporal delimiter
        at += 2
    if at + 2 > end or data[at] & 0xFA != 0x0A:
        return None
    size, shift = 0, 0
    for _ in range(4):
        at += 1
        size |= (data[at] & 127) << shift
        shift += 7
        if data[at] < 128:
            break
    return data[at + 1 : min(at + 1 + size, at + 65, end)]
