"""Stage 3: images along the line between the optimised and the target embedding (paper section 3.2, eq. 3)."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapters import AdapterPack
from .base_model import BaseModel
from .config import SampleConfig
from .diffusion import guide, interpolate

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
    strength: float = 1.0
    """Factor on the adapter; 0 is the base alone."""


def sample(
    base: BaseModel,
    pack: AdapterPack,
    target_embeddings: Tensor,
    optimized_embeddings: Tensor,
    cells: Sequence[Cell],
    config: SampleConfig,
    progress: Progress | None = None,
) -> Tensor:
    """Latents (len(cells), C, H, W), fp32 on the CPU, one for each cell, in the order of `cells`.

    Starts from noise, as the paper does, and uses classifier-free guidance. Rows are (edit, eta, seed)
    and never influence each other: an image does not depend on what it was rendered with.

    Args:
        base: the frozen base.
        pack: adapters of N edits.
        target_embeddings: e_tgt, (N, T, D).
        optimized_embeddings: e_opt, (N, T, D).
        cells: what to render.
        config: steps, guidance, scheduler, rows per batch.
        progress: called after every step of every batch.
    """
    guided = config.guidance_scale != 1
    negative = base.encode_text([config.negative_prompt])[0]
    images = max(1, config.batch_rows // (2 if guided else 1))
    batches = list(_batches(cells, images))
    steps, results = config.num_inference_steps, dict[int, Tensor]()
    for batch, numbers in enumerate(batches):
        chosen = [cells[number] for number in numbers]
        text = torch.stack(
            [interpolate(target_embeddings[cell.edit], optimized_embeddings[cell.edit], cell.eta) for cell in chosen]
        )
        rows = torch.tensor([cell.edit for cell in chosen])
        if guided:
            text = torch.cat([negative.expand_as(text), text])
            rows = rows.repeat(2)

        def on_step(step: int, before: int = batch * steps) -> None:
            if progress is not None:
                progress(before + step, steps * len(batches), f"{len(results)} of {len(cells)} images done")

        pack.set_rows(rows)
        pack.strength(chosen[0].strength)
        with torch.no_grad(), pack.attached(base.unet):
            latents = _denoise(base, text, [cell.seed for cell in chosen], config, guided, on_step)
        results.update(zip(numbers, latents.float().cpu(), strict=True))
    return torch.stack([results[number] for number in range(len(cells))])


def _batches(cells: Sequence[Cell], size: int) -> Iterator[list[int]]:
    """Numbers of the cells rendered together: equal strength, edits side by side, at most `size`."""
    for strength in dict.fromkeys(cell.strength for cell in cells):
        order = [number for number, cell in enumerate(cells) if cell.strength == strength]
        order.sort(key=lambda number: cells[number].edit)
        for start in range(0, len(order), size):
            yield order[start : start + size]


def _denoise(
    base: BaseModel,
    text: Tensor,
    seeds: Sequence[int],
    config: SampleConfig,
    guided: bool,
    on_step: Callable[[int], None],
) -> Tensor:
    """Latents (B, C, H, W) from noise; text (B, T, D), or (2 B, T, D) with the unconditional half first."""
    scheduler = base.family.scheduler(config.scheduler)
    scheduler.set_timesteps(config.num_inference_steps, device=base.device)
    # One generator a row: equal seeds see equal noise, whatever the batch and the device.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (base.family.unet_config["in_channels"], *[base.family.unet_config["sample_size"]] * 2)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    latents: Tensor = noise.to(base.device) * scheduler.init_noise_sigma
    options = _step_options(scheduler, config, generators)
    text = text.to(base.device)
    for step, timestep in enumerate(scheduler.timesteps, start=1):
        scaled = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
        prediction = base.predict(scaled, timestep.expand(len(scaled)), text).float()
        if guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = guide(unconditional, conditional, config.guidance_scale)
        latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
        on_step(min(step, config.num_inference_steps))
    return latents


def _step_options(scheduler: Any, config: SampleConfig, generators: list[torch.Generator]) -> dict[str, Any]:
    """What this scheduler's step takes beyond the usual three."""
    takes = inspect.signature(scheduler.step).parameters
    offered = {"eta": config.ddim_eta, "generator": generators}
    return {name: value for name, value in offered.items() if name in takes}
