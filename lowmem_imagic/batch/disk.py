"""Estimates the disk space of a batch before it begins."""

from ..engine.base import BaseModel
from ..pictures.png import SHEET_CELL_PX
from ..planning.plan import CPU_SLOTS, MAX_SLOTS, adapter_weights
from ..settings.stages import EditConfig


def disk_bytes(base: BaseModel, config: EditConfig, count: int) -> tuple[int, int]:
    """Most bytes of `count` items, with uncompressed pictures, and most bytes of their training states.

    Zeros if the base's architecture cannot be built; each of its items then fails with that error.
    """
    if not count:
        return 0, 0
    try:
        weights = adapter_weights(base, config)
    except Exception:
        return 0, 0
    pictures = len(config.sample.etas) * len(config.sample.seeds)
    sheet = 3 * SHEET_CELL_PX**2 * (pictures + 3) * 5 // 4
    width, height = base.sizes.own
    each = 3 * width * height * pictures + sheet + round(2 * weights * config.finetune.keep) + 2**18
    # Weights and two moments of each edit in training, and the temporary file of one state.
    return count * each, 12 * weights * (min(count, CPU_SLOTS if base.device.type == "cpu" else MAX_SLOTS) + 1)
