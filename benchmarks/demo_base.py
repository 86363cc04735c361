"""How much of any picture the bundled autoencoder keeps: photographs, scenes, scenes with strangers and their patterns.

    python -m benchmarks.demo_base --photographs DIR

The photographs stay where they are: only their figures are written, without names. Overlaps of patterns before and
after the autoencoder are those of `benchmarks.identity`. What the base itself draws is measured by
`benchmarks.demo_quality`.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lowmem_imagic.demo.batch_render import render_batch
from lowmem_imagic.demo.pictures import scene_at, to_tensor
from lowmem_imagic.demo.scene import Scene
from lowmem_imagic.demo.strangers import STRANGE
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.families import DEMO

from .bundled import model_of
from .demo_quality import psnr_db, reconstructed
from .identity import readers
from .results import provenance, write_result
from .samples import SCENE_SEED

SCENES = 200
"""Scenes of each half."""
PHOTOGRAPH_TARGET_DB, STRANGER_TARGET_DB, OVERLAP_TARGET = 26.0, 30.0, 0.85
"""Goals of means."""
LEAST_SHARE = 0.04
"""Least share of an object that its pattern covers: a handful of pixels is no pattern."""
_TOGETHER = 32
"""Scenes whose readers are in memory at once."""


def photographs(folder: Path, size_px: int) -> Tensor:
    """The photographs of a folder, their middle squares, (B, 3, size, size) in [-1, 1]."""
    pictures = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        pictures.append(np.asarray(ImageOps.fit(upright, (size_px, size_px), Image.Resampling.LANCZOS)))
    return to_tensor(np.stack(pictures), torch.device("cpu"))


def strangers(count: int) -> list[Scene]:
    """Held-out scenes of one object with a pattern of the strange vocabulary, and other strange details on some."""
    rng, scenes, index = random.Random(f"{SCENE_SEED}/strangers"), list[Scene](), 0
    while len(scenes) < count:
        scene = scene_at(SCENE_SEED, index)
        index += 1
        if len(scene.objects) == 1:
            scenes.append(scene.with_details(rng, STRANGE, pattern=1, paint=0.2, ground=0.2, screen=0.2, prop=0.2))
    return scenes


def overlaps(scenes: Sequence[Scene], images: Tensor) -> list[float | None]:
    """Overlap of the pattern in each picture (3, H, W) in [-1, 1] with its scene's; None for hardly any pattern."""
    pictures = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    values: list[float | None] = []
    for start in range(0, len(scenes), _TOGETHER):
        part = readers(scenes[start : start + _TOGETHER], pictures.shape[1])
        shown = zip(part, pictures[start : start + _TOGETHER], strict=True)
        values += [reader.overlap(picture) if reader.shares[0] >= LEAST_SHARE else None for reader, picture in shown]
    return values


def run(base: BaseModel, folder: Path | None, count: int) -> dict[str, Any]:
    """Everything this benchmark measures."""
    size = base.sizes.own[0]
    known = [scene_at(SCENE_SEED, index) for index in range(count)]
    strange = strangers(count)
    sets = {"known": render_batch(known, size), "strangers": render_batch(strange, size)}
    pictures = {name: to_tensor(part, torch.device("cpu")) for name, part in sets.items()}
    if folder is not None:
        pictures["photographs"] = photographs(folder, size)
    targets = {"strangers": STRANGER_TARGET_DB, "photographs": PHOTOGRAPH_TARGET_DB}
    result: dict[str, Any] = {"model": model_of(base), "size_px": size}
    for name, part in pictures.items():
        again = reconstructed(base, part)
        ratios = psnr_db(again, part)
        result[name] = {
            "pictures": len(part),
            "mean_db": round(float(ratios.mean()), 3),
            "percentile_5_db": round(float(np.percentile(ratios, 5)), 3),
        }
        if name in targets:
            result[name] |= {"target_db": targets[name], "passed": bool(ratios.mean() >= targets[name])}
        if name == "strangers":
            result["overlap"] = _overlap(strange, again)
    return result


def _overlap(scenes: Sequence[Scene], images: Tensor) -> dict[str, Any]:
    """Mean overlap of the patterns, in all and by kind."""
    by_kind: dict[str, list[float]] = {}
    for scene, value in zip(scenes, overlaps(scenes, images), strict=True):
        pattern = scene.objects[0].pattern
        if value is not None and pattern is not None:
            by_kind.setdefault(pattern.kind, []).append(value)
    values = [value for part in by_kind.values() for value in part]
    mean = float(np.mean(values))
    return {
        "patterns": len(values),
        "mean": round(mean, 4),
        "by_kind": {kind: round(float(np.mean(part)), 4) for kind, part in sorted(by_kind.items())},
        "target": OVERLAP_TARGET,
        "passed": mean >= OVERLAP_TARGET,
    }


def main() -> int:
    """Command line; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO, metavar="DIR", help="a diffusers folder [the bundled model]")
    parser.add_argument("--photographs", type=Path, metavar="DIR", help="a folder of photographs [none]")
    parser.add_argument("--scenes", type=int, default=SCENES, help=f"scenes of each half [{SCENES}]")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the result here")
    args = parser.parse_args()
    base = BaseModel.load(args.model, device="cpu")
    origin = provenance(base.device)
    result = run(base, args.photographs, args.scenes)
    for name in ("known", "strangers", "photographs"):
        if name in result:
            part = result[name]
            goal = f", target {part['target_db']:.0f} dB" if "target_db" in part else ""
            low = part["percentile_5_db"]
            print(f"{name:12} {part['mean_db']:6.2f} dB (5th percentile {low:.2f}){goal}")
    kinds = "  ".join(f"{kind} {value:.2f}" for kind, value in result["overlap"]["by_kind"].items())
    print(f"overlap of patterns {result['overlap']['mean']:.3f}, target {OVERLAP_TARGET}: {kinds}")
    standard = args.model == DEMO and args.scenes == SCENES and args.photographs is not None
    if args.out is not None or standard:
        print(f"result: {write_result('demo_base', result, path=args.out, origin=origin).name}")
    return 0 if all(part["passed"] for part in result.values() if isinstance(part, dict) and "passed" in part) else 1


if __name__ == "__main__":
    raise SystemExit(main())
