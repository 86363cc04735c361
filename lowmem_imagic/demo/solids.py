"""Solids and camera of a scene, as numbers.

Conventions: y is up, the camera looks along +z at the centre of the floor.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .scene import Scene, SceneObject

Array = NDArray[Any]

FIELD = 0.40
"""Half the picture's width at unit distance from the camera."""
LIGHT_DISC = ((0.0, 0.0), (0.10, 0.03), (-0.05, 0.09), (-0.07, -0.08), (0.05, -0.10))
"""Offsets of the area light's samples, giving soft shadow edges."""


@dataclass(frozen=True)
class Solid:
    """An object's geometry in world coordinates: a shape in its own frame plus the frame."""

    shape: str
    center: Array
    axes: Array
    """(3, 3): rows are the own axes in world coordinates; world-to-own is ``axes @ (p - center)``."""
    radius: float
    half_height: float

    @staticmethod
    def of(solid: SceneObject) -> "Solid":
        r = solid.radius
        radius, half_height = {
            "sphere": (r, r),
            "cube": (0.80 * r, 0.80 * r),
            "cylinder": (0.68 * r, 0.88 * r),
            "cone": (0.82 * r, 0.95 * r),
        }[solid.shape]
        tilt, lift = 0.0, half_height
        if solid.pose == "lying" and solid.shape == "cylinder":
            tilt, lift = math.pi / 2, radius
        elif solid.pose == "lying" and solid.shape == "cone":
            # The cone rests on one of its generating lines: tilt it until that line's outward normal points down.
            half_angle = math.atan2(radius, 2 * half_height)
            tilt = math.pi / 2 + half_angle
            lift = radius * half_height / math.hypot(2 * half_height, radius)
        yaw = np.array(
            [
                [math.cos(solid.rotation), 0, math.sin(solid.rotation)],
                [0, 1, 0],
                [-math.sin(solid.rotation), 0, math.cos(solid.rotation)],
            ]
        )
        roll = np.array([[math.cos(tilt), math.sin(tilt), 0], [-math.sin(tilt), math.cos(tilt), 0], [0, 0, 1]])
        axes = (yaw @ roll).T.astype(np.float32)
        center = np.array([solid.x, lift, solid.z], np.float32)
        return Solid(solid.shape, center, axes, radius, half_height)


def unit(v: Array) -> Array:
    unit: Array = (v / (np.linalg.norm(v, axis=-1, keepdims=True) + 1e-9)).astype(np.float32)
    return unit


def camera_frame(scene: Scene) -> tuple[Array, Array, Array, Array]:
    """Camera position (3,) and the directions forward, right and up (3,), float64."""
    flat = scene.distance * math.cos(scene.elevation)
    eye = np.array(
        [
            flat * math.sin(scene.azimuth),
            scene.distance * math.sin(scene.elevation),
            -flat * math.cos(scene.azimuth),
        ]
    )
    forward = np.array([0.0, 0.42, 0.0]) - eye
    forward /= np.linalg.norm(forward)
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    return eye, forward, right, np.cross(forward, right)
