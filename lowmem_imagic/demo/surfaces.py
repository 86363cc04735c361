"""Colours of floors, backdrops and patterned solids, procedural, at the points where rays meet them."""

import torch
from torch import Tensor

from .attributes import FLOORS
from .packed_scene import FAR, View
from .strangers import LETTERS, PATTERNS
from .vectors import Vector, bounded, dot, mixed, scaled, where


def _noise(a: Tensor, b: Tensor, seed: Tensor | float) -> Tensor:
    """Hash noise in [0, 1) of two integer-valued coordinates."""
    value = torch.sin(a * 12.9898 + b * 78.233 + seed) * 43758.547
    return value - value.floor()


def _smooth_noise(x: Tensor, z: Tensor, seed: Tensor | float) -> Tensor:
    """Value noise in [0, 1): hash noise on the integer grid, smoothly interpolated."""
    fx, fz = x.floor(), z.floor()
    u, v = x - fx, z - fz
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    top = _noise(fx, fz, seed) * (1 - u) + _noise(fx + 1, fz, seed) * u
    bottom = _noise(fx, fz + 1, seed) * (1 - u) + _noise(fx + 1, fz + 1, seed) * u
    return top * (1 - v) + bottom * v


def _fraction(x: Tensor) -> Tensor:
    return x - x.floor()


def floor_color(view: View, x: Tensor, z: Tensor, distance: Tensor) -> Vector:
    """Floor colours at floor points; contrast fades with distance as pixels cover more of the floor."""
    phase = view.number("phase")
    turn = phase % 1.2 - 0.6
    cos, sin = turn.cos(), turn.sin()
    x, z = cos * x + sin * z, cos * z - sin * x
    fade = (1.25 - distance / 11.0).clamp(0, 1)
    kinds, present = view.number("floor"), view.present("floor")
    color: Vector = (torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x))

    def put(kind: int, paint: Vector) -> None:
        nonlocal color
        color = where(kinds == kind, paint, color)

    def toned(tone: Tensor, base: tuple[float, float, float]) -> Vector:
        return tone * base[0], tone * base[1], tone * base[2]

    if 0 in present:
        plank = (x * 1.7 + phase).floor()
        across = x * 1.7 + phase - plank
        grain = torch.sin(z * 4 + plank * 3 + 2.5 * _smooth_noise(x * 4, z * 0.8, phase))
        tone = 0.55 + fade * (0.26 * (_noise(plank, plank * 0, phase) - 0.5) + 0.07 * grain)
        put(0, toned(tone * (1 - 0.45 * fade * (across < 0.07)), (0.92, 0.56, 0.28)))
    if 1 in present:
        grid = (z * 1.2).floor()
        shift = x * 1.0 + 0.5 * (grid % 2) + phase
        joint = ((shift - shift.floor() - 0.5).abs() > 0.455) | ((z * 1.2 - grid - 0.5).abs() > 0.45)
        blotch = 0.16 * (_smooth_noise(x * 5, z * 5, phase) - 0.5)
        tone = 0.52 + fade * (0.20 * (_noise(shift.floor(), grid, phase) - 0.5) + blotch)
        put(1, toned(tone * (1 - 0.42 * fade * joint), (0.92, 0.94, 1.0)))
    if 2 in present:
        fine, coarse = _smooth_noise(x * 7, z * 5, phase), _smooth_noise(x * 1.5, z * 1.5, phase)
        put(2, toned(0.52 + fade * (0.34 * (fine - 0.5) + 0.22 * (coarse - 0.5)), (0.40, 0.92, 0.20)))
    if 3 in present:
        check = ((x * 1.15 + phase).floor() + (z * 1.15).floor()) % 2
        put(3, toned(0.58 + 0.54 * fade * (check - 0.5), (0.90, 0.94, 1.0)))
    if max(present) < len(FLOORS):
        return color
    # Grounds without a name, between two colours.
    scale = view.number("floor_scale")
    first, second = view.vector("floor_color"), view.vector("floor_second")
    x, z = x * scale, z * scale
    number = len(FLOORS)
    if number in present:
        # Carpet: a lattice of diamonds with borders.
        diamond = (_fraction(x * 0.8 + phase) - 0.5).abs() + (_fraction(z * 0.8) - 0.5).abs()
        share = ((diamond > 0.38) & (diamond < 0.56)).float() * 0.8 + 0.2 * _smooth_noise(x * 9, z * 9, phase)
        put(number, mixed(first, second, 0.15 + fade * (share - 0.15)))
    if number + 1 in present:
        # Sand: ripples that a slow noise bends.
        ripple = torch.sin(z * 7 + 3 * _smooth_noise(x * 0.9, z * 0.9, phase) + x)
        share = 0.35 + fade * (0.22 * ripple + 0.25 * (_smooth_noise(x * 12, z * 12, phase) - 0.5))
        put(number + 1, mixed(first, second, share))
    if number + 2 in present:
        # Water: crests where two waves meet.
        wave = _smooth_noise(x * 1.6, z * 2.6, phase) + _smooth_noise(x * 3.1 + 5, z * 4.7, phase)
        crest = (1 - 3.2 * (wave - 1).abs()).clamp(0, 1)
        put(number + 2, mixed(first, second, fade * crest))
    if number + 3 in present:
        # Gravel: stones of two colours and dark gaps.
        stone = _smooth_noise(x * 4.5, z * 4.5, phase)
        share = (_smooth_noise(x * 2.3 + 9, z * 2.3, phase) > 0.5).float()
        gap = 1 - 0.6 * fade * (stone < 0.28)
        put(number + 3, scaled(mixed(first, second, 0.5 + fade * (share - 0.5)), gap))
    return color


