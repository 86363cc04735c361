"""The photo's own noise: what sampling would have had to start from for the base to come to the photo by itself."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..engine.base import BaseModel

STEPS = 30
"""Steps backwards through the noise schedule."""
SOFTENING = 0.05
"""Noise on the photo before it is inverted. Latents have flat parts of which a base is all too sure; inverted as they
are, they give noise that is not white (standard deviation 0.79 on the bundled model, 0.97 with this), and pictures
that start from it are blurred."""


@torch.no_grad()
def own_noise(
    base: BaseModel,
    latents: Tensor,
    generator: torch.Generator,
    progress: Callable[[int, int, str], None] | None = None,
) -> Tensor:
    """The noise (C, H, W), fp32 on the CPU, that the base makes of a photo: about standard normal.

    DDIM inversion (Song et al. 2021, arXiv 2010.02502, section 4.3) without text: the denoising steps backwards, each
    with the prediction at the cleaner end. A picture that starts from this noise keeps more of the photo's layout than
    one from a seed's.

    Args:
        base: the base, without adapters.
        latents: the photo (C, H, W).
        generator: draws the softening noise.
        progress: called after every step.

    Raises:
        NonFiniteModelError: the UNet or the noise schedule gives NaN or infinity, or more than an edit file can hold.

    **Memory**: one UNet row, nothing for a backward pass.
    """
    scheduler = base.family.inverse_scheduler()
    scheduler.set_timesteps(STEPS)
    empty = base.encode_text([""])
    # One photo at a time: the last bits of its noise do not depend on the others of a pack.
    x = latents[None] + SOFTENING * torch.randn(latents[None].shape, generator=generator)
    now = torch.zeros(1, dtype=torch.long)
    for step, timestep in enumerate(scheduler.timesteps, start=1):
        prediction = base.predict(x, now, empty).float().cpu()
        if not prediction.isfinite().all():
            raise base.damaged("the UNet")
        x = scheduler.step(prediction, timestep, x).prev_sample
        now = timestep.view(1)
        if progress is not None:
            progress(step, STEPS, "")
    a = base.alpha_bar[now].view(-1, 1, 1, 1)
    own: Tensor = ((x - a.sqrt() * latents) / (1 - a).sqrt())[0]
    if not own.half().isfinite().all():
        raise base.damaged("the noise schedule")
    return own
