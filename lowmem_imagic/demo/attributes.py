"""The attributes of the bundled world that captions have words for."""

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.80, 0.10, 0.09),
    "green": (0.10, 0.58, 0.17),
    "blue": (0.10, 0.23, 0.82),
    "yellow": (0.93, 0.80, 0.10),
    "purple": (0.50, 0.14, 0.66),
    "orange": (0.96, 0.45, 0.04),
    "white": (0.93, 0.93, 0.91),
    "black": (0.055, 0.055, 0.065),
}
"""Linear-light base colours by name."""

SHAPES = ("sphere", "cube", "cylinder", "cone")
MATERIALS = ("rubber", "metal")
SIZES: dict[str, float] = {"small": 0.52, "large": 0.90}
"""Nominal radius of an object in scene units, by name."""
FLOORS = ("wooden", "stone", "grass", "tiled")
POSES = ("standing", "lying")
LYING_SHAPES = ("cylinder", "cone")
"""Shapes whose pose can be seen; the others are always standing."""
