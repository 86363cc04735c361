"""Ways to edit a photo by a sentence, behind one protocol, so that they are compared like with like.

A method gets photos and sentences and gives pictures for each point of its slider (eta, or what plays its part).
Every item starts from the same noise; what a method may choose, it chooses for all items at once.
"""

import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from lowmem_imagic import edit_file
from lowmem_imagic.base_model import BaseModel
from lowmem_imagic.config import EditConfig, SampleConfig
from lowmem_imagic.diffusion import add_noise, guide, interpolate, loss_per_edit
from lowmem_imagic.embed import embed
from lowmem_imagic.images import Photo
from lowmem_imagic.letterbox import to_images, to_tensor
from lowmem_imagic.pipeline import Job, apply_edits, make_edits
from lowmem_imagic.png import encode_png
from lowmem_imagic.sample import Cell
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


Method = Callable[[BaseModel, Sequence[Image.Image], Sequence[str], Sequence[float]], Outcome]
"""``method(base, photos, sentences, etas)``."""


def ours(config: EditConfig, *, pack: int = 8, strength: float = 1.0) -> Method:
    """This package, `pack` items at a time."""

    def run(base: BaseModel, photos: Sequence[Image.Image], sentences: Sequence[str], etas: Sequence[float]) -> Outcome:
        pictures: dict[float, list[Image.Image]] = {eta: [] for eta in etas}
        sizes: list[int] = []
        train_s = sample_s = 0.0
        for start in range(0, len(photos), pack):
            jobs = [Job(_photo(p), s) for p, s in zip(photos[start:][:pack], sentences[start:][:pack], strict=True)]
            started = time.perf_counter()
            # Read back, because what is rendered later is the file.
            files = [edit_file.encode(edit) for edit in make_edits(base, jobs, config)]
            train_s += time.perf_counter() - started
            edits = [edit_file.decode(data) for data in files]
            sizes += map(len, files)
            started = time.perf_counter()
            cells = [Cell(number, eta, SEED, strength) for eta in etas for number in range(len(jobs))]
            made = apply_edits(base, edits, cells, config.sample)
            sample_s += time.perf_counter() - started
            for cell, picture in zip(cells, made, strict=True):
                pictures[cell.eta].append(picture)
        passes = config.embed.passes + config.finetune.passes
        return Outcome(pictures, passes, train_s / len(photos), sample_s / (len(photos) * len(etas)), tuple(sizes))

    return run


def full_finetune(learning_rate: float, *, embed_steps: int, steps: int, draws: int, config: EditConfig) -> Method:
    """Imagic as published: the embedding, then every weight of the UNet (paper section 3.2), with Adam.

    Needs a base in fp32, whose UNet comes back unchanged.

    Args:
        learning_rate: of the weights; the paper's is for a batch of its own size and to be tuned here.
        embed_steps: of stage 1; its rate is the configuration's.
        steps: of stage 2.
        draws: (timestep, noise) draws a step, both stages.
        config: stage 1's rate and how to sample.
    """
    first = replace(config.embed, steps=embed_steps, draws=draws)

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
        text = torch.cat([interpolate(target, optimized, eta) for eta in etas])
        return list(denoised(base, text, config.sample, _noise(base, len(etas)))), train_s

    def run(base: BaseModel, photos: Sequence[Image.Image], sentences: Sequence[str], etas: Sequence[float]) -> Outcome:
        if base.weights != "fp32":
            raise ValueError(f"full fine-tuning needs weights in fp32, the base has {base.weights}")
        untouched = copy.deepcopy(base.unet.state_dict())
        latents: dict[float, list[Tensor]] = {eta: [] for eta in etas}
        train_s, started = 0.0, time.perf_counter()
        try:
            for photo, sentence in zip(photos, sentences, strict=True):
                made, seconds = one(base, photo, sentence, etas)
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


