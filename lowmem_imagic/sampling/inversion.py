"""The photo's own noise: what sampling would have had to start from for the base to come to the photo by itself."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.base import BaseModel
from ..families.conditioning import Conditioning
from ..families.family import Denoiser

STEPS = 30
"""Steps backwards through the noise schedule."""
SOFTENING = 0.05
"""Noise on the photo before it is inverted. Latents have flat parts of which a base is all too sure; inverted as they
are, they give noise that is not white (standard deviation 0.79 on the bundled model, 0.97 with this), and pictures
that start from it are blurred."""


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
    """The noise (C, H, W), fp32 on the CPU, that the base makes of a photo: about standard normal.

    The denoising steps backwards, each with the prediction at the cleaner end, and without text: for a discrete
    schedule DDIM inversion (Song et al. 2021, arXiv 2010.02502, section 4.3). A picture that starts from this noise
    keeps more of the photo's layout than one from a seed's.

    Args:
        base: the base, without adapters.
        denoiser: the network whose noise it is.
        latents: the photo (C, H, W).
        generator: draws the softening noise.
        progress: called after every step.
        extra: what the denoiser takes beside the text, one row.

    Raises:
        NonFiniteModelError: the denoiser or the noise schedule gives NaN or infinity, or more than an edit file can
            hold.

    **Memory**: one row, nothing for a backward pass.
    """
    schedule = denoiser.schedule
    inverter = schedule.inverter(STEPS, tuple(latents.shape))
    given = base.encode_text([""]) | (extra or {})
    # One photo at a time: the last bits of its noise do not depend on the others of a pack.
    x = latents[None] + SOFTENING * torch.randn(latents[None].shape, generator=generator)
    for step, at in enumerate(inverter.at):
        prediction = base.predict(denoiser, x, at.view(1), given).float().cpu()
        if not prediction.isfinite().all():
            raise base.damaged(f"the {denoiser.title}")
        x = inverter.stepped(prediction, step, x)
        if progress is not None:
            progress(step + 1, STEPS, "")
    own = schedule.noise_in(x, latents[None], inverter.end.view(1))[0]
    if not own.half().isfinite().all():
        raise base.damaged("the noise schedule")
    return own
