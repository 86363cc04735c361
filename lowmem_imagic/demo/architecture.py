"""The bundled model's parts, untrained: the layer types of Stable Diffusion, at 1/140 of its size.

Sizes: pictures 128 px, latents (20, 16, 16), text (32 tokens, width 128). Four latent channels for 8 x 8 px hold no
photograph of 128 px: the best linear code gives 40 of them back at 24 dB in eight numbers, at 27 in 20 (see `codec`).
Prediction type epsilon on Stable Diffusion's noise schedule.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE_PX = 128
LATENT_CHANNELS = 20
DOWNSAMPLING = 8
TOKENS = 32
WIDTH = 128

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def new_vae() -> AutoencoderKL:
    """A KL autoencoder, 128 px to (20, 16, 16), untrained; `codec.write_linear_encoder` gives it its encoder."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 48, 96, 160),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE_PX,
        mid_block_add_attention=False,
    )


def new_unet() -> UNet2DConditionModel:
    """An untrained UNet for (20, 16, 16) latents and text of width 128."""
    return UNet2DConditionModel(
        sample_size=SIZE_PX // DOWNSAMPLING,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        # diffusers reads this as the number of heads, as it does for Stable Diffusion 1.x.
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder of three layers for `tokenizer`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=WIDTH,
        )
    )


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.x's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_tokenizer(captions: Sequence[str], *, vocab_size: int = 900) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer whose merges are learnt from `captions`; any text can be encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(unk_token=_EOS, end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_BOS, _EOS],
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    learnt = json.loads(learner.to_str())["model"]["merges"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in learnt]
    # The trainer numbers last letters in an order that differs from run to run; and a word may end in any
    # byte, seen in the captions or not. So the numbers are given here.
    words = [_BOS, _EOS, *alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer(
            vocab_file=str(vocab_file),
            merges_file=str(merges_file),
            vocab=vocab,
            merges=[tuple(pair) for pair in merges],
            model_max_length=TOKENS,
        )
