"""Parses JPEG, PNG, WebP, GIF, BMP and PPM files.

Each function limits the cost of its format, collects the colour signals by precedence, and keeps only the parts for the
pixels of one picture for the decoder.
"""

import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np

from .contents import MAX_PROFILE_BYTES, Calibrated, Cicp, Contents, Icc, NotThisKind, Signal, Srgb, TooCostly, Unheeded
from .spaces import D65
from .tiff import directories, exif_of, orientation_in

_MAX_SCANS = 100
_MAX_SEGMENTS = 20_000
_MAX_FRAMES = 10_000
_MAX_TEXT_BYTES = 2**20
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_GAIN_MAP = "its HDR gain map was ignored, the standard picture was used"


def examine_jpeg(data: bytes, max_pixels: int) -> Contents:
    """The contents of a JPEG file: its first picture, with only JFIF's and Adobe's application segments.

    Raises:
        TooCostly: The file has more scans than progressive pictures have; each takes a pass over all pixels.
    """
    del max_pixels
    kept = [b"\xff\xd8"]
    width = height = scans = 0
    exif = xmp = b""
    profile: dict[int, bytes] = {}
    pictures, gain_map = 1, False
    at, body = 2, None
    for _ in range(_MAX_SEGMENTS):
        match = _MARKER.search(data, at)
        if match is None:
            break
        marker, at = match[1][0], match.end()
        if marker == 0xD9:
            break
        if marker in (0x01, 0xD8) or at + 2 > len(data):
            continue
        length = struct.unpack_from(">H", data, at)[0]
        segment = data[at + 2 : at + length]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(segment) >= 5 and not width:
            height, width = struct.unpack_from(">HH", segment, 1)
        if marker == 0xDA:
            scans += 1
            body = match.start() if body is None else body
            if scans > _MAX_SCANS:
                raise TooCostly(f"more than {_MAX_SCANS} scans, expected a few; save it again as a plain JPEG")
        elif body is None and (not 0xE0 <= marker <= 0xEF or marker in (0xE0, 0xEE)) and marker != 0xFE:
            kept.append(data[match.end() - 2 : at + length])
        if marker == 0xE1 and segment.startswith(b"Exif\0\0"):
            exif = exif or segment
        elif marker == 0xE1 and segment.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = xmp or segment
        elif marker == 0xE2 and segment.startswith(b"ICC_PROFILE\0") and len(segment) > 14:
            profile.setdefault(segment[12], segment[14:])
        elif marker == 0xE2 and segment.startswith(b"MPF\0"):
            pictures = next((one.number(0xB001, 1) for one in directories(segment[4:])), 1)
        elif marker == 0xE2 and segment.startswith(b"urn:iso:std:iso:ts:21496:-1\0"):
            gain_map = True
        at += length
    else:
        raise TooCostly(f"more than {_MAX_SEGMENTS} segments; save it again as a plain JPEG")
    notes = []
    if pictures > 1:
        gain_map = gain_map or max(data.find(name, at) for name in (b"hdrgainmap", b"HDRGainMap")) >= 0
    gain_map = gain_map or b"hdrgm:" in xmp
    if gain_map:
        notes.append(_GAIN_MAP)
    elif pictures > 1:
        notes.append(f"first frame of {pictures} used")
    signals: list[Signal] = [Icc(b"".join(profile[n] for n in sorted(profile)))] if profile else []
    turned, told = _exif(exif)
    return Contents(
        data=b"".join((*kept, memoryview(data)[len(data) if body is None else body :])),
        width=width,
        height=height,
        orientation=turned or orientation_in(xmp) or 1,
        signals=signals + told,
        notes=notes,
    )


def _exif(block: bytes) -> tuple[int, list[Signal]]:
    """Orientation and colour signals of an Exif block; a damaged block is ignored."""
    try:
        return exif_of(block)
    except (ValueError, LookupError, OverflowError, struct.error):
        return 0, []


