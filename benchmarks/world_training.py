"""Parts that the scripts share which train small models of other families on the bundled world.

`benchmarks.cascade_world` trains a DeepFloyd IF, `benchmarks.flow_world` a FLUX.2 klein.
"""

import argparse
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_imagic.demo.pictures import CHUNK, packed, render_batch, training_scene_at
from lowmem_imagic.demo.publishing import clean_configs
from lowmem_imagic.demo.trainer import Trainer

log = logging.getLogger("benchmarks.world_training")

WORLDS = Path(__file__).parent / "worlds"
"""The trained models of both scripts."""
SIDE_PX = 128
CAPTIONS = 4
"""Captions of a scene; each training step takes one of them."""
EMPTY_CAPTION_SHARE = 0.1
SEED = 8
"""Of the bundled model's scenes; 1 is the judge's; 2, 5, 6, 12 and 13 are held out for benchmarks."""


def parser_of(description: str | None, presets: Mapping[str, Any]) -> argparse.ArgumentParser:
    """The options that the scripts share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    minutes = ", ".join(f"{preset.minutes:g} on {name}" for name, preset in presets.items() if name != "tiny")
    parser.add_argument("--out", type=Path, required=True, help="folder for the result, with checkpoints in its `work`")
    parser.add_argument("--preset", choices=tuple(presets), default="cpu", help="sizes for a machine [cpu]")
    parser.add_argument("--minutes", type=float, help=f"time in all [{minutes}]")
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of scenes, weights and draws [{SEED}]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def world_captions(seed: int) -> list[str]:
    """Captions that have every word of the bundled world."""
    rng = random.Random(seed)
    return [training_scene_at(seed, index).caption(rng) for index in range(4000)]


class Scenes:
    """Training scenes on the device, with the tokens of their captions.

    They are rendered little by little, a chunk at a time, and each chunk is kept in a file.

    Args:
        folder: for the chunks' files.
        total: scenes in all, a multiple of a chunk.
        uses: training samples of a scene, before there are as many as `total`.
        stored: pictures (N, 128, 128, 3) of bytes to the tensors (N, ...) that are trained on.
        encoded: captions to token ids (N, T).
        supersampling: samples of a pixel, each way.
        seed: of the scenes and captions.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total: int,
        uses: float,
        stored: Callable[[Tensor], Tensor],
        encoded: Callable[[list[str]], Tensor],
        supersampling: int,
        seed: int,
        device: torch.device,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.total, self.uses, self.device = folder, total, uses, device
        self.stored, self.encoded, self.supersampling, self.seed = stored, encoded, supersampling, seed
        self.empty = encoded([""]).to(device)
        """Token ids (1, T) of the empty caption."""
        self.parts: dict[str, Tensor] = {}
        """What is stored of the scenes, with room for all of them."""
        self.count = 0
        """Scenes that there are."""

    def grow(self, samples: float) -> None:
        """Renders until there are enough scenes for so many training samples, at least a chunk."""
        while self.count < min(max(samples / self.uses, 1), self.total):
            path = self.folder / f"{self.count // CHUNK:05d}.safetensors"
            if not path.exists():
                self._render(path)
            for name, part in load_file(path).items():
                if name not in self.parts:
                    self.parts[name] = torch.empty(self.total, *part.shape[1:], dtype=part.dtype, device=self.device)
                self.parts[name][self.count : self.count + CHUNK].copy_(part)
            self.count += CHUNK

    def _render(self, path: Path) -> None:
        scenes = [training_scene_at(self.seed, self.count + number) for number in range(CHUNK)]
        rng = random.Random(f"{self.seed}/captions/{self.count // CHUNK}")
        captions = [scene.caption(rng) for scene in scenes for _ in range(CAPTIONS)]
        pictures = render_batch(packed(scenes), SIDE_PX, supersampling=self.supersampling, device=self.device)
        tokens = self.encoded(captions).view(CHUNK, CAPTIONS, -1).int()
        partial = path.with_suffix(f".partial-{os.getpid()}")
        save_file({"pictures": self.stored(pictures).cpu().contiguous(), "tokens": tokens}, partial)
        os.replace(partial, path)

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Stored tensors (count, ...) of scenes, and the token ids (count, T) of a caption of each, a tenth empty."""

        def drawn(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator, device=self.device)

        chosen = drawn(self.count)
        tokens = self.parts["tokens"][chosen, drawn(CAPTIONS)].long()
        without = torch.rand(count, 1, generator=generator, device=self.device) < EMPTY_CAPTION_SHARE
        return self.parts["pictures"][chosen], torch.where(without, self.empty, tokens)


def stratified(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Shares (count,) in any order, one from each of as many equal parts of 0 to 1."""
    order = torch.randperm(count, generator=generator, device=device)
    return (order + torch.rand(count, generator=generator, device=device)) / count


def steps_of(name: str, trainer: Trainer, loss_at: Callable[[int], Tensor]) -> None:
    """Trains for the trainer's time on the losses of its steps, with a line in the log now and then."""
    losses, reported = list[Tensor](), time.monotonic()
    for step in trainer:
        loss = loss_at(step)
        trainer.update(loss)
        losses.append(loss.detach())
        if len(losses) >= 200 or time.monotonic() - reported > 60:
            mean = torch.stack(losses).mean().item()
            sound = "" if trainer.check(mean) else "; NOT FINITE, taken back"
            log.info("%s step %d, %.0f s: loss %.4f%s", name, trainer.step, trainer.spent, mean, sound)
            losses, reported = [], time.monotonic()


def write_pipelines(pipelines: Mapping[Path, Any]) -> None:
    """Writes diffusers' pipelines into folders, in place of those that are there."""
    for folder, pipeline in pipelines.items():
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        pipeline.save_pretrained(partial)
        clean_configs(partial)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)


def size_of(*folders: Path) -> int:
    """Bytes of all files in folders."""
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
