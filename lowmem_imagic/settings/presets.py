"""Named settings: ``balanced`` and ``fast`` from measurements (docs/quality.md), ``paper`` from the paper."""

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
    # Chosen on the bundled world's validation scenes; docs/quality.md has the measurements.
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
LARGE: dict[str, dict[str, Any]] = {
    "balanced": {"adapt": "attn+ff", "lora_rank": 8, "lora_alpha": 8.0, "keep": 0.216},
    "fast": {"adapt": "attn+ff"},
}
"""Changes of a preset's stage 2 for large networks: rank 16 on all layers of SDXL takes 0.79 GB in training, more than
a checkpointed row of 1024 px, and a file of 98 MB. Training programs for such networks adapt linear layers alone."""


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
    chosen = changes.get("finetune", {})
    large = {key: (base["finetune"][key], v) for key, v in LARGE.get(name, {}).items() if key not in chosen}
    return replace(build(lambda stage: top.get(stage, {}), top), large=large)
