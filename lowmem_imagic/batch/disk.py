"""Estimates the disk space of a batch before it begins."""

from collections.abc import Sequence

from ..engine.base import BaseModel
from ..pictures.png import SHEET_CELL_PX
from ..planning.plan import CPU_SLOTS, MAX_SLOTS, adapter_weights
from ..settings.stages import EditConfig


def disk_bytes(base: BaseModel, config: EditConfig, pixels: Sequence[int]) -> tuple[int, int]:
    """Most bytes of some items, with uncompressed pictures, and most bytes of their training states.

    Zeros if the base's architecture cannot be built; each of its items then fails with that error.

    Args:
        base: the base of the items.
        config: their settings.
        pixels: width times height of each item's photo, which its pictures have, too; 0 if unknown, which counts as
            the model's own size.
    """
    if not pixels:
        return 0, 0
    try:
        weights = adapter_weights(base, config)
    except Exception:
        return 0, 0
    config = config.for_group(base.family.group)
    pictures = len(config.sample.etas) * len(config.sample.seeds)
    sheet = 3 * SHEET_CELL_PX**2 * (pictures + 3) * 5 // 4
    width, height = base.sizes.own
    rest = sheet + round(2 * weights * config.finetune.keep) + 2**18
    results = sum(3 * (of_photo or width * height) * pictures + rest for of_photo in pixels)
    # Weights and two moments of each edit in training, and the temporary file of one state.
    slots = CPU_SLOTS if base.device.type == "cpu" else MAX_SLOTS
    return results, 12 * weights * (min(len(pixels), slots) + 1)
