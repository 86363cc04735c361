"""A tiny DeepFloyd IF with random weights in two diffusers folders, made with the libraries' own classes."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from tests.conftest import CAPTIONS, away_from_start

WIDTH = 32
"""Width of the text encoder's tokens; those of T5-XXL have 4096."""
SIDES = (16, 32)
"""Sides of the pictures of both stages, in place of 64 and 256."""
NAMES = ("IF-I-tiny", "IF-II-tiny")
"""Names of both folders, as of the published ones."""

_UNET: dict[str, Any] = {
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": WIDTH,
    "encoder_hid_dim_type": "text_proj",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "norm_num_groups": 8,
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_act_fn": "gelu",
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
}
_SECOND: dict[str, Any] = {
    "class_embed_type": "timestep",
    "mid_block_scale_factor": 2**0.5,
    "resnet_out_scale_factor": 2**0.5,
    "resnet_skip_time_act": True,
}
_SCHEDULE: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
}
_NOTHING: dict[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "watermarker": None,
    "requires_safety_checker": False,
}


def tiny_tokenizer() -> T5TokenizerFast:
    """A tokenizer of T5's kind that knows the words of `CAPTIONS` and single letters, for 77 tokens."""
    words = dict.fromkeys(word for caption in CAPTIONS for word in caption.split())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words)]
    pieces += [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=77)


def tiny_pipelines(**unet: Any) -> tuple[IFPipeline, IFSuperResolutionPipeline]:
    """Both stages: pictures of 16 px and of 32 px, every layer type of DeepFloyd IF.

    Args:
        unet: changes of the first stage's configuration.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(4)
        values = {"sample_size": SIDES[0], "in_channels": 3, **_UNET, **unet}
        first = away_from_start(UNet2DConditionModel(**values))
        second = away_from_start(UNet2DConditionModel(sample_size=SIDES[1], in_channels=6, **_UNET, **_SECOND))
        encoder = away_from_start(
            T5EncoderModel(
                T5Config(
                    vocab_size=len(tokenizer),
                    d_model=WIDTH,
                    d_kv=8,
                    d_ff=64,
                    num_layers=2,
                    num_heads=4,
                    feed_forward_proj="gated-gelu",
                )
            )
        )
    text = {"tokenizer": tokenizer, "text_encoder": encoder, **_NOTHING}
    pipelines = (
        IFPipeline(unet=first, scheduler=DDPMScheduler(sample_max_value=1.5, **_SCHEDULE), **text),
        IFSuperResolutionPipeline(
            unet=second,
            scheduler=DDPMScheduler(sample_max_value=1.0, **_SCHEDULE),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            **text,
        ),
    )
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def write_tiny(folder: Path, **unet: Any) -> Path:
    """The folder of the first stage in `folder`, with that of the second beside it; see `tiny_pipelines`."""
    for name, pipeline in zip(NAMES, tiny_pipelines(**unet), strict=True):
        pipeline.save_pretrained(folder / name)
    return folder / NAMES[0]
