"""Runs a scheduler without a model, to see whether perfect predictions lead it to the picture."""

from typing import Any

import torch
from torch import Tensor

from ..diffusion.schedules import training_target

SHAPE = (1, 4, 8, 8)
"""Shape of the test picture: white noise with variance 1, to which latents are scaled."""


def rehearse(scheduler: Any, alpha_bar: Tensor, prediction_type: str, *, of_pixels: bool = False) -> float:
    """Error of a scheduler's result with the right prediction in every step, as a share of the picture's norm.

    A scheduler that fits the base's noise schedule ends at the picture, except for the noise left by its last step: a
    few hundredths. A scheduler that clips latents, divides by zero or counts timesteps differently does not, and no
    training can correct that. NaN or infinity if the scheduler itself makes such numbers. Needs no network.

    Args:
        scheduler: a scheduler with its timesteps set.
        alpha_bar: the base's cumulative product of alphas, (num_train_timesteps,).
        prediction_type: prediction type of the base's UNet.
        of_pixels: whether the base denoises pictures in [-1, 1] and clips its predictions to that range.
    """
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(SHAPE, generator=generator)
    if of_pixels:
        picture = picture.clamp(-1, 1)
    x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep)
        # Timesteps may lie between the timesteps of training.
        place = timestep.float().clamp(0, len(alpha_bar) - 1)
        below, share = int(place), float(place) - int(place)
        above = min(below + 1, len(alpha_bar) - 1)
        around = alpha_bar[[below, above]]
        level = torch.lerp(around[0], around[1], share)
        noise = (scaled - level.sqrt() * picture) / (1 - level).sqrt()
        target = training_target(picture, noise, torch.zeros(1, dtype=torch.long), level.view(1), prediction_type)
        x = scheduler.step(target, timestep, x).prev_sample
    return float((x - picture).norm() / picture.norm())
