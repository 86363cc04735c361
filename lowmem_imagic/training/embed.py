"""Stage 1: the text embedding is optimised until it describes the photo (Imagic, arXiv 2210.09276, section 3.2).

Minimises the denoising loss (paper eq. 2)

    ``L(x, e, theta) = E_{t, epsilon} || epsilon - f_theta(x_t, t, e) ||^2``

over the embedding ``e`` alone; the network ``theta`` is frozen. The embedding starts at e_tgt, the target sentence's,
and ends as e_opt. Few steps keep it close to e_tgt, so that the path between the two remains meaningful. An edit with
several sentences, or none, starts at the embedding of a sentence that describes the photo (`sampling.description`).
"""

from ..families.family import Denoiser
from ..settings.stages import EditConfig
from .stage import Slot, Stage


def stage(config: EditConfig, denoiser: Denoiser) -> Stage:
    """Stage 1 with these settings and a denoiser."""
    return Stage(
        name="embed",
        denoiser=denoiser,
        trains="text",
        config=config.embed,
        start=from_sentence,
        end=as_stored,
        cheaper="`checkpointing`, or fewer draws a step",
    )


def from_sentence(slot: Slot) -> None:
    """Starts from the start sentence."""
    for name, part in slot.text.items():
        part.copy_(slot.target[name][0])


def as_stored(slot: Slot) -> None:
    """Rounds e_opt as the edit file stores it, so that an edit and its file give the same pictures."""
    for name, part in slot.text.items():
        if (dtype := slot.parts[name].stored) is not None:
            rows = slot.target.stored(part, slot.parts[name])
            rows.copy_(rows.to(dtype))
