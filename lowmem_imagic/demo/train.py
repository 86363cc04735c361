"""Trains the bundled model from nothing but the renderer: ``python -m lowmem_imagic.demo.train --out DIR``.

Three parts, of which the first takes no training:

1. The encoder, a linear code (`lowmem_imagic.demo.codec`).
2. The decoder, on scenes and on procedural pictures, so that the autoencoder holds any picture.
3. UNet and text encoder, on scenes and captions, a tenth of these empty.

The result is a diffusers ``StableDiffusionPipeline`` folder in fp16, written at every checkpoint from the averaged
weights.

``--preset gpu`` takes minutes of one large card: pictures are drawn on it beside training, and nothing but numbers of
scenes and captions comes from the CPU. ``--preset cpu`` is for a job of many hours: run the same command again after
a stop, and it goes on from the checkpoints in ``--work`` with the time that is left. As 2 and 3 are independent, each
can have a process of its own (``--only``), and they write the same folder.

``--start-from DIR`` takes the tokenizer of a folder, and of its weights those whose names and shapes agree, and trains
them on, as those that begin anew, at the preset's share of the learning rates.
"""

import argparse
import functools
import logging
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import architecture, codec, fused_norm
from .pictures import CHUNK, ProceduralPictures, packed, render_batch, scene_at, to_tensor, training_scene_at
from .procedural import procedural_batch
from .publishing import learnt_tokenizer, new_pipeline, publish
from .strangers import STRANGE
from .trainer import Trainer, exact_attention
from .training_presets import PRESETS, Preset
from .training_scenes import Scenes, tokens_of

log = logging.getLogger("lowmem_imagic.demo.train")

EMPTY_CAPTION_SHARE = 0.1
MIN_SNR, MAX_WEIGHT = 5.0, 10.0
"""Bounds of the weight of a timestep, see `loss_weights`."""
SEED = 8
"""Of the bundled model's scenes; 1 is the judge's; 2, 5, 6, 12 and 13 are held out for benchmarks."""
CODE_SEED = 1008
"""Of the pictures that the encoder is computed from; the same for every model, so that latents are comparable."""
WRITING_SECONDS = 8
"""Kept for writing the folder."""
CROP_PX, WHOLE_FROM = 64, 0.8
"""The decoder sees crops, which make for more steps, until this share of its time; then fewer whole pictures, or what
it learnt of a crop's borders would show inside them."""
LATENT_NOISE = 0.01
"""Deviation of the noise on latents that the decoder is trained with, as a sampler's latents are not exact."""


def loss_weights(scheduler: DDIMScheduler) -> Tensor:
    """Weight (1000,) of each timestep's squared error of the noise.

    What and where an object is, is settled at high noise, where the plain loss is all but blind: there the weight
    is that of the velocity, 1 + 1/SNR (Salimans and Ho 2022, equation 13 and appendix D), at most `MAX_WEIGHT`.
    At low noise it falls as `MIN_SNR` / SNR (Hang et al. 2023, section 3.4).
    """
    kept: Tensor = scheduler.alphas_cumprod
    snr = kept / (1 - kept)
    return (1 + 1 / snr).clamp_max(MAX_WEIGHT) * (MIN_SNR / snr).clamp_max(1.0)


