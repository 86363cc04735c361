"""Pictures of many scenes at once by ray casting, on any torch device, with every detail that a scene can have.

Every solid is intersected in closed form: exact surfaces and normals at any resolution, soft shadows from an area
light, one mirror bounce for metal, procedural floors whose contrast fades with distance (the average over a camera's
pixel). Every scene is packed into one row of numbers; then all rays of all scenes go through the same elementwise
operations, without a branch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .scene import FLOORS, Scene, SceneObject
from .solids import FIELD, LIGHT_DISC, Solid, camera_frame, unit
from .strangers import GROUNDS, LETTERS, PATTERNS, SCREENS, Prop

SLOTS = 4
"""Solids of a packed scene: two objects, two props."""
_FAR = 1e4
_RAYS = {"cuda": 1 << 22, "cpu": 1 << 17}
"""Rays traced together: enough to fill the device, few enough for its memory or cache."""

Vector = tuple[Tensor, Tensor, Tensor]

_SCENE = {
    "eye": 3, "forward": 3, "right": 3, "up": 3, "light": 3, "sky": 3,
    "floor": 1, "phase": 1, "floor_color": 3, "floor_second": 3, "floor_scale": 1,
    "screen": 1, "screen_depth": 1, "screen_color": 3, "screen_second": 3, "screen_phase": 1,
}  # fmt: skip
"""Numbers of a packed scene by name."""
_SOLID = {
    "there": 1, "box": 1, "center": 3, "axes": 9, "extent": 3, "quadric": 3, "bound": 1, "bottom": 1, "top": 1,
    "radius": 1, "color": 3, "metal": 1,
    "pattern": 1, "pattern_color": 3, "direction": 3, "across": 3, "scale": 1, "pattern_phase": 1, "letter": 1,
}  # fmt: skip
"""Numbers of one of its solids."""


def _slices(sizes: dict[str, int]) -> dict[str, slice]:
    ends = np.cumsum(list(sizes.values())).tolist()
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


_IN_SCENE, _IN_SOLID = _slices(_SCENE), _slices(_SOLID)
_SCENE_SIZE, _SOLID_SIZE = sum(_SCENE.values()), sum(_SOLID.values())
ROW = _SCENE_SIZE + SLOTS * _SOLID_SIZE
"""Numbers of a packed scene in all."""


def pack(scene: Scene) -> NDArray[np.float32]:
    """The row (`ROW`,) of numbers that a scene is rendered from."""
    row = np.zeros(ROW, np.float32)
    eye, forward, right, up = camera_frame(scene)
    ground, screen = scene.ground, scene.screen
    values: dict[str, Any] = {
        "eye": eye,
        "forward": forward,
        "right": right,
        "up": up,
        "light": unit(np.array(scene.light, np.float32)),
        "sky": scene.sky,
        "floor": len(FLOORS) + GROUNDS.index(ground.kind) if ground else FLOORS.index(scene.floor),
        "phase": scene.texture_seed % 10007 / 97.0,
    }
    if ground:
        values |= {"floor_color": ground.color, "floor_second": ground.second, "floor_scale": ground.scale}
    if screen:
        values |= {
            "screen": 1 + SCREENS.index(screen.kind),
            "screen_depth": screen.depth,
            "screen_color": screen.color,
            "screen_second": screen.second,
            "screen_phase": screen.phase,
        }
    for name, value in values.items():
        row[_IN_SCENE[name]] = value
    things: tuple[SceneObject | Prop, ...] = (*scene.objects, *scene.props)
    for slot, thing in enumerate(things):
        start = _SCENE_SIZE + slot * _SOLID_SIZE
        numbers = _object(thing) if isinstance(thing, SceneObject) else _prop(thing)
        for name, value in numbers.items():
            row[start:][_IN_SOLID[name]] = value
    return row


def _object(solid: SceneObject) -> dict[str, Any]:
    """The numbers of an object."""
    body = Solid.of(solid)
    numbers = _body(solid.shape, body.center, body.axes, body.radius, body.half_height)
    numbers |= {"color": solid.base_color, "metal": solid.material == "metal"}
    pattern = solid.pattern
    if pattern:
        turn, tilt = pattern.turn, pattern.tilt
        # Of an object not turned, -z is where the camera is.
        direction = (math.sin(turn) * math.cos(tilt), math.sin(tilt), -math.cos(turn) * math.cos(tilt))
        numbers |= {
            "pattern": 1 + PATTERNS.index(pattern.kind),
            "pattern_color": pattern.color,
            "direction": direction,
            "across": (math.cos(turn), 0.0, math.sin(turn)),
            "scale": pattern.scale / body.radius,
            "pattern_phase": pattern.phase,
            "letter": list(LETTERS).index(pattern.letter),
        }
    return numbers


def _prop(prop: Prop) -> dict[str, Any]:
    """The numbers of a prop."""
    size = prop.size
    shape, radius, half_height = {
        "pebble": ("sphere", size, size),
        "post": ("cylinder", 0.35 * size, 3.0 * size),
        "brick": ("cube", 1.3 * size, 0.6 * size),
        "peg": ("cone", 0.8 * size, 1.3 * size),
    }[prop.kind]
    cos, sin = math.cos(prop.rotation), math.sin(prop.rotation)
    axes = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]], np.float32)
    numbers = _body(shape, np.array([prop.x, half_height, prop.z]), axes, radius, half_height)
    if prop.kind == "brick":
        numbers["extent"] = (1.3 * size, 0.6 * size, 0.6 * size)
    return numbers | {"color": prop.color}


def _body(shape: str, center: NDArray[np.float32], axes: NDArray[np.float32], r: float, h: float) -> dict[str, Any]:
    """The numbers of a shape: a box, or ``x^2 + z^2 + a y^2 + 2 b y + c = 0`` between two caps."""
    k2 = (r / (2 * h)) ** 2
    quadric, bound, bottom, top = {
        "sphere": ((1.0, 0.0, -r * r), _FAR, 0.0, 0.0),
        "cube": ((0.0, 0.0, 1.0), h, 0.0, 0.0),
        "cylinder": ((0.0, 0.0, -r * r), h, r, r),
        "cone": ((-k2, k2 * h, -k2 * h * h), h, r, 0.0),
    }[shape]
    return {
        "there": 1,
        "box": shape == "cube",
        "center": center,
        "axes": axes.reshape(-1),
        "extent": (r, r, r),
        "quadric": quadric,
        "bound": bound,
        "bottom": bottom,
        "top": top,
        "radius": r,
    }


def render_batch(
    scenes: Sequence[Scene] | NDArray[np.float32],
    size_px: int,
    *,
    supersampling: int = 3,
    device: torch.device | str = "cpu",
    plain: bool = False,
) -> Tensor:
    """Pictures (B, size, size, 3) uint8 of the scenes, on the device.

    Args:
        scenes: scenes, or rows of `pack`.
        size_px: side of the pictures.
        supersampling: rays a pixel, along each side.
        device: where to compute.
        plain: leave patterns away.
    """
    rows = scenes if isinstance(scenes, np.ndarray) else np.stack([pack(scene) for scene in scenes])
    pictures = torch.empty(len(rows), size_px, size_px, 3, dtype=torch.uint8, device=device)
    side = size_px * supersampling
    for numbers, slots in _parts(rows, side, pictures.device):
        part = torch.from_numpy(rows[numbers]).to(pictures.device)
        color, _ = _shade(_View(part, slots, rows[numbers]), side, plain=plain)
        planes = []
        for plane in color:
            linear = plane.view(-1, size_px, supersampling, size_px, supersampling).mean((2, 4))
            planes.append((linear.clamp(0, 1) ** (1 / 1.25) * 255).round())
        pictures[torch.from_numpy(numbers).to(pictures.device)] = torch.stack(planes, -1).to(torch.uint8)
    return pictures


def object_masks(scenes: Sequence[Scene], size_px: int) -> NDArray[np.int64]:
    """Object number (B, size, size) at each pixel's centre, 0 for everything else, props too."""
    rows = np.stack([pack(scene) for scene in scenes])
    counts = np.array([[len(scene.objects)] for scene in scenes])
    masks = np.empty((len(rows), size_px * size_px), np.int64)
    for numbers, slots in _parts(rows, size_px, torch.device("cpu")):
        part = rows[numbers]
        number = _shade(_View(torch.from_numpy(part), slots, part), size_px, plain=True)[1].numpy()
        masks[numbers] = np.where(number > counts[numbers], 0, number)
    return masks.reshape(-1, size_px, size_px)


