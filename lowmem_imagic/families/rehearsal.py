"""A scheduler tried without a model: whether perfect predictions lead it to the picture."""

from typing import Any

import torch
from torch import Tensor

from ..diffusion.schedules import training_target

SHAPE = (1, 4, 8, 8)
"""Of the latents it is tried on: white, with the variance of 1 that latents are scaled to."""


def rehearse(scheduler: Any, alpha_bar: Tensor, prediction_type: str) -> float:
    """How far from a picture a scheduler ends that is told the truth in every step, as a share of the picture's size.

    In place of the UNet's prediction stands the one that is right for that picture. A scheduler that fits the base's
    noise schedule then ends at it, but for the noise that its last step leaves: a few hundredths. One that clips
    latents, divides by zero or counts timesteps otherwise does not, and neither will any training lead it there.
    NaN or infinity where it makes such numbers itself. Costs no pass through a network.

    Args:
        scheduler: with its timesteps set.
        alpha_bar: the base's, (num_train_timesteps,).
        prediction_type: what the base's UNet predicts.
    """
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(SHAPE, generator=generator)
    x = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep)
        # Timesteps may lie between those of training.
        place = timestep.float().clamp(0, len(alpha_bar) - 1)
        below, share = int(place), float(place) - int(place)
        above = min(below + 1, len(alpha_bar) - 1)
        around = alpha_bar[[below, above]]
        level = torch.lerp(around[0], around[1], share)
        noise = (scaled - level.sqrt() * picture) / (1 - level).sqrt()
        target = training_target(picture, noise, torch.zeros(1, dtype=torch.long), level.view(1), prediction_type)
        x = scheduler.step(target, timestep, x).prev_sample
    return float((x - picture).norm() / picture.norm())