def _reconstruction_loss(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a picture's reconstruction is trained by, and its squared error alone (B,)."""
    edges = sum(F.l1_loss(torch.diff(y, dim=dim), torch.diff(x, dim=dim)) for dim in (-1, -2))
    mse = F.mse_loss(y, x, reduction="none").mean((1, 2, 3))
    return 0.25 * F.l1_loss(y, x) + 3 * mse.mean() + 0.15 * edges, mse


def linear_code(work: Path, preset: Preset, device: torch.device) -> codec.LinearCode:
    """The encoder, from scenes and procedural pictures; computed once and kept in `work`."""
    path = work / "code.safetensors"
    if not path.exists():
        rows = packed([training_scene_at(CODE_SEED, index) for index in range(preset.code_pictures)])
        scenes = to_tensor(render_batch(rows, architecture.SIZE_PX, supersampling=2, device=device), device)
        generator = torch.Generator(device).manual_seed(CODE_SEED)
        stock = ProceduralPictures(
            preset.code_pictures, architecture.SIZE_PX, generator, together=min(preset.together, preset.code_pictures)
        ).stock
        strange = to_tensor(stock, device)
        # Every colour alike.
        strange = torch.cat([strange, -strange.roll(1, 1), strange.roll(2, 1)]).cpu()
        code = codec.fit(torch.cat([scenes.cpu(), strange]), architecture.LATENT_CHANNELS, scaled_to=scenes.cpu())
        partial = path.with_suffix(".partial")
        save_file({"weight": code.weight, "bias": code.bias, "parity": code.parity}, partial)
        os.replace(partial, path)
    return codec.LinearCode(**load_file(path))


def train_decoder(
    vae: AutoencoderKL,
    scenes: Scenes,
    work: Path,
    preset: Preset,
    *,
    seconds: float,
    rate: float,
    seed: int,
    device: torch.device,
    publish: Callable[[], None],
) -> None:
    """Trains the decoder on the scenes and on procedural pictures; `publish` is called after every checkpoint.

    `rate` is the share of the preset's learning rates.
    """
    started = time.monotonic()
    dtype = torch.bfloat16 if preset.bfloat16 else torch.float32
    scenes.grow(preset.kept_pictures)
    generator = torch.Generator(device).manual_seed(seed)
    unfamiliar = ProceduralPictures(preset.procedural, architecture.SIZE_PX, generator, together=preset.together)
    log.info("%d procedural pictures, %.0f s", len(unfamiliar.stock), time.monotonic() - started)
    decoder, post = on_device(vae.decoder, device, dtype), on_device(vae.post_quant_conv, device, dtype)
    trainer = Trainer(
        {"decoder": decoder, "post_quant_conv": post},
        path=work / "decoder.safetensors",
        seconds=seconds - (time.monotonic() - started),
        learning_rate=rate * preset.decoder_rate,
        adam_rate=rate * 1.5e-3,
        save_every=preset.save_every,
        averaging=0.998,
    )
    trainer.after_save = publish
    generator.manual_seed(seed + 1 + trainer.step)
    rng = random.Random(seed + trainer.step)
    half = preset.decoder_batch // 2
    report = _Report("decoder", preset.decoder_batch, trainer)
    for _ in trainer:
        chosen = torch.randint(len(scenes.pictures), (half,), generator=generator, device=device)
        drawn = torch.stack([scenes.pictures[chosen], unfamiliar.batch(half, renewed=0.25)], 1).flatten(0, 1)
        if trainer.spent < WHOLE_FROM * trainer.seconds:
            y0, x0 = (rng.randrange(architecture.SIZE_PX - CROP_PX + 1) for _ in range(2))
            drawn = drawn[:, y0 : y0 + CROP_PX, x0 : x0 + CROP_PX]
        else:
            drawn = drawn[: max(2, len(drawn) * CROP_PX**2 // architecture.SIZE_PX**2)]
        x = to_tensor(drawn, device)
        latents = scenes.code.encode(x)
        latents = latents + LATENT_NOISE * torch.randn(latents.shape, generator=generator, device=device)
        y = decoder(post(latents.to(dtype).contiguous(memory_format=torch.channels_last))).float()
        error, mse = _reconstruction_loss(y, x)
        trainer.update(error)
        report.add(error.detach(), mse[0::2].mean().detach(), mse[1::2].mean().detach())


def train_unet(
    pipeline: StableDiffusionPipeline,
    scenes: Scenes,
    work: Path,
    preset: Preset,
    *,
    seconds: float,
    rate: float,
    seed: int,
    device: torch.device,
    publish: Callable[[], None],
) -> None:
    """Trains the pipeline's UNet and text encoder together; `publish` is called after every checkpoint.

    `rate` is the share of the preset's learning rates.
    """
    started = time.monotonic()
    dtype = torch.bfloat16 if preset.bfloat16 else torch.float32
    scheduler = pipeline.scheduler
    text_encoder = pipeline.text_encoder.to(device, dtype).train()
    unet = on_device(pipeline.unet, device, dtype)
    attention = exact_attention(device)
    weights, kept = loss_weights(scheduler).to(device), scheduler.alphas_cumprod.to(device)
    scenes.grow(min(2 * CHUNK, scenes.total))
    trainer = Trainer(
        {"unet": unet, "text_encoder": text_encoder},
        path=work / "unet.safetensors",
        seconds=seconds - (time.monotonic() - started),
        learning_rate=rate * preset.unet_rate,
        adam_rate=rate * 7e-4,
        save_every=preset.save_every,
        averaging=0.9995,
    )
    trainer.after_save = publish
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + trainer.step)
    empty = tokens_of(pipeline.tokenizer, [""]).to(device, torch.int32)
    batch, steps = preset.unet_batch, len(kept)
    report = _Report("unet", batch, trainer)
    for step in trainer:
        scenes.grow(int((step + 1) * batch / preset.uses))

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        chosen = torch.randint(scenes.count, (batch,), generator=generator, device=device)
        mirror = torch.randint(2, (batch, 1, 1, 1), generator=generator, device=device)
        tokens = scenes.captions(chosen, generator)
        tokens = torch.where(uniform(batch, 1) < EMPTY_CAPTION_SHARE, empty, tokens).long()
        x = scenes.latents[chosen].float()
        x = torch.where(mirror == 1, scenes.code.mirrored(x), x)
        noise = torch.randn(x.shape, generator=generator, device=device)
        # Stratified timesteps: one from each of `batch` equal parts of the schedule.
        timesteps = ((torch.arange(batch, device=device) + uniform(batch)) / batch * steps).long().clamp_max(steps - 1)
        signal = kept[timesteps][:, None, None, None]
        noisy = (signal.sqrt() * x + (1 - signal).sqrt() * noise).to(dtype)
        with attention:
            text = text_encoder(tokens)[0]
            noise_pred = unet(noisy.contiguous(memory_format=torch.channels_last), timesteps, text).sample
        errors = (noise_pred.float() - noise).square().mean((1, 2, 3))
        loss = (weights[timesteps] * errors).mean()
        trainer.update(loss)
        report.add(loss.detach())


def on_device(network: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The network where and as it is trained."""
    network = network.to(device, dtype, memory_format=torch.channels_last).train()
    if device.type == "cuda" and fused_norm.usable(device, dtype):
        fused_norm.fuse(network)
    return network


class _Report:
    """Losses of a training in the log, ten times in all its time and at least every 200 steps; and its health."""

    def __init__(self, name: str, batch: int, trainer: Trainer) -> None:
        self.name, self.batch, self.trainer = name, batch, trainer
        self.losses: list[tuple[Tensor, ...]] = []
        self._at, self._steps = time.monotonic(), 0

    def add(self, *losses: Tensor) -> None:
        """One step's losses; where the first is not finite, the trainer goes back."""
        self.losses.append(losses)
        late = time.monotonic() - self._at > min(10.0, self.trainer.seconds / 20)
        if len(self.losses) < 200 and not late:
            return
        means = [torch.stack(part).mean().item() for part in zip(*self.losses, strict=True)]
        now = time.monotonic()
        speed = self.batch * len(self.losses) / (now - self._at)
        healthy = self.trainer.check(means[0])
        errors = "".join(f", {10 * math.log10(4 / mse):.2f} dB" if mse > 0 else "" for mse in means[1:])
        log.info(
            "%s step %d, %.0f s: loss %.4f%s, %.0f pictures a second%s",
            self.name,
            self.trainer.step,
            self.trainer.spent,
            means[0],
            errors,
            speed,
            "" if healthy else "; NOT FINITE, taken back",
        )
        self.losses, self._at = [], now


def main() -> None:
    """Command line of the training script."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--work", type=Path, help="folder for checkpoints [OUT.work]")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu", help="sizes for a machine [cpu]")
    parser.add_argument("--minutes", type=float, help="time in all [8 on gpu, 1440 on cpu]")
    parser.add_argument("--only", choices=("decoder", "unet"), help="train one part, with all of the time")
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of scenes, weights and draws [{SEED}]")
    parser.add_argument("--start-from", type=Path, metavar="DIR", help="take weights of this folder where they fit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    preset = PRESETS[args.preset]
    work = args.work or args.out.with_name(args.out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    seconds = 60 * (args.minutes or preset.minutes)
    share = {None: preset.decoder_share, "decoder": 1.0, "unet": 0.0}[args.only]
    start, seed = args.start_from, args.seed

    tokenizer = work / "tokenizer"
    if start is not None and not tokenizer.exists():
        shutil.copytree(start / "tokenizer", tokenizer)
    learnt_tokenizer(tokenizer, seed)
    code = linear_code(work, preset, device)
    scenes = Scenes(work, tokenizer, code, preset, seed=seed, device=device)
    pipeline = new_pipeline(code, tokenizer, start, seed=seed)
    write = functools.partial(publish, code, tokenizer, start, work, args.out, seed=seed)
    rate = 1.0 if start is None else preset.continued
    common: dict[str, Any] = {"rate": rate, "seed": seed, "device": device, "publish": write}
    if share > 0:
        left = share * seconds - (time.monotonic() - started)
        train_decoder(pipeline.vae, scenes, work, preset, seconds=left, **common)
    if share < 1:
        left = (1 - share) * seconds - WRITING_SECONDS if share else seconds
        train_unet(pipeline, scenes, work, preset, seconds=left, **common)
    log.info("wrote %s, %.0f s in all", args.out, time.monotonic() - started)
    finished = AutoencoderKL.from_pretrained(args.out, subfolder="vae", local_files_only=True)
    log.info("autoencoder: %s", kept_by(finished.to(device), preset.measured, device))


@torch.no_grad()
def kept_by(vae: AutoencoderKL, count: int, device: torch.device) -> str:
    """PSNR that the autoencoder gives back plain scenes, strange ones and procedural pictures at, in words."""
    plain = [scene_at(SEED + 1000, index) for index in range(count)]
    rng = random.Random(SEED)
    strange = [
        scene.with_details(rng, STRANGE, pattern=0.7, paint=0.3, ground=0.3, screen=0.3, prop=0.3) for scene in plain
    ]
    size, dtype = architecture.SIZE_PX, next(vae.parameters()).dtype
    pictures = {
        "plain scenes": render_batch(plain, size, device=device),
        "strangers": render_batch(strange, size, device=device),
        "procedural": procedural_batch(count, size, torch.Generator(device).manual_seed(SEED + 1000)),
    }
    words = []
    for name, part in pictures.items():
        x = to_tensor(part, device)
        y = torch.cat([vae.decode(vae.encode(p.to(dtype)).latent_dist.mean).sample.float() for p in x.split(16)])
        errors = (y.clamp(-1, 1) - x).square().mean((1, 2, 3)).clamp_min(1e-10)
        words.append(f"{name} {(10 * torch.log10(4 / errors)).mean().item():.2f} dB")
    return ", ".join(words)


if __name__ == "__main__":
    main()