def _parts(rows: NDArray[np.float32], side: int, device: torch.device) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Numbers of scenes that are rendered together, and how many solids each of them has."""
    there = rows[:, [_SCENE_SIZE + slot * _SOLID_SIZE + _IN_SOLID["there"].start for slot in range(SLOTS)]]
    together = max(1, _RAYS[device.type] // (side * side))
    counts = there.sum(1).astype(int)
    for count in np.unique(counts).tolist():
        chosen = np.flatnonzero(counts == count)
        for start in range(0, len(chosen), together):
            yield chosen[start : start + together], count


@dataclass(frozen=True)
class _View:
    """Packed scenes by name, every number as a column (B, 1) that broadcasts over the rays."""

    rows: Tensor
    slots: int
    packed: NDArray[np.float32]
    """The rows where they can be read without waiting for the device."""

    def present(self, name: str, slot: int | None = None) -> set[int]:
        """The values that a whole number has among the scenes."""
        where = _IN_SCENE[name] if slot is None else _IN_SOLID[name]
        start = 0 if slot is None else _SCENE_SIZE + slot * _SOLID_SIZE
        return set(np.unique(self.packed[:, start + where.start]).astype(int).tolist())

    def number(self, name: str, slot: int | None = None) -> Tensor:
        """A number of the scenes, or of the solid in a slot."""
        [column] = self._columns(name, slot)
        return column

    def vector(self, name: str, slot: int | None = None) -> Vector:
        """Three numbers of the scenes, or of the solid in a slot."""
        x, y, z = self._columns(name, slot)
        return x, y, z

    def axes(self, slot: int) -> tuple[Vector, Vector, Vector]:
        """A solid's own axes in world coordinates."""
        a = self._columns("axes", slot)
        return (a[0], a[1], a[2]), (a[3], a[4], a[5]), (a[6], a[7], a[8])

    def _columns(self, name: str, slot: int | None) -> list[Tensor]:
        where = _IN_SCENE[name] if slot is None else _IN_SOLID[name]
        start = 0 if slot is None else _SCENE_SIZE + slot * _SOLID_SIZE
        return list(self.rows[:, start + where.start : start + where.stop].split(1, 1))


