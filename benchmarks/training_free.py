"""Editing methods without training: the sentence alone, SDEdit, DDIM inversion, semantic guidance.

See `benchmarks.edit_methods`.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lowmem_imagic.diffusion.schedules import guide
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.pictures.letterbox import to_images, to_tensor
from lowmem_imagic.sampling.inversion import SOFTENING
from lowmem_imagic.settings.stages import SampleConfig

from .edit_methods import EMBEDS, SEED, Method, Outcome, embeds, same_noise

BATCH = 32
"""Pictures sampled together."""
SHARES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Points of a slider that is a share of the steps: more than 1 is no more than 1, and little is changed below 0.5."""
SCALE = 2.0
"""Scale of semantic guidance at 1 on its slider. It has no limit as this package's edit guidance has, so that its best
scale lies lower."""
SCALED = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
"""Points of the slider that is a share of `SCALE`."""


def sentence_alone(config: SampleConfig) -> Method:
    """Text-to-image from the target sentence, as the base alone draws it; the slider has no effect."""

    def run(base: BaseModel, photos: Sequence[Image.Image], sentences: Sequence[str], etas: Sequence[float]) -> Outcome:
        started = time.perf_counter()
        latents = denoised(base, base.encode_text(sentences)[EMBEDS], config, same_noise(base, len(sentences)))
        pictures = to_images(base.decode(latents))
        seconds = (time.perf_counter() - started) / len(sentences)
        return Outcome(dict.fromkeys(etas, pictures), 0, 0.0, seconds)

    return Method(asdict(config), run)


def sdedit(config: SampleConfig) -> Method:
    """SDEdit (Meng et al. 2022): noise the photo part of the way, denoise it under the sentence.

    The slider is the share of the steps: 0 returns the photo, 1 starts from almost pure noise.
    """

    def run(base: BaseModel, photos: Sequence[Image.Image], sentences: Sequence[str], etas: Sequence[float]) -> Outcome:
        started = time.perf_counter()
        clean = _encoded(base, photos)
        text, noise = base.encode_text(sentences)[EMBEDS], same_noise(base, len(photos))
        pictures = {}
        for eta in etas:
            steps = _share_of(eta, config)
            latents = clean
            if steps:
                first = _timesteps(base, config)[-steps].expand(len(clean))
                noisy = base.denoisers[0].schedule.noised(clean, noise, first)
                latents = denoised(base, text, config, noisy, last_steps=steps)
            pictures[eta] = to_images(base.decode(latents))
        seconds = (time.perf_counter() - started) / (len(photos) * len(etas))
        return Outcome(pictures, 0, 0.0, seconds)

    return Method(asdict(config), run, etas=SHARES)


def ddim_inversion(config: SampleConfig) -> Method:
    """DDIM inversion (Song et al. 2021, section 4.3): inverts the photo without text, then denoises it under the
    sentence.

    The slider is the share of inverted steps: 0 returns the photo. Needs DDIM.
    """

    def run(base: BaseModel, photos: Sequence[Image.Image], sentences: Sequence[str], etas: Sequence[float]) -> Outcome:
        started = time.perf_counter()
        text = base.encode_text(sentences)[EMBEDS]
        inverted = _inverted(base, _encoded(base, photos), config)
        pictures = {}
        for eta in etas:
            steps = _share_of(eta, config)
            made = denoised(base, text, config, inverted[steps], last_steps=steps) if steps else inverted[0]
            pictures[eta] = to_images(base.decode(made))
        seconds = (time.perf_counter() - started) / (len(photos) * len(etas))
        return Outcome(pictures, 0, 0.0, seconds)

    return Method(asdict(config), run, etas=SHARES)


def semantic_guidance(config: SampleConfig) -> Method:
    """Semantic guidance of an inverted photo, without training (LEDITS, Tsaban & Passos 2023, arXiv 2307.00522; here
    from DDIM inversion).

    The photo is inverted without text, with the softening of this package's own inversion
    (`lowmem_imagic.sampling.inversion`). Its denoising without text reproduces it; the difference of the predictions
    under sentence and source prompt is added, times the slider and `SCALE`. This package's rendering with a source
    prompt has beside that an adapter and e_opt in place of no text, a mask, and a limit on the difference.
    """

    def run(
        base: BaseModel,
        photos: Sequence[Image.Image],
        sentences: Sequence[str],
        etas: Sequence[float],
        sources: Sequence[str],
    ) -> Outcome:
        started = time.perf_counter()
        clean = _encoded(base, photos)
        noise = torch.randn(clean[0].shape, generator=torch.Generator().manual_seed(SEED))
        noises = _inverted(base, clean + SOFTENING * noise, config)[config.num_inference_steps]
        pictures: dict[float, list[Image.Image]] = {eta: [] for eta in etas}
        scales = SCALE * torch.tensor(etas).view(-1, 1, 1, 1)
        for inverted, sentence, source in zip(noises, sentences, sources, strict=True):
            text = base.encode_text(["", sentence, source])[EMBEDS].repeat_interleave(len(etas), 0)
            scheduler, x = _scheduler(base, config), inverted.repeat(len(etas), 1, 1, 1)
            scheduler.set_timesteps(config.num_inference_steps)
            for timestep in scheduler.timesteps:
                rows = x.repeat(3, 1, 1, 1)
                with torch.no_grad():
                    predicted = base.predict(base.denoisers[0], rows, timestep.expand(len(rows)), embeds(text))
                plain, asked, shown = predicted.float().cpu().chunk(3)
                x = scheduler.step(plain + scales * (asked - shown), timestep, x).prev_sample
            for eta, picture in zip(etas, to_images(base.decode(x)), strict=True):
                pictures[eta].append(picture)
        seconds = (time.perf_counter() - started) / (len(photos) * len(etas))
        return Outcome(pictures, 0, 0.0, seconds)

    settings = {**asdict(config), "method": "semantic guidance", "softening": SOFTENING, "scale": SCALE}
    return Method(settings, run, etas=SCALED, sourced=True)


