"""The compared methods by name: full fine-tuning, this package and its variants, methods without training.

A variant of this package differs from the preset ``balanced`` in the settings beside its name.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem_imagic.settings.presets import SMALL_KEEP, preset
from lowmem_imagic.settings.stages import SampleConfig

from .edit_methods import Method, ours, packed
from .full_finetuning import full_finetune
from .levers import LEVERS, UNLIMITED
from .training_free import ddim_inversion, sdedit, semantic_guidance, sentence_alone

FULL_EMBED_STEPS, FULL_STEPS, FULL_DRAWS = 60, 120, 8
"""Full fine-tuning: 480 + 960 passes, in the paper's proportion of 1000 steps to 1500, several draws a step."""
FULL_RATES = {"full-1e-5": 1e-5, "full-3e-5": 3e-5, "full-1e-4": 1e-4, "full-3e-4": 3e-4}
"""Learning rates of full fine-tuning to compare."""
FULL_SAMPLED_ALIKE = "full-1e-4-sampled-alike"
"""Full fine-tuning with the sampling of ``balanced``, to separate the effects of training and sampling."""
FP32 = (*FULL_RATES, FULL_SAMPLED_ALIKE, "balanced-fp32")
"""Methods with an fp32 base; all others have an int8 base."""
RETARGET_FROM = "a photo of an object"
"""The training sentence of `retarget`, which renders under another sentence."""

_PAPER: dict[str, Any] = {"start": "noise", "guidance_scale": 3.0, "photo_guidance": None, "mask": 0.0}
"""The paper's sampling, except for numbers such as steps."""
_TRAINING: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "adapt-attn": {"finetune": {"adapt": "attn", "keep": 1.0}},
    "adapt-attn-ff": {"finetune": {"adapt": "attn+ff", "keep": 1.0}},
    "rank-4": {"finetune": {"lora_rank": 4, "lora_alpha": 4.0, "learning_rate": 2e-3, "keep": 1.0}},
    "rank-4-truncated": {"finetune": {"lora_rank": 4, "lora_alpha": 4.0, "learning_rate": 2e-3, "keep": 0.45}},
    "rank-32": {"finetune": {"lora_rank": 32, "lora_alpha": 32.0, "learning_rate": 7e-4, "keep": 0.054}},
    "rate-5e-4": {"finetune": {"learning_rate": 5e-4}},
    "rate-2e-3": {"finetune": {"learning_rate": 2e-3}},
    "rate-constant": {"finetune": {"final_rate": 1.0}},
    "draws-8": {"embed": {"steps": 15, "draws": 8}, "finetune": {"steps": 30, "draws": 8}},
    "seed-noise": {"sample": {"start": "photo"}},
    "seed-noise-mask-off": {"sample": {"start": "photo", "mask": 0.0}},
    "any-noise": {"embed": {"anchor": 0.0}, "finetune": {"anchor": 0.0}},
    "any-noise-embed": {"embed": {"anchor": 0.0}},
    "all-timesteps": {"embed": {"timesteps": (0.0, 1.0)}, "finetune": {"timesteps": (0.0, 1.0)}},
    "embed-20": {"embed": {"steps": 20}, "finetune": {"steps": 160}},
    "embed-100": {"embed": {"steps": 100}, "finetune": {"steps": 80}},
    "finetune-240": {"finetune": {"steps": 240}},
    "embedding-only": {"finetune": {"steps": 0}},
    "decoder-only": {"finetune": {"blocks": ("up",)}},
    "keep-all": {"finetune": {"keep": 1.0}},
    "small": {"finetune": {"keep": SMALL_KEEP}},
    # The longest edit files that the bundled model may have, 600 kB.
    "keep-24": {"finetune": {"keep": 0.24}},
    "keep-24-guidance-3": {"finetune": {"keep": 0.24}, "sample": {"guidance_scale": 3.0}},
    "lora-as-published": {
        "embed": {"steps": 25, "draws": 8, "anchor": 0.0, "timesteps": (0.0, 1.0)},
        "finetune": {
            "steps": 60,
            "draws": 8,
            "learning_rate": 1e-3,
            "lora_rank": 4,
            "lora_alpha": 4.0,
            "keep": 1.0,
            "final_rate": 1.0,
            "anchor": 0.0,
            "timesteps": (0.0, 1.0),
        },
        "sample": _PAPER,
    },
}
"""``lora-as-published``: LoRA in place of full fine-tuning and nothing else, 200 + 480 passes."""
_SAMPLING: dict[str, Mapping[str, Any]] = {
    "mask-off": {"mask": 0.0},
    "guidance-even": {"photo_guidance": None},
    "paper-sampling": _PAPER,
    "strength-80": {"strength": 0.8},
    "strength-120": {"strength": 1.2},
    "encoder-50": {"strength": (0.5, 1.0, 1.0)},
    "decoder-50": {"strength": (1.0, 1.0, 0.5)},
    "projection": {"interpolation": "projection"},
    "guidance-2": {"guidance_scale": 2.0},
    "guidance-3": {"guidance_scale": 3.0},
    "guidance-4": {"guidance_scale": 4.0},
    "guidance-8": {"guidance_scale": 8.0},
}
_SOURCED: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "source-keep-all": {"finetune": {"keep": 1.0}},
    "source-scale-1.5": {"sample": {"edit_guidance_scale": 1.5}},
    "source-scale-6": {"sample": {"edit_guidance_scale": 6.0}},
}


