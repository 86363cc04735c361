"""Judges whether an edited picture follows its sentence and otherwise keeps the photo.

*success*: the judge (`benchmarks.oracle`) sees every requested attribute. *kept*: it sees every other attribute with a
name, the position and the size unchanged; a paint, which has no name, is compared by its mean colour. *background*:
PSNR against the photo outside the edit (`SceneEdit.kept_mask`). *identity*: the object of a stranger shows its own
pattern where the ground truth shows it (`benchmarks.identity`). A known object has no pattern, but must be an object:
it needs `OBJECT_DB` of PSNR inside, against the ground truth. Objects displaced by less than *kept* allows stay above;
a smear of the right colours, which a judge that saw renders alone may take for one, does not. A picture is *good* if
success, kept, a background of `BACKGROUND_DB` and identity hold together.

PSNR inside a stranger is reported without a bound: a shift by a pixel costs it more than a lost letter.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage.metrics import structural_similarity

from lowmem_imagic.demo.pictures import to_tensor
from lowmem_imagic.demo.scene import LYING_SHAPES

from .averages import level, share
from .identity import reader
from .oracle import WORDS, Attributes, Oracle
from .scene_edits import GROUPS, HALVES, KINDS, SceneEdit, rows_of

BACKGROUND_DB = 22.0
"""Least PSNR of the background."""
OVERLAP = 0.6
"""Least overlap of a stranger's pattern."""
OBJECT_DB = 16.0
"""Least PSNR inside the object of a known photo."""
PAINT_LEVELS = 32.0
"""Largest distance, levels of 255, of a paint's mean colour from the ground truth's."""
PLACE = {"x": 0.25, "z": 0.35}
"""Largest distance, in scene units, of an object's reading from its place: about four mean errors of the judge."""
RADIUS_SHARE = 0.2
"""Largest difference of a radius from the original, as a share of it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on one edited picture."""

    success: bool
    kept: bool
    background_db: float
    """PSNR against the photo outside the edit."""
    overlap: float | None
    """Overlap of the pattern with the ground truth's; None for known photos."""
    object_db: float
    """PSNR against the ground-truth render, inside the photo's own object there."""
    truth_db: float
    """PSNR against the ground-truth render, everywhere."""
    truth_ssim: float
    """SSIM against the ground-truth render (Wang et al. 2004)."""

    @property
    def background(self) -> bool:
        """Whether the background is kept."""
        return self.background_db >= BACKGROUND_DB

    @property
    def identity(self) -> bool:
        """Whether a stranger's pattern is kept, or a known object is as the ground truth has it."""
        return self.object_db >= OBJECT_DB if self.overlap is None else self.overlap >= OVERLAP

    @property
    def good(self) -> bool:
        """Whether success, kept, background and identity all hold."""
        return self.success and self.kept and self.background and self.identity

    def as_json(self) -> dict[str, Any]:
        """Plain values, rounded."""
        values = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}
        return {**values, "good": self.good}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Verdict":
        """The verdict from the values of `as_json`, up to rounding."""
        return Verdict(**{k: v for k, v in values.items() if k != "good"})


def judge(oracle: Oracle, items: Sequence[SceneEdit], pictures: Sequence[Image.Image]) -> list[Verdict]:
    """A verdict on each picture, for the item at the same index.

    Args:
        oracle: the judge.
        items: the items.
        pictures: their edits, RGB, squares of one size.
    """
    readings = _readings(oracle, items, pictures)
    verdicts = []
    for item, picture, reading in zip(items, pictures, readings, strict=True):
        side = picture.width
        edited = np.asarray(picture)
        photo, truth = np.asarray(item.photo_picture(side)), np.asarray(item.truth_picture(side))
        mask, inside = item.kept_mask(side), item.object_mask(side)
        success, kept = compare(item, reading)
        solid, overlap = item.edited.objects[0], None
        if solid.pattern:
            pattern = reader(item.edited, side)
            overlap = pattern.overlap(edited)
            kept &= solid.paint is None or pattern.base_error(edited) <= PAINT_LEVELS
        verdicts.append(
            Verdict(
                success=success,
                kept=kept,
                background_db=psnr_db(edited[mask], photo[mask]),
                overlap=overlap,
                object_db=psnr_db(edited[inside], truth[inside]),
                truth_db=psnr_db(edited, truth),
                truth_ssim=float(structural_similarity(edited, truth, channel_axis=-1, data_range=255)),
            )
        )
    return verdicts


