"""Scenes that the bundled model is trained on, with the tokens of their captions."""

import functools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizerFast

from . import architecture, codec
from .attributes import MATERIALS
from .pictures import CHUNK, packed, prepared, render_batch, to_tensor, training_scene_at
from .training_presets import Preset

CAPTIONS = 4
"""Captions of a scene; each training step takes one of them."""
MATERIAL_WEIGHT = 3.0
"""How often a caption that names a material is taken, to 1 of others: materials are what a network learns last."""


class Scenes:
    """Training scenes on the device, as latents, tokens and weights of their captions; the first ones as pictures, too.

    They are rendered little by little, a chunk at a time, and each chunk is kept in a file.
    """

    def __init__(
        self, work: Path, tokenizer: Path, code: codec.LinearCode, preset: Preset, *, seed: int, device: torch.device
    ) -> None:
        self.folder = work / f"scenes-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.preset, self.code, self.device, self.count = preset, code, device, 0
        size, side = architecture.SIZE_PX, architecture.SIZE_PX // architecture.DOWNSAMPLING
        self.total = preset.scenes
        shape = (self.total, architecture.LATENT_CHANNELS, side, side)
        self.latents = torch.empty(shape, dtype=torch.float16, device=device)
        self.tokens = torch.empty(self.total, CAPTIONS, architecture.TOKENS, dtype=torch.int32, device=device)
        self.weights = torch.empty(self.total, CAPTIONS, device=device)
        words = tokenizer_at(tokenizer)(list(MATERIALS), add_special_tokens=False).input_ids
        self._materials = torch.tensor([word[0] for word in words], dtype=torch.int32, device=device)
        self.pictures = torch.empty(preset.kept_pictures, size, size, 3, dtype=torch.uint8, device=device)
        there = 0
        while self._file(there).exists():
            self._take(load_file(self._file(there)))
            there += 1
        self._chunks: Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]] = prepared(
            functools.partial(_prepare, tokenizer), seed, self.total, processes=preset.processes, start=self.count
        )

    def _file(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}.safetensors"

    def _take(self, chunk: dict[str, Tensor]) -> None:
        rows = min(CHUNK, self.total - self.count)
        place = slice(self.count, self.count + rows)
        self.latents[place] = chunk["latents"][:rows].to(self.device)
        self.tokens[place] = chunk["tokens"][:rows].to(self.device)
        named = torch.isin(self.tokens[place], self._materials).any(-1)
        self.weights[place] = torch.where(named, MATERIAL_WEIGHT, 1.0)
        kept = self.pictures[place]
        kept.copy_(chunk["pictures"][: len(kept)])
        self.count += rows

    def captions(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens (B, T) of a caption of each of the scenes (B,), drawn by the captions' weights."""
        drawn = torch.multinomial(self.weights[chosen], 1, generator=generator)[:, 0]
        return self.tokens[chosen, drawn]

    def grow(self, count: int) -> None:
        """Renders until there are at least so many."""
        while self.count < min(count, self.total):
            rows, tokens = next(self._chunks)
            path = self._file(self.count // CHUNK)
            if path.exists():
                # Another process, which trains the other part, was here first.
                self._take(load_file(path))
                continue
            pictures = render_batch(
                rows, architecture.SIZE_PX, supersampling=self.preset.supersampling, device=self.device
            )
            kept = max(0, min(CHUNK, len(self.pictures) - self.count))
            chunk = {
                "latents": torch.cat([self.code.encode(to_tensor(p, self.device)) for p in pictures.split(64)]).half(),
                "tokens": torch.from_numpy(tokens),
                "pictures": pictures[:kept],
            }
            self._take(chunk)
            partial = path.with_suffix(f".partial-{os.getpid()}")
            save_file({name: part.cpu().contiguous() for name, part in chunk.items()}, partial)
            os.replace(partial, path)


@functools.cache
def tokenizer_at(folder: Path) -> Any:
    """The tokenizer in a folder."""
    return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)


def _prepare(tokenizer: Path, seed: int, chunk: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Packed scenes of a chunk, and `CAPTIONS` captions of each as tokens."""
    scenes = [training_scene_at(seed, index) for index in range(chunk * CHUNK, (chunk + 1) * CHUNK)]
    rng = random.Random(f"{seed}/captions/{chunk}")
    captions = [scene.caption(rng) for scene in scenes for _ in range(CAPTIONS)]
    tokens = tokens_of(tokenizer_at(tokenizer), captions)
    return packed(scenes), tokens.numpy().reshape(CHUNK, CAPTIONS, -1).astype(np.int32)


def tokens_of(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token ids (B, T) of captions."""
    tokens: Tensor = tokenizer(
        captions, padding="max_length", max_length=architecture.TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return tokens
