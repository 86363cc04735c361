"""The pictures that the bundled model, and whatever judges it, is trained on: scenes by number, rendered in batches."""

import multiprocessing
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batch_render import render_batch
from .packed_scene import ROW, pack
from .procedural import procedural_batch
from .scene import Scene
from .strangers import FAMILIAR

CHUNK = 256
"""Scenes that a process prepares at a time."""
_PATIENCE = 90.0
"""Seconds after which a process is taken not to answer."""
PLAIN_SHARE = 0.55
"""Training scenes without any unnamed detail."""


def scene_at(seed: int, index: int) -> Scene:
    """Scene number `index` of the set with this seed; every detail of it has a name."""
    return Scene.draw(random.Random(f"{seed}/{index}"))


def training_scene_at(seed: int, index: int) -> Scene:
    """Scene number `index` of a training set, many of them with details of `FAMILIAR`."""
    rng = random.Random(f"{seed}/{index}")
    scene = Scene.draw(rng)
    if rng.random() < PLAIN_SHARE:
        return scene
    return scene.with_details(rng, FAMILIAR, pattern=0.5, paint=0.2, ground=0.2, screen=0.25, prop=0.25)


def prepared(
    prepare: Callable[[int, int], Any], seed: int, count: int, *, processes: int, start: int = 0
) -> Iterator[Any]:
    """What `prepare` gives for ``(seed, number of a chunk)``, chunk after chunk; chunks hold `CHUNK` scenes."""
    chunks = [(seed, chunk) for chunk in range(start // CHUNK, -(-count // CHUNK))]
    if processes < 2:
        yield from (prepare(*chunk) for chunk in chunks)
        return
    # A process that shares threads or a device with its parent may hang: these start afresh.
    with multiprocessing.get_context("spawn").Pool(processes, _one_thread) as pool:
        results = pool.imap(_Spread(prepare), chunks)
        patient = True
        for chunk in chunks:
            try:
                yield results.next(_PATIENCE) if patient else prepare(*chunk)
            except multiprocessing.TimeoutError:
                # Processes that cannot start are started again for ever.
                patient = False
                yield prepare(*chunk)


class _Spread:
    """A function of two arguments as one of a pair; a lambda cannot be sent to a process."""

    def __init__(self, prepare: Callable[[int, int], Any]) -> None:
        self.prepare = prepare

    def __call__(self, chunk: tuple[int, int]) -> Any:
        return self.prepare(*chunk)


def _one_thread() -> None:
    torch.set_num_threads(1)
    # On a card, a process of its own would take memory and time for nothing.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def packed(scenes: Sequence[Scene]) -> NDArray[np.float32]:
    """Rows (N, `ROW`) that `render_batch` takes."""
    return np.stack([pack(scene) for scene in scenes]) if scenes else np.empty((0, ROW), np.float32)


class ProceduralPictures:
    """A stock of procedural pictures, each drawn a few times, turned and recoloured, before another takes its place."""

    def __init__(self, count: int, size_px: int, generator: torch.Generator, *, together: int) -> None:
        self.size_px, self.generator, self.together = size_px, generator, together
        # Numbers that the program goes on by are drawn here: to ask a card for one is to wait for it.
        self._rng = random.Random(generator.initial_seed())
        self.stock = torch.cat([self._drawn() for _ in range(-(-count // together))])
        self._next, self._owed = 0, 0.0

    def _drawn(self) -> Tensor:
        return procedural_batch(self.together, self.size_px, self.generator, leaves=self._rng.randrange(2, 30))

    def batch(self, count: int, *, renewed: float) -> Tensor:
        """Pictures (count, H, W, 3) uint8; `renewed` of as many in the stock are replaced by new ones."""
        self._owed += renewed * count
        while self._owed >= self.together:
            self._owed -= self.together
            self.stock[self._next : self._next + self.together] = self._drawn()
            self._next = (self._next + self.together) % len(self.stock)
        draw = self.generator
        chosen = self.stock[torch.randint(len(self.stock), (count,), generator=draw, device=draw.device)]
        # One symmetry of the square, one order of the colours and perhaps the negative, for the whole batch.
        turn, flip, order, negative = (self._rng.randrange(12) for _ in range(4))
        chosen = torch.rot90(chosen, turn % 4, (1, 2))
        chosen = chosen.flip(2) if flip % 2 else chosen
        orders = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
        chosen = chosen[..., list(orders[order % 6])]
        return 255 - chosen if negative % 2 else chosen


def to_tensor(pictures: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """(B, 3, H, W) in [-1, 1] from (B, H, W, 3) uint8."""
    return torch.as_tensor(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


__all__ = [
    "CHUNK",
    "ProceduralPictures",
    "packed",
    "prepared",
    "render_batch",
    "scene_at",
    "to_tensor",
    "training_scene_at",
]
