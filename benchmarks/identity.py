"""Reads the pattern of a scene's object off a picture: the identity of an edit, and of an autoencoder's round trip.

Two renders of the scene, one without the pattern and one with its colour all over the object, give the two colours that
a pixel of the object can have, with all its light, shadow and reflections. A pixel shows the pattern if it is nearer to
the second colour. The map of these pixels is compared with the map of the scene's own render, by intersection over
union of the pattern's pixels, or of the object's other pixels if that is less: an object all in the pattern's colour
has no pattern.

An object may be a little off its place and size and still count as kept, and a little darker. So the picture is first
moved, resized and brightened by about as much, to where its object differs least from the scene's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from lowmem_imagic.demo.batch_render import object_masks, render_batch
from lowmem_imagic.demo.scene import Scene

TOLD_APART = 24.0
"""Levels of 255 by which the two colours of a pixel must differ for it to count."""
SHIFT_SHARE, SHIFTS = 1 / 32, 2
"""Largest shift along each axis, as a share of the picture's side, and steps to it."""
SCALES = (0.92, 1.0, 1.08)
"""Sizes that the object is sought at."""
GAIN = (0.8, 1.25)
"""Bounds of the factor that corrects its brightness."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class PatternReader:
    """Reads the pattern of a scene's first object; see `reader`."""

    rows: NDArray[np.int64]
    """(M,) rows of the object's pixels whose two colours can be told apart."""
    columns: NDArray[np.int64]
    without: NDArray[np.float32]
    """(M, 3) their colours without the pattern."""
    within: NDArray[np.float32]
    """(M, 3) their colours in the pattern."""
    own: NDArray[np.float32]
    """(M, 3) their colours in the scene's own render."""
    object_pixels: int

    @cached_property
    def truth(self) -> NDArray[np.bool_]:
        """(M,) pixels of the pattern in the scene's own render."""
        return self._nearer(self.own)

    @property
    def shares(self) -> tuple[float, float]:
        """Shares of the object's pixels that show the pattern, and that can be read at all."""
        count = max(1, self.object_pixels)
        return float(self.truth.sum()) / count, len(self.truth) / count

    @property
    def contrast(self) -> float:
        """Median distance of the two colours of a pixel, levels of 255."""
        apart = np.sqrt(np.square(self.within - self.without).mean(1))
        return float(np.median(apart)) if len(apart) else 0.0

    def overlap(self, picture: Pixels) -> float:
        """Overlap of the pattern in a picture (H, W, 3) with that in the scene's own render, from 0 to 1."""
        labels = self._nearer(self._aligned(picture))
        pairs = ((labels, self.truth), (~labels, ~self.truth))
        return min(float((seen & own).sum() / max(1, (seen | own).sum())) for seen, own in pairs)

    def base_error(self, picture: Pixels) -> float:
        """Distance of the mean colour beside the pattern to the scene's own, levels of 255."""
        gap = (self._aligned(picture) - self.own)[~self.truth].mean(0)
        return float(np.sqrt(np.square(gap).mean()))

    def _aligned(self, picture: Pixels) -> NDArray[np.float32]:
        """(M, 3) the picture's colours at the object's pixels, from where it differs least from the scene's own."""
        views = [self._seen(picture, *place) for place in _places(len(picture))]
        return min(views, key=lambda seen: float(np.square(seen - self.own).sum()))

    def _seen(self, picture: Pixels, scale: float, down: int, right: int) -> NDArray[np.float32]:
        """(M, 3) the colours of an object that is that much larger, too low and too far right, as bright as ours."""
        rows, columns = (
            np.clip(np.rint((place - place.mean()) * scale + place.mean() + shift), 0, len(picture) - 1).astype(int)
            for place, shift in ((self.rows, down), (self.columns, right))
        )
        seen: NDArray[np.float32] = picture[rows, columns].astype(np.float32)
        gain = (seen * self.own).sum() / max(1.0, np.square(seen).sum())
        seen *= np.float32(np.clip(gain, *GAIN))
        return seen

    def _nearer(self, seen: NDArray[np.float32]) -> NDArray[np.bool_]:
        """(M,) where colours are nearer to the pattern's than to the object's."""
        nearer: NDArray[np.bool_] = np.square(seen - self.within).sum(1) < np.square(seen - self.without).sum(1)
        return nearer


@lru_cache(maxsize=1024)
def reader(scene: Scene, size_px: int) -> PatternReader:
    """The reader of the pattern of a scene's first object, for pictures of this size."""
    return readers([scene], size_px)[0]


def readers(scenes: Sequence[Scene], size_px: int, *, supersampling: int = 3) -> list[PatternReader]:
    """The readers of the patterns of scenes' first objects, for pictures of this size."""
    covered = []
    for scene in scenes:
        solid, *others = scene.objects
        assert solid.pattern is not None
        covered.append(replace(scene, objects=(replace(solid, paint=solid.pattern.color), *others)))
    without, within, own = (
        render_batch(part, size_px, supersampling=supersampling, plain=plain).numpy().astype(np.float32)
        for part, plain in ((scenes, True), (covered, True), (scenes, False))
    )
    inside = object_masks(scenes, size_px) == 1
    apart = inside & (np.sqrt(np.square(within - without).mean(-1)) > TOLD_APART)
    result = []
    for number, (told, solid_pixels) in enumerate(zip(apart, inside.sum((1, 2)), strict=True)):
        rows, columns = np.nonzero(told)
        first, second, shown = (pictures[number][rows, columns] for pictures in (without, within, own))
        result.append(PatternReader(rows, columns, first, second, shown, int(solid_pixels)))
    return result


def _places(size_px: int) -> Iterator[tuple[float, int, int]]:
    """Scales and shifts at which an object is sought."""
    steps = sorted({round(step * SHIFT_SHARE * size_px / SHIFTS) for step in range(-SHIFTS, SHIFTS + 1)})
    for scale in SCALES:
        for down in steps:
            for right in steps:
                yield scale, down, right
