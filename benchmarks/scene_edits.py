"""SceneEdits 2: photos of the bundled world with a sentence each, and the edited picture itself as ground truth.

Two disjoint sets with fixed seeds, `VALIDATION` for choosing settings and `TEST` for reporting. Each has two halves of
equal size. *Known* photos have nothing that no sentence has a word for. *Strangers* are the same photos with details
that the base was never trained on (`lowmem_imagic.demo.strangers.STRANGE`): always a pattern on the object, and on some
a paint, a ground, a screen or props. Their edits are the same, so that the halves differ in the details alone.

Every kind of edit has the same share of each half. Photos show one object; the sentence describes the edited picture as
a user would: colour, shape and floor, the changed attributes, and the pose of a lying object. It never mentions a
detail, and leaves out a colour or a floor without a name.

The ground truth of a stranger keeps the details, as a user would expect:

- *color*: the object gets the named colour, in place of its own or of its paint; the pattern keeps its colour.
- *shape*, *size*, *pose*: the pattern goes with the object, in the object's own coordinates: it grows with the object,
  lies down with it, and cuts the new shape as it cut the old one.
- *material*: the pattern shines or is matt like the rest of the object; rust is matt on metal, too.
- *floor*: the named floor takes the place of any other; a screen and props stay on it.
- *two*: both at once. *add*: the second object is as the sentence says, without details; the first keeps its own.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lowmem_imagic.demo.attributes import COLORS, FLOORS, LYING_SHAPES, MATERIALS, POSES, SHAPES, SIZES
from lowmem_imagic.demo.render import object_mask, render
from lowmem_imagic.demo.scene import Scene, SceneObject
from lowmem_imagic.demo.strangers import STRANGE

from .identity import PatternReader, readers

KINDS = ("color", "shape", "material", "size", "floor", "pose", "two", "add")
"""One attribute; two attributes at once; a second object."""
GROUPS: dict[str, tuple[str, ...]] = {
    "rigid": ("color", "material", "floor", "two"),
    "non_rigid": ("shape", "size", "pose", "add"),
}
"""Kinds that leave outlines where they are, and kinds that do not; "two" changes the shape in every second item."""
KNOWN, STRANGERS = "known", "strangers"
HALVES = (KNOWN, STRANGERS)
SAME_LEVELS = 10
"""Largest difference, of 255, at which a pixel counts as equal in two renders."""
PATTERN_SHARES, READABLE_SHARE, CONTRAST = (0.08, 0.6), 0.6, 40.0
"""Shares of a stranger's object that show its pattern, least share of pixels whose two colours can be told apart, and
least distance of the two colours; of photo and ground truth alike. A white object with pale spots is no stranger."""

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
_CHECKED_PX = 48
"""Size at which a pattern is tried."""


@dataclass(frozen=True)
class EditSet:
    """A set of items."""

    name: str
    seed: int
    """Seed of the scenes; never a seed that trained the model or the judge."""
    per_kind: int
    """Items of each kind in each half."""

    def items(self) -> list["SceneEdit"]:
        """The items, halves and kinds in turn, so that the first N items have equal shares of all."""
        return list(_items(self))


@lru_cache
def _items(chosen: EditSet) -> tuple["SceneEdit", ...]:
    """The items of a set."""
    known = [_known(chosen.seed, kind, number) for number in range(chosen.per_kind) for kind in KINDS]
    return tuple(item for pair in zip(known, _strangers(known, chosen.seed), strict=True) for item in pair)


VALIDATION = EditSet("validation", seed=12, per_kind=8)
"""128 items."""
TEST = EditSet("test", seed=13, per_kind=16)
"""256 items."""
SETS = {chosen.name: chosen for chosen in (VALIDATION, TEST)}


@dataclass(frozen=True)
class SceneEdit:
    """A photo, a sentence, and the ground truth of the edit."""

    name: str
    half: str
    """One of `HALVES`."""
    kind: str
    """One of `KINDS`."""
    photo: Scene
    edited: Scene
    asked: tuple[str, ...]
    """Attributes the sentence changes; empty for a second object."""
    in_full: bool = False
    """Whether the sentence also names unchanged size and material."""

    @cached_property
    def sentence(self) -> str:
        """The target sentence."""
        return self._told(self.edited)

    @cached_property
    def source(self) -> str:
        """The source prompt: the photo in the words of the sentence, which never mention a detail."""
        return self._told(self.photo)

    def _told(self, scene: Scene) -> str:
        """A scene in a sentence with the attributes that the edit is about."""
        phrases = [
            solid.words(
                size=self.in_full or "size" in self.asked,
                material=self.in_full or "material" in self.asked,
                pose=self.in_full or "pose" in self.asked or solid.pose == "lying",
            )
            for solid in scene.objects
        ]
        place = "" if scene.ground else f" on a {scene.floor} floor"
        return f"a photo of {' and '.join(phrases)}{place}"

    def photo_picture(self, size_px: int) -> Image.Image:
        """The photo."""
        return _rendered(self.photo, size_px)

    def truth_picture(self, size_px: int) -> Image.Image:
        """The ground truth: the same scene, camera, light and floor with the edit applied."""
        return _rendered(self.edited, size_px)

    def kept_mask(self, size_px: int) -> NDArray[np.bool_]:
        """Pixels (size, size) that the edit must keep: outside the old and the new object.

        For a changed floor: pixels that hardly differ in the ground truth, that is the sky and surfaces that do not
        mirror the floor.
        """
        if "floor" not in self.asked:
            return (_mask(self.photo, size_px) == 0) & (_mask(self.edited, size_px) == 0)
        photo, truth = (
            np.asarray(picture, np.int16) for picture in (self.photo_picture(size_px), self.truth_picture(size_px))
        )
        unchanged: NDArray[np.bool_] = abs(photo - truth).max(-1) <= SAME_LEVELS
        return unchanged

    def object_mask(self, size_px: int) -> NDArray[np.bool_]:
        """Pixels (size, size) of the photo's own object in the ground truth."""
        own: NDArray[np.bool_] = _mask(self.edited, size_px) == 1
        return own


