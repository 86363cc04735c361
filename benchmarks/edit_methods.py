"""Ways to edit a photo by a sentence, behind one protocol, so that they are compared like with like.

A method gets photos and sentences and gives pictures for each point of its slider (eta, or what plays its part).
Every item starts from the same noise; what a method may choose, it chooses for all items at once.
"""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lowmem_imagic import edit_file
from lowmem_imagic.adapters import AdapterPack
from lowmem_imagic.atomic import write_bytes
from lowmem_imagic.base_model import BaseModel
from lowmem_imagic.config import EditConfig
from lowmem_imagic.diffusion import coarse, loss_per_edit
from lowmem_imagic.embed import embed
from lowmem_imagic.images import Photo
from lowmem_imagic.letterbox import to_images, to_tensor
from lowmem_imagic.pipeline import COARSE_SIDE, Job, apply_edits, make_edits
from lowmem_imagic.png import encode_png
from lowmem_imagic.safetensors_codec import serialize
from lowmem_imagic.sample import Cell, sample
from lowmem_imagic.training import draw_rows

SEED = 0
"""Of every item's training and starting noise."""


@dataclass(frozen=True)
class Outcome:
    """What a method made of some items."""

    pictures: dict[float, list[Image.Image]]
    """For each point of the slider a picture of each item."""
    passes: int
    """Rows that went forward and backward through the UNet, an item."""
    train_s: float
    """Seconds of training, an item."""
    sample_s: float
    """Seconds of sampling, a picture."""
    edit_bytes: tuple[int, ...] = ()
    """Size of each item's edit file, where the method has one."""


def joined(parts: Sequence[Outcome]) -> Outcome:
    """What a method made of several lots of equally many items, as one lot."""
    return Outcome(
        {eta: [picture for part in parts for picture in part.pictures[eta]] for eta in parts[0].pictures},
        parts[0].passes,
        sum(part.train_s for part in parts) / len(parts),
        sum(part.sample_s for part in parts) / len(parts),
        tuple(size for part in parts for size in part.edit_bytes),
    )


Method = Callable[[BaseModel, Sequence[Image.Image], Sequence[str], Sequence[float]], Outcome]
"""``method(base, photos, sentences, etas)``."""


def ours(config: EditConfig, *, edits: Path | None = None, retarget_from: str | None = None) -> Method:
    """This package, one item at a time, which on a CPU is as fast as side by side.

    Args:
        config: settings of all stages; of the third, etas and seeds are the protocol's.
        edits: folder of edit files: what is there already is not trained again, so that ways of sampling share
            their edits.
        retarget_from: train for this sentence, render under the item's.
    """

    def run(base: BaseModel, photos: Sequence[Image.Image], sentences: Sequence[str], etas: Sequence[float]) -> Outcome:
        pictures: dict[float, list[Image.Image]] = {eta: [] for eta in etas}
        sizes: list[int] = []
        train_s = sample_s = 0.0
        for photo, sentence in zip(photos, sentences, strict=True):
            # Read back, because what is rendered later is the file.
            data, seconds = trained(base, Job(as_photo(photo), retarget_from or sentence), config, edits)
            train_s += seconds
            sizes.append(len(data))
            started = time.perf_counter()
            cells = [Cell(0, eta, SEED, config.sample.strength) for eta in etas]
            made = apply_edits(base, [edit_file.decode(data)], cells, config.sample, prompts=[sentence])
            sample_s += time.perf_counter() - started
            for eta, picture in zip(etas, made, strict=True):
                pictures[eta].append(picture)
        passes = config.embed.passes + config.finetune.passes
        return Outcome(pictures, passes, train_s / len(photos), sample_s / (len(photos) * len(etas)), tuple(sizes))

    return run


def trained(base: BaseModel, job: Job, config: EditConfig, folder: Path | None) -> tuple[bytes, float]:
    """Edit file of a job, and the seconds that training it takes or took; from `folder` where it has it."""
    if folder is None:
        started = time.perf_counter()
        [edit] = make_edits(base, [job], config)
        return edit_file.encode(edit), time.perf_counter() - started
    facts = {
        "embed": asdict(config.embed),
        "finetune": asdict(config.finetune),
        "seed": config.seed,
        "base": [base.identity.files, base.weights],
        "job": [job.photo.sha256, job.prompt],
    }
    path = folder / f"edit-{_digest(facts)}.safetensors"
    clock = path.with_suffix(".json")
    if not clock.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data, seconds = trained(base, job, config, None)
        write_bytes(path, data, overwrite=True)
        # Last: what it stands beside is complete.
        write_bytes(clock, json.dumps(seconds).encode(), overwrite=True)
    return path.read_bytes(), json.loads(clock.read_text())


