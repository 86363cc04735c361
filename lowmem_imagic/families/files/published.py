"""Published configurations of well-known models, for planning before a download.

Source: ``config.json`` of each part of the repositories in `source.SHORT_NAMES`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import IncompleteModelError
from .source import SHORT_NAMES, Folder

_SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""The UNet of Stable Diffusion 1.4 and 1.5: 859,520,964 weights."""
_SD2_UNET = {
    **SD15_UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
_OPENCLIP_H = {
    **_CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}


def _parts(unet: dict[str, Any], text_encoder: dict[str, Any], **scheduler: Any) -> dict[str, dict[str, Any]]:
    pipeline = {"_class_name": "StableDiffusionPipeline"}
    return {
        ".": pipeline,
        "unet": unet,
        "vae": _VAE,
        "text_encoder": text_encoder,
        "scheduler": {**_SCHEDULER, **scheduler},
    }


_SD1 = _parts(SD15_UNET, _CLIP_L)
PUBLISHED = {
    "sd14": _SD1,
    "sd15": _SD1,
    "sd21-base": _parts(_SD2_UNET, _OPENCLIP_H),
    "sd21": _parts({**_SD2_UNET, "sample_size": 96}, _OPENCLIP_H, prediction_type="v_prediction"),
}
"""Configurations of the parts, by short name."""


@dataclass(frozen=True)
class Published(Folder):
    """A well-known model's configurations, without weights and vocabulary."""

    @staticmethod
    def of(name: str) -> "Published":
        """The configurations of the model with this short name."""
        return Published(Path(name), SHORT_NAMES[name])

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        """A component's configuration.

        Raises:
            IncompleteModelError: this configuration is not included, as planning does not need it.
        """
        parts = PUBLISHED[self.path.name]
        if component not in parts:
            raise IncompleteModelError(f"{self.label}: {component}/{name} is not known without a download")
        return dict(parts[component])
