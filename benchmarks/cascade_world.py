"""Trains a small DeepFloyd IF on the bundled world: ``python -m benchmarks.cascade_world --out DIR``.

The paper's own kind of model, a cascade in pixels with a T5 that sees no padding, on scenes whose edits are known
exactly (`benchmarks.scene_edits`). Stage I makes pictures of 32 px, stage II enlarges them to 128 px.

1. Stage I and the text encoder, on scenes and captions, a tenth of these empty.
2. Stage II, under the text of the finished encoder, with the picture of 32 px enlarged and noised at random levels; on
   a CPU it is trained on parts of pictures.

The result is two diffusers folders in fp16, ``DIR/IF-I-world`` and ``DIR/IF-II-world``, of at most `MOST_BYTES`; give
the first one as a model. Run the same command again after a stop, and it goes on from the checkpoints in ``DIR/work``
with the time that is left. ``--only`` trains one stage; stage II needs stage I's checkpoint for its text.
"""

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from lowmem_imagic.demo.pictures import CHUNK, to_tensor
from lowmem_imagic.demo.trainer import Trainer, exact_attention, load_averaged

from .world_training import (
    SIDE_PX,
    Scenes,
    parser_of,
    size_of,
    steps_of,
    stratified,
    world_captions,
    write_pipelines,
)

log = logging.getLogger("benchmarks.cascade_world")

