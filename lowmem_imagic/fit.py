"""Whether an edit looks under- or over-fitted, in plain words with the setting to change.

An under-fitted edit does not give the photo back at eta 0; an over-fitted one gives it back whatever the sentence
says (the failure reported of adapters in place of full fine-tuning). Both show in the pictures themselves.
"""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

UNDERFIT_DB = 20.0
"""A reconstruction (eta 0) further from the photo's round trip through the autoencoder than this has lost the photo."""
OVERFIT_DB = 38.0
"""Pictures at eta 0 and at the largest eta closer to each other than this are the same picture. A mask leaves the rest
of a picture alone: of the bundled world's renders a matt and a shiny object are up to 37 dB apart."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What the pictures of an edit say of its training."""

    reconstruction_db: float | None
    """PSNR of the picture at eta 0 to the photo's round trip; None where eta 0 was not rendered."""
    change_db: float | None
    """PSNR between the pictures at eta 0 and at the largest eta of 1 or more; None where they were not rendered."""
    embedding_distance: float
    """``|e_opt - e_tgt| / |e_tgt|``: how far stage 1 went."""

    @property
    def hint(self) -> str:
        """What to change, "" where nothing looks wrong."""
        if self.reconstruction_db is not None and self.reconstruction_db < UNDERFIT_DB:
            return (
                f"this edit looks under-fitted: at eta 0 it is {self.reconstruction_db:.0f} dB from the photo "
                f"({UNDERFIT_DB:.0f} and more is usual); try a higher --steps-finetune or --rank, or --adapt all"
            )
        if self.change_db is not None and self.change_db > OVERFIT_DB:
            return (
                f"this edit looks over-fitted: eta changes next to nothing ({self.change_db:.0f} dB between its ends); "
                "try a lower --steps-finetune or --learning-rate, or render with a lower --mask or --strength 0.7"
            )
        return ""

    def as_json(self) -> dict[str, Any]:
        """Plain values for the report."""
        # JSON has no infinity, which is the PSNR of equal pictures.
        values = {name: None if value is None else round(min(value, 99.0), 3) for name, value in asdict(self).items()}
        return {**values, "hint": self.hint}


def embedding_distance(optimized_embedding: Tensor, target_embedding: Tensor) -> float:
    """``|e_opt - e_tgt| / |e_tgt|`` of embeddings (T, D)."""
    return float((optimized_embedding.float() - target_embedding).norm() / target_embedding.norm())
