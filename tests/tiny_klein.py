"""A tiny FLUX.2 klein with random weights in diffusers' folder layout, made with diffusers' own classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from benchmarks.flow_world import CHAT
from tests.conftest import away_from_start

SIDE = 32
"""Side of its pictures; 4 px are one place of the transformer."""
WIDTH = 16
"""Width of the text encoder; the text has three times as much."""
LAYERS = 28
"""Layers of the text encoder, one more than are used."""


def tiny_tokenizer() -> Any:
    """Qwen's tokenizer with single bytes as its words."""
    letters = {letter: number for number, letter in enumerate(bytes_to_unicode().values())}
    whole = Tokenizer(models.BPE(letters, []))
    whole.pre_tokenizer, whole.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = Qwen2TokenizerFast(tokenizer_object=whole, vocab=letters, merges=[])
    marks = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": marks, "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    )
    tokenizer.chat_template = CHAT
    tokenizer.model_max_length = 4096
    return tokenizer


def tiny_pipeline(*, distilled: bool = False, channels: int = 4, **transformer: Any) -> Flux2KleinPipeline:
    """The pipeline: pictures of 32 px, latents (16, 8, 8), double and single blocks.

    Args:
        distilled: whether it is marked as made for few steps.
        channels: channels of the autoencoder; the transformer's latents have four times as many.
        transformer: changes of the transformer's configuration.
    """
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=32,
                num_hidden_layers=LAYERS,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=1024,
                initializer_range=0.2,
            )
        )
        values = {
            "patch_size": 1,
            "in_channels": 4 * channels,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 3 * WIDTH,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": [4, 4, 4, 4],
            "guidance_embeds": False,
        }
        network = Flux2Transformer2DModel(**{**values, **transformer})
        vae = AutoencoderKLFlux2(
            sample_size=SIDE,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=channels,
            norm_num_groups=4,
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, time_shift_type="exponential", base_image_seq_len=256
        )
        pipeline = Flux2KleinPipeline(
            scheduler=scheduler,
            vae=away_from_start(vae).eval(),
            text_encoder=away_from_start(encoder).eval(),
            tokenizer=tokenizer,
            transformer=away_from_start(network).eval(),
            is_distilled=distilled,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_tiny(folder: Path, **options: Any) -> Path:
    """The folder, with a tiny pipeline in it; see `tiny_pipeline`."""
    tiny_pipeline(**options).save_pretrained(folder)
    return folder


_BLOCK = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
_ENDS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}


def original_layout(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The transformer's tensors as Black Forest Labs' files have them."""
    original = {}
    for name, tensor in state.items():
        base = name.removesuffix(".weight")
        if name.startswith("transformer_blocks."):
            _, number, rest = base.split(".", 2)
            block = f"double_blocks.{number}"
            if rest in _BLOCK:
                original[f"{block}.{_BLOCK[rest]}.{'scale' if '.norm_' in rest else 'weight'}"] = tensor
            for part, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
                if rest == f"attn.{names[0]}":
                    parts = [state[f"transformer_blocks.{number}.attn.{one}.weight"] for one in names]
                    original[f"{block}.{part}_attn.qkv.weight"] = torch.cat(parts)
        elif name.startswith("single_transformer_blocks."):
            _, number, rest = base.split(".", 2)
            ending = "scale" if ".norm_" in rest else "weight"
            original[f"single_blocks.{number}.{_SINGLE[rest]}.{ending}"] = tensor
        elif base == "norm_out.linear":
            scale, shift = tensor.chunk(2)
            original["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
        else:
            original[f"{_ENDS[base]}.weight"] = tensor
    return original
