"""Scenes as rows of numbers, every detail included, from which all rays of many scenes are computed at once."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .attributes import FLOORS
from .scene import Scene, SceneObject
from .solids import Solid, camera_frame, unit
from .strangers import GROUNDS, LETTERS, PATTERNS, SCREENS, Prop
from .vectors import Vector

SLOTS = 4
"""Solids of a packed scene: two objects, two props."""
FAR = 1e4
"""Distance of a ray that meets nothing."""
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
        "sphere": ((1.0, 0.0, -r * r), FAR, 0.0, 0.0),
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


def solid_counts(rows: NDArray[np.float32]) -> NDArray[np.int64]:
    """How many solids (B,) each packed scene has."""
    there = rows[:, [_SCENE_SIZE + slot * _SOLID_SIZE + _IN_SOLID["there"].start for slot in range(SLOTS)]]
    counts: NDArray[np.int64] = there.sum(1).astype(np.int64)
    return counts


@dataclass(frozen=True)
class View:
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
