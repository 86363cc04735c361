"""The UNet of Stable Diffusion 1.5 by its public configuration, with random weights.

Bytes do not depend on what the weights are, so memory and size can be measured without a download.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

CONFIG: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""``unet/config.json`` of Stable Diffusion 1.5."""

PARAMETERS = 859_520_964
"""Weights of that UNet."""

TOKENS = 77
"""Length of the text conditioning."""


def meta_unet() -> nn.Module:
    """The network without weights, on the meta device; its few buffers are real."""
    with init_empty_weights(include_buffers=False):
        unet: nn.Module = UNet2DConditionModel.from_config(CONFIG)
    assert sum(p.numel() for p in unet.parameters()) == PARAMETERS
    return unet


def random_weights(unet: nn.Module, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(name, fp16 tensor) of every parameter, one at a time, scaled so that activations neither grow nor vanish."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        tensor = torch.empty(parameter.shape, dtype=torch.float16)
        if parameter.dim() == 1:
            yield name, tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            yield name, tensor.normal_(0.0, 1 / math.sqrt(math.prod(parameter.shape[1:])), generator=generator)
