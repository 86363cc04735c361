"""The picture of one `Scene`, and which object is where in it; see `lowmem_imagic.demo.batch_render`."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .batch_render import object_masks, render_batch
from .scene import Scene

SIZE_PX = 128
"""Side of a picture of the bundled model's size."""


def render(scene: Scene, size_px: int = SIZE_PX, *, supersampling: int = 3) -> Image.Image:
    """The picture of `scene`, RGB, `size_px` on a side, averaged over `supersampling`**2 rays a pixel."""
    return Image.fromarray(render_batch([scene], size_px, supersampling=supersampling)[0].numpy())


def object_mask(scene: Scene, size_px: int = SIZE_PX) -> NDArray[np.int64]:
    """Object number (size_px, size_px) at each pixel's centre, 0 for everything else."""
    mask: NDArray[np.int64] = object_masks([scene], size_px)[0]
    return mask
