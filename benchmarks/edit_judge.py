"""Judges whether an edited picture follows its sentence and otherwise keeps the photo.

*success*: the judge (`benchmarks.oracle`) sees every requested attribute. *kept*: it sees every other attribute, the
position and the size unchanged. *background*: PSNR against the photo outside the edit (`SceneEdit.kept_mask`). A
picture is *good* if success, kept and a background of `BACKGROUND_DB` hold together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage.metrics import structural_similarity

from lowmem_imagic.demo.pictures import to_tensor
from lowmem_imagic.demo.scene import LYING_SHAPES

from .oracle import WORDS, Attributes, Oracle
from .scene_edits import SceneEdit

BACKGROUND_DB = 22.0
"""Least PSNR of the background."""
PLACE = {"x": 0.25, "z": 0.35}
"""Largest distance, in scene units, of an object's reading from its place: about four mean errors of the judge."""
RADIUS_SHARE = 0.2
"""Largest difference of a radius from the original, as a share of it."""
RESAMPLES = 2000
"""Resamples of the bootstrap."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on one edited picture."""

    success: bool
    kept: bool
    background_db: float
    """PSNR against the photo outside the edit."""
    truth_db: float
    """PSNR against the ground-truth render, everywhere."""
    truth_ssim: float
    """SSIM against the ground-truth render (Wang et al. 2004)."""

    @property
    def good(self) -> bool:
        """Whether success, kept and background all hold."""
        return self.success and self.kept and self.background_db >= BACKGROUND_DB

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
    for item, picture, found in zip(items, pictures, readings, strict=True):
        side = picture.width
        edited = np.asarray(picture)
        photo, truth = np.asarray(item.photo_picture(side)), np.asarray(item.truth_picture(side))
        mask = item.kept_mask(side)
        success, kept = compare(item, found)
        verdicts.append(
            Verdict(
                success=success,
                kept=kept,
                background_db=psnr_db(edited[mask], photo[mask]),
                truth_db=psnr_db(edited, truth),
                truth_ssim=float(structural_similarity(edited, truth, channel_axis=-1, data_range=255)),
            )
        )
    return verdicts


def compare(item: SceneEdit, found: Sequence[Attributes]) -> tuple[bool, bool]:
    """(success, kept) of readings of the edited picture's objects, from left to right."""
    truth = [Attributes.of(item.edited, index) for index in range(len(item.edited.objects))]
    first = found[0]
    agrees = {name: getattr(first, name) == getattr(truth[0], name) for name in WORDS}
    if truth[0].shape not in LYING_SHAPES:
        del agrees["pose"]
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


def bootstrap(values: Sequence[float], *, median: bool = False, seed: int = 0) -> dict[str, Any]:
    """Mean (or median) of a value of each item, with its 95 % percentile bootstrap interval."""
    measured = np.array(values, float)
    middle = np.median if median else np.mean
    draws = np.random.default_rng(seed).integers(len(measured), size=(RESAMPLES, len(measured)))
    low, high = np.percentile(middle(measured[draws], axis=1), [2.5, 97.5])
    return {
        "value": round(float(middle(measured)), 4),
        "interval_95": [round(float(low), 4), round(float(high), 4)],
        "of": len(measured),
    }


def difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, Any]:
    """Mean difference of a value to another method's value on the same items, with its bootstrap interval.

    Paired, so that the difficulty of items does not widen the interval. Items that only one method has are left out.
    """
    return bootstrap([value - theirs[name] for name, value in ours.items() if name in theirs])


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Shares and medians over items, with their intervals."""
    return {
        "good": bootstrap([v.good for v in verdicts]),
        "success": bootstrap([v.success for v in verdicts]),
        "kept": bootstrap([v.kept for v in verdicts]),
        "background": bootstrap([v.background_db >= BACKGROUND_DB for v in verdicts]),
        "background_db": bootstrap([v.background_db for v in verdicts], median=True),
        "truth_db": bootstrap([v.truth_db for v in verdicts], median=True),
        "truth_ssim": bootstrap([v.truth_ssim for v in verdicts], median=True),
    }
