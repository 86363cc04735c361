"""The words of the bundled model, as its folder says them (`families.vocabulary`)."""

import json
from pathlib import Path

from .attributes import COLORS, FLOORS, MATERIALS, POSES, SHAPES, SIZES

FILE = "vocabulary.json"
GROUPS = {
    "shape": SHAPES,
    "colour": tuple(COLORS),
    "floor": FLOORS,
    "size": tuple(SIZES),
    "material": MATERIALS,
    "pose": POSES,
}
"""Words by their kind: the object first, then what is seen best."""
PIECES = ("a photo of a", "{size}", "{pose}", "{colour}", "{material}", "{shape}", "on a {floor} floor")
"""The parts of `Scene.caption`."""


def write(folder: Path) -> None:
    """Writes the file into a model's folder."""
    text = json.dumps({"groups": GROUPS, "pieces": PIECES}, indent=2)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")
