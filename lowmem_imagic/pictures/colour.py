"""Converts colours to sRGB by the file's colour signal of highest precedence."""

import dataclasses
import struct
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

from . import spaces
from .contents import Calibrated, Cicp, Icc, Signal, Srgb, Unheeded
from .spaces import Space

_NAMED = {"CMYK": "CMYK", "LAB": "CIELAB"}
_APPROXIMATE_GAMMA = (2.15, 2.25)


def to_srgb(colour: Image.Image, signals: Sequence[Signal], notes: list[str]) -> tuple[Image.Image, bytes | None]:
    """The picture as sRGB, and the embedded profile if the picture was sRGB already, as it still describes the result.

    Applies the first usable signal; adds remarks on signals that are not usable.

    Args:
        colour: A picture of mode L, RGB, CMYK or LAB.
        signals: The file's colour signals, by precedence.
        notes: A list to which remarks are added.
    """
    if colour.mode == "LAB":  # self-describing
        rgb = _applied(colour, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
        if rgb is not None:
            notes.append("converted from CIELAB")
            return rgb, None
    for signal in signals:
        if isinstance(signal, Icc):
            result = _through_profile(colour, signal.data, notes)
            if result is not None:
                return result
        elif colour.mode in ("L", "RGB"):
            if isinstance(signal, Srgb):
                break
            if isinstance(signal, Unheeded):
                notes.append(signal.remark)
                continue
            numbers = _of_cicp(signal, notes) if isinstance(signal, Cicp) else _of_calibrated(signal, notes)
            if numbers is None:
                continue
            space, words = numbers
            if isinstance(signal, Cicp) and not signal.full_range and not signal.decoded:
                colour = colour.point(
                    [min(255, max(0, round((n - 16) * 255 / 219))) for n in range(256)] * _bands(colour)
                )
                notes.append("its narrow range of values was widened")
            try:
                rgb = _from_space(colour, space)
            except (ImageCms.PyCMSError, ValueError, struct.error):
                notes.append("its colour information cannot be applied and was ignored")
                continue
            if rgb is not None:
                notes.append(words)
                return rgb, None
            break
    if colour.mode in _NAMED:
        notes.append(f"converted from {_NAMED[colour.mode]}")
    return colour.convert("RGB"), None


def _bands(image: Image.Image) -> int:
    return len(image.getbands())


def _of_cicp(signal: Cicp, notes: list[str]) -> tuple[Space, str] | None:
    """The space of code points, and a remark on its use; None if they name no known space."""
    primaries, transfer = signal.primaries, signal.transfer
    if not signal.decoded and signal.matrix != 0:
        notes.append(f"its colour code points say YCbCr (matrix {signal.matrix}) of RGB data and were ignored")
        return None
    if primaries == transfer == spaces.UNSPECIFIED:
        return None
    curve = spaces.curve_of(transfer)
    around = spaces.SRGB_PRIMARIES if primaries == spaces.UNSPECIFIED else spaces.PRIMARIES.get(primaries)
    if curve is None or around is None:
        notes.append(f"its colour code points {primaries}/{transfer} are not known here and were ignored")
        return None
    name = spaces.PRIMARY_NAMES.get(primaries, "other primaries")
    if transfer in spaces.CAMERA_CURVES:
        notes.append("its camera transfer (BT.709) was taken for sRGB's, as browsers do")
    words = f"converted to sRGB from {name} (code points {primaries}/{transfer})"
    if transfer in spaces.HDR_NAMES:
        words += f"; of its HDR range ({spaces.HDR_NAMES[transfer]}) everything brighter than white was cut off"
    return Space(around, curve), words


def _of_calibrated(signal: Calibrated, notes: list[str]) -> tuple[Space, str] | None:
    """The space of a file's own numbers, and a remark on its use; None if they make no valid space."""
    around = signal.chromaticities
    if around is not None and not spaces.is_valid(around):
        notes.append(f"{signal.words}: primaries that span no colours were ignored")
        around = None
    if around is None and signal.gamma is None and signal.curves is None:
        return None
    space = Space(around or spaces.SRGB_PRIMARIES, spaces.srgb_curve())
    if signal.curves is not None:
        space = dataclasses.replace(space, curves=signal.curves)
    elif signal.gamma is not None:
        low, high = _APPROXIMATE_GAMMA
        # sRGB's own transfer is written as 1/2.2 (PNG, third edition, 11.3.2.5); with sRGB's primaries, 1/2.2 means it.
        if not (low <= signal.gamma <= high and spaces.is_srgb(space)):
            space = dataclasses.replace(space, curves=spaces.power_curve(signal.gamma))
    return space, f"converted to sRGB from {signal.words}"


def _from_space(colour: Image.Image, space: Space) -> Image.Image | None:
    """A picture of mode L or RGB converted from a space; None if that changes nothing."""
    profile = ImageCms.ImageCmsProfile(BytesIO(spaces.profile_of(space, grey=colour.mode == "L")))
    return _applied(colour, profile, unless_same=True)


def _through_profile(colour: Image.Image, profile: bytes, notes: list[str]) -> tuple[Image.Image, bytes | None] | None:
    """Picture and profile, as from `to_srgb`, by an embedded profile; None, with a remark, if it is unusable."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = source.profile.xcolor_space.strip()
    except (OSError, ValueError, ImageCms.PyCMSError):
        notes.append("its colour profile is damaged and was ignored")
        return None
    if space == "RGB" and colour.mode == "L":
        colour = colour.convert("RGB")
    if space != {"L": "GRAY"}.get(colour.mode, colour.mode):
        named = space if space.isascii() and space.isprintable() else "other"
        notes.append(f"its colour profile is for {named} data and was ignored")
        return None
    try:
        rgb = _applied(colour, source, unless_same=True)
    except (ImageCms.PyCMSError, ValueError):
        notes.append("its colour profile cannot be applied and was ignored")
        return None
    if rgb is None:
        return colour.convert("RGB"), profile if colour.mode == "RGB" else None
    words = f"converted from {_NAMED[colour.mode]}" if colour.mode in _NAMED else "converted to sRGB"
    notes.append(f"{words} through its colour profile")
    return rgb, None


def _applied(colour: Image.Image, source: ImageCms.ImageCmsProfile, *, unless_same: bool = False) -> Image.Image | None:
    """The picture converted by a profile; with `unless_same`, None if no sample changes by more than rounding."""
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    if colour.mode == "L":
        # LittleCMS's shortcut for 8-bit grey is off by ten levels in dark parts, so convert all 256 values exactly.
        flags |= ImageCms.Flags.NOOPTIMIZE
    transform = ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        colour.mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags,
    )
    if unless_same and _changes_nothing(transform, colour.mode):
        return None
    if colour.mode == "L":
        levels = ImageCms.applyTransform(Image.frombytes("L", (256, 1), bytes(range(256))), transform)
        assert levels is not None
        return Image.merge("RGB", [colour.point(list(band.tobytes())) for band in levels.split()])
    return ImageCms.applyTransform(colour, transform)


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a colour transform changes no sample of a coarse colour grid by more than rounding."""
    if mode == "L":
        probe = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    elif mode == "RGB":
        grid = np.stack(np.meshgrid(*[np.arange(0, 256, 17)] * 3), axis=-1)
        probe = Image.fromarray(grid.reshape(16, -1, 3).astype(np.uint8))
    else:
        return False
    moved = ImageCms.applyTransform(probe, transform)
    difference = np.asarray(moved, dtype=np.int16) - np.asarray(probe.convert("RGB"), dtype=np.int16)
    return bool(np.abs(difference).max() <= 2)
