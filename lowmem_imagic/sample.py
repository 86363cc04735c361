"""Stage 3: images on the way from the optimised to the target embedding (paper section 3.2, eq. 3)."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapters import AdapterPack
from .base_model import BaseModel
from .config import SampleConfig, Strength, strengths
from .diffusion import PATHS, guide, refined, starting_noise
from .memory import in_rungs

Progress = Callable[[int, int, str], None]
"""Called as ``progress(step, steps, remark)`` after every step."""


@dataclass(frozen=True)
class Cell:
    """One image to render."""

    edit: int
    """Number of the edit in the pack."""
    eta: float
    """Interpolation: 0 is the photo, 1 the target sentence."""
    seed: int
    """Seed of the starting noise."""
    strength: Strength = 1.0
    """Factor on the adapter; 0 is the base alone."""
    guidance_scale: float | None = None
    """Classifier-free guidance; None takes the configuration's."""


@dataclass(frozen=True)
class _Way:
    """The ways of B images from their photos to their sentences."""

    pack: AdapterPack
    rows: Tensor
    """(B,) the edit of each."""
    strengths: Tensor
    """(B, 3) factors on its adapter."""
    optimized: Tensor
    """e_opt of each, (B, T, D)."""
    target: Tensor
    """e_tgt of each, (B, T, D)."""
    negative: Tensor | None
    """(1, T, D); None without guidance."""
    config: SampleConfig

    def at(self, etas: Sequence[float]) -> Tensor:
        """Sets the adapters for these etas, and gives the text: (B, T, D), or (2 B, T, D) with the negative first."""
        eta = torch.tensor(etas).view(-1, 1, 1)
        text = PATHS[self.config.interpolation](self.target, self.optimized, eta)
        factors = self.strengths * (1 - self.config.release * eta.view(-1, 1).clamp(0, 1))
        if self.negative is None:
            self.pack.set_rows(self.rows, factors)
            return text
        self.pack.set_rows(self.rows.repeat(2), factors.repeat(2, 1))
        return torch.cat([self.negative.expand_as(text), text])


def sample(
    base: BaseModel,
    pack: AdapterPack,
    target_embeddings: Tensor,
    optimized_embeddings: Tensor,
    cells: Sequence[Cell],
    config: SampleConfig,
    progress: Progress | None = None,
    *,
    coarse_latents: Tensor | None = None,
) -> Tensor:
    """Latents (len(cells), C, H, W), fp32 on the CPU, one for each cell, in the order of `cells`.

    Uses classifier-free guidance, and starts as `SampleConfig.start` says. Rows are (edit, eta, seed, strength,
    guidance) and never influence each other: an image does not depend on what it was rendered with.

    Args:
        base: the frozen base.
        pack: adapters of N edits.
        target_embeddings: e_tgt, (N, T, D).
        optimized_embeddings: e_opt, (N, T, D).
        cells: what to render.
        config: steps, scheduler, start, interpolation, hold, release, rows per batch; guidance where a cell has none
            of its own.
        progress: called after every step of every batch; its steps are those of all images.
        coarse_latents: low frequencies of the photos (N, C, h, w); needed to start from the photo.
    """
    if config.start == "photo" and coarse_latents is None:
        raise ValueError("sampling starts from the photo and its coarse latents are not given")
    if config.start == "noise":
        coarse_latents = None
    negative = base.encode_text([config.negative_prompt])[:1]
    scales = [config.guidance_scale if cell.guidance_scale is None else cell.guidance_scale for cell in cells]
    waiting = list(_batches(cells, scales, config.batch_rows, base.most_images))
    steps, results = config.num_inference_steps, dict[int, Tensor]()

    def render() -> Tensor:
        numbers = waiting[0]
        chosen = [cells[number] for number in numbers]
        rows = torch.tensor([cell.edit for cell in chosen])
        start = coarse_latents[rows] if coarse_latents is not None else None
        guidance = None
        if scales[numbers[0]] != 1:
            guidance = torch.tensor([scales[number] for number in numbers]).view(-1, 1, 1, 1)
        way = _Way(
            pack,
            rows,
            torch.tensor([strengths(cell.strength) for cell in chosen]),
            optimized_embeddings[rows],
            target_embeddings[rows],
            negative if guidance is not None else None,
            config,
        )

        def on_step(step: int) -> None:
            if progress is not None:
                done = len(results) * steps + len(numbers) * step
                progress(done, len(cells) * steps, f"{len(results)} of {len(cells)} images done")

        with torch.no_grad(), pack.attached(base.unet):
            return _denoise(base, way, chosen, config, guidance, start, on_step)

    def fewer() -> bool:
        most = len(waiting[0]) // 2
        if most:
            waiting[:] = [numbers[i : i + most] for numbers in waiting for i in range(0, len(numbers), most)]
            base.most_images = most
            base.step_down(f"{most} images a sampling batch")
        return bool(most)

    while waiting:
        latents = in_rungs(render, fewer)
        results.update(zip(waiting.pop(0), latents.float().cpu(), strict=True))
    return torch.stack([results[number] for number in range(len(cells))])