def examine_png(data: bytes, max_pixels: int) -> Contents:
    """The contents of a PNG file: its still picture; colour chunks in the order of PNG, third edition, 4.3.

    Raises:
        TooCostly: The file has more than a million chunks.
    """
    del max_pixels
    kept = [data[:8]]
    chunks: dict[bytes, bytes] = {}
    texts: dict[bytes, bytes] = {}
    frames, still_is_frame, colours = 1, False, 0
    for count, (kind, start, end) in enumerate(png_chunks(data)):
        if count > 1_000_000:
            raise TooCostly("more than a million chunks; save it again as a plain PNG")
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            if kind == b"tRNS" and colours and end - start > colours:
                # More opacities than colours: drop the surplus, as other readers do; Pillow's palette rejects it.
                body = kind + data[start : start + colours]
                kept.append(struct.pack(">I", colours) + body + struct.pack(">I", zlib.crc32(body)))
            else:
                kept.append(data[start - 8 : end + 4])
            if kind == b"PLTE" and chunks.get(b"IHDR", b"")[9:10] == b"\x03":
                colours = (end - start) // 3
            if kind in (b"IHDR", b"IDAT"):
                chunks.setdefault(kind, data[start : min(end, start + 13)])
        elif kind in (b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"eXIf"):
            chunks.setdefault(kind, data[start:end])
        elif kind in (b"tEXt", b"zTXt", b"iTXt") and len(texts) < 100:
            keyword, _, rest = data[start : min(end, start + _MAX_TEXT_BYTES)].partition(b"\0")
            if keyword == b"XML:com.adobe.xmp" or keyword.startswith(b"Raw profile type "):
                texts.setdefault(keyword, _inflated(rest[1:], _MAX_TEXT_BYTES) if kind == b"zTXt" else rest)
        elif kind == b"acTL" and end - start >= 4:
            frames = struct.unpack_from(">I", data, start)[0]
        elif kind == b"fcTL" and b"IDAT" not in chunks:
            still_is_frame = True
        elif kind == b"CgBI":
            raise NotThisKind("a PNG file changed for iOS apps (CgBI), which only those show; export it as a plain PNG")
        if kind == b"IEND":
            break
    header = chunks.get(b"IHDR", b"")
    if len(header) < 13:
        raise ValueError("no header")
    width, height, bits, colour_type = struct.unpack_from(">IIBB", header)
    if colour_type == 3 and not colours:
        raise ValueError("no palette")
    notes = []
    if frames > 1:
        notes.append(
            f"first frame of {frames} used" if still_is_frame else f"its still picture used, {frames} frames not"
        )
    turned, told = _exif(chunks.get(b"eXIf", b"") or _from_hex(texts, b"exif") or _from_hex(texts, b"APP1"))
    if profile := _from_hex(texts, b"icc") or _from_hex(texts, b"icm"):
        told.insert(0, Icc(profile))
    return Contents(
        data=b"".join(kept),
        width=width,
        height=height,
        bits=bits,
        orientation=turned or orientation_in(texts.get(b"XML:com.adobe.xmp", b"")) or 1,
        signals=_png_signals(chunks, is_grey=colour_type in (0, 4)) + told,
        notes=notes,
    )


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields kind, start and end of the body of every chunk; the last may be cut off."""
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at + 8, min(at + 8 + length, len(data))
        at += 12 + length


def _png_signals(chunks: dict[bytes, bytes], *, is_grey: bool) -> list[Signal]:
    """Colour signals of a PNG's chunks, by precedence."""
    signals = list[Signal]()
    if len(points := chunks.get(b"cICP", b"")) >= 4:
        signals.append(Cicp(points[0], points[1], points[2], bool(points[3])))
    if packed := chunks.get(b"iCCP", b"").partition(b"\0")[2]:
        signals.append(Icc(_inflated(packed[1:], MAX_PROFILE_BYTES)))
    if b"sRGB" in chunks:
        signals.append(Srgb())
    gamma, around = None, None
    if len(stated := chunks.get(b"gAMA", b"")) >= 4:
        exponent = struct.unpack_from(">I", stated)[0] / 100_000
        if 0.1 <= exponent <= 10:
            gamma = 1 / exponent
        else:
            signals.append(Unheeded(f"its gAMA chunk says {exponent:g}, which was ignored"))
    if len(stated := chunks.get(b"cHRM", b"")) >= 32 and not is_grey:
        around = tuple(value / 100_000 for value in struct.unpack_from(">8I", stated))
    if gamma or around:
        names = " and ".join(f"{name} chunk" for name, value in (("gAMA", gamma), ("cHRM", around)) if value)
        signals.append(Calibrated(f"the numbers in its {names}", gamma, None, around))
    return signals


