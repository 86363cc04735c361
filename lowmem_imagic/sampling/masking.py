"""Where a picture is to change, as the base itself judges it: what its sentence says otherwise than the photo."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.base import BaseModel
from ..families.conditioning import Conditioning
from ..families.family import Denoiser

DRAWS = 12
"""Noise draws that the difference is averaged over."""
TIMESTEP = 0.7
"""Share of the noise schedule at which the base is asked; 0 is the clean end. There objects are decided, not their
texture."""
TOP = 0.98
"""Quantile of the difference that counts as 1, so that one cell does not set the scale."""
SOFT = 0.15
"""The mask rises from 0 to 1 between this much below the threshold and this much above it."""
REACH = 16
"""Parts of the picture's side: the difference is averaged, and the mask grown, over one each way."""


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
    """How far each place of the picture is the sentence's to change, (1, H, W) from 0 to 1, fp32 on the CPU.

    DiffEdit's mask (Couairon et al. 2022, arXiv 2210.11427, section 3.2): the base's predictions for the noised picture
    under two texts, where they differ. In place of a sentence that describes the photo stands e_opt.

    Args:
        base: the base, without adapters.
        denoiser: the network that is asked.
        latents: the picture at eta 0 (C, H, W).
        optimized: e_opt and the rest of what the denoiser takes, one row.
        target: e_tgt, likewise.
        threshold: difference, as a share of its largest, at which a place is half the sentence's; above 0.
        max_rows: rows at once, at most.

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
    # Equal embeddings differ nowhere, and nothing is to change.
    share = difference / difference.quantile(TOP).clamp(min=1e-12)
    soft = min(SOFT, threshold)
    rising = ((share - threshold) / (2 * soft) + 0.5).clamp(0, 1)
    return F.max_pool2d(rising, 2 * reach + 1, stride=1, padding=reach)[0]
