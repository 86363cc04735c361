"""The pictures that the bundled model, and whatever judges it, is trained on: scenes by number, rendered."""

import functools
import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import architecture
from .render import pixels
from .scene import Scene


def scene_at(seed: int, index: int) -> Scene:
    """Scene number `index` of the set with this seed."""
    return Scene.draw(random.Random(f"{seed}/{index}"))


def rendered(path: Path, *, seed: int, count: int, processes: int) -> np.ndarray:
    """Pictures (count, 64, 64, 3) uint8 of scenes 0..count-1; those that `path` holds are not rendered again."""
    size = architecture.SIZE_PX
    pictures = np.empty((count, size, size, 3), np.uint8)
    there = 0
    if path.exists():
        before = np.load(path, allow_pickle=False)[:count]
        there = len(before)
        pictures[:there] = before
    if there == count:
        return pictures
    scenes = (scene_at(seed, index) for index in range(there, count))
    # The processes import `render` alone, which takes no torch.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        work = pool.imap(functools.partial(pixels, size_px=size), scenes, chunksize=32)
        bar = tqdm(work, initial=there, total=count, desc="rendering", mininterval=5)
        for index, picture in enumerate(bar, start=there):
            pictures[index] = picture
    partial = path.with_suffix(".partial.npy")
    np.save(partial, pictures, allow_pickle=False)
    os.replace(partial, path)
    return pictures


def to_tensor(pictures: np.ndarray, device: torch.device) -> Tensor:
    """(B, 3, H, W) in [-1, 1] from (B, H, W, 3) uint8."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