def sentence_alone(config: SampleConfig) -> Method:
    """Text-to-image from the target sentence: how well the base itself follows it; the slider does nothing."""

    def run(base: BaseModel, photos: Sequence[Image.Image], sentences: Sequence[str], etas: Sequence[float]) -> Outcome:
        started = time.perf_counter()
        latents = denoised(base, base.encode_text(sentences), config, _noise(base, len(sentences)))
        pictures = to_images(base.decode(latents))
        seconds = (time.perf_counter() - started) / len(sentences)
        return Outcome(dict.fromkeys(etas, pictures), 0, 0.0, seconds)

    return run


def sdedit(config: SampleConfig) -> Method:
    """SDEdit (Meng et al. 2022): noise the photo part of the way, denoise it under the sentence.

    The slider is the share of the steps: 0 gives the photo back, 1 starts from all but pure noise.
    """

    def run(base: BaseModel, photos: Sequence[Image.Image], sentences: Sequence[str], etas: Sequence[float]) -> Outcome:
        started = time.perf_counter()
        clean = base.encode_images(torch.cat([to_tensor(photo) for photo in photos]))
        text, noise = base.encode_text(sentences), _noise(base, len(photos))
        pictures = {}
        for eta in etas:
            steps = round(eta * config.num_inference_steps)
            latents = denoised(base, text, config, noise, start=clean, last_steps=steps) if steps else clean
            pictures[eta] = to_images(base.decode(latents))
        seconds = (time.perf_counter() - started) / (len(photos) * len(etas))
        return Outcome(pictures, 0, 0.0, seconds)

    return run


@torch.no_grad()
def denoised(
    base: BaseModel,
    text: Tensor,
    config: SampleConfig,
    noise: Tensor,
    *,
    start: Tensor | None = None,
    last_steps: int | None = None,
    batch: int = 32,
) -> Tensor:
    """Latents (B, C, H, W) denoised under text (B, T, D) with guidance, no adapters.

    Args:
        base: the base.
        text: conditioning of each row.
        config: scheduler, steps, guidance; its seeds, etas and strength are not read.
        noise: (B, C, H, W), standard normal.
        start: latents that carry the noise at the first step; pure noise by default.
        last_steps: how many of the steps to take, from the end; all by default.
        batch: rows sampled together.
    """
    negative = base.encode_text([config.negative_prompt])[0]
    finished = []
    for i in range(0, len(text), batch):
        scheduler = base.family.scheduler(config.scheduler)
        scheduler.set_timesteps(config.num_inference_steps)
        timesteps = scheduler.timesteps[-(last_steps or config.num_inference_steps) :]
        rows = text[i : i + batch]
        latents = noise[i : i + batch] * scheduler.init_noise_sigma
        if start is not None:
            first = timesteps[:1].expand(len(rows))
            latents = add_noise(start[i : i + batch], noise[i : i + batch], first, base.alpha_bar)
        both = torch.cat([negative.expand_as(rows), rows])
        for timestep in timesteps:
            predicted = base.predict(torch.cat([latents, latents]), timestep.expand(2 * len(rows)), both).float()
            guided = guide(*predicted.cpu().chunk(2), config.guidance_scale)
            latents = scheduler.step(guided, timestep, latents).prev_sample
        finished.append(latents)
    return torch.cat(finished)


def _noise(base: BaseModel, rows: int) -> Tensor:
    """The same starting noise (C, H, W) for every row: (B, C, H, W), as `lowmem_imagic.sample` draws it."""
    unet = base.family.unet_config
    shape = (unet["in_channels"], unet["sample_size"], unet["sample_size"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).expand(rows, *shape).contiguous()


def _photo(picture: Image.Image) -> Photo:
    """A rendered picture as a photo that was read from a file."""
    digest = hashlib.sha256(encode_png(picture, provenance=None)).hexdigest()
    return Photo(image=picture, sha256=digest, name="scene", notes=(), icc_profile=None)