def _dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _along(origin: Vector, distance: Tensor, direction: Vector) -> Vector:
    return (
        origin[0] + distance * direction[0],
        origin[1] + distance * direction[1],
        origin[2] + distance * direction[2],
    )


def _normalized(v: Vector) -> Vector:
    length = 1 / (_dot(v, v).sqrt() + 1e-9)
    return v[0] * length, v[1] * length, v[2] * length


def _where(condition: Tensor, a: Vector, b: Vector) -> Vector:
    return (
        torch.where(condition, a[0], b[0]),
        torch.where(condition, a[1], b[1]),
        torch.where(condition, a[2], b[2]),
    )


def _scaled(v: Vector, factor: Tensor) -> Vector:
    return v[0] * factor, v[1] * factor, v[2] * factor


def _mixed(a: Vector, b: Vector, share: Tensor) -> Vector:
    return a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share


def _bounded(value: Tensor, least: float) -> Tensor:
    """The value, away from zero by `least`, so that one can divide by it."""
    return torch.where(value.abs() < least, torch.full_like(value, least), value)


def _own(view: _View, slot: int, origin: Vector, direction: Vector) -> tuple[Vector, Vector]:
    """Origin and direction of rays in a solid's own frame."""
    center = view.vector("center", slot)
    axes = view.axes(slot)
    o = (origin[0] - center[0], origin[1] - center[1], origin[2] - center[2])
    return (
        (_dot(axes[0], o), _dot(axes[1], o), _dot(axes[2], o)),
        (_dot(axes[0], direction), _dot(axes[1], direction), _dot(axes[2], direction)),
    )