def compare(item: SceneEdit, found: Sequence[Attributes]) -> tuple[bool, bool]:
    """(success, kept) of readings of the edited picture's objects, from left to right, as far as words go."""
    truth = [Attributes.of(item.edited, index) for index in range(len(item.edited.objects))]
    first = found[0]
    agrees = {name: getattr(first, name) == getattr(truth[0], name) for name in WORDS}
    if truth[0].shape not in LYING_SHAPES:
        del agrees["pose"]
    if item.edited.objects[0].paint:
        del agrees["color"]
    if item.edited.ground:
        del agrees["floor"]
    in_place = all(abs(getattr(first, axis) - getattr(truth[0], axis)) <= limit for axis, limit in PLACE.items())
    in_place &= abs(first.radius - truth[0].radius) <= RADIUS_SHARE * truth[0].radius
    success = all(agrees.get(name, True) for name in item.asked)
    kept = in_place and all(right for name, right in agrees.items() if name not in item.asked)
    if len(truth) == 2:
        success = all(getattr(found[1], name) == getattr(truth[1], name) for name in ("shape", "color"))
    return success, kept


def _readings(
    oracle: Oracle, items: Sequence[SceneEdit], pictures: Sequence[Image.Image]
) -> list[tuple[Attributes, ...]]:
    """For each picture, a reading of each expected object."""
    images = to_tensor(np.stack([np.asarray(picture) for picture in pictures]), torch.device("cpu"))
    readings: list[tuple[Attributes, ...]] = [()] * len(items)
    singles = [i for i, item in enumerate(items) if len(item.edited.objects) == 1]
    pairs = [i for i, item in enumerate(items) if len(item.edited.objects) == 2]
    if singles:
        for i, found in zip(singles, oracle.read(images[singles]), strict=True):
            readings[i] = (found,)
    if pairs:
        for i, both in zip(pairs, oracle.read_pairs(images[pairs]), strict=True):
            readings[i] = both
    return readings


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 values of equal shape, dB; at most 99."""
    error = np.square(one.astype(np.float64) - other).mean()
    return min(99.0, 10 * math.log10(255**2 / error)) if error else 99.0


def photo_overlap(item: SceneEdit, picture: Image.Image) -> float | None:
    """The overlap of a picture at eta 0 with the photo's own pattern; None for a known photo."""
    pattern = item.photo.objects[0].pattern
    return reader(item.photo, picture.width).overlap(np.asarray(picture)) if pattern else None


_SHARES: dict[str, Callable[[Verdict], bool]] = {
    "good": lambda v: v.good,
    "success": lambda v: v.success,
    "kept": lambda v: v.kept,
    "background": lambda v: v.background,
    "identity": lambda v: v.identity,
}
_LEVELS: dict[str, Callable[[Verdict], float]] = {
    "background_db": lambda v: v.background_db,
    "object_db": lambda v: v.object_db,
    "truth_db": lambda v: v.truth_db,
    "truth_ssim": lambda v: v.truth_ssim,
}


def summary(items: Sequence[SceneEdit], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Shares, medians and the mean overlap (None without patterns), averaged over kinds, with their intervals."""
    kinds = [item.kind for item in items]
    overlaps = [verdict.overlap for verdict in verdicts if verdict.overlap is not None]
    return {
        **{name: share(kinds, [of(v) for v in verdicts]) for name, of in _SHARES.items()},
        **{name: level(kinds, [of(v) for v in verdicts], median=True) for name, of in _LEVELS.items()},
        # Of a half: either all of its items have patterns or none.
        "overlap": level(kinds, overlaps) if len(overlaps) == len(items) else None,
    }


def by_half(items: Sequence[SceneEdit], verdicts: Sequence[Verdict], *, kinds: bool = True) -> dict[str, Any]:
    """`summary` of each half: of all kinds, of rigid and non-rigid kinds, and with `kinds` of each kind."""
    chosen = {"all": KINDS, **GROUPS} | ({kind: (kind,) for kind in KINDS} if kinds else {})
    result: dict[str, Any] = {}
    for half in HALVES:
        for name, members in chosen.items():
            if rows := rows_of(items, half=half, kinds=members):
                part = summary([items[n] for n in rows], [verdicts[n] for n in rows])
                result.setdefault(half, {})[name] = part
    return result
