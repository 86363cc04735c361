"""Trains the judge (`benchmarks.oracle`): ``python -m benchmarks.train_oracle --out benchmarks/oracle.safetensors``.

Renders are degraded in training (smoothing, noise, blotches, brightness) because pictures to judge come from an
autoencoder. Half of the scenes have details without a name, above all strange patterns: the judge must read what has a
name whatever else there is.
"""

import argparse
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm, trange

from lowmem_imagic.demo.batch_render import render_batch
from lowmem_imagic.demo.pictures import CHUNK, packed, prepared, scene_at, to_tensor
from lowmem_imagic.demo.scene import LYING_SHAPES, Scene
from lowmem_imagic.demo.strangers import FAMILIAR, STRANGE

from .oracle import (
    CENTER,
    NUMBERS,
    SPREAD,
    TARGET,
    WORDS,
    Attributes,
    Oracle,
    accuracy,
    half,
    new_network,
    split,
    weights,
)

SCENE_SEED = 1
"""Seed of the oracle's scenes; no model is trained on it."""
SIZE_PX = 64
"""Side of its pictures: everything with a name is seen at this size, whatever the size of the judged picture."""
RATE, RATE_AGAIN = 3e-3, 1e-3
"""Highest learning rates of a new judge, and of one that is trained further."""
DETAILED_SHARE, STRANGE_SHARE = 0.5, 0.75
"""Scenes with details without a name, and those of them with the strangers' vocabulary."""
_UNSEEN = -100
"""Label of what cannot be seen, or has no name; cross-entropy's own default for "leave out"."""


def judged_scene_at(seed: int, index: int) -> Scene:
    """Scene number `index` of the judge's, known ones and strangers."""
    scene, rng = scene_at(seed, index), random.Random(f"{seed}/{index}/details")
    if rng.random() > DETAILED_SHARE:
        return scene
    vocabulary = STRANGE if rng.random() < STRANGE_SHARE else FAMILIAR
    return scene.with_details(rng, vocabulary, pattern=0.9, paint=0.2, ground=0.15, screen=0.25, prop=0.25)


def prepare(seed: int, chunk: int) -> tuple[list[Scene], np.ndarray]:
    """The scenes of a chunk, and packed."""
    scenes = [judged_scene_at(seed, index) for index in range(chunk * CHUNK, (chunk + 1) * CHUNK)]
    return scenes, packed(scenes)