def _hit(view: _View, slot: int, o: Vector, d: Vector) -> tuple[Tensor, Vector]:
    """Distance along rays in a solid's own frame, `_FAR` where they miss, and outward normals."""
    # The curved surface.
    a2, b2, c2 = view.vector("quadric", slot)
    bound = view.number("bound", slot)
    a = d[0] * d[0] + d[2] * d[2] + a2 * d[1] * d[1]
    b = o[0] * d[0] + o[2] * d[2] + a2 * o[1] * d[1] + b2 * d[1]
    c = o[0] * o[0] + o[2] * o[2] + a2 * o[1] * o[1] + 2 * b2 * o[1] + c2
    disc = b * b - a * c
    root = disc.clamp_min(0).sqrt()
    inverse = 1 / _bounded(a, 1e-9)
    first, second = (-b - root) * inverse, (-b + root) * inverse
    best = torch.full_like(first, _FAR)
    for distance in (torch.minimum(first, second), torch.maximum(first, second)):
        inside = (disc >= 0) & ((o[1] + distance * d[1]).abs() <= bound) & (distance > 1e-4) & (distance < best)
        best = torch.where(inside, distance, best)
    p = _along(o, best, d)
    normal = _normalized((p[0], a2 * p[1] + b2, p[2]))
    # The caps.
    down = 1 / _bounded(d[1], 1e-7)
    zero, one = torch.zeros_like(best), torch.ones_like(best)
    for radius, height, sign in (("bottom", -bound, -1), ("top", bound, 1)):
        size = view.number(radius, slot)
        distance = (height - o[1]) * down
        x, z = o[0] + distance * d[0], o[2] + distance * d[2]
        inside = (x * x + z * z <= size * size) & (size > 0) & (distance > 1e-4) & (distance < best)
        best = torch.where(inside, distance, best)
        normal = _where(inside, (zero, sign * one, zero), normal)
    # The box.
    enter, leave, faces = None, None, []
    for extent, position, step in zip(view.vector("extent", slot), o, d, strict=True):
        inverse = 1 / _bounded(step, 1e-7)
        low, high = (-extent - position) * inverse, (extent - position) * inverse
        faces.append(torch.minimum(low, high))
        far = torch.maximum(low, high)
        enter = faces[-1] if enter is None else torch.maximum(enter, faces[-1])
        leave = far if leave is None else torch.minimum(leave, far)
    assert enter is not None and leave is not None
    box = view.number("box", slot) > 0
    entered = torch.where((enter < leave) & (enter > 0), enter, torch.full_like(enter, _FAR))
    x = enter == faces[0]
    y = ~x & (enter == faces[1])
    face: Vector = (
        torch.where(x, -d[0].sign(), zero),
        torch.where(y, -d[1].sign(), zero),
        torch.where(x | y, zero, -d[2].sign()),
    )
    return torch.where(box, entered, best), _where(box, face, normal)


def _trace(view: _View, origin: Vector, direction: Vector) -> tuple[Tensor, Vector, Tensor]:
    """Nearest distance, normal and solid number from 1 (0 where nothing is hit) of rays."""
    best, normal, number = None, None, None
    for slot in range(view.slots):
        distance, n = _hit(view, slot, *_own(view, slot, origin, direction))
        axes = view.axes(slot)
        world: Vector = (
            n[0] * axes[0][0] + n[1] * axes[1][0] + n[2] * axes[2][0],
            n[0] * axes[0][1] + n[1] * axes[1][1] + n[2] * axes[2][1],
            n[0] * axes[0][2] + n[1] * axes[1][2] + n[2] * axes[2][2],
        )
        if best is None or normal is None or number is None:
            best, normal, number = distance, world, (distance < _FAR).long()
            continue
        nearer = distance < best
        best = torch.where(nearer, distance, best)
        normal = _where(nearer, world, normal)
        number = torch.where(nearer, slot + 1, number)
    assert best is not None and normal is not None and number is not None
    return best, normal, number


