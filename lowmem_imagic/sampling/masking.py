"""The mask of a picture: the places where the base's predictions differ between the sentence and the photo."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.base import BaseModel
from ..families.conditioning import Conditioning
from ..families.family import Denoiser

DRAWS = 12
"""Noise draws that the difference is averaged over."""
TIMESTEP = 0.7
"""Share of the noise schedule at which the base predicts; 0 is the clean end. At this noise level a prediction decides
objects, not texture."""
TOP = 0.98
"""Quantile of the difference that counts as 1, so that a single place does not set the scale."""
SOFT = 0.15
"""The mask rises from 0 to 1 between this much below the threshold and this much above it."""
REACH = 16
"""Divisor of the picture's shorter side: the difference is averaged, and the mask dilated, over this share each way."""


@torch.no_grad()
def change_mask(
    base: BaseModel,
    denoiser: Denoiser,
    latents: Tensor,
    optimized: Conditioning,
    target: Conditioning,
    threshold: float,
    *,
    max_rows: int = 2 * DRAWS,
) -> Tensor:
    """The mask (1, H, W), fp32 on the CPU: 0 keeps the photo, 1 lets the place change.

    DiffEdit's mask (Couairon et al. 2022, arXiv 2210.11427, section 3.2): the places where the base's predictions for
    the noised picture differ between two texts. e_opt replaces DiffEdit's description of the photo.

    Args:
        base: the base, without adapters.
        denoiser: the predicting network.
        latents: the picture at eta 0 (C, H, W).
        optimized: conditioning with e_opt, one row.
        target: conditioning with e_tgt, one row.
        threshold: difference, as a share of its largest, at which the mask is 0.5; above 0.
        max_rows: most rows at once.

    **Memory**: `max_rows` rows, nothing for a backward pass.
    """
    schedule = denoiser.schedule
    positions = schedule.position(TIMESTEP).expand(DRAWS)
    noise = torch.randn((DRAWS, *latents.shape), generator=torch.Generator().manual_seed(0))
    noisy = schedule.noised(latents.expand_as(noise), noise, positions)
    both, differences = Conditioning.cat([optimized, target]), []
    draws = max(1, max_rows // 2)
    for x, at in zip(noisy.split(draws), positions.split(draws), strict=True):
        predicted = base.predict(denoiser, x.repeat(2, 1, 1, 1), at.repeat(2), both.repeat(len(x)))
        photo, sentence = predicted.float().cpu().chunk(2)
        differences.append(photo - sentence)
    difference = torch.cat(differences).square().mean((0, 1), keepdim=True).sqrt()
    reach = max(1, min(latents.shape[-2:]) // REACH)
    padded = F.pad(difference, [reach] * 4, mode="replicate")
    difference = F.avg_pool2d(padded, 2 * reach + 1, stride=1)
    # With equal embeddings all differences are 0, and the mask keeps the whole photo.
    share = difference / difference.quantile(TOP).clamp(min=1e-12)
    soft = min(SOFT, threshold)
    rising = ((share - threshold) / (2 * soft) + 0.5).clamp(0, 1)
    return F.max_pool2d(rising, 2 * reach + 1, stride=1, padding=reach)[0]