def full_finetune(
    learning_rate: float,
    *,
    embed_steps: int,
    steps: int,
    draws: int,
    config: EditConfig,
    folder: Path | None = None,
) -> Method:
    """Imagic as published: the embedding, then every weight of the UNet (paper section 3.2), with Adam.

    Needs a base in fp32, whose UNet comes back unchanged.

    Args:
        learning_rate: of the weights; the paper's is for a batch of its own size and to be tuned here.
        embed_steps: of stage 1; its rate is the configuration's.
        steps: of stage 2.
        draws: (timestep, noise) draws a step, both stages.
        config: stage 1's rate and how to sample.
        folder: keeps each item's latents, and what it keeps is not made again: a stopped run goes on.
    """
    first = replace(config.embed, steps=embed_steps, draws=draws)
    schedule = {"rate": learning_rate, "steps": steps, "embed": asdict(first), "sample": asdict(config.sample)}

    def one(base: BaseModel, photo: Image.Image, sentence: str, etas: Sequence[float]) -> tuple[list[Tensor], float]:
        generator = torch.Generator().manual_seed(SEED)
        target = base.encode_text([sentence, config.sample.negative_prompt])[:1]
        latents = base.encode_images(to_tensor(photo))
        started = time.perf_counter()
        optimized, _ = embed(base, latents, target, first, [generator])
        weights = list(base.unet.parameters())
        optimizer = torch.optim.Adam([w.requires_grad_() for w in weights], lr=learning_rate, foreach=True)
        for _ in range(steps):
            noisy, timesteps, wanted = draw_rows(
                latents, draws, base.alpha_bar, base.family.prediction_type, [generator]
            )
            predicted = base.predict(noisy, timesteps, optimized.repeat_interleave(draws, 0))
            optimizer.zero_grad()
            loss_per_edit(predicted, wanted, 1).sum().backward()
            optimizer.step()
        base.unet.requires_grad_(False)
        train_s = time.perf_counter() - started
        # An adapter of zeros, so that sampling is this package's own in every respect.
        nothing = AdapterPack(base.unet, edits=1, adapt="attn", rank=1, alpha=1.0, device=base.device)
        cells = [Cell(0, eta, SEED) for eta in etas]
        low = coarse(latents, COARSE_SIDE)
        return list(sample(base, nothing, target, optimized, cells, config.sample, coarse_latents=low)), train_s

    def remembered(
        base: BaseModel, photo: Image.Image, sentence: str, etas: Sequence[float]
    ) -> tuple[Sequence[Tensor], float]:
        if folder is None:
            return one(base, photo, sentence, etas)
        facts = {**schedule, "base": base.identity.files, "photo": as_photo(photo).sha256, "sentence": sentence}
        path = folder / f"full-{_digest({**facts, 'etas': etas})}.safetensors"
        if not path.exists():
            made, seconds = one(base, photo, sentence, etas)
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {"latents": torch.stack(made), "seconds": torch.tensor(seconds)}
            write_bytes(path, serialize(tensors, {}), overwrite=True)
        kept = load_file(path)
        return list(kept["latents"]), float(kept["seconds"])

    def run(base: BaseModel, photos: Sequence[Image.Image], sentences: Sequence[str], etas: Sequence[float]) -> Outcome:
        if base.weights != "fp32":
            raise ValueError(f"full fine-tuning needs weights in fp32, the base has {base.weights}")
        untouched = copy.deepcopy(base.unet.state_dict())
        latents: dict[float, list[Tensor]] = {eta: [] for eta in etas}
        train_s, started = 0.0, time.perf_counter()
        try:
            for photo, sentence in zip(photos, sentences, strict=True):
                made, seconds = remembered(base, photo, sentence, etas)
                train_s += seconds
                for eta, z in zip(etas, made, strict=True):
                    latents[eta].append(z)
                base.unet.load_state_dict(untouched)
        finally:
            base.unet.load_state_dict(untouched)
            base.unet.requires_grad_(False)
        pictures = {eta: to_images(base.decode(torch.stack(parts))) for eta, parts in latents.items()}
        sample_s = (time.perf_counter() - started - train_s) / (len(photos) * len(etas))
        return Outcome(pictures, (embed_steps + steps) * draws, train_s / len(photos), sample_s)

    return run


def _digest(facts: Mapping[str, Any]) -> str:
    """A short name for what something was made from."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def same_noise(base: BaseModel, rows: int) -> Tensor:
    """The same starting noise (C, H, W) for every row: (B, C, H, W), as `lowmem_imagic.sample` draws it."""
    unet = base.family.unet_config
    shape = (unet["in_channels"], unet["sample_size"], unet["sample_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).expand(rows, *shape).contiguous()


def as_photo(picture: Image.Image) -> Photo:
    """A rendered picture as a photo that was read from a file."""
    digest = hashlib.sha256(encode_png(picture, provenance=None)).hexdigest()
    return Photo(image=picture, sha256=digest, name="scene", notes=(), icc_profile=None)