def screen_seen(view: View, origin: Vector, direction: Vector) -> tuple[Vector, Tensor]:
    """Colour of the backdrop, and its distance, `FAR` where rays miss it."""
    kinds, present = view.number("screen"), view.present("screen")
    depth, phase = view.number("screen_depth"), view.number("screen_phase")
    first, second = view.vector("screen_color"), view.vector("screen_second")
    distance = (depth - origin[2]) / bounded(direction[2], 1e-7)
    x, y = origin[0] + distance * direction[0], origin[1] + distance * direction[1]
    color: Vector = first
    height = torch.full_like(x, FAR)
    if 1 in present:
        hills = 2.2 + 0.7 * torch.sin(0.8 * x + 6.283 * phase) + 0.35 * torch.sin(2.1 * x + 20 * phase)
        meadow = (y + 0.5 * torch.sin(0.6 * x + 9 * phase) < 1.0).float()
        color = where(kinds == 1, mixed(first, second, meadow), color)
        height = torch.where(kinds == 1, hills, height)
    if 2 in present:
        fold = 0.5 + 0.5 * torch.sin(5 * x + 6.283 * phase + 0.8 * torch.sin(1.7 * x))
        color = where(kinds == 2, mixed(first, second, fold), color)
    if 3 in present:
        row = (y * 2.2).floor()
        brick = x * 1.1 + 0.5 * (row % 2) + phase
        joint = (_fraction(brick) < 0.08) | (_fraction(y * 2.2) < 0.14)
        shade = 0.8 + 0.4 * _noise(brick.floor(), row, phase)
        color = where(kinds == 3, where(joint, second, scaled(first, shade)), color)
    if 4 in present:
        slat = _fraction(x * 1.4 + phase)
        rail = (y > 0.55) & (y < 0.75)
        color = where(kinds == 4, where(rail, second, first), color)
        # No slat where there is a gap.
        height = torch.where(kinds == 4, torch.where((slat < 0.55) | rail, 1.5, 0.0), height)
    hit = (kinds > 0) & (distance > 1e-3) & (distance < 60) & (y >= 0) & (y < height)
    return color, torch.where(hit, distance, torch.full_like(distance, FAR))


def patterned(view: View, slot: int, p: Vector, color: Vector) -> tuple[Vector, Tensor]:
    """Colours at points of a solid, given in its own frame, and where rust makes it dull."""
    kinds, present = view.number("pattern", slot), view.present("pattern", slot) - {0}
    dull = torch.zeros_like(p[0], dtype=torch.bool)
    if not present:
        return color, dull
    scale, phase = view.number("scale", slot), view.number("pattern_phase", slot)
    q = scaled(p, scale)
    along, across = dot(view.vector("direction", slot), q), dot(view.vector("across", slot), q)
    share = torch.zeros_like(along)

    def put(name: str, value: Tensor) -> None:
        nonlocal share
        share = torch.where(kinds == 1 + PATTERNS.index(name), value.to(share.dtype), share)

    names = {PATTERNS[number - 1] for number in present}
    if "stripes" in names:
        put("stripes", _fraction(along * 1.5 + phase) < 0.42)
    if "rings" in names:
        n, s = view.vector("direction", slot), 1 / scale
        center: Vector = (n[0] * s, n[1] * s, n[2] * s)
        r = ((p[0] - center[0]) ** 2 + (p[1] - center[1]) ** 2 + (p[2] - center[2]) ** 2).sqrt() * scale
        put("rings", _fraction(r * 1.8 + phase) < 0.42)
    if "dots" in names:
        gap = [_fraction(axis * 1.25 + phase) - 0.5 for axis in q]
        put("dots", (gap[0] ** 2 + gap[1] ** 2 + gap[2] ** 2).sqrt() < 0.42)
    if "checks" in names:
        cells = [(axis * 1.6 + phase).floor() for axis in q]
        put("checks", ((cells[0] + cells[1] + cells[2]) % 2) > 0.5)
    if "halves" in names:
        put("halves", along > 0.15)
    if "letter" in names:
        font = torch.tensor(
            [[[mark == "#" for mark in line] for line in letter] for letter in LETTERS.values()],
            dtype=torch.float32,
            device=share.device,
        )
        column, line = across * 5.0 + 2.5, 3.5 - q[1] * 5.0
        inside = (column >= 0) & (column < 5) & (line >= 0) & (line < 7) & (along > 0)
        at = (view.number("letter", slot).long() * 7 + line.long().clamp(0, 6)) * 5 + column.long().clamp(0, 4)
        put("letter", inside & (font.flatten()[at] > 0.5))
    if "marble" in names:
        bend = _smooth_noise(q[0] * 2.2 + 7 * phase, q[1] * 2.2 + q[2] * 1.7, phase)
        put("marble", (torch.sin(along * 5 + 5 * bend).abs() < 0.32).float())
    if "rust" in names:
        field = _smooth_noise(q[0] * 1.9 + q[2] * 1.3 + 5 * phase, q[1] * 1.9 - q[2], phase)
        grain = _smooth_noise(q[0] * 9, q[1] * 9 + q[2] * 7, phase)
        patch = (field + 0.25 * grain > 0.68).float()
        put("rust", patch)
        dull = (kinds == 1 + PATTERNS.index("rust")) & (patch > 0.5)
    return mixed(color, view.vector("pattern_color", slot), share), dull
