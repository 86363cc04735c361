"""Details of a scene that no sentence of the bundled world has a word for: patterns, paints, grounds, screens, props.

A photo shows such details and a base model has not seen them all: keeping them is what fine-tuning on the photo is
for. So they come in two vocabularies that share nothing: `FAMILIAR` details are in some of the pictures that the
bundled UNet and text encoder are trained on, never named in a caption; `STRANGE` ones are in none of them.
"""

import random
from dataclasses import dataclass

Color = tuple[float, float, float]

LETTERS: dict[str, tuple[str, ...]] = {
    "A": (" ### ", "#   #", "#   #", "#####", "#   #", "#   #", "#   #"),
    "E": ("#####", "#    ", "#    ", "#### ", "#    ", "#    ", "#####"),
    "H": ("#   #", "#   #", "#   #", "#####", "#   #", "#   #", "#   #"),
    "K": ("#   #", "#  # ", "# #  ", "##   ", "# #  ", "#  # ", "#   #"),
    "T": ("#####", "  #  ", "  #  ", "  #  ", "  #  ", "  #  ", "  #  "),
    "X": ("#   #", "#   #", " # # ", "  #  ", " # # ", "#   #", "#   #"),
}
"""Letters that may be painted on an object, five columns by seven rows."""

PATTERNS = ("stripes", "rings", "dots", "checks", "halves", "letter", "marble", "rust")
GROUNDS = ("carpet", "sand", "water", "gravel")
SCREENS = ("hills", "curtain", "wall", "fence")
PROPS = ("pebble", "post", "brick", "peg")

PAINTS: dict[str, Color] = {
    "olive": (0.38, 0.40, 0.06),
    "grey": (0.38, 0.38, 0.38),
    "navy": (0.03, 0.06, 0.25),
    "salmon": (0.90, 0.42, 0.30),
    "lime": (0.55, 0.80, 0.15),
    "beige": (0.75, 0.60, 0.42),
    "teal": (0.05, 0.32, 0.32),
    "cyan": (0.05, 0.75, 0.80),
    "pink": (0.92, 0.30, 0.58),
    "brown": (0.26, 0.13, 0.05),
    "lilac": (0.62, 0.50, 0.90),
    "pistachio": (0.85, 0.90, 0.60),
}
"""Linear-light colours by the name that a sentence for the renderer may call them; no caption does."""


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A second colour on parts of an object, fixed to the object: it turns and lies down with it."""

    kind: str
    """One of `PATTERNS`."""
    color: Color
    """Linear light."""
    turn: float = 0.0
    """Of the pattern about the object's own axis, radians."""
    tilt: float = 0.0
    """Of the pattern's direction out of the horizontal, radians."""
    scale: float = 1.0
    """Of the pattern's period."""
    phase: float = 0.0
    """Shift by parts of a period, in [0, 1)."""
    letter: str = "A"
    """One of `LETTERS`."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A floor without a name, in two colours."""

    kind: str
    """One of `GROUNDS`."""
    color: Color
    second: Color
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Screen:
    """What stands upright behind the objects and hides the far floor."""

    kind: str
    """One of `SCREENS`."""
    color: Color
    second: Color
    depth: float
    """Distance behind the centre of the floor, scene units."""
    phase: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Prop:
    """A small thing on the floor that no caption counts."""

    kind: str
    """One of `PROPS`."""
    color: Color
    x: float
    z: float
    size: float
    rotation: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Kinds of details that occur together."""

    patterns: tuple[str, ...]
    paints: tuple[str, ...]
    """Of `PAINTS`; each is drawn with a little variation."""
    letters: tuple[str, ...]
    grounds: tuple[str, ...]
    screens: tuple[str, ...]
    props: tuple[str, ...]

    def paint(self, rng: random.Random) -> Color:
        """A colour near one of the paints."""
        red, green, blue = (min(0.97, max(0.01, c * rng.uniform(0.88, 1.12))) for c in PAINTS[rng.choice(self.paints)])
        return red, green, blue

    def pattern(self, rng: random.Random, *, rotation: float, kind: str | None = None) -> Pattern | None:
        """A pattern, of any kind or a chosen one, for an object turned by `rotation`: a letter faces the camera."""
        if not self.patterns:
            return None
        kind = kind or rng.choice(self.patterns)
        facing = rng.uniform(-0.5, 0.5)
        return Pattern(
            kind=kind,
            color=self.paint(rng),
            turn=rotation + facing if kind == "letter" else rng.uniform(0, 6.283),
            tilt=0.0 if kind == "letter" else rng.uniform(-1.5, 1.5),
            scale=rng.uniform(0.8, 1.3),
            phase=rng.random(),
            letter=rng.choice(self.letters),
        )

    def ground(self, rng: random.Random, kind: str | None = None) -> Ground:
        """A floor of two of the paints."""
        return Ground(
            kind=kind or rng.choice(self.grounds),
            color=self.paint(rng),
            second=self.paint(rng),
            scale=rng.uniform(0.7, 1.4),
        )

    def screen(self, rng: random.Random, kind: str | None = None) -> Screen:
        """A backdrop of two of the paints; hills are far, everything else is near."""
        kind = kind or rng.choice(self.screens)
        depth = rng.uniform(6.0, 9.0) if kind == "hills" else rng.uniform(2.2, 4.0)
        return Screen(kind=kind, color=self.paint(rng), second=self.paint(rng), depth=depth, phase=rng.random())

    def prop(self, rng: random.Random) -> Prop:
        """A small thing beside or behind the place of the objects."""
        side = rng.choice((-1, 1))
        return Prop(
            kind=rng.choice(self.props),
            color=self.paint(rng),
            x=side * rng.uniform(0.3, 1.9),
            z=rng.choice((rng.uniform(-1.7, -1.1), rng.uniform(1.3, 2.0))),
            size=rng.uniform(0.12, 0.22),
            rotation=rng.uniform(0, 6.283),
        )


FAMILIAR = Vocabulary(
    patterns=("rings", "dots", "halves", "marble"),
    paints=("olive", "grey", "navy", "salmon", "lime", "beige", "teal"),
    letters=("A", "T", "K"),
    grounds=("carpet", "sand"),
    screens=("hills", "curtain"),
    props=("pebble", "post"),
)
"""In some training scenes."""

STRANGE = Vocabulary(
    patterns=("stripes", "checks", "letter", "rust"),
    paints=("cyan", "pink", "brown", "lilac", "pistachio"),
    letters=("E", "H", "X"),
    grounds=("water", "gravel"),
    screens=("wall", "fence"),
    props=("brick", "peg"),
)
"""In no training scene of the UNet and the text encoder."""