def _blocked(view: _View, origin: Vector, direction: Vector) -> Tensor:
    """Whether any solid is hit by rays; a cheaper `_trace`."""
    blocked = None
    for slot in range(view.slots):
        o, d = _own(view, slot, origin, direction)
        a2, b2, c2 = view.vector("quadric", slot)
        bound = view.number("bound", slot)
        a = d[0] * d[0] + d[2] * d[2] + a2 * d[1] * d[1]
        b = o[0] * d[0] + o[2] * d[2] + a2 * o[1] * d[1] + b2 * d[1]
        c = o[0] * o[0] + o[2] * o[2] + a2 * o[1] * o[1] + 2 * b2 * o[1] + c2
        disc = b * b - a * c
        root = disc.clamp_min(0).sqrt()
        inverse = 1 / _bounded(a, 1e-9)
        hit = torch.zeros_like(disc, dtype=torch.bool)
        for distance in ((-b - root) * inverse, (-b + root) * inverse):
            hit = hit | (((o[1] + distance * d[1]).abs() <= bound) & (distance > 1e-4))
        hit = hit & (disc >= 0)
        down = 1 / _bounded(d[1], 1e-7)
        for radius, height in (("bottom", -bound), ("top", bound)):
            size = view.number(radius, slot)
            distance = (height - o[1]) * down
            x, z = o[0] + distance * d[0], o[2] + distance * d[2]
            hit = hit | ((x * x + z * z <= size * size) & (size > 0) & (distance > 1e-4))
        enter, leave = None, None
        for extent, position, step in zip(view.vector("extent", slot), o, d, strict=True):
            inverse = 1 / _bounded(step, 1e-7)
            low, high = (-extent - position) * inverse, (extent - position) * inverse
            near, far = torch.minimum(low, high), torch.maximum(low, high)
            enter = near if enter is None else torch.maximum(enter, near)
            leave = far if leave is None else torch.minimum(leave, far)
        assert enter is not None and leave is not None
        hit = torch.where(view.number("box", slot) > 0, (enter < leave) & (enter > 0), hit)
        blocked = hit if blocked is None else blocked | hit
    assert blocked is not None
    return blocked


def _lit_share(view: _View, points: Vector) -> Tensor:
    """Share of the area light that each point sees."""
    lx, ly, lz = view.vector("light")
    # The cross products of the light's direction with a fixed vector, and with the first of them.
    s = _normalized((ly * 1.0 - lz * 0.1, lz * 0.3 - lx * 1.0, lx * 0.1 - ly * 0.3))
    u = (ly * s[2] - lz * s[1], lz * s[0] - lx * s[2], lx * s[1] - ly * s[0])
    seen = None
    for a, b in LIGHT_DISC:
        ray = _normalized((lx + a * s[0] + b * u[0], ly + a * s[1] + b * u[1], lz + a * s[2] + b * u[2]))
        free = (~_blocked(view, points, ray)).float()
        seen = free if seen is None else seen + free
    assert seen is not None
    return seen / len(LIGHT_DISC)


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


def _floor_color(view: _View, x: Tensor, z: Tensor, distance: Tensor) -> Vector:
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
        color = _where(kinds == kind, paint, color)

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
        put(number, _mixed(first, second, 0.15 + fade * (share - 0.15)))
    if number + 1 in present:
        # Sand: ripples that a slow noise bends.
        ripple = torch.sin(z * 7 + 3 * _smooth_noise(x * 0.9, z * 0.9, phase) + x)
        share = 0.35 + fade * (0.22 * ripple + 0.25 * (_smooth_noise(x * 12, z * 12, phase) - 0.5))
        put(number + 1, _mixed(first, second, share))
    if number + 2 in present:
        # Water: crests where two waves meet.
        wave = _smooth_noise(x * 1.6, z * 2.6, phase) + _smooth_noise(x * 3.1 + 5, z * 4.7, phase)
        crest = (1 - 3.2 * (wave - 1).abs()).clamp(0, 1)
        put(number + 2, _mixed(first, second, fade * crest))
    if number + 3 in present:
        # Gravel: stones of two colours and dark gaps.
        stone = _smooth_noise(x * 4.5, z * 4.5, phase)
        share = (_smooth_noise(x * 2.3 + 9, z * 2.3, phase) > 0.5).float()
        gap = 1 - 0.6 * fade * (stone < 0.28)
        put(number + 3, _scaled(_mixed(first, second, 0.5 + fade * (share - 0.5)), gap))
    return color