def compared(folder: Path | None = None) -> dict[str, Method]:
    """All methods by name.

    Args:
        folder: folder of trained edits: methods that differ only in sampling share them, and a stopped run can
            continue. Empty it when the training code changes.
    """
    balanced = preset("balanced")
    small = replace(balanced, groups={})
    plain = SampleConfig(num_inference_steps=balanced.sample.num_inference_steps, start="photo")
    ways = {**{name: (rate, plain) for name, rate in FULL_RATES.items()}, FULL_SAMPLED_ALIKE: (1e-4, balanced.sample)}
    full = {
        name: full_finetune(
            rate, embed_steps=FULL_EMBED_STEPS, steps=FULL_STEPS, draws=FULL_DRAWS, sampling=sampling, folder=folder
        )
        for name, (rate, sampling) in ways.items()
    }
    variants = {**_TRAINING, **{name: {"sample": values} for name, values in _SAMPLING.items()}}
    return {
        **full,
        "balanced": ours(balanced, edits=folder),
        "balanced-fp32": ours(balanced, edits=folder),
        "balanced-packed": packed(balanced, slots=4, together=16),
        "fast": ours(preset("fast"), edits=folder),
        **{name: ours(preset("balanced", values), edits=folder) for name, values in variants.items()},
        # On the small models of other families (`benchmarks.cascade_world`, `benchmarks.flow_world`), with the settings
        # for the bundled model: those for the real models of these families would change a small one too little.
        "cascade": ours(small, edits=folder),
        "cascade-first-adapter": ours(small, edits=folder, without="unet_2"),
        "flow": ours(replace(small, sample=replace(small.sample, scheduler="FireFlow")), edits=folder),
        "in-full": ours(balanced, edits=folder, in_full=True),
        "retarget": ours(balanced, edits=folder, retarget_from=RETARGET_FROM),
        "once": ours(balanced, edits=folder, asked_later=True),
        "source": ours(balanced, edits=folder, sourced=True),
        **{lever.name: ours(balanced, edits=folder, lever=lever) for lever in LEVERS},
        UNLIMITED.name: ours(
            preset("balanced", {"sample": {"edit_guidance_scale": 2.0}}), edits=folder, lever=UNLIMITED
        ),
        "source-once": ours(balanced, edits=folder, sourced=True, asked_later=True),
        "source-described": ours(balanced, edits=folder, describes=True),
        "source-in-full": ours(balanced, edits=folder, sourced=True, in_full=True),
        **{name: ours(preset("balanced", values), edits=folder, sourced=True) for name, values in _SOURCED.items()},
        "sdedit": sdedit(plain),
        "ddim-inversion": ddim_inversion(plain),
        "semantic-guidance": semantic_guidance(plain),
        "sentence-alone": sentence_alone(plain),
    }
