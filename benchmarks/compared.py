"""The methods that are compared, by name: full fine-tuning, this package and what may be changed in it, the free ones.

Every variant of this package differs from the preset ``balanced`` in what its name says, and in nothing else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_imagic.config import preset

from .edit_methods import Method, ours
from .full_finetuning import full_finetune
from .training_free import ddim_inversion, sdedit, sentence_alone

FULL_EMBED_STEPS, FULL_STEPS, FULL_DRAWS = 60, 120, 8
"""Full fine-tuning: 480 + 960 passes, in the paper's proportion of 1000 steps to 1500, several draws a step."""
FULL_RATES = {"full-1e-5": 1e-5, "full-3e-5": 3e-5, "full-1e-4": 1e-4}
"""Rates of full fine-tuning that are tried."""
RETARGET_FROM = "a photo of an object"
"""The sentence that an edit is trained for before another is asked of it."""

_TRAINING: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "adapt-attn": {"finetune": {"adapt": "attn"}},
    "adapt-attn-ff": {"finetune": {"adapt": "attn+ff"}},
    "rank-2": {"finetune": {"lora_rank": 2, "lora_alpha": 2.0}},
    "rank-8": {"finetune": {"lora_rank": 8, "lora_alpha": 8.0}},
    "rank-16": {"finetune": {"lora_rank": 16, "lora_alpha": 16.0}},
    "rate-5e-4": {"finetune": {"learning_rate": 5e-4}},
    "rate-2e-3": {"finetune": {"learning_rate": 2e-3}},
    "rate-4e-3": {"finetune": {"learning_rate": 4e-3}},
    "embed-5": {"embed": {"steps": 5}},
    "embed-60": {"embed": {"steps": 60}},
    "embed-rate-3e-3": {"embed": {"learning_rate": 3e-3}},
    "embed-rate-3e-2": {"embed": {"learning_rate": 3e-2}},
    "finetune-20": {"finetune": {"steps": 20}},
    "finetune-120": {"finetune": {"steps": 120}},
    "joint": {"embed": {"steps": 0}, "finetune": {"steps": 85, "embedding_learning_rate": 1e-2}},
    "decoder-only": {"finetune": {"blocks": ("up",)}},
    "noisy-half": {"finetune": {"timesteps": (0.4, 1.0)}},
    "average": {"finetune": {"average": 0.9}},
    "decay": {"finetune": {"weight_decay": 30.0}},
    "keep-45": {"finetune": {"keep": 0.45}},
    "keep-20": {"finetune": {"keep": 0.2}},
}
_SAMPLING: dict[str, Mapping[str, Any]] = {
    "start-noise": {"start": "noise"},
    "start-photo": {"start": "photo"},
    "embedding-only": {"strength": 0.0},
    "strength-80": {"strength": 0.8},
    "strength-60": {"strength": 0.6},
    "encoder-50": {"strength": (0.5, 1.0, 1.0)},
    "decoder-50": {"strength": (1.0, 1.0, 0.5)},
    "projection": {"interpolation": "projection"},
    "guidance-2": {"guidance_scale": 2.0},
    "guidance-5": {"guidance_scale": 5.0},
}


def compared(folder: Path | None = None) -> dict[str, Method]:
    """All methods by name.

    Args:
        folder: keeps what training makes: methods that differ in sampling alone share it, and a stopped run goes on.
            To be emptied when the code that trains changes.
    """
    balanced = preset("balanced")
    full = {
        name: full_finetune(
            rate, embed_steps=FULL_EMBED_STEPS, steps=FULL_STEPS, draws=FULL_DRAWS, config=balanced, folder=folder
        )
        for name, rate in FULL_RATES.items()
    }
    variants = {**_TRAINING, **{name: {"sample": values} for name, values in _SAMPLING.items()}}
    return {
        **full,
        "balanced": ours(balanced, edits=folder),
        "fast": ours(preset("fast"), edits=folder),
        **{name: ours(preset("balanced", values), edits=folder) for name, values in variants.items()},
        "retarget": ours(balanced, edits=folder, retarget_from=RETARGET_FROM),
        "sdedit": sdedit(balanced.sample),
        "ddim-inversion": ddim_inversion(balanced.sample),
        "sentence-alone": sentence_alone(balanced.sample),
    }