def _inverted(base: BaseModel, latents: Tensor, config: SampleConfig) -> dict[int, Tensor]:
    """The latents (B, C, H, W) of photos after each number of steps of DDIM inversion; 0 is the photos' own."""
    timesteps = _timesteps(base, config)
    inverted = {0: latents}
    for steps, timestep in enumerate(timesteps.flip(0), start=1):
        before = None if steps == 1 else timesteps[-steps + 1]
        inverted[steps] = _one_step_back(base, inverted[steps - 1], before, timestep)
    return inverted


@torch.no_grad()
def _one_step_back(base: BaseModel, latents: Tensor, before: Tensor | None, timestep: Tensor) -> Tensor:
    """The latents (B, C, H, W) at `timestep`, from those one step cleaner, at `before` (None: the photo's)."""
    empty = base.encode_text([""])[EMBEDS].expand(len(latents), -1, -1)
    now = before if before is not None else torch.zeros_like(timestep)
    noise = torch.cat(
        [
            base.predict(base.denoisers[0], x, now.expand(len(x)), embeds(e)).float().cpu()
            for x, e in zip(latents.split(BATCH), empty.split(BATCH), strict=True)
        ]
    )
    schedule: Any = base.denoisers[0].schedule
    a_now = schedule.alpha_bar[now] if before is not None else torch.tensor(1.0)
    clean = (latents - (1 - a_now).sqrt() * noise) / a_now.sqrt()
    return schedule.noised(clean, noise, timestep.expand(len(latents)))


@torch.no_grad()
def denoised(
    base: BaseModel, text: Tensor, config: SampleConfig, latents: Tensor, *, last_steps: int | None = None
) -> Tensor:
    """Latents (B, C, H, W) denoised under text (B, T, D) with guidance, no adapters.

    Args:
        base: the base.
        text: conditioning of each row.
        config: scheduler, steps and guidance; other settings are ignored.
        latents: (B, C, H, W) at the noise level of the first step taken; standard normal for the whole schedule.
        last_steps: number of steps to take, from the end; all by default.
    """
    negative = base.encode_text([config.negative_prompt])[EMBEDS][0]
    finished = []
    for rows, start in zip(text.split(BATCH), latents.split(BATCH), strict=True):
        scheduler = _scheduler(base, config)
        scheduler.set_timesteps(config.num_inference_steps)
        x = start if last_steps else start * scheduler.init_noise_sigma
        both = torch.cat([negative.expand_as(rows), rows])
        for timestep in scheduler.timesteps[-(last_steps or config.num_inference_steps) :]:
            predicted = base.predict(
                base.denoisers[0], torch.cat([x, x]), timestep.expand(2 * len(rows)), embeds(both)
            ).float()
            guided = guide(*predicted.cpu().chunk(2), config.guidance_scale)
            x = scheduler.step(guided, timestep, x).prev_sample
        finished.append(x)
    return torch.cat(finished)


def _encoded(base: BaseModel, photos: Sequence[Image.Image]) -> Tensor:
    return base.encode_images(torch.cat([to_tensor(photo) for photo in photos]))


def _timesteps(base: BaseModel, config: SampleConfig) -> Tensor:
    """The steps of a whole denoising, from noisy to clean."""
    scheduler = _scheduler(base, config)
    scheduler.set_timesteps(config.num_inference_steps)
    timesteps: Tensor = scheduler.timesteps
    return timesteps


def _scheduler(base: BaseModel, config: SampleConfig) -> Any:
    """diffusers' scheduler on the base's noise schedule."""
    schedule: Any = base.denoisers[0].schedule
    return schedule.scheduler(config.scheduler)


def _share_of(eta: float, config: SampleConfig) -> int:
    """Number of steps for a point of the slider; all steps beyond 1."""
    return min(config.num_inference_steps, max(0, round(eta * config.num_inference_steps)))