def _inflated(packed: bytes, most: int) -> bytes:
    """Up to `most` bytes of unpacked zlib data; empty for damaged data."""
    try:
        return zlib.decompressobj().decompress(packed, most)
    except zlib.error:
        return b""


def _from_hex(texts: dict[bytes, bytes], name: bytes) -> bytes:
    """The bytes of a block in ImageMagick's text chunk: name, length and hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(texts.get(b"Raw profile type " + name, b"").split()[2:]).decode("ascii"))
    except ValueError:
        return b""


def examine_webp(data: bytes, max_pixels: int) -> Contents:
    """The contents of a WebP file; the decoder gets the whole file."""
    del max_pixels
    chunks: dict[bytes, bytes] = {}
    frames, at, width, height = 0, 12, 0, 0
    while at + 8 <= len(data) and frames < 100_000:
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind in (b"ICCP", b"EXIF", b"XMP ") and length <= MAX_PROFILE_BYTES:
            chunks.setdefault(kind, data[at + 8 : at + 8 + length])
        elif kind == b"VP8X" and length >= 10:
            width = 1 + int.from_bytes(data[at + 12 : at + 15], "little")
            height = 1 + int.from_bytes(data[at + 15 : at + 18], "little")
        elif kind == b"VP8L" and not width:
            sides = int.from_bytes(data[at + 9 : at + 13], "little")
            width, height = 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
        elif kind == b"VP8 " and not width:
            width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, at + 14))
        frames += kind == b"ANMF"
        at += 8 + length + length % 2
    signals: list[Signal] = [Icc(chunks[b"ICCP"])] if chunks.get(b"ICCP") else []
    turned, told = _exif(chunks.get(b"EXIF", b""))
    return Contents(
        data=data,
        width=width,
        height=height,
        orientation=turned or orientation_in(chunks.get(b"XMP ", b"")) or 1,
        signals=signals + told,
        notes=[f"first frame of {frames} used"] if frames > 1 else [],
    )


def examine_gif(data: bytes, max_pixels: int) -> Contents:
    """The contents of a GIF file: its first frame and its colour profile."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)
    frames, end, profile = 0, len(data), b""
    while at < len(data) and frames < _MAX_FRAMES:
        if data[at] == 0x2C and at + 10 <= len(data):
            _, _, wide, high, local = struct.unpack_from("<4HB", data, at + 1)
            if not frames and wide * high > max_pixels:
                raise TooCostly(f"a frame of {wide} x {high} pixels")
            at = _after_blocks(data, at + 11 + (3 << (local & 7) + 1 if local & 128 else 0))
            frames += 1
            end = at if frames == 1 else end
        elif data[at] == 0x21:
            start, at = at, _after_blocks(data, at + 2)
            if data[start + 3 : start + 14] == b"ICCRGBG1012" and at - start <= MAX_PROFILE_BYTES:
                profile = b"".join(_blocks(data, start + 14))
        else:
            break
    return Contents(
        data=data[:end] + b";" if frames > 1 else data,
        width=width,
        height=height,
        signals=[Icc(profile)] if profile else [],
        notes=[f"first frame of {frames if frames < _MAX_FRAMES else 'very many'} used"] if frames > 1 else [],
    )


def _blocks(data: bytes, at: int) -> Iterator[bytes]:
    """Yields the contents of a chain of sub-blocks."""
    while at < len(data) and data[at]:
        yield data[at + 1 : at + 1 + data[at]]
        at += 1 + data[at]


def _after_blocks(data: bytes, at: int) -> int:
    """The position after a chain of sub-blocks."""
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1


_MAX_RUN_LENGTH_BYTES = 4 * 2**20


