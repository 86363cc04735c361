"""Converts colour spaces given as numbers to ICC profiles for LittleCMS.

Sources: ITU-T H.273 (07/2024), tables 2 and 3, for code points; ICC.1:2022 for profiles and annex E for the Bradford
adaptation; IEC 61966-2-1 (sRGB); SMPTE ST 2084 (PQ); ITU-R BT.2100 (HLG); ITU-R BT.2408, section 2, which puts
reference white at 203 cd/m2.
"""

import struct
from dataclasses import dataclass

import numpy as np

D65, ILLUMINANT_C, DCI_WHITE, EQUAL_ENERGY = (0.3127, 0.3290), (0.310, 0.316), (0.314, 0.351), (1 / 3, 1 / 3)
SRGB_PRIMARIES = (*D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
PRIMARIES = {
    1: SRGB_PRIMARIES,
    4: (*ILLUMINANT_C, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    8: (*ILLUMINANT_C, 0.681, 0.319, 0.243, 0.692, 0.145, 0.049),
    9: (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    10: (*EQUAL_ENERGY, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0),
    11: (*DCI_WHITE, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    22: (*D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
"""Chromaticities of white, red, green and blue by code point."""
ADOBE_RGB = (*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
ROMM_RGB = (0.3457, 0.3585, 0.7347, 0.2653, 0.1596, 0.8404, 0.0366, 0.0001)
"""Chromaticities of Adobe RGB (1998), 4.3.1, and of ROMM RGB (ISO 22028-2), known as ProPhoto."""
PRIMARY_NAMES = {1: "sRGB", 9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
UNSPECIFIED = 2
CAMERA_CURVES = frozenset({1, 6, 11, 12, 14, 15})
"""Transfers of BT.709 and similar standards. They describe cameras; screens and browsers show such pictures as sRGB."""
HDR_NAMES = {16: "PQ", 18: "HLG"}

_ENTRIES = 4096
_WHITE_CD_M2 = 203.0
_HLG_PEAK_CD_M2 = 1000.0


@dataclass(frozen=True)
class Space:
    """An RGB colour space.

    Attributes:
        chromaticities: Chromaticities of white, red, green and blue.
        curves: Linear light for equally spaced samples, [1 or 3, entries], 0 to 1.
    """

    chromaticities: tuple[float, ...]
    curves: np.ndarray


def srgb_curve() -> np.ndarray:
    """Linear light by sRGB's own transfer, [1, entries]."""
    values = np.linspace(0, 1, _ENTRIES)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)[None]


def power_curve(gamma: float) -> np.ndarray:
    """Linear light by a power, [1, entries]."""
    curve: np.ndarray = np.linspace(0, 1, _ENTRIES)[None] ** gamma
    return curve


def curve_of(transfer: int) -> np.ndarray | None:
    """Linear light by a transfer's code point, [1, entries], where 1 is reference white; None for unknown ones."""
    values = np.linspace(0, 1, _ENTRIES)
    if transfer in (13, UNSPECIFIED) or transfer in CAMERA_CURVES:
        return srgb_curve()
    if transfer in (4, 5, 8):
        return power_curve({4: 2.2, 5: 2.8, 8: 1.0}[transfer])
    if transfer == 7:  # SMPTE ST 240
        linear = np.where(values < 0.0913, values / 4, ((values + 0.1115) / 1.1115) ** (1 / 0.45))
    elif transfer in (9, 10):
        linear = np.where(values > 0, 10 ** ((values - 1) * (2 if transfer == 9 else 2.5)), 0)
    elif transfer == 16:
        root = values ** (32 / 2523)
        linear = (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (8192 / 1305)
        linear *= 10_000 / _WHITE_CD_M2
    elif transfer == 17:
        linear = values**2.6 * (52.37 / 48)
    elif transfer == 18:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(values <= 0.5, values**2 / 3, (np.exp((values - c) / a) + b) / 12)
        # The system gamma of a 1000 cd/m2 screen, by channel rather than by luminance.
        linear = scene**1.2 * (_HLG_PEAK_CD_M2 / _WHITE_CD_M2)
    else:
        return None
    return np.clip(linear, 0, 1)[None]


def is_valid(chromaticities: tuple[float, ...]) -> bool:
    """Whether the primaries span a space around their white."""
    try:
        matrix = _to_xyz(chromaticities)
    except (ValueError, ArithmeticError, np.linalg.LinAlgError):
        return False
    return bool(np.isfinite(matrix).all() and np.abs(matrix).max() < 8 and abs(np.linalg.det(matrix)) > 1e-4)


def is_srgb(space: Space) -> bool:
    """Whether the primaries are those of sRGB, up to rounding."""
    return max(abs(a - b) for a, b in zip(space.chromaticities, SRGB_PRIMARIES, strict=True)) < 0.002


def _to_xyz(chromaticities: tuple[float, ...]) -> np.ndarray:
    """The matrix from linear RGB to XYZ of D50, [3, 3]."""
    points = np.array(chromaticities, np.float64).reshape(4, 2)
    if (points[:, 1] < 0).any() or points[0, 1] <= 0:
        raise ValueError("a white without light")
    xyz = np.column_stack([points, 1 - points.sum(axis=1)]).T  # [3, white and primaries]
    white = xyz[:, 0] / xyz[1, 0]
    scaled = xyz[:, 1:] * np.linalg.solve(xyz[:, 1:], white)
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    gains = (bradford @ _D50) / (bradford @ white)
    adapted: np.ndarray = np.linalg.inv(bradford) @ (gains[:, None] * bradford) @ scaled
    return adapted


_D50 = np.array([0.9642, 1.0, 0.8249])


def profile_of(space: Space, *, grey: bool = False) -> bytes:
    """An ICC profile (version 2, display) of a colour space; of its curve alone for grey pictures."""
    tags = {b"wtpt": _xyz(_D50)}
    curves = [space.curves[min(n, len(space.curves) - 1)] for n in range(3)]
    if grey:
        tags[b"kTRC"] = _curv(curves[1])
    else:
        for name, column, curve in zip(b"rgb", _to_xyz(space.chromaticities).T, curves, strict=True):
            tags[b"%cXYZ" % name] = _xyz(column)
            tags[b"%cTRC" % name] = _curv(curve)
    tags[b"desc"] = b"desc" + bytes(4) + struct.pack(">I", 6) + b"photo\0" + bytes(78)
    tags[b"cprt"] = b"text" + bytes(4) + b"none\0"
    table, body = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    colour = b"GRAY" if grey else b"RGB "
    head = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), bytes(4), 0x02400000, b"mntr", colour, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + _xyz(_D50)[8:]
    return head.ljust(128, b"\0") + table + body


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def _curv(curve: np.ndarray) -> bytes:
    # A linear curve needs no table, which would round to 16 bits.
    if np.array_equal(curve, np.linspace(0, 1, len(curve))):
        return b"curv" + bytes(4) + struct.pack(">I", 0)
    table: bytes = np.rint(curve * 65535).astype(">u2").tobytes()
    return b"curv" + bytes(4) + struct.pack(">I", len(curve)) + table
