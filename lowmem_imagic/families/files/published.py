"""Published configurations of well-known models, and CLIP's vocabulary: for plans, and for single files.

Source: ``config.json`` of each part of the repositories in `source.SHORT_NAMES`. Stable Diffusion's models have one
vocabulary, which OpenAI published with CLIP (MIT licence, in the folder ``clip``); only their padding differs. The
package has its merges, from which the numbered words follow. Of other models it has no vocabulary: plans need none.
"""

import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import IncompleteModelError
from .components import TOKENIZERS
from .reading import read_json
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
_XL_VAE = {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
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
SDXL_UNET: dict[str, Any] = {
    **SD15_UNET,
    "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""The UNet of Stable Diffusion XL: 2,567,463,684 weights."""
_SSD_1B_UNET = {
    **SDXL_UNET,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
_VEGA_UNET = {
    **_SSD_1B_UNET,
    "transformer_layers_per_block": [1, [1, 1], [2, 2]],
    "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
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
_OPENCLIP_G = {
    **_CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
KLEIN_TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "rope_theta": 2000,
    "guidance_embeds": False,
}
"""The transformer of FLUX.2 klein 4B, base and distilled: 3,875,544,576 weights."""
_KLEIN_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 32,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "batch_norm_eps": 1e-4,
    "patch_size": [2, 2],
}
_QWEN3_4B: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "rope_theta": 1_000_000,
}
_CLIP = Path(__file__).parent / "clip"
"""The folder with the merges and the settings of CLIP's tokenizer."""
_PADDED_BY_ZERO = {"pad_token": "!"}
"""Settings of the tokenizers of OpenCLIP's text encoders: they pad with the token 0."""


@functools.cache
def _tokenizer_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder with CLIP's tokenizer as transformers reads it, which lasts as long as the process.

    The words have the numbers of OpenAI's ``SimpleTokenizer``: the printable characters of Latin-1, stand-ins for the
    other bytes, both once more at the end of a word, the merges in their order, and the two marks.
    """
    folder = tempfile.TemporaryDirectory(prefix="lowmem-imagic-clip-")
    for name in ("LICENSE", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(_CLIP / name, Path(folder.name, name))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(number) for number in printable] + [chr(256 + number) for number in range(256 - len(printable))]
    merges = (_CLIP / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    words = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    numbers = json.dumps({word: number for number, word in enumerate(words)}, ensure_ascii=False, separators=(",", ":"))
    Path(folder.name, "vocab.json").write_bytes(f"{numbers}\n".encode())
    return folder


def _parts(unet: dict[str, Any], text_encoder: dict[str, Any], **scheduler: Any) -> dict[str, dict[str, Any]]:
    pipeline = {"_class_name": "StableDiffusionPipeline"}
    return {
        ".": pipeline,
        "unet": unet,
        "vae": _VAE,
        "text_encoder": text_encoder,
        "tokenizer": _PADDED_BY_ZERO if text_encoder is _OPENCLIP_H else {},
        "scheduler": {**_SCHEDULER, **scheduler},
    }


_XL_PIPELINE = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}


def _xl_parts(unet: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        ".": _XL_PIPELINE,
        "unet": unet,
        "vae": _XL_VAE,
        "text_encoder": _CLIP_L,
        "text_encoder_2": _OPENCLIP_G,
        "tokenizer": {},
        "tokenizer_2": _PADDED_BY_ZERO,
        "scheduler": _SCHEDULER,
    }


_IF_UNET: dict[str, Any] = {
    "out_channels": 6,
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "attention_head_dim": 64,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_act_fn": "gelu",
}
_IF_II_L = {
    **_IF_UNET,
    "sample_size": 256,
    "in_channels": 6,
    "class_embed_type": "timestep",
    "cross_attention_dim": 1280,
    "block_out_channels": [160, 320, 640, 960, 1280],
    "layers_per_block": [2, 2, 3, 5, 5],
    "down_block_types": ["ResnetDownsampleBlock2D"] * 3 + ["SimpleCrossAttnDownBlock2D"] * 2,
    "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 2 + ["ResnetUpsampleBlock2D"] * 3,
    "mid_block_scale_factor": 2**0.5,
    "resnet_out_scale_factor": 2**0.5,
    "resnet_skip_time_act": True,
}
"""The UNet of IF-II-L: 1,187.6 million weights."""
_T5_XXL = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_IF_SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
}


def _if_parts(channels: int) -> dict[str, dict[str, Any]]:
    """DeepFloyd IF with a stage I of a number of channels, and IF-II-L."""
    first = {
        **_IF_UNET,
        "sample_size": 64,
        "in_channels": 3,
        "cross_attention_dim": 4 * channels,
        "block_out_channels": [channels, 2 * channels, 3 * channels, 4 * channels],
        "layers_per_block": 3,
        "down_block_types": ["ResnetDownsampleBlock2D"] + ["SimpleCrossAttnDownBlock2D"] * 3,
        "up_block_types": ["SimpleCrossAttnUpBlock2D"] * 3 + ["ResnetUpsampleBlock2D"],
    }
    return {
        ".": {"_class_name": "IFPipeline"},
        "unet": first,
        "unet_2": _IF_II_L,
        "text_encoder": _T5_XXL,
        "scheduler": {**_IF_SCHEDULER, "sample_max_value": 1.5},
        "scheduler_2": {**_IF_SCHEDULER, "sample_max_value": 1.0},
        "image_noising_scheduler": {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"},
    }


def _klein_parts(**pipeline: Any) -> dict[str, dict[str, Any]]:
    return {
        ".": {"_class_name": "Flux2KleinPipeline", **pipeline},
        "transformer": KLEIN_TRANSFORMER,
        "vae": _KLEIN_VAE,
        "text_encoder": _QWEN3_4B,
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
    }


_SD1 = _parts(SD15_UNET, _CLIP_L)
_XL = _xl_parts(SDXL_UNET)
PUBLISHED = {
    "sd14": _SD1,
    "sd15": _SD1,
    "sd21-base": _parts(_SD2_UNET, _OPENCLIP_H),
    "sd21": _parts({**_SD2_UNET, "sample_size": 96}, _OPENCLIP_H, prediction_type="v_prediction"),
    "sdxl": _XL,
    "ssd-1b": _xl_parts(_SSD_1B_UNET),
    "vega": _xl_parts(_VEGA_UNET),
    "realvisxl": _XL,
    "animagine-xl": _XL,
    "if-m": _if_parts(192),
    "if-l": _if_parts(320),
    "if-xl": _if_parts(704),
    "klein": _klein_parts(),
    "klein-distilled": _klein_parts(is_distilled=True),
}
"""Configurations of the parts, by short name."""


@dataclass(frozen=True)
class Published(Folder):
    """A well-known model's configurations and tokenizers, without weights."""

    alone: bool = False
    """Whether a cascade is without its second stage."""

    @staticmethod
    def of(name: str, *, alone: bool = False) -> "Published":
        """The configurations of the model with this short name; `alone`: of a cascade's first stage."""
        return Published(Path(name), SHORT_NAMES[name], alone=alone)

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        """A component's configuration.

        Raises:
            IncompleteModelError: the model has no such component.
        """
        parts = PUBLISHED[self.path.name]
        if component not in parts:
            raise IncompleteModelError(f"{self.label}: {component}/{name} is not known without a download")
        shared = read_json(_CLIP / name, self._name(component, name)) if component in TOKENIZERS else {}
        return {**shared, **parts[component]}

    @property
    def components(self) -> Sequence[str]:
        """The components of the model, see `Folder.components`; with the second network of a cascade."""
        has_second = "unet_2" in PUBLISHED[self.path.name] and not self.alone
        return (*super().components, *(["unet_2"] if has_second else []))

    def vocabulary(self, component: str = "tokenizer") -> Path:
        """The vocabulary file of CLIP.

        Raises:
            IncompleteModelError: the model has another vocabulary.
        """
        if component not in PUBLISHED[self.path.name]:
            raise IncompleteModelError(f"{self.label}: the vocabulary of its {component} needs a download")
        return Path(_tokenizer_folder().name, "vocab.json")

    def tokenizer(self, component: str = "tokenizer") -> tuple[Path, dict[str, Any]]:
        """The folder with CLIP's vocabulary, and the settings of this model's tokenizer.

        Raises:
            IncompleteModelError: the model has another vocabulary.
        """
        return self.vocabulary(component).parent, dict(PUBLISHED[self.path.name][component])
