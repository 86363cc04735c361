"""UNets of Stable Diffusion by their public configurations, without weights or with random ones.

Bytes, kernels and time do not depend on the values of the weights, so they can be measured without a download.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.families import SHORT_NAMES, StableDiffusion
from lowmem_imagic.families.conditioning import Conditioning
from lowmem_imagic.families.files.published import SD15_UNET, Published
from lowmem_imagic.families.files.weights import Weights
from lowmem_imagic.families.lean_unet import make_lean
from lowmem_imagic.families.stable_diffusion import AT_LATENTS, EMBEDS
from lowmem_imagic.layers.frozen import load_frozen

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
"""``unet/config.json`` of Stable Diffusion XL."""

CONFIGURATIONS = {"sd15": SD15_UNET, "sdxl": SDXL_UNET}
PARAMETERS = {"sd15": 859_520_964, "sdxl": 2_567_463_684}
"""Published numbers of weights."""
TOKENS = 77
"""Length of the text conditioning."""


def meta_unet(name: str) -> nn.Module:
    """The network without weights, on the meta device; its few buffers are real."""
    with init_empty_weights(include_buffers=False):
        unet: nn.Module = UNet2DConditionModel.from_config(CONFIGURATIONS[name])
    assert sum(p.numel() for p in unet.parameters()) == PARAMETERS[name]
    return unet


def random_weights(unet: nn.Module, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """(name, fp16 tensor) of every parameter, one at a time; see `drawn`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        yield name, drawn(name, parameter.shape, generator)


def drawn(name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """A random weight in fp16 on the generator's device, scaled so that activations neither grow nor vanish."""
    tensor = torch.empty(shape, dtype=torch.float16, device=generator.device)
    if len(shape) == 1:
        return tensor.fill_(1.0 if name.endswith("weight") else 0.0)
    return tensor.normal_(0.0, 1 / math.sqrt(math.prod(shape[1:])), generator=generator)


class _Drawn(Weights):
    """Weights of a network that are drawn on access."""

    def __init__(self, network: nn.Module) -> None:
        self._shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        self.names = list(self._shapes)
        self._generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight."""
        return self._shapes[name]

    def __getitem__(self, name: str) -> Tensor:
        return drawn(name, self._shapes[name], self._generator)


@dataclass(frozen=True)
class _Random(Published):
    """Stable Diffusion 1.5's configurations, with random weights for the UNet."""

    def weights(self, component: str) -> Weights:
        """Random weights of the UNet, the only component that has any."""
        assert component == "unet"
        return _Drawn(meta_unet("sd15"))


class RandomBase(BaseModel):
    """A base with only a UNet; a sentence's embedding is drawn with a seed from its letters."""

    def encode_text(self, sentences: Sequence[str]) -> Conditioning:
        """Embeddings (B, T, D), equal for equal sentences."""
        draws = [torch.Generator().manual_seed(zlib.crc32(sentence.encode())) for sentence in sentences]
        shape = self.family.text[EMBEDS].shape
        return Conditioning({EMBEDS: torch.stack([torch.randn(shape, generator=draw) for draw in draws])})


def random_sd15(
    *, weights: str, device: torch.device, dtype: torch.dtype, checkpointing: bool, attention: str = "sdpa"
) -> BaseModel:
    """A base model of the package with a random UNet of Stable Diffusion 1.5, without the other parts."""
    family = StableDiffusion(_Random(Path("sd15"), SHORT_NAMES["sd15"]))
    base = RandomBase(family, device=device, weights=weights, attention=attention, checkpointing=checkpointing)
    base.dtype = dtype
    return base


def frozen_meta(name: str, *, weights: str, dtype: torch.dtype, lean: bool) -> nn.Module:
    """The network with frozen weights of a format on the meta device, with or without lean layers."""
    unet, device = meta_unet(name), torch.device("meta")
    tensors = list(unet.named_parameters())
    load_frozen(unet, tensors, weights=weights, device=device, dtype=dtype, in_float=AT_LATENTS)
    if lean:
        make_lean(unet)
    return unet
