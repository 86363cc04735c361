"""The contents of a picture file, told from its bytes before anything is decoded."""

from dataclasses import dataclass, field

import numpy as np

MAX_PROFILE_BYTES = 16 * 2**20
"""Largest colour profile that is read; those of printing presses have 3 MB."""


class NotThisKind(Exception):
    """The bytes are of a kind that is not edited; the text goes on after "FILE is"."""


class TooCostly(Exception):
    """Decoding would take more time or memory than a photo does; the text goes on after "FILE has"."""


class MissingReader(NotThisKind):
    """The package that decodes this kind is not installed."""


@dataclass(frozen=True)
class Icc:
    """An embedded ICC profile."""

    data: bytes


@dataclass(frozen=True)
class Cicp:
    """Coding-independent code points (ITU-T H.273)."""

    primaries: int
    transfer: int
    matrix: int = 0
    full_range: bool = True
    decoded: bool = False
    """Whether the decoder undoes the matrix and the range, as those of AVIF and HEIF do."""


@dataclass(frozen=True)
class Calibrated:
    """Primaries and transfer given as numbers; None stands for sRGB's.

    Attributes:
        words: The space or the place of its numbers, e.g. "the numbers in its gAMA chunk".
        gamma: Linear light is the sample to this power.
        curves: Instead of `gamma`, linear light for equally spaced samples, [1 or 3, entries], 0 to 1.
        chromaticities: x and y of white, red, green and blue.
    """

    words: str
    gamma: float | None = None
    curves: np.ndarray | None = None
    chromaticities: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Srgb:
    """The file says that it is sRGB."""


@dataclass(frozen=True)
class Unheeded:
    """A colour space that is named and not applied."""

    remark: str


Signal = Icc | Cicp | Calibrated | Srgb | Unheeded


@dataclass
class Contents:
    """A file taken apart.

    Attributes:
        data: Bytes for the decoder: the parts that make the pixels, without metadata and further pictures.
        width, height: As the header says, 0 where only the decoder can tell.
        bits: Per sample where the file can hold more than 8, otherwise 8.
        orientation: As Exif numbers it; 1 where the decoder turns the picture itself.
        signals: Of colour, the one that counts most first.
        notes: Remarks, e.g. on parts that were left out.
        white_is_zero: Of a TIFF.
    """

    data: bytes
    width: int = 0
    height: int = 0
    bits: int = 8
    orientation: int = 1
    signals: list[Signal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    white_is_zero: bool = False
