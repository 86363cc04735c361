"""The photo's own noise: the starting noise from which the base alone would sample the photo."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.base import BaseModel
from ..families.conditioning import Conditioning
from ..families.family import Denoiser

STEPS = 30
"""Steps backwards through the noise schedule."""
SOFTENING = 0.05
"""Noise added to the photo before inversion. The base predicts flat parts of latents too exactly: without this noise,
inversion gives noise that is not white (standard deviation 0.79 on the bundled model, 0.97 with it), and pictures that
start from it are blurred."""


@torch.no_grad()
def own_noise(
    base: BaseModel,
    denoiser: Denoiser,
    latents: Tensor,
    generator: torch.Generator,
    progress: Callable[[int, int, str], None] | None = None,
    *,
    extra: Conditioning | None = None,
) -> Tensor:
    """The noise (C, H, W), fp32 on the CPU, to which the base inverts a photo: about standard normal.

    Runs the denoising steps backwards, each with the prediction at the cleaner end, and without text: for a discrete
    schedule DDIM inversion (Song et al. 2021, arXiv 2010.02502, section 4.3). A picture that starts from this noise
    keeps more of the photo's layout than one from a seed's noise.

    Args:
        base: the base, without adapters.
        denoiser: the network to invert with.
        latents: the photo (C, H, W).
        generator: draws the softening noise.
        progress: called after every step.
        extra: the conditioning beside the text, one row.

    Raises:
        NonFiniteModelError: the denoiser or the noise schedule gives NaN, infinity, or a number too large for an edit
            file.

    **Memory**: one row, nothing for a backward pass.
    """
    schedule = denoiser.schedule
    inverter = schedule.inverter(STEPS, tuple(latents.shape))
    conditioning = base.encode_text([""]) | (extra or {})
    # One photo at a time: the last bits of its noise must not depend on other photos.
    x = latents[None] + SOFTENING * torch.randn(latents[None].shape, generator=generator)
    for step, at in enumerate(inverter.at):
        prediction = base.predict(denoiser, inverter.scaled(x, step), at.view(1), conditioning).float().cpu()
        if not prediction.isfinite().all():
            raise base.damaged(f"the {denoiser.title}")
        x = inverter.stepped(prediction, step, x)
        if progress is not None:
            progress(step + 1, STEPS, "")
    own = schedule.noise_in(x, latents[None], inverter.end.view(1))[0]
    if not own.half().isfinite().all():
        raise base.damaged("the noise schedule")
    return own
