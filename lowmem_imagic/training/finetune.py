"""Stage 2: the model is tuned on the photo with e_opt fixed (Imagic, arXiv 2210.09276, section 3.2).

Minimises the same loss as stage 1 (paper eq. 2)

    ``L(x, e_opt, theta) = E_{t, epsilon} || epsilon - f_theta(x_t, t, e_opt) ||^2``

over the network. The paper trains all weights ``theta``; here ``theta`` is frozen, and low-rank adapters (LoRA, arXiv
2106.09685) train in its place: ``W + alpha / r * B A`` for each adapted layer. A is drawn and B is zero, so that
stage 2 starts from the unchanged network; it ends with the edit's adapter.
"""

from ..families.family import Denoiser
from ..settings.stages import EditConfig
from .stage import Slot, Stage, unchanged


def stage(config: EditConfig, denoiser: Denoiser, *, first: bool = True) -> Stage:
    """Stage 2 with these settings for one denoiser; each denoiser of a cascade has one, and `first` marks the first."""
    return Stage(
        name="finetune" if first else f"finetune_{denoiser.name}",
        denoiser=denoiser,
        trains="adapter",
        config=config.finetune,
        start=from_the_base,
        end=unchanged,
        cheaper="`checkpointing`, fewer draws a step, or `adapt=attn`",
    )


def from_the_base(slot: Slot) -> None:
    """Draws A and sets B to zero: the adapter changes nothing yet."""
    slot.adapters.initialize_edit(slot.number, slot.generator)