def _screen(view: _View, origin: Vector, direction: Vector) -> tuple[Vector, Tensor]:
    """Colour of the backdrop, and its distance, `_FAR` where rays miss it."""
    kinds, present = view.number("screen"), view.present("screen")
    depth, phase = view.number("screen_depth"), view.number("screen_phase")
    first, second = view.vector("screen_color"), view.vector("screen_second")
    distance = (depth - origin[2]) / _bounded(direction[2], 1e-7)
    x, y = origin[0] + distance * direction[0], origin[1] + distance * direction[1]
    color: Vector = first
    height = torch.full_like(x, _FAR)
    if 1 in present:
        hills = 2.2 + 0.7 * torch.sin(0.8 * x + 6.283 * phase) + 0.35 * torch.sin(2.1 * x + 20 * phase)
        meadow = (y + 0.5 * torch.sin(0.6 * x + 9 * phase) < 1.0).float()
        color = _where(kinds == 1, _mixed(first, second, meadow), color)
        height = torch.where(kinds == 1, hills, height)
    if 2 in present:
        fold = 0.5 + 0.5 * torch.sin(5 * x + 6.283 * phase + 0.8 * torch.sin(1.7 * x))
        color = _where(kinds == 2, _mixed(first, second, fold), color)
    if 3 in present:
        row = (y * 2.2).floor()
        brick = x * 1.1 + 0.5 * (row % 2) + phase
        joint = (_fraction(brick) < 0.08) | (_fraction(y * 2.2) < 0.14)
        shade = 0.8 + 0.4 * _noise(brick.floor(), row, phase)
        color = _where(kinds == 3, _where(joint, second, _scaled(first, shade)), color)
    if 4 in present:
        slat = _fraction(x * 1.4 + phase)
        rail = (y > 0.55) & (y < 0.75)
        color = _where(kinds == 4, _where(rail, second, first), color)
        # No slat where there is a gap.
        height = torch.where(kinds == 4, torch.where((slat < 0.55) | rail, 1.5, 0.0), height)
    hit = (kinds > 0) & (distance > 1e-3) & (distance < 60) & (y >= 0) & (y < height)
    return color, torch.where(hit, distance, torch.full_like(distance, _FAR))


def _backdrop(view: _View, origin: Vector, direction: Vector) -> tuple[Vector, Tensor, Tensor]:
    """Unshaded floor, screen or sky colour that a ray sees, the floor's distance (`_FAR` elsewhere), all's distance."""
    brightness = 0.82 + 0.5 * direction[1].clamp(0, 1)
    color = _scaled(view.vector("sky"), brightness)
    down = direction[1].clamp_max(-1e-4)
    ground = torch.where(direction[1] < -1e-3, -origin[1] / down, torch.full_like(down, _FAR))
    near = ground < 60
    x, _, z = _along(origin, torch.where(near, ground, torch.zeros_like(ground)), direction)
    color = _where(near, _floor_color(view, x, z, ground), color)
    if view.present("screen") == {0}:
        return color, ground, ground
    picture, distance = _screen(view, origin, direction)
    front = distance < ground
    # What stands behind the screen is not floor any more.
    floor = torch.where(front, torch.full_like(ground, _FAR), ground)
    return _where(front, picture, color), floor, torch.minimum(ground, distance)


def _patterned(view: _View, slot: int, p: Vector, color: Vector) -> tuple[Vector, Tensor]:
    """Colours at points of a solid, given in its own frame, and where rust makes it dull."""
    kinds, present = view.number("pattern", slot), view.present("pattern", slot) - {0}
    dull = torch.zeros_like(p[0], dtype=torch.bool)
    if not present:
        return color, dull
    scale, phase = view.number("scale", slot), view.number("pattern_phase", slot)
    q = _scaled(p, scale)
    along, across = _dot(view.vector("direction", slot), q), _dot(view.vector("across", slot), q)
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
    return _mixed(color, view.vector("pattern_color", slot), share), dull


