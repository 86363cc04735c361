"""Hints whether an edit is under- or over-fitted, with the setting to change.

An under-fitted edit does not reproduce the photo at eta 0. An over-fitted edit reproduces it for any sentence, which is
reported of adapters in place of full fine-tuning. The rendered pictures show both.

If the base itself cannot reproduce a picture, the hint says that instead: no setting of the training helps then. Three
measurements tell, without a pass through the UNet: the scheduler's result for exact predictions (`families.rehearsal`),
the photo's round trip through the autoencoder, and the final loss of stage 1.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

UNDERFIT_DB = 20.0
"""Least PSNR between the picture at eta 0 and the photo's round trip; below it, the edit has lost the photo."""
OVERFIT_DB = 38.0
"""Most PSNR between the pictures at eta 0 and at the largest eta; above it, they are the same picture.

A mask keeps the rest of a picture: renders of the bundled world with a matt and with a shiny object reach 37 dB."""

SCHEDULER_ERROR = 0.2
"""Largest `Fit.scheduler_error` of a scheduler that fits its base.

Fitting schedulers of diffusers have 0.075 or less; one that clips latents has 0.37."""
ROUND_TRIP_DB = 15.0
"""Least PSNR of the photo's round trip through the autoencoder; below it, the photo cannot be recognised."""
UNTRAINED_LOSS = 1.0
"""Denoising loss of a network that always predicts zero."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Signs in the pictures of an edit of how well it was trained."""

    reconstruction_db: float | None
    """PSNR of the picture at eta 0 to the photo's round trip; None if eta 0 was not rendered."""
    change_db: float | None
    """PSNR between the pictures at eta 0 and at the largest eta of 1 or more; None if they were not rendered."""
    embedding_distance: float
    """``|e_opt - e_start| / |e_start|``, from the start sentence's embedding: the change by stage 1."""
    scheduler_error: float = 0.0
    """Distance of the scheduler's result from the picture if all predictions are exact, as a share of its norm."""
    round_trip_db: float | None = None
    """PSNR of the photo's round trip through the autoencoder to the photo."""
    embed_loss: float | None = None
    """Final loss of stage 1, which trains no weights of the model; None if it took no steps."""
    adapt: str = ""
    """The layers with an adapter, see `FinetuneConfig.adapt`; "" if they are not known."""

    @property
    def fault_of_base(self) -> str:
        """The reason why the base itself cannot reproduce a picture; "" if it can."""
        if self.scheduler_error > SCHEDULER_ERROR:
            return (
                f"the scheduler does not fit this base: even with right predictions it ends {self.scheduler_error:.0%} "
                "away from the picture (less than 8% is usual); another `scheduler` or `model` may do better, more "
                "training does not"
            )
        if self.round_trip_db is not None and self.round_trip_db < ROUND_TRIP_DB:
            return (
                f"the autoencoder of this base alone gives the photo back at only {self.round_trip_db:.0f} dB "
                f"({ROUND_TRIP_DB:.0f} and more is usual); the base is damaged or not made for such photos, and "
                "training does not change that"
            )
        if self.embed_loss is not None and self.embed_loss >= UNTRAINED_LOSS:
            return (
                f"the UNet of this base predicts no better than nothing would (loss {self.embed_loss:.2f}, less than 1 "
                "is usual); its weights or its prediction type are not what its configuration says"
            )
        return ""

    @property
    def hint(self) -> str:
        """A hint with the setting to change; "" if nothing looks wrong."""
        if fault := self.fault_of_base:
            return fault
        if self.reconstruction_db is not None and self.reconstruction_db < UNDERFIT_DB:
            layers = "" if self.adapt == "all" else ", `adapt=all`"
            return (
                f"this edit looks under-fitted: at eta 0 it is {self.reconstruction_db:.0f} dB from the photo "
                f"({UNDERFIT_DB:.0f} and more is usual); try a higher `steps_finetune` or `rank`{layers}, or another "
                "`seed`"
            )
        if self.change_db is not None and self.change_db > OVERFIT_DB:
            return (
                f"this edit looks over-fitted: eta changes next to nothing ({self.change_db:.0f} dB between its ends); "
                "try a lower `steps_finetune` or `learning_rate`, or render with a lower `mask` or `strength=0.7`"
            )
        return ""

    def as_json(self) -> dict[str, Any]:
        """Plain values for the report."""
        # JSON has no infinity, which is the PSNR of equal pictures.
        values = {
            name: round(min(value, 99.0), 3) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }
        return {**values, "hint": self.hint}


def embedding_distance(optimized: Sequence[Tensor], start: Sequence[Tensor]) -> float:
    """``|e_opt - e_start| / |e_start|`` over all tensors of the embeddings."""
    e_opt, e_start = (torch.cat([part.float().flatten() for part in parts]) for parts in (optimized, start))
    return float((e_opt - e_start).norm() / e_start.norm())