def train_oracle(
    pictures: Tensor,
    scenes: Sequence[Scene],
    *,
    steps: int,
    batch: int = 64,
    seed: int = 0,
    start: Oracle | None = None,
) -> Oracle:
    """An oracle trained on renders (B, H, W, 3) uint8 of the scenes, where they are; its weights rounded to fp16.

    Each picture of two objects gives two views, each with most of the other object covered. With `start`, a judge for
    pictures of this size, that one is trained further.
    """
    torch.manual_seed(seed)
    device, size_px = pictures.device, pictures.shape[1]
    generator = torch.Generator(device).manual_seed(seed)
    views = _Views(*(part.to(device) for part in _Views.of(scenes)))
    network, rate = new_network(size_px), RATE
    if start is not None:
        network.load_state_dict(start.state())
        rate = RATE_AGAIN
    network = network.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-2)
    order = torch.empty(0, dtype=torch.long, device=device)
    for step in (bar := trange(steps, desc="training the oracle", mininterval=5)):
        if len(order) < batch:
            order = torch.randperm(len(views.picture), generator=generator, device=device)
        rows, order = order[:batch], order[batch:]
        share = step / steps
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 10 * share) * 0.5 * (1 + math.cos(math.pi * share))
        images = to_tensor(pictures[views.picture[rows]], device)
        images, numbers = _shown(images, views.side[rows]), views.numbers[rows]
        mirrored = torch.rand(len(rows), generator=generator, device=device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        signs = torch.where(mirrored[:, None] & (torch.arange(3, device=device) == 0), -1, 1)
        images = _degraded(images, generator).contiguous(memory_format=torch.channels_last)
        loss = _loss(network(images), views.words[rows], numbers * signs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    network.load_state_dict({name: t.float() for name, t in weights(network).items()}, strict=False)
    return Oracle(network.cpu().to(memory_format=torch.contiguous_format), {}, size_px=size_px)


def measure(oracle: Oracle, pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Accuracy and mean absolute errors on renders, apart for one object, one object degraded, and two.

    Args:
        oracle: the reader.
        pictures: (B, H, W, 3) uint8.
        scenes: what they show.
    """
    images = to_tensor(pictures, torch.device("cpu"))
    single = [i for i, scene in enumerate(scenes) if len(scene.objects) == 1]
    double = [i for i, scene in enumerate(scenes) if len(scene.objects) == 2]
    truth = [Attributes.of(scenes[i]) for i in single]
    degraded = _degraded(images[single], torch.Generator().manual_seed(0))
    readings = {
        "one_object": (oracle.read(images[single]), truth),
        "one_object_degraded": (oracle.read(degraded), truth),
        "two_objects": (
            [found for pair in oracle.read_pairs(images[double]) for found in pair],
            [Attributes.of(scenes[i], index) for i in double for index in (0, 1)],
        ),
    }
    report: dict[str, Any] = {}
    for name, (found, expected) in readings.items():
        if expected:
            errors = {
                key: round(
                    sum(abs(getattr(f, key) - getattr(t, key)) for f, t in zip(found, expected, strict=True))
                    / len(expected),
                    4,
                )
                for key in NUMBERS
            }
            report[name] = {
                "objects": len(expected),
                "accuracy": accuracy(found, expected),
                "mean_error": errors,
            }
    return report


class _Views(NamedTuple):
    """Training examples: a picture or half of one, and the object to read in it."""

    picture: Tensor
    """(M,) number of the picture."""
    side: Tensor
    """(M,) 0 left half, 1 right half, 2 whole."""
    words: Tensor
    """(M, 6) indices into `WORDS`; `_UNSEEN` for an invisible pose."""
    numbers: Tensor
    """(M, 3) `NUMBERS`, centred and scaled."""

    @staticmethod
    def of(scenes: Sequence[Scene]) -> "_Views":
        """One view for a scene of one object, two for a scene of two (the first object is the left one)."""
        picture, side, words, numbers = [], [], [], []
        for number, scene in enumerate(scenes):
            for index, solid in enumerate(scene.objects):
                truth = Attributes.of(scene, index)
                picture.append(number)
                side.append(2 if len(scene.objects) == 1 else index)
                words.append([values.index(getattr(truth, name)) for name, values in WORDS.items()])
                names = list(WORDS)
                if solid.shape not in LYING_SHAPES:
                    words[-1][names.index("pose")] = _UNSEEN
                if solid.paint:
                    words[-1][names.index("color")] = _UNSEEN
                if scene.ground:
                    words[-1][names.index("floor")] = _UNSEEN
                numbers.append([truth.x, truth.z, truth.radius])
        scaled = (torch.tensor(numbers) - CENTER) / SPREAD
        return _Views(torch.tensor(picture), torch.tensor(side), torch.tensor(words), scaled)


def _named(scene: Scene) -> bool:
    """Whether every attribute of a scene has a name, whatever other details there are."""
    return scene.ground is None and not any(solid.paint for solid in scene.objects)


def _loss(outputs: Tensor, words: Tensor, numbers: Tensor) -> Tensor:
    """Cross-entropies of all attributes plus the squared error of the numbers."""
    logits, found = split(outputs)
    loss = F.mse_loss(found, numbers)
    for column, part in enumerate(logits.values()):
        known = (words[:, column] != _UNSEEN).sum().clamp_min(1)
        loss = loss + F.cross_entropy(part, words[:, column], ignore_index=_UNSEEN, reduction="sum") / known
    return loss


def _shown(images: Tensor, side: Tensor) -> Tensor:
    """Each picture's view: left half (0), right half (1) or whole (2)."""
    sides = side[:, None, None, None]
    return torch.where(sides == 0, half(images, 0), torch.where(sides == 1, half(images, 1), images))


def _degraded(images: Tensor, generator: torch.Generator) -> Tensor:
    """The pictures with typical errors of an autoencoder and a sampler, each to a random degree."""

    def degree(scale: float = 1.0) -> Tensor:
        return scale * torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)

    def signed(scale: float) -> Tensor:
        return degree(2 * scale) - scale

    smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    coarse = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    images = torch.where(degree() < 0.25, coarse, torch.lerp(images, smooth, degree()))
    size = tuple(images.shape)
    # Errors in latents come out as blotches of a few pixels.
    blotches = F.interpolate(
        torch.randn(*size[:2], 16, 16, generator=generator, device=images.device), size=size[2:], mode="bilinear"
    )
    grain = torch.randn(size, generator=generator, device=images.device)
    images = images * (1 + signed(0.12)) + signed(0.08) + degree(0.10) * blotches + degree(0.06) * grain
    return images.clamp(-1, 1)


def drawn(count: int, size_px: int, *, device: torch.device, processes: int) -> tuple[list[Scene], Tensor]:
    """The first scenes of the judge, and their pictures (count, H, W, 3) uint8 on the device."""
    scenes, pictures = [], []
    chunks = prepared(prepare, SCENE_SEED, count, processes=processes)
    for part, rows in tqdm(chunks, total=-(-count // CHUNK), desc="rendering", mininterval=5):
        scenes += part
        pictures.append(render_batch(rows, size_px, supersampling=2, device=device))
    return scenes[:count], torch.cat(pictures)[:count]


def main() -> int:
    """Command line: renders, trains, measures on held-out renders, saves; returns 1 if `TARGET` is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--size", type=int, default=SIZE_PX, help=f"side of its pictures [{SIZE_PX}]")
    parser.add_argument("--scenes", type=int, default=32768, help="scenes in all [32768]")
    parser.add_argument("--held-out", type=int, default=2000, help="scenes kept for measuring [2000]")
    parser.add_argument("--steps", type=int, default=6000, help="steps of training [6000]")
    parser.add_argument("--batch", type=int, default=64, help="views per step [64]")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and draws [0]")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes that draw scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--start-from", type=Path, metavar="FILE", help="train this judge further")
    args = parser.parse_args()
    start = Oracle.load(args.start_from) if args.start_from else None
    scenes, pictures = drawn(args.scenes, args.size, device=torch.device(args.device), processes=args.processes)
    known = len(scenes) - args.held_out
    oracle = train_oracle(
        pictures[:known], scenes[:known], steps=args.steps, batch=args.batch, seed=args.seed, start=start
    )
    held_out = {}
    for plain in (True, False):
        rows = [n for n in range(known, len(scenes)) if scenes[n].plain is plain and _named(scenes[n])]
        measured = measure(oracle, pictures[torch.tensor(rows)].cpu(), [scenes[index] for index in rows])
        held_out |= {key if plain else f"{key}_with_details": part for key, part in measured.items()}
    oracle.report.update(
        held_out=held_out,
        settings={
            "scene_seed": SCENE_SEED,
            "size_px": args.size,
            "training_scenes": known,
            "held_out_scenes": args.held_out,
            "steps": args.steps,
            "batch": args.batch,
            "seed": args.seed,
            "before": start.report["settings"] if start else None,
        },
    )
    oracle.save(args.out)
    for name, part in held_out.items():
        shares = "  ".join(f"{key} {100 * share:.1f} %" for key, share in part["accuracy"].items())
        errors = "  ".join(f"{key} {error:.3f}" for key, error in part["mean_error"].items())
        print(f"{name} ({part['objects']} objects): {shares}; mean error {errors}")
    reached = all(share >= TARGET for share in held_out["one_object"]["accuracy"].values())
    print(f"every attribute of one object read right in {100 * TARGET:.0f} %: {'yes' if reached else 'NO'}")
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