def examine_bmp(data: bytes, max_pixels: int) -> Contents:
    """The contents of a BMP file, with the colour space of its version 4 or 5 header.

    Raises:
        TooCostly: The file has more run-length coded data than can be decoded in a second or two.
    """
    del max_pixels
    head = struct.unpack_from("<I", data, 14)[0]
    width, height = struct.unpack_from("<ii" if head >= 40 else "<HH", data, 18)
    coding = struct.unpack_from("<I", data, 30)[0] if head >= 40 else 0
    if coding in (1, 2) and len(data) > _MAX_RUN_LENGTH_BYTES:
        raise TooCostly(f"{len(data)} bytes of run-length coding; save it as PNG")
    signals = list[Signal]()
    if head >= 108 and len(data) >= 14 + 108:
        space = data[70:74]
        if space == b"BGRs" or space == b" niW":  # 'sRGB' and 'Win ' as little-endian numbers
            signals.append(Srgb())
        elif space == b"DEBM" and head >= 124:  # MBED
            start, size = struct.unpack_from("<II", data, 126)
            signals.append(Icc(data[14 + start : 14 + start + size][:MAX_PROFILE_BYTES]))
        elif space == b"KNIL":  # LINK
            signals.append(Unheeded("its colour profile is a file of its own, so it was taken for sRGB"))
        elif space == bytes(4):
            signals += _calibrated_bmp(struct.unpack_from("<12I", data, 74))
    return Contents(data=data, width=abs(width), height=abs(height), signals=signals)


def _calibrated_bmp(numbers: tuple[int, ...]) -> list[Signal]:
    """The signal of LCS_CALIBRATED_RGB: red, green and blue as three 2.30 fixed-point numbers each, gammas as 16.16.

    The numbers are XYZ, with white as their sum, or, in files of most programs, chromaticities, which add up to 1 each.
    """
    if not any(numbers):
        return []  # from programs without colour management
    ends = np.array(numbers[:9], np.float64).reshape(3, 3) / 2**30
    sums = ends.sum(axis=1)
    around = None
    if (sums > 0).all():
        white = np.array(D65) if np.abs(sums - 1).max() < 0.01 else ends.sum(axis=0)[:2] / ends.sum()
        around = tuple(float(part) for part in (*white, *(ends / sums[:, None])[:, :2].ravel()))
    gammas = [value / 65536 for value in numbers[9:]]
    if not all(0.1 <= value <= 10 for value in gammas):
        return [Calibrated("the numbers in its bitmap header", None, None, around)]
    if len(set(gammas)) == 1:
        return [Calibrated("the numbers in its bitmap header", gammas[0], None, around)]
    curves = np.linspace(0, 1, 1024)[None] ** np.array(gammas)[:, None]
    return [Calibrated("the numbers in its bitmap header", None, curves, around)]


def examine_ppm(data: bytes, max_pixels: int) -> Contents:
    """The contents of a binary PPM, PGM or PBM file, scaled to 8 bits here, as Pillow's own scaling takes minutes."""
    head = re.match(rb"P([456])(?:\s|#[^\n]{0,999}\n)+(\d{1,9})(?:\s|#[^\n]{0,999}\n)+(\d{1,9})", data)
    if head is None:
        raise ValueError("no size")
    kind, width, height = head[1], int(head[2]), int(head[3])
    plain = Contents(data=data, width=width, height=height)
    highest = re.compile(rb"(?:\s|#[^\n]{0,999}\n)+(\d{1,9})\s").match(data, head.end())
    if kind == b"4" or width * height > max_pixels:
        return plain
    if highest is None or not 0 < (most := int(highest[1])) < 65536:
        raise ValueError("no highest value")
    if most == 255:
        return plain
    count = width * height * (3 if kind == b"6" else 1)
    values = np.frombuffer(data, ">u2" if most > 255 else "u1", count, highest.end())
    table = np.rint(np.minimum(np.arange(65536), most) * (255 / most)).astype(np.uint8)
    plain.data = b"P%c\n%d %d\n255\n" % (kind, width, height) + table[values].tobytes()
    bits = most.bit_length()
    plain.notes = [f"{bits}-bit values scaled to 8 bit"] if bits > 8 else []
    return plain
