"""A scene of the bundled world as a value: drawn at random, described in words, edited, read from a sentence.

The picture of a scene is a pure function of the value (`lowmem_imagic.demo.render`), so
``scene.edit(color="blue")`` gives the ground truth of the edit "make it blue": the same camera,
light, floor texture and everything else, with one attribute changed.
"""

import math
import random
from dataclasses import dataclass, replace

from ..errors import ConfigError
from .attributes import COLORS, FLOORS, LYING_SHAPES, MATERIALS, POSES, SHAPES, SIZES
from .sentence import ObjectWords, read_sentence
from .strangers import (
    GROUNDS,
    LETTERS,
    PAINTS,
    PATTERNS,
    SCREENS,
    Color,
    Ground,
    Pattern,
    Prop,
    Screen,
    Vocabulary,
)


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One solid on the floor."""

    shape: str
    color: str
    material: str = "rubber"
    size: str = "large"
    pose: str = "standing"
    x: float = 0.0
    """Position to the right of the centre, scene units."""
    z: float = 0.0
    """Position away from the camera, scene units."""
    rotation: float = 0.0
    """Turn about the vertical axis, radians."""
    jitter: float = 1.0
    """Factor on the nominal radius of its size."""
    paint: Color | None = None
    """A colour without a name in place of the named one, linear light; captions then leave the colour out."""
    pattern: Pattern | None = None
    """A second colour on parts of it; no caption mentions it."""

    def __post_init__(self) -> None:
        allowed = {"shape": SHAPES, "color": COLORS, "material": MATERIALS, "size": SIZES, "pose": POSES}
        problems = [
            f"{name} is {getattr(self, name)!r}, expected one of {', '.join(words)}"
            for name, words in allowed.items()
            if getattr(self, name) not in words
        ]
        if self.pose == "lying" and self.shape not in LYING_SHAPES:
            problems.append(f"a {self.shape} cannot lie, only {' and '.join(LYING_SHAPES)} can")
        if problems:
            raise ConfigError(problems)

    @property
    def radius(self) -> float:
        """Radius in scene units."""
        return SIZES[self.size] * self.jitter

    @property
    def base_color(self) -> Color:
        """Linear-light colour, of the paint where it has one."""
        return self.paint or COLORS[self.color]

    def words(self, *, size: bool, material: bool, color: bool = True, pose: bool = True) -> str:
        """The noun phrase for this object with the chosen attributes, e.g. "a small lying red metal cone"."""
        parts = [
            self.size if size else "",
            self.pose if pose and self.shape in LYING_SHAPES else "",
            self.color if color and not self.paint else "",
            self.material if material else "",
            self.shape,
        ]
        phrase = " ".join(part for part in parts if part)
        return ("an " if phrase[0] in "aeiou" else "a ") + phrase


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One or two objects on a floor, with a camera, a light and a sky; renders to a picture."""

    objects: tuple[SceneObject, ...]
    floor: str
    azimuth: float = 0.0
    """Camera turned about the vertical axis through the centre, radians."""
    elevation: float = 0.44
    """Camera angle above the floor, radians."""
    distance: float = 5.0
    """Camera distance from the centre, scene units."""
    light: tuple[float, float, float] = (-0.5, 1.0, -0.6)
    """Direction towards the light (not normalised)."""
    sky: tuple[float, float, float] = (0.62, 0.74, 0.90)
    """Sky colour, linear light in [0, 1]."""
    texture_seed: int = 0
    """Chooses planks, stones, blades of grass and tiles."""
    ground: Ground | None = None
    """A floor without a name in place of the named one; captions then leave the floor out."""
    screen: Screen | None = None
    """A backdrop; no caption mentions it."""
    props: tuple[Prop, ...] = ()
    """Small things on the floor; no caption mentions them."""

    def __post_init__(self) -> None:
        if self.floor not in FLOORS:
            raise ConfigError(f"floor is {self.floor!r}, expected one of {', '.join(FLOORS)}")
        if not 1 <= len(self.objects) <= 2:
            raise ConfigError(f"a scene has one or two objects, found {len(self.objects)}")

    @staticmethod
    def draw(rng: random.Random, *, objects: int | None = None) -> "Scene":
        """A scene drawn from the training distribution; attributes are independent of each other."""
        count = objects or (1 if rng.random() < 0.65 else 2)
        solids = []
        for index in range(count):
            shape = rng.choice(SHAPES)
            if count == 1:
                size = rng.choice(tuple(SIZES))
                x, z = rng.uniform(-0.85, 0.85), rng.uniform(-0.6, 0.6)
            else:
                size = "small" if rng.random() < 0.6 else "large"
                x, z = (-1 if index == 0 else 1) * rng.uniform(0.8, 1.2), rng.uniform(-0.5, 0.5)
            solids.append(
                SceneObject(
                    shape=shape,
                    color=rng.choice(tuple(COLORS)),
                    material=rng.choice(MATERIALS),
                    size=size,
                    pose="lying" if shape in LYING_SHAPES and rng.random() < 0.35 else "standing",
                    x=x,
                    z=z,
                    rotation=rng.uniform(0, 2 * math.pi),
                    jitter=rng.uniform(0.93, 1.07),
                )
            )
        bright, tint = rng.uniform(0.45, 0.9), [rng.uniform(-0.18, 0.18) for _ in range(3)]
        return Scene(
            objects=tuple(solids),
            floor=rng.choice(FLOORS),
            azimuth=rng.uniform(-0.22, 0.22),
            elevation=rng.uniform(0.36, 0.52),
            distance=rng.uniform(4.8, 5.2),
            light=(rng.uniform(-0.8, 0.8), 1.0, rng.uniform(-0.9, -0.1)),
            sky=(
                min(1.0, max(0.1, bright + tint[0])),
                min(1.0, max(0.1, bright + tint[1])),
                min(1.0, max(0.1, bright + tint[2])),
            ),
            texture_seed=rng.randrange(1 << 30),
        )

    @property
    def plain(self) -> bool:
        """Whether every detail of the scene has a name."""
        return not self.unnamed

    @property
    def unnamed(self) -> list[str]:
        """Words for the details of the scene that captions have no word for."""
        paints = {color: word for word, color in PAINTS.items()}
        words = []
        for solid in self.objects:
            words += [paints.get(solid.paint, "a colour")] if solid.paint else []
            words += [solid.pattern.kind] if solid.pattern else []
        words += [self.ground.kind] if self.ground else []
        words += [self.screen.kind] if self.screen else []
        return [*dict.fromkeys([*words, *(prop.kind for prop in self.props)])]

    def with_details(
        self,
        rng: random.Random,
        vocabulary: Vocabulary,
        *,
        pattern: float = 0.0,
        paint: float = 0.0,
        ground: float = 0.0,
        screen: float = 0.0,
        prop: float = 0.0,
    ) -> "Scene":
        """This scene with details of the vocabulary, each with its probability (per object for pattern and paint)."""
        solids = tuple(
            replace(
                solid,
                paint=vocabulary.paint(rng) if rng.random() < paint else solid.paint,
                pattern=vocabulary.pattern(rng, rotation=solid.rotation) if rng.random() < pattern else solid.pattern,
            )
            for solid in self.objects
        )
        return replace(
            self,
            objects=solids,
            ground=vocabulary.ground(rng) if rng.random() < ground else self.ground,
            screen=vocabulary.screen(rng) if rng.random() < screen else self.screen,
            props=tuple(vocabulary.prop(rng) for _ in range(rng.choice((1, 1, 2))))
            if rng.random() < prop
            else self.props,
        )

    def edit(self, *, object_index: int = 0, **changes: str) -> "Scene":
        """This scene with attributes of one object (shape, color, material, size, pose) or the floor changed.

        A named colour or floor takes the place of one without a name; every other detail stays.

        Raises:
            ConfigError: unknown attribute or value. A shape that cannot lie becomes standing.
        """
        unknown = set(changes) - {"shape", "color", "material", "size", "pose", "floor"}
        if unknown:
            raise ConfigError(f"a scene has no attribute {', '.join(sorted(unknown))}")
        if not 0 <= object_index < len(self.objects):
            raise ConfigError(f"object {object_index} of {len(self.objects)} does not exist")
        scene = self
        if "floor" in changes:
            scene = replace(self, floor=changes.pop("floor"), ground=None)
        if changes:
            solid = self.objects[object_index]
            if changes.get("shape", solid.shape) not in LYING_SHAPES and "pose" not in changes:
                changes["pose"] = "standing"
            solids = list(self.objects)
            paint = None if "color" in changes else solid.paint
            solids[object_index] = replace(solid, paint=paint, **changes)  # type: ignore[arg-type]
            scene = replace(scene, objects=tuple(solids))
        return scene

    def add(self, solid: SceneObject) -> "Scene":
        """This scene with a second object."""
        return replace(self, objects=(*self.objects, solid))

    def caption(self, rng: random.Random | None = None) -> str:
        """A sentence that describes the scene; with `rng`, attributes are left out at random.

        Without `rng` everything is said. With it, size, material, pose, colour and floor are each
        sometimes left out, so that a model learns what each word means on its own.
        """
        if rng is None:
            phrases = [solid.words(size=True, material=True) for solid in self.objects]
            return f"a photo of {' and '.join(phrases)}{self._place}"
        phrases = []
        for solid in self.objects:
            say_pose = rng.random() < (0.85 if solid.pose == "lying" else 0.3)
            phrases.append(
                solid.words(
                    size=rng.random() < 0.55,
                    material=rng.random() < 0.65,
                    color=rng.random() < 0.94,
                    pose=say_pose,
                )
            )
        opening = "a photo of " if rng.random() < 0.7 else ""
        place = self._place if rng.random() < 0.75 else ""
        return opening + " and ".join(phrases) + place

    @property
    def _place(self) -> str:
        """The end of a caption that names the floor, empty where the floor has no name."""
        return "" if self.ground else f" on a {self.floor} floor"

    @staticmethod
    def from_sentence(sentence: str, *, seed: int = 0) -> "Scene":
        """The scene a sentence describes; what it leaves open is drawn with `seed`.

        Beside the words of captions it may name details: a colour of `PAINTS`, a pattern after its object ("with cyan
        stripes", "with a letter H"), a floor of `GROUNDS` and a backdrop of `SCREENS`.

        Raises:
            PromptError: see `read_sentence`.
        """
        read = read_sentence(sentence)
        scene = Scene.draw(random.Random(seed), objects=len(read.objects))
        details = random.Random(f"{seed}/details")
        solids = [_solid(drawn, words, details) for drawn, words in zip(scene.objects, read.objects, strict=True)]
        floor, screen = read.scenery.get("floor"), read.scenery.get("backdrop")
        return replace(
            scene,
            objects=tuple(solids),
            floor=floor if floor in FLOORS else scene.floor,
            ground=_ANY.ground(details, floor) if floor in GROUNDS else None,
            screen=_ANY.screen(details, screen) if screen else None,
        )


