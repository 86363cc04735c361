"""The UNet of Stable Diffusion 1.5 by its public configuration, with random weights.

Bytes do not depend on what the weights are, so memory and size can be measured without a download.
"""

import math
from collections.abc import Iterator

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lowmem_imagic.families.published import SD15_UNET

PARAMETERS = 859_520_964
"""Weights of that UNet."""

TOKENS = 77
"""Length of the text conditioning."""


def meta_unet() -> nn.Module:
    """The network without weights, on the meta device; its few buffers are real."""
    with init_empty_weights(include_buffers=False):
        unet: nn.Module = UNet2DConditionModel.from_config(SD15_UNET)
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
