"""Whether an edit looks under- or over-fitted, in plain words with the setting to change.

An under-fitted edit does not give the photo back at eta 0; an over-fitted one gives it back whatever the sentence
says (the failure reported of adapters in place of full fine-tuning). Both show in the pictures themselves.

Neither is said where the base by itself would not give its own picture back: no setting of the training mends that. It
is told by three measurements that cost no pass through the UNet: what the scheduler makes of right predictions
(`families.rehearsal`), the photo through the autoencoder, and the loss that stage 1 ended with.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

UNDERFIT_DB = 20.0
"""A reconstruction (eta 0) further from the photo's round trip through the autoencoder than this has lost the photo."""
OVERFIT_DB = 38.0
"""Pictures at eta 0 and at the largest eta closer to each other than this are the same picture. A mask leaves the rest
of a picture alone: of the bundled world's renders a matt and a shiny object are up to 37 dB apart."""

SCHEDULER_ERROR = 0.2
"""A scheduler that ends further from a picture than this when every prediction is right (`Fit.scheduler_error`) does
not belong to its base. Those of diffusers that do end at 0.075 or less; one that clips latents at 0.37."""
ROUND_TRIP_DB = 15.0
"""A photo that the autoencoder alone gives back at less than this cannot be recognised."""
UNTRAINED_LOSS = 1.0
"""Denoising loss of a network that predicts nothing at all."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Signs in the pictures of an edit of how well it was trained."""

    reconstruction_db: float | None
    """PSNR of the picture at eta 0 to the photo's round trip; None where eta 0 was not rendered."""
    change_db: float | None
    """PSNR between the pictures at eta 0 and at the largest eta of 1 or more; None where they were not rendered."""
    embedding_distance: float
    """``|e_opt - e_tgt| / |e_tgt|``: how far stage 1 went."""
    scheduler_error: float = 0.0
    """How far from a picture the scheduler ends when every prediction is right, as a share of the picture's size."""
    round_trip_db: float | None = None
    """PSNR of the photo's round trip through the autoencoder to the photo."""
    embed_loss: float | None = None
    """Loss that stage 1 ended with, which trains nothing of the model; None where it took no steps."""

    @property
    def fault_of_base(self) -> str:
        """Why the base by itself does not give its own picture back, "" where it does."""
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
        """A hint at the setting to change, "" where nothing looks wrong."""
        if fault := self.fault_of_base:
            return fault
        if self.reconstruction_db is not None and self.reconstruction_db < UNDERFIT_DB:
            return (
                f"this edit looks under-fitted: at eta 0 it is {self.reconstruction_db:.0f} dB from the photo "
                f"({UNDERFIT_DB:.0f} and more is usual); try a higher `steps_finetune` or `rank`, or `adapt=all`"
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
        values = {name: None if value is None else round(min(value, 99.0), 3) for name, value in asdict(self).items()}
        return {**values, "hint": self.hint}


def embedding_distance(optimized: Sequence[Tensor], target: Sequence[Tensor]) -> float:
    """``|e_opt - e_tgt| / |e_tgt|`` of the tensors that embeddings consist of, all of them together."""
    e_opt, e_tgt = (torch.cat([part.float().flatten() for part in parts]) for parts in (optimized, target))
    return float((e_opt - e_tgt).norm() / e_tgt.norm())