_ANY = Vocabulary(
    patterns=PATTERNS, paints=tuple(PAINTS), letters=tuple(LETTERS), grounds=GROUNDS, screens=SCREENS, props=()
)


def _solid(drawn: SceneObject, words: ObjectWords, rng: random.Random) -> SceneObject:
    """The drawn object with what a sentence says of it; without a word it is of rubber, and stands."""
    said = words.said
    color = said.get("colour", drawn.color)
    solid = replace(
        drawn,
        shape=said["shape"],
        color=color if color in COLORS else drawn.color,
        paint=PAINTS.get(color),
        material=said.get("material", "rubber"),
        size=said.get("size", drawn.size),
        pose=said.get("pose", "standing"),
    )
    return replace(solid, pattern=_pattern(rng, solid, words)) if "pattern" in said else solid


def _pattern(rng: random.Random, solid: SceneObject, words: ObjectWords) -> Pattern:
    """The pattern that a sentence asks for on the solid."""
    pattern = _ANY.pattern(rng, rotation=solid.rotation, kind=words.said["pattern"])
    assert pattern is not None
    if words.pattern_color is not None:
        color = {**COLORS, **PAINTS}[words.pattern_color]
    else:
        # A colour that the object has already would not show.
        own = solid.base_color
        color = max(PAINTS.values(), key=lambda paint: sum((a - b) ** 2 for a, b in zip(paint, own, strict=True)))
    return replace(pattern, color=color, letter=words.letter or pattern.letter)
