"""A tiny Stable Diffusion XL with random weights in diffusers' folder layout, made with diffusers' own classes."""

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lowmem_imagic.demo.architecture import TOKENS, train_tokenizer
from tests.conftest import CAPTIONS, away_from_start

WIDTHS = (16, 32)
"""Widths of the text encoders."""
POOLED = 24
SIDE, LATENT_SIDE = 32, 16
"""Sides of its pictures and latents."""
SIZE_NUMBERS = 8
"""Numbers for each of the six numbers about a picture's size."""


def _text_encoder(kind: Any, tokenizer: Any, width: int, act: str, projection: int) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            hidden_act=act,
            projection_dim=projection,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tiny_pipeline(
    prediction_type: str = "epsilon", *, zero_snr: bool = False, **unet: Any
) -> StableDiffusionXLPipeline:
    """The pipeline: pictures of 32 px, latents (4, 16, 16), every layer type of SDXL.

    Args:
        prediction_type: "epsilon" or "v_prediction".
        zero_snr: whether the noise schedule ends at pure noise, with trailing timesteps, as in NoobAI's v-prediction.
        unet: changes of the UNet's configuration.
    """
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=700)
    other = copy.deepcopy(tokenizer)
    # As SDXL's second tokenizer pads.
    other.pad_token = "!"
    with torch.random.fork_rng():
        torch.manual_seed(2)
        values = {
            "sample_size": LATENT_SIDE,
            "block_out_channels": (16, 32, 32),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 1, 2],
            "attention_head_dim": [2, 4, 4],
            "cross_attention_dim": sum(WIDTHS),
            "use_linear_projection": True,
            "norm_num_groups": 8,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_NUMBERS,
            "projection_class_embeddings_input_dim": POOLED + 6 * SIZE_NUMBERS,
        }
        network = away_from_start(UNet2DConditionModel(**{**values, **unet}))
        vae = away_from_start(
            AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 16),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                sample_size=SIDE,
                scaling_factor=0.13025,
                force_upcast=True,
            )
        )
        first = away_from_start(_text_encoder(CLIPTextModel, tokenizer, WIDTHS[0], "quick_gelu", WIDTHS[0]))
        second = away_from_start(_text_encoder(CLIPTextModelWithProjection, other, WIDTHS[1], "gelu", POOLED))
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        steps_offset=1,
        timestep_spacing="trailing" if zero_snr else "leading",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
    )
    # Keys of other classes that SDXL's published configuration has.
    scheduler.register_to_config(clip_sample=False, set_alpha_to_one=False)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=other,
        unet=network,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_tiny(folder: Path, *options: Any, **changes: Any) -> Path:
    """The folder, with a tiny pipeline in it; see `tiny_pipeline`."""
    tiny_pipeline(*options, **changes).save_pretrained(folder)
    return folder