def _batches(
    cells: Sequence[Cell], scales: Sequence[float], batch_rows: int, most_images: int | None
) -> Iterator[list[int]]:
    """Numbers of the cells rendered together: edits side by side, at most `batch_rows` rows and `most_images`.

    Guidance 1 takes one row an image, any other two, so the two kinds are kept apart.
    """
    for guided in (False, True):
        order = [number for number in range(len(cells)) if (scales[number] != 1) == guided]
        order.sort(key=lambda number: cells[number].edit)
        size = max(1, min(batch_rows // (2 if guided else 1), most_images or batch_rows))
        for begin in range(0, len(order), size):
            yield order[begin : begin + size]


def _denoise(
    base: BaseModel,
    way: _Way,
    cells: Sequence[Cell],
    config: SampleConfig,
    guidance: Tensor | None,
    coarse_latents: Tensor | None,
    on_step: Callable[[int], None],
) -> Tensor:
    """Latents (B, C, H, W) from noise.

    Args:
        base: the frozen base, with adapters in place.
        way: sets adapters and text for an eta of each cell.
        cells: B of them: their etas, and the seeds of their starting noise.
        config: steps, scheduler, how many steps are held.
        guidance: scale of each row (B, 1, 1, 1), None without guidance.
        coarse_latents: what the starting noise lies over (B, C, h, w), None for nothing.
        on_step: called after every step.
    """
    scheduler = base.family.scheduler(config.scheduler)
    scheduler.set_timesteps(config.num_inference_steps, device=base.device)
    shape = base.family.latent_shape
    # One generator a row: equal seeds see equal noise, whatever the batch and the device.
    generators = [torch.Generator().manual_seed(cell.seed) for cell in cells]
    noise = torch.stack([starting_noise(shape, generator) for generator in generators]).to(base.device)
    latents: Tensor = noise * scheduler.init_noise_sigma
    if coarse_latents is not None:
        below = refined(coarse_latents.to(base.device), *shape[1:])
        latents = scheduler.add_noise(below, noise, scheduler.timesteps[:1].expand(len(noise)))
    options = _step_options(scheduler, config, generators)
    held = round(config.hold * len(scheduler.timesteps))
    guidance = None if guidance is None else guidance.to(base.device)
    for step, timestep in enumerate(scheduler.timesteps, start=1):
        if step == 1 and held:
            text = way.at([0.0] * len(cells)).to(base.device)
        elif step in (1, held + 1):
            text = way.at([cell.eta for cell in cells]).to(base.device)
        scaled = scheduler.scale_model_input(latents if guidance is None else torch.cat([latents, latents]), timestep)
        prediction = base.predict(scaled, timestep.expand(len(scaled)), text).float()
        if guidance is not None:
            unconditional, conditional = prediction.chunk(2)
            prediction = guide(unconditional, conditional, guidance)
        latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
        on_step(min(step, config.num_inference_steps))
    return latents


def _step_options(scheduler: Any, config: SampleConfig, generators: list[torch.Generator]) -> dict[str, Any]:
    """What this scheduler's step takes beyond the usual three."""
    takes = inspect.signature(scheduler.step).parameters
    offered = {"eta": config.ddim_eta, "generator": generators}
    return {name: value for name, value in offered.items() if name in takes}