SMALL_PX = 32
TOKENS = 77
"""Tokens of a sentence, as DeepFloyd IF's."""
WIDTH = 128
"""Width of the text encoder's tokens."""
MIN_SNR = 5.0
"""Bound of the weight of a timestep, see `loss_weights`."""
MOST_BYTES = 15_000_000
STAGES = {"first": "IF-I-world", "second": "IF-II-world"}
"""The folders of the stages."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"
_RARE = -15.0
"""Score of a letter in the tokenizer's vocabulary, below that of any word."""
_UNET: dict[str, Any] = {
    "out_channels": 6,
    "act_fn": "gelu",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "attention_head_dim": 32,
    "cross_attention_dim": WIDTH,
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": WIDTH,
    "encoder_hid_dim_type": "text_proj",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "norm_num_groups": 8,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_act_fn": "gelu",
    "layers_per_block": 1,
}
_SCHEDULE: dict[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "fixed_small",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What fits a machine."""

    minutes: float
    first_share: float
    """Of the time, for stage I and the text encoder."""
    scenes: int
    uses: float
    """Training samples of a scene, before there are as many as `scenes`."""
    batches: tuple[int, int]
    """Pictures of a step, for each stage."""
    crop_px: int
    """Side of the parts of pictures that stage II sees: its layers work at any size, and a step takes a fraction of the
    time."""
    supersampling: int
    bfloat16: bool
    save_every: float
    """Seconds between checkpoints."""


PRESETS = {
    "gpu": Preset(
        minutes=15,
        first_share=0.5,
        scenes=64 * 1024,
        uses=8,
        batches=(1024, 256),
        crop_px=SIDE_PX,
        supersampling=2,
        bfloat16=True,
        save_every=60,
    ),
    "cpu": Preset(
        minutes=1440,
        first_share=0.5,
        scenes=16 * 1024,
        uses=32,
        batches=(32, 16),
        crop_px=SIDE_PX // 2,
        supersampling=2,
        bfloat16=True,
        save_every=300,
    ),
    # Checks that everything runs, in seconds; the model is of no use.
    "tiny": Preset(
        minutes=0.05,
        first_share=0.5,
        scenes=CHUNK,
        uses=4,
        batches=(4, 2),
        crop_px=SIDE_PX // 2,
        supersampling=1,
        bfloat16=False,
        save_every=60,
    ),
}


def new_unets() -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    """Both stages' UNets, untrained, with the layer types of DeepFloyd IF."""
    first = UNet2DConditionModel(
        sample_size=SMALL_PX,
        in_channels=3,
        block_out_channels=(40, 96, 128),
        down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 2,
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 2 + ("ResnetUpsampleBlock2D",),
        **_UNET,
    )
    second = UNet2DConditionModel(
        sample_size=SIDE_PX,
        in_channels=6,
        block_out_channels=(32, 32, 64, 96),
        down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("SimpleCrossAttnDownBlock2D",),
        up_block_types=("SimpleCrossAttnUpBlock2D",) + ("ResnetUpsampleBlock2D",) * 3,
        class_embed_type="timestep",
        mid_block_scale_factor=2**0.5,
        resnet_out_scale_factor=2**0.5,
        resnet_skip_time_act=True,
        **_UNET,
    )
    return first, second


def new_text_encoder(words: int) -> T5EncoderModel:
    """An encoder of T5's kind of three layers, untrained."""
    return T5EncoderModel(
        T5Config(
            vocab_size=words,
            d_model=WIDTH,
            d_kv=32,
            d_ff=2 * WIDTH,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def new_tokenizer(seed: int) -> T5TokenizerFast:
    """A tokenizer of T5's kind: the words of captions, and letters for all other words."""
    counts = Counter(word for caption in world_captions(seed) for word in caption.lower().split())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    # Of equal length of a sentence in words, no order matters; a word is always better than its letters.
    pieces += [(f"▁{word}", -1.0) for word in sorted(counts)]
    pieces += [(letter, _RARE) for letter in f"▁{_LETTERS}"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def loss_weights(kept: Tensor) -> Tensor:
    """Weight (1000,) of each timestep's squared error of the noise, from the schedule's cumulative product of alphas.

    As min-SNR weights the noise's error (Hang et al. 2023, section 3.4).
    """
    return (MIN_SNR * (1 - kept) / kept.clamp_min(1e-8)).clamp_max(1.0)


def cropped(pictures: Tensor, side_px: int, generator: torch.Generator) -> Tensor:
    """A square part (N, C, S, S) of each of some pictures (N, C, H, W), anywhere in it."""
    height, width = pictures.shape[2:]
    places = torch.rand(len(pictures), 2, generator=generator, device=pictures.device)
    room = torch.tensor([height - side_px + 1, width - side_px + 1], device=pictures.device)
    return torch.stack(
        [
            picture[:, top : top + side_px, left : left + side_px]
            for picture, (top, left) in zip(pictures, (places * room).long().tolist(), strict=True)
        ]
    )


def encoded(tokenizer: T5TokenizerFast, captions: list[str]) -> Tensor:
    """Token ids (B, 77) of captions, cleaned as DeepFloyd IF's pipelines clean them."""
    cleaned = [caption.lower().strip() for caption in captions]
    ids: Tensor = tokenizer(
        cleaned, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def text_modules(encoder: T5EncoderModel) -> dict[str, nn.Module]:
    """The parts of the text encoder for `Trainer`, which trains what is called an embedding as a table."""
    inner = encoder.encoder
    return {"embedding": inner.embed_tokens, "blocks": inner.block, "norm": inner.final_layer_norm}


def train(
    stage: str,
    unet: UNet2DConditionModel,
    encoder: T5EncoderModel,
    tokenizer: T5TokenizerFast,
    scenes: Scenes,
    work: Path,
    preset: Preset,
    *,
    seconds: float,
    seed: int,
    device: torch.device,
    publish: Callable[[], None],
) -> None:
    """Trains a stage's UNet, with the text encoder for the first; `publish` is called after every checkpoint."""
    started, second = time.monotonic(), stage == "second"
    dtype = torch.bfloat16 if preset.bfloat16 else torch.float32
    kept = DDPMScheduler(**_SCHEDULE).alphas_cumprod.to(device)
    weights, batch = loss_weights(kept), preset.batches[second]
    attention = exact_attention(device)
    unet = unet.to(device, dtype, memory_format=torch.channels_last).train()
    encoder = encoder.to(device, dtype).train(not second).requires_grad_(not second)
    scenes.grow(0)
    trainer = Trainer(
        {"unet": unet, **({} if second else text_modules(encoder))},
        path=work / f"{stage}.safetensors",
        seconds=seconds - (time.monotonic() - started),
        learning_rate=0.01,
        adam_rate=7e-4,
        save_every=preset.save_every,
        averaging=0.9995,
    )
    trainer.after_save = publish
    generator = torch.Generator(device).manual_seed((seed + second) * 1_000_003 + trainer.step)
    pad = tokenizer.pad_token_id

    def noised(clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures with noise at random timesteps, the noise, and the timesteps."""
        at = (stratified(batch, generator, device) * len(kept)).long().clamp_max(len(kept) - 1)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        signal = kept[at].view(-1, 1, 1, 1)
        return signal.sqrt() * clean + (1 - signal).sqrt() * noise, noise, at

    def loss_at(step: int) -> Tensor:
        scenes.grow((step + 1) * batch)
        pictures, tokens = scenes.batch(batch, generator)
        x = to_tensor(pictures, device)
        mirror = torch.randint(2, (batch, 1, 1, 1), generator=generator, device=device)
        x = torch.where(mirror == 1, x.flip(3), x)
        small = F.interpolate(x, SMALL_PX, mode="area")
        beside: dict[str, Any] = {}
        if second:
            large = F.interpolate(small, SIDE_PX, mode="bilinear", align_corners=True)
            x, large = cropped(torch.cat([x, large], 1), preset.crop_px, generator).chunk(2, 1)
            noisy, noise, at = noised(x)
            lower, _, level = noised(large)
            noisy, beside = torch.cat([noisy, lower], 1), {"class_labels": level}
        else:
            noisy, noise, at = noised(small)
        with attention:
            text = encoder(tokens, attention_mask=(tokens != pad).long())[0]
            inputs = noisy.to(dtype).contiguous(memory_format=torch.channels_last)
            prediction = unet(inputs, at, encoder_hidden_states=text, **beside).sample[:, :3]
        errors = (prediction.float() - noise).square().mean((1, 2, 3))
        return (weights[at] * errors).mean()

    steps_of(stage, trainer, loss_at)


def publish(work: Path, out: Path, tokenizer: T5TokenizerFast) -> None:
    """Writes both folders in fp16 from the averaged weights of all checkpoints that there are."""
    first, second = new_unets()
    encoder = new_text_encoder(len(tokenizer))
    load_averaged(work / "first.safetensors", {"unet": first, **text_modules(encoder)})
    load_averaged(work / "second.safetensors", {"unet": second})
    for part in (first, second, encoder):
        part.half()
    nothing: dict[str, Any] = {
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }
    pipelines = {
        "first": IFPipeline(
            tokenizer=tokenizer,
            text_encoder=encoder,
            unet=first,
            scheduler=DDPMScheduler(sample_max_value=1.5, **_SCHEDULE),
            **nothing,
        ),
        # Stage I's folder has the text encoder of both.
        "second": IFSuperResolutionPipeline(
            tokenizer=None,
            text_encoder=None,
            unet=second,
            scheduler=DDPMScheduler(sample_max_value=1.0, **_SCHEDULE),
            image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            **nothing,
        ),
    }
    write_pipelines({out / STAGES[stage]: pipeline for stage, pipeline in pipelines.items()})


def main() -> None:
    """Command line of the training script."""
    started = time.monotonic()
    parser = parser_of(__doc__, PRESETS)
    parser.add_argument("--only", choices=tuple(STAGES), help="train one stage, with all of the time")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    preset, device = PRESETS[args.preset], torch.device(args.device)
    work = args.out / "work"
    seconds = 60 * (args.minutes or preset.minutes)
    shares = {"first": preset.first_share, "second": 1 - preset.first_share}

    torch.manual_seed(args.seed + 1)
    tokenizer = new_tokenizer(args.seed)
    scenes = Scenes(
        work / f"scenes-{args.seed}",
        total=preset.scenes,
        uses=preset.uses,
        stored=lambda pictures: pictures,
        encoded=functools.partial(encoded, tokenizer),
        supersampling=preset.supersampling,
        seed=args.seed,
        device=device,
    )
    unets, encoder = new_unets(), new_text_encoder(len(tokenizer))
    write = functools.partial(publish, work, args.out, tokenizer)
    for stage, unet in zip(STAGES, unets, strict=True):
        if args.only not in (None, stage):
            continue
        if stage == "second" and not load_averaged(work / "first.safetensors", text_modules(encoder.float())):
            parser.error("stage II is trained under stage I's text; train stage I first")
        whole = seconds if args.only else shares[stage] * seconds
        train(
            stage,
            unet,
            encoder,
            tokenizer,
            scenes,
            work,
            preset,
            seconds=whole,
            seed=args.seed,
            device=device,
            publish=write,
        )
    size = size_of(*folders_in(args.out))
    log.info("wrote %s, %.1f MB, %.0f s in all", args.out, size / 1e6, time.monotonic() - started)
    if size > MOST_BYTES:
        log.warning("the folders are larger than %.0f MB", MOST_BYTES / 1e6)


def folders_in(out: Path) -> list[Path]:
    """The folders of both stages."""
    return [out / name for name in STAGES.values()]


if __name__ == "__main__":
    main()