@lru_cache(maxsize=2048)
def _rendered(scene: Scene, size_px: int) -> Image.Image:
    """The picture of a scene, which nobody changes."""
    return render(scene, size_px)


@lru_cache(maxsize=2048)
def _mask(scene: Scene, size_px: int) -> NDArray[np.int64]:
    """The object mask of a scene, which nobody changes."""
    return object_mask(scene, size_px)


def _known(seed: int, kind: str, number: int) -> SceneEdit:
    """Item `number` of a kind, without details."""
    name, rng = f"{KNOWN}-{kind}-{number}", random.Random(f"{seed}/{kind}/{number}")
    photo = Scene.draw(rng, objects=1)
    solid = photo.objects[0]
    if kind == "pose" and solid.shape not in LYING_SHAPES:
        shape = rng.choice(LYING_SHAPES)
        photo = replace(photo, objects=(replace(solid, shape=shape, pose=rng.choice(POSES)),))
    if kind == "add":
        return _add(photo, rng, name)
    names = _PAIRS[number % len(_PAIRS)] if kind == "two" else (kind,)
    asked = {word: rng.choice([w for w in _WORDS[word] if w != _attribute(photo, word)]) for word in names}
    return SceneEdit(name, KNOWN, kind, photo, photo.edit(**asked), names)


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
    return SceneEdit(name, KNOWN, "add", photo, photo.add(added), ())


def _strangers(known: Sequence[SceneEdit], seed: int) -> list[SceneEdit]:
    """Known items with details, before and after the edit; every pattern can be read in both."""
    draws = [random.Random(f"{seed}/{item.kind}/{item.name}/details") for item in known]
    detailed = [
        item.photo.with_details(rng, STRANGE, paint=0.2, ground=0.2, screen=0.25, prop=0.25)
        for item, rng in zip(known, draws, strict=True)
    ]
    items: dict[int, SceneEdit] = {}
    # All together, because a hundred small renders take as long as a large one.
    while waiting := [number for number in range(len(known)) if number not in items]:
        tried = [_patterned(known[number], detailed[number], draws[number]) for number in waiting]
        scenes = [scene for item in tried for scene in (item.photo, item.edited)]
        readable = [_readable(pattern) for pattern in readers(scenes, _CHECKED_PX, supersampling=1)]
        for place, (number, item) in enumerate(zip(waiting, tried, strict=True)):
            if all(readable[2 * place : 2 * place + 2]):
                items[number] = item
    return [items[number] for number in range(len(known))]


def _patterned(known: SceneEdit, detailed: Scene, rng: random.Random) -> SceneEdit:
    """A known item with the details of `detailed` and a new pattern."""
    [solid] = detailed.objects
    pattern = STRANGE.pattern(rng, rotation=solid.rotation)
    photo = replace(detailed, objects=(replace(solid, pattern=pattern),))
    own, *added = known.edited.objects
    own = replace(own, pattern=pattern, paint=None if "color" in known.asked else solid.paint)
    edited = replace(
        photo,
        objects=(own, *added),
        floor=known.edited.floor,
        ground=None if "floor" in known.asked else photo.ground,
    )
    return replace(known, name=known.name.replace(KNOWN, STRANGERS), half=STRANGERS, photo=photo, edited=edited)


def _readable(pattern: PatternReader) -> bool:
    """Whether enough of the pattern, and not all of the object, can be seen."""
    least, most = PATTERN_SHARES
    shown, readable = pattern.shares
    return least <= shown <= most and readable >= READABLE_SHARE and pattern.contrast >= CONTRAST


def rows_of(items: Sequence[SceneEdit], *, half: str | None = None, kinds: Sequence[str] = KINDS) -> list[int]:
    """Indices of the items of a half, or of both, and of these kinds."""
    return [n for n, item in enumerate(items) if half in (None, item.half) and item.kind in kinds]