def _shade(view: _View, side: int, *, plain: bool) -> tuple[Vector, Tensor]:
    """Linear-light colours (B, side * side), three planes, and the numbers of the solids seen."""
    device = view.rows.device
    steps = (torch.arange(side, device=device, dtype=torch.float64) + 0.5) / side * 2 - 1
    px = (steps * FIELD).float().repeat(side)[None]
    py = (-steps * FIELD).float().repeat_interleave(side)[None]
    f, r, u = view.vector("forward"), view.vector("right"), view.vector("up")
    rays = _normalized((f[0] + px * r[0] + py * u[0], f[1] + px * r[1] + py * u[1], f[2] + px * r[2] + py * u[2]))
    eye = view.vector("eye")
    origin: Vector = (eye[0].expand_as(px * eye[0]), eye[1].expand_as(px * eye[0]), eye[2].expand_as(px * eye[0]))
    light, sky = view.vector("light"), view.vector("sky")

    color, ground, behind = _backdrop(view, origin, rays)
    distance, normal, number = _trace(view, origin, rays)
    hit = distance < behind
    number = torch.where(hit, number, 0)
    hit = number > 0
    on_floor = ~hit & (ground < 60)

    # One point for every ray, of an object or of the floor, so that the light is sought once.
    reach = torch.where(hit, distance, torch.where(on_floor, ground, torch.zeros_like(ground)))
    point = _along(origin, reach, rays)
    lifted: Vector = (point[0] + 2e-3 * normal[0], point[1] + 2e-3 * normal[1], point[2] + 2e-3 * normal[2])
    point = _where(hit, lifted, point)
    lit = _lit_share(view, point)

    near = (point[0].abs() < 5) & (point[2].abs() < 5)
    floor_lit = torch.where(near, lit, torch.ones_like(lit))
    for slot in range(view.slots):
        # Ambient light is blocked close to an object: the dark line where it touches the floor.
        cx, _, cz = view.vector("center", slot)
        gap2 = ((point[0] - cx) ** 2 + (point[2] - cz) ** 2) / view.number("radius", slot) ** 2
        floor_lit = floor_lit * (1 - 0.25 * torch.exp(-1.5 * gap2))
    shaded = _scaled(color, 0.42 + 0.68 * light[1] * floor_lit)
    haze = 1 - torch.exp(-0.07 * (ground - 5).clamp_min(0))
    color = _where(on_floor, _mixed(shaded, _scaled(sky, torch.full_like(sky[0], 0.9)), haze), color)

    # The object.
    base, metal = _surface(view, number, point, plain=plain)
    facing = _dot(normal, light).clamp(0, 1) * lit
    half = _normalized((light[0] - rays[0], light[1] - rays[1], light[2] - rays[2]))
    shine = _dot(normal, half).clamp(0, 1)
    rubber_light, gloss = 0.30 + 0.14 * normal[1] + 0.80 * facing, 0.10 * shine**14 * lit
    if not any(1 in view.present("metal", slot) for slot in range(view.slots)):
        return _where(hit, tuple(c * rubber_light + gloss for c in base), color), number  # type: ignore[arg-type]
    turned = _dot(rays, normal)
    mirror: Vector = (
        rays[0] - 2 * turned * normal[0],
        rays[1] - 2 * turned * normal[1],
        rays[2] - 2 * turned * normal[2],
    )
    seen, far, _ = _backdrop(view, point, mirror)
    seen = _scaled(seen, torch.where(far < 60, 0.85, 1.0))
    other = _trace(view, point, mirror)[2]
    for slot in range(view.slots):
        seen = _where(other == slot + 1, tuple(0.5 * c for c in view.vector("color", slot)), seen)  # type: ignore[arg-type]
    edge = (1 - (-turned).clamp(0, 1)) ** 4
    polish = 0.9 * shine**70 * lit
    shiny = [
        b * (0.08 + 0.25 * facing) + s * (0.75 * b + 0.10 + 0.25 * edge) + polish
        for b, s in zip(base, seen, strict=True)
    ]
    body = [torch.where(metal, m, b * rubber_light + gloss) for m, b in zip(shiny, base, strict=True)]
    return _where(hit, tuple(body), color), number  # type: ignore[arg-type]


def _surface(view: _View, number: Tensor, point: Vector, *, plain: bool) -> tuple[Vector, Tensor]:
    """Colour of the solid at each ray's point, and whether it shines like metal there."""
    zero = torch.zeros_like(point[0])
    base: Vector = (zero, zero, zero)
    metal = torch.zeros_like(number, dtype=torch.bool)
    for slot in range(view.slots):
        here = number == slot + 1
        color, shiny = view.vector("color", slot), view.number("metal", slot) > 0
        dull = torch.zeros_like(metal)
        if not plain:
            color, dull = _patterned(view, slot, _own(view, slot, point, point)[0], color)
        base = _where(here, color, base)
        metal = torch.where(here, shiny & ~dull, metal)
    return base, metal
