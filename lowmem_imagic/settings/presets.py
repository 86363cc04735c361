"""Named settings: ``balanced`` and ``fast`` from measurements (docs/scene_edits_1.md), ``paper`` from the paper."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import ConfigError
from .stages import EditConfig, build

SMALL_KEEP = 0.046
"""Share of the adapter's bytes that the smallest edit files keep (option `small`)."""

_ANCHORED_EMBED: dict[str, Any] = {"draws": 2, "anchor": 0.5, "timesteps": (0.2, 1.0)}
_ANCHORED_FINETUNE: dict[str, Any] = {
    "draws": 2,
    "anchor": 0.5,
    "timesteps": (0.3, 1.0),
    "final_rate": 0.0,
    "adapt": "all",
}
_SAMPLING: dict[str, Any] = {
    "etas": (0.0, 0.6, 0.8, 1.0, 1.2),
    "start": "inverted",
    "mask": 0.6,
    "guidance_scale": 6.0,
    "photo_guidance": 1.0,
}

_VALUES: dict[str, dict[str, dict[str, Any]]] = {
    # Chosen on the bundled world's validation scenes; docs/scene_edits_1.md has the measurements.
    "balanced": {
        "embed": {"steps": 60, "learning_rate": 1e-2, **_ANCHORED_EMBED},
        # Trained at a comfortable rank, stored in about the bytes of rank 2.
        "finetune": {
            "steps": 120,
            "learning_rate": 1e-3,
            "lora_rank": 16,
            "lora_alpha": 16.0,
            "keep": 0.108,
            **_ANCHORED_FINETUNE,
        },
        "sample": _SAMPLING,
    },
    "fast": {
        "embed": {"steps": 24, "learning_rate": 1e-2, **_ANCHORED_EMBED},
        # A higher rank gains nothing in so few steps.
        "finetune": {
            "steps": 48,
            "learning_rate": 3e-3,
            "lora_rank": 4,
            "lora_alpha": 4.0,
            "keep": 0.43,
            **_ANCHORED_FINETUNE,
        },
        "sample": {"num_inference_steps": 20, **_SAMPLING},
    },
    # Section 3.3, "Stable Diffusion": 1000 steps at 2e-3, then 1500 steps, one draw each. The paper's 5e-7
    # moves all weights; an adapter of rank 16 needs a rate of the order other one-image adapters use.
    "paper": {
        "embed": {"steps": 1000, "learning_rate": 2e-3, "draws": 1},
        "finetune": {
            "steps": 1500,
            "learning_rate": 1e-4,
            "draws": 1,
            "adapt": "all",
            "lora_rank": 16,
            "lora_alpha": 16.0,
        },
        "sample": {
            "etas": (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
            "num_inference_steps": 50,
            "guidance_scale": 7.5,
        },
    },
}

PRESETS = tuple(_VALUES)
# Rank 16 on all layers of SDXL takes 0.79 GB in training, more than a checkpointed row of 1024 px, and a file of 98 MB.
# Training programs for such networks adapt linear layers alone.
_LARGE: dict[str, dict[str, dict[str, Any]]] = {
    "balanced": {"finetune": {"adapt": "attn+ff", "lora_rank": 8, "lora_alpha": 8.0, "keep": 0.216}},
    "fast": {"finetune": {"adapt": "attn+ff"}},
}
# Not yet measured on real weights. Stage 2: the rates of the reference trainers of FLUX.2 klein and Z-Image (diffusers
# and ai-toolkit 1e-4, OneTrainer 3e-4). Stage 1: a tenth of the usual rate, a guess, as no trainer optimises the states
# of a language model. Guidance: that of the published pipeline. FireFlow brings a photo back from its own noise with a
# tenth of Euler's error in as many passes. What "paper" does not name here is its schedule for Stable Diffusion.
_FLOW: dict[str, dict[str, dict[str, Any]]] = {
    "balanced": {
        "embed": {"learning_rate": 1e-3},
        "finetune": {"learning_rate": 1e-4, "adapt": "attn+ff"},
        "sample": {"scheduler": "FireFlow", "guidance_scale": 4.0},
    },
    "fast": {
        "embed": {"learning_rate": 1e-3},
        "finetune": {"learning_rate": 3e-4, "adapt": "attn+ff"},
        "sample": {"scheduler": "FireFlow", "guidance_scale": 4.0},
    },
    "paper": {"sample": {"scheduler": "Euler", "guidance_scale": 4.0}},
}
# Not yet measured on real weights. Stage 1: the paper's rate for Imagen, which reads the same text encoder as DeepFloyd
# IF (section 3.3). Stage 2: the layers of diffusers' trainer for DeepFloyd IF, and the sum of its rates over its steps
# (5e-6 in 1200). Guidance: that of the published pipelines.
_CASCADE: dict[str, dict[str, dict[str, Any]]] = {
    "balanced": {
        "embed": {"learning_rate": 1e-3},
        "finetune": {"learning_rate": 1e-4, "adapt": "attn"},
        "sample": {"guidance_scale": 7.0},
    },
    "fast": {
        "embed": {"learning_rate": 2e-3},
        "finetune": {"learning_rate": 3e-4, "adapt": "attn"},
        "sample": {"guidance_scale": 7.0},
    },
    "paper": {"embed": {"steps": 100, "learning_rate": 1e-3}, "sample": {"guidance_scale": 7.0}},
}
GROUPS: dict[str, dict[str, dict[str, dict[str, Any]]]] = {"large": _LARGE, "flow": _FLOW, "cascade": _CASCADE}
"""Changes of presets for groups of networks (see `families.family.Family.group`): by group, preset and stage."""


def preset(name: str = "balanced", overrides: Mapping[str, Mapping[str, Any]] | None = None) -> EditConfig:
    """The settings of a preset, with `overrides` as ``{"embed": {"steps": 10}, "": {"seed": 1}}`` on top.

    Args:
        name: one of `PRESETS`.
        overrides: fields of `EmbedConfig`, `FinetuneConfig` and `SampleConfig` under ``embed``, ``finetune`` and
            ``sample``, and of `EditConfig` under "".

    Raises:
        ConfigError: unknown preset, unknown names, values out of range; all problems at once.
    """
    if name not in _VALUES:
        raise ConfigError(f"`preset` is {name!r}, expected one of {', '.join(PRESETS)}")
    changes, base = overrides or {}, _VALUES[name]
    stages = {stage: {**base.get(stage, {}), **changes.get(stage, {})} for stage in {**base, **changes} if stage}
    top = {**stages, **changes.get("", {})}
    config = build(lambda stage: top.get(stage, {}), top)
    groups = {
        group: {
            f"{stage}.{key}": (getattr(getattr(config, stage), key), value)
            for stage, values in presets.get(name, {}).items()
            for key, value in values.items()
            if key not in changes.get(stage, {})
        }
        for group, presets in GROUPS.items()
    }
    return replace(config, groups=groups)
