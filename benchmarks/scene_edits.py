"""SceneEdits: photos of the bundled world with a sentence each, and the edited picture itself as ground truth.

Two disjoint sets with fixed seeds, `VALIDATION` for choosing settings and `TEST` for reporting. Every kind of edit has
the same share. Photos show one object; the sentence describes the edited picture as a user would: colour, shape and
floor, the changed attributes, and the pose of a lying object.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lowmem_imagic.demo.render import object_mask, render
from lowmem_imagic.demo.scene import COLORS, FLOORS, LYING_SHAPES, MATERIALS, POSES, SHAPES, SIZES, Scene, SceneObject

KINDS = ("color", "shape", "material", "size", "floor", "pose", "two", "add")
"""One attribute; two attributes at once; a second object."""
HARD_KINDS = ("pose", "add")
"""Kinds reported separately: the bundled model hardly drew them when this was decided."""
SAME_LEVELS = 10
"""Largest difference, of 255, at which a pixel counts as equal in two renders."""

_WORDS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "material": MATERIALS,
    "size": tuple(SIZES),
    "floor": FLOORS,
    "pose": POSES,
}
_PAIRS = (("color", "floor"), ("color", "shape"), ("shape", "floor"), ("color", "material"))
"""Attributes changed by the kind "two", in turn."""


@dataclass(frozen=True)
class EditSet:
    """A set of items."""

    name: str
    seed: int
    """Seed of the scenes; never a seed that trained the model or the judge."""
    per_kind: int

    def items(self) -> list["SceneEdit"]:
        """The items, kinds in turn, so that the first N items have equal shares of all kinds."""
        return [self._item(kind, number) for number in range(self.per_kind) for kind in KINDS]

    def _item(self, kind: str, number: int) -> "SceneEdit":
        rng = random.Random(f"{self.seed}/{kind}/{number}")
        photo = Scene.draw(rng, objects=1)
        solid = photo.objects[0]
        if kind == "pose" and solid.shape not in LYING_SHAPES:
            shape = rng.choice(LYING_SHAPES)
            photo = replace(photo, objects=(replace(solid, shape=shape, pose=rng.choice(POSES)),))
        if kind == "add":
            return _add(photo, rng, f"{kind}-{number}")
        names = _PAIRS[number % len(_PAIRS)] if kind == "two" else (kind,)
        asked = {name: rng.choice([w for w in _WORDS[name] if w != _attribute(photo, name)]) for name in names}
        edited = photo.edit(**asked)
        return SceneEdit(f"{kind}-{number}", kind, photo, edited, names)


VALIDATION = EditSet("validation", seed=5, per_kind=4)
"""32 items."""
TEST = EditSet("test", seed=6, per_kind=16)
"""128 items."""
SETS = {chosen.name: chosen for chosen in (VALIDATION, TEST)}


@dataclass(frozen=True)
class SceneEdit:
    """A photo, a sentence, and the ground truth of the edit."""

    name: str
    kind: str
    photo: Scene
    edited: Scene
    asked: tuple[str, ...]
    """Attributes the sentence changes; empty for a second object."""
    in_full: bool = False
    """Whether the sentence also names unchanged size and material."""

    @cached_property
    def sentence(self) -> str:
        """The target sentence."""
        phrases = [
            solid.words(
                size=self.in_full or "size" in self.asked,
                material=self.in_full or "material" in self.asked,
                pose=self.in_full or "pose" in self.asked or solid.pose == "lying",
            )
            for solid in self.edited.objects
        ]
        return f"a photo of {' and '.join(phrases)} on a {self.edited.floor} floor"

    def photo_picture(self, size_px: int) -> Image.Image:
        """The photo."""
        return render(self.photo, size_px)

    def truth_picture(self, size_px: int) -> Image.Image:
        """The ground truth: the same scene, camera, light and floor with the edit applied."""
        return render(self.edited, size_px)

    def kept_mask(self, size_px: int) -> NDArray[np.bool_]:
        """Pixels (size, size) that the edit must keep: outside the old and the new object.

        For a changed floor: pixels that hardly differ in the ground truth, that is the sky and surfaces that do not
        mirror the floor.
        """
        if self.photo.floor == self.edited.floor:
            return (object_mask(self.photo, size_px) == 0) & (object_mask(self.edited, size_px) == 0)
        photo, truth = (
            np.asarray(picture, np.int16) for picture in (self.photo_picture(size_px), self.truth_picture(size_px))
        )
        unchanged: NDArray[np.bool_] = abs(photo - truth).max(-1) <= SAME_LEVELS
        return unchanged


def _attribute(scene: Scene, name: str) -> str:
    """An attribute of the scene's object, or its floor."""
    value: str = scene.floor if name == "floor" else getattr(scene.objects[0], name)
    return value


def _add(photo: Scene, rng: random.Random, name: str) -> SceneEdit:
    """The photo's object moved to one side, and the edit that adds a second object."""
    moved = replace(photo.objects[0], size="small", x=-rng.uniform(0.8, 1.2))
    added = SceneObject(
        shape=rng.choice([shape for shape in SHAPES if shape != moved.shape]),
        color=rng.choice([color for color in COLORS if color != moved.color]),
        material=rng.choice(MATERIALS),
        size="small",
        x=rng.uniform(0.8, 1.2),
        z=rng.uniform(-0.5, 0.5),
    )
    photo = replace(photo, objects=(moved,))
    return SceneEdit(name, "add", photo, photo.add(added), ())


def of_kinds(items: Sequence[SceneEdit], kinds: Sequence[str]) -> list[int]:
    """Indices of the items of these kinds."""
    return [number for number, item in enumerate(items) if item.kind in kinds]
