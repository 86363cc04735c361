"""Trains the bundled model from nothing but the renderer: ``python -m lowmem_imagic.demo.train --out DIR``.

Two trainings share the time of ``--minutes``: the autoencoder's, on scenes and on procedural pictures, so that it
holds any picture; and that of UNet and text encoder, on scenes and captions, a tenth of them empty. The result is a
diffusers ``StableDiffusionPipeline`` folder in fp16.

``--preset gpu`` takes minutes of one large card: pictures are drawn on it beside training, and nothing but numbers
of scenes and captions comes from the CPU. ``--preset cpu`` is for a job of many hours: run the same command again
after a stop, and it goes on from the checkpoints in ``--work`` with the time that is left.

``--start-from DIR`` takes autoencoder and tokenizer of a finished folder as they are, so that latents stay what they
are, and trains its UNet and text encoder further. Give another ``--seed`` for other scenes.

Every minute, and at the end, ``--out`` is written from the averaged weights.
"""

import argparse
import contextlib
import copy
import functools
import json
import logging
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import CLIPTokenizerFast

from . import architecture, fused_norm
from .pictures import (
    CHUNK,
    ProceduralPictures,
    packed,
    prepared,
    render_batch,
    scene_at,
    to_tensor,
    training_scene_at,
)
from .procedural import procedural_batch
from .strangers import STRANGE
from .trainer import Trainer

log = logging.getLogger("lowmem_imagic.demo.train")

EMPTY_CAPTION_SHARE = 0.1
CAPTIONS = 4
"""Captions of a scene; each training step takes one of them."""
MIN_SNR, MAX_WEIGHT = 5.0, 10.0
"""Bounds of the weight of a timestep, see `loss_weights`."""
SEED = 8
"""Of the bundled model's scenes; 1 is the judge's, 2, 5 and 6 are held out for benchmarks."""
WRITING_SECONDS = 8
"""Kept for writing the folder."""
KL_WEIGHT = 2e-3
"""Of a latent's divergence from noise, beside the error of a pixel."""
CROP_PX, WHOLE_FROM = 64, 0.8
"""The autoencoder sees crops, which make for more steps, until this share of its time; then fewer whole pictures."""
SHARD = "15MB"
"""Largest file of a finished folder."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What fits a machine."""

    minutes: float
    autoencoder_share: float
    """Of the time."""
    scenes: int
    procedural: int
    """Procedural pictures in stock."""
    together: int
    """Pictures drawn at a time."""
    vae_batch: int
    unet_batch: int
    learning_rate: float
    """Of UNet and text encoder."""
    supersampling: int
    bfloat16: bool
    processes: int
    save_every: float
    """Seconds between checkpoints."""
    measured: int
    """Pictures of each kind that the autoencoder is measured on."""


PRESETS = {
    "gpu": Preset(
        minutes=8,
        autoencoder_share=0.4,
        scenes=64 * 1024,
        procedural=8192,
        together=128,
        vae_batch=144,
        unet_batch=1024,
        learning_rate=1.5e-3,
        supersampling=2,
        bfloat16=True,
        processes=6,
        save_every=60,
        measured=128,
    ),
    "cpu": Preset(
        minutes=1440,
        autoencoder_share=0.4,
        scenes=24 * 1024,
        procedural=2048,
        together=8,
        vae_batch=28,
        unet_batch=32,
        learning_rate=7e-4,
        supersampling=2,
        bfloat16=False,
        processes=1,
        save_every=300,
        measured=32,
    ),
    # Checks that everything runs, in seconds; the model is of no use.
    "tiny": Preset(
        minutes=0.2,
        autoencoder_share=0.4,
        scenes=16,
        procedural=8,
        together=4,
        vae_batch=6,
        unet_batch=4,
        learning_rate=1e-3,
        supersampling=1,
        bfloat16=False,
        processes=1,
        save_every=5,
        measured=2,
    ),
}


def loss_weights(scheduler: DDIMScheduler) -> Tensor:
    """Weight (1000,) of each timestep's squared error of the noise.

    What and where an object is, is settled at high noise, where the plain loss is all but blind: there the weight
    is that of the velocity, 1 + 1/SNR (Salimans and Ho 2022, equation 13 and appendix D), at most `MAX_WEIGHT`.
    At low noise it falls as `MIN_SNR` / SNR (Hang et al. 2023, section 3.4).
    """
    kept: Tensor = scheduler.alphas_cumprod
    snr = kept / (1 - kept)
    return (1 + 1 / snr).clamp_max(MAX_WEIGHT) * (MIN_SNR / snr).clamp_max(1.0)


class Fp32Attention(TorchFunctionMode):
    """Computes attention on CPUs in fp32: in bfloat16 its backward pass has no fast path there."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention or args[0].is_cuda:
            return func(*args, **(kwargs or {}))
        query, key, value, *rest = args
        return func(query.float(), key.float(), value.float(), *rest, **(kwargs or {})).to(query.dtype)


def _reconstruction_loss(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a picture's reconstruction is trained by, and its squared error alone (B,)."""
    edges = sum(F.l1_loss(torch.diff(y, dim=dim), torch.diff(x, dim=dim)) for dim in (-1, -2))
    mse = F.mse_loss(y, x, reduction="none").mean((1, 2, 3))
    return 0.25 * F.l1_loss(y, x) + 3 * mse.mean() + 0.15 * edges, mse


class Scenes:
    """Training scenes on the device: rendered little by little, with their captions as tokens."""

    def __init__(self, tokenizer: Path, preset: Preset, *, seed: int, device: torch.device) -> None:
        self.preset, self.device, self.count = preset, device, 0
        size, total = architecture.SIZE_PX, preset.scenes
        self.total = total
        self.pictures = torch.empty(total, size, size, 3, dtype=torch.uint8, device=device)
        self.tokens = torch.empty(total, CAPTIONS, architecture.TOKENS, dtype=torch.int32, device=device)
        self._chunks: Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]] = prepared(
            functools.partial(_prepare, tokenizer), seed, total, processes=preset.processes
        )

    def grow(self, count: int) -> None:
        """Renders until there are at least this many."""
        while self.count < min(count, self.total):
            rows, tokens = next(self._chunks)
            rows, tokens = rows[: self.total - self.count], tokens[: self.total - self.count]
            place = slice(self.count, self.count + len(rows))
            self.pictures[place] = render_batch(
                rows, architecture.SIZE_PX, supersampling=self.preset.supersampling, device=self.device
            )
            self.tokens[place] = torch.from_numpy(tokens).to(self.device)
            self.count += len(rows)


@functools.cache
def _tokenizer_at(folder: Path) -> Any:
    return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)


def _prepare(tokenizer: Path, seed: int, chunk: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Packed scenes of a chunk, and `CAPTIONS` captions of each as tokens."""
    scenes = [training_scene_at(seed, index) for index in range(chunk * CHUNK, (chunk + 1) * CHUNK)]
    rng = random.Random(f"{seed}/captions/{chunk}")
    captions = [scene.caption(rng) for scene in scenes for _ in range(CAPTIONS)]
    tokens = _tokens(_tokenizer_at(tokenizer), captions)
    return packed(scenes), tokens.numpy().reshape(CHUNK, CAPTIONS, -1).astype(np.int32)


def _tokens(tokenizer: Any, captions: list[str]) -> Tensor:
    tokens: Tensor = tokenizer(
        captions, padding="max_length", max_length=architecture.TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return tokens


def train_vae(
    scenes: Scenes, work: Path, preset: Preset, *, seconds: float, seed: int, device: torch.device
) -> AutoencoderKL:
    """The autoencoder trained on the scenes and on procedural pictures; its latents are standardised, see `settle`."""
    started = time.monotonic()
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if preset.bfloat16 else torch.float32
    vae = on_device(architecture.new_vae(), device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    half = preset.vae_batch // 2
    unfamiliar = ProceduralPictures(preset.procedural, architecture.SIZE_PX, generator, together=preset.together)
    log.info("%d procedural pictures, %.1f s", preset.procedural, _waited(unfamiliar.stock) - started)
    scenes.grow(min(4096, scenes.total // 4))
    log.info("%d scenes, %.1f s", scenes.count, _waited(scenes.pictures) - started)
    trainer = Trainer(
        {"vae": vae},
        path=work / "vae.safetensors",
        seconds=max(1.0, seconds - (time.monotonic() - started)),
        learning_rate=1.5e-3,
        save_every=preset.save_every,
        averaging=0.998,
    )
    generator.manual_seed(seed + 1 + trainer.step)
    rng = random.Random(seed + trainer.step)
    whole = preset.vae_batch * CROP_PX**2 // architecture.SIZE_PX**2
    report = _Report("autoencoder", preset.vae_batch, trainer)
    for _ in trainer:
        scenes.grow(int(scenes.total * min(1.0, 1.1 * trainer.spent / trainer.seconds)))
        chosen = torch.randint(scenes.count, (half,), generator=generator, device=device)
        drawn = torch.stack([scenes.pictures[chosen], unfamiliar.batch(half, renewed=0.25)], 1).flatten(0, 1)
        drawn = _cropped(drawn, rng) if trainer.spent < WHOLE_FROM * trainer.seconds else drawn[:whole]
        x = to_tensor(drawn, device).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x.to(dtype)).latent_dist
        mean, spread = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator, device=device)
        y = vae.decode((mean + (0.5 * spread).exp() * noise).to(dtype)).sample.float()
        error, mse = _reconstruction_loss(y, x)
        kl = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
        trainer.update(error + KL_WEIGHT * kl)
        report.add(error.detach(), mse[0::2].mean().detach(), mse[1::2].mean().detach())
    scenes.grow(scenes.total)
    finished = architecture.new_vae().to(device, memory_format=torch.channels_last).eval()
    finished.load_state_dict({name.removeprefix("vae."): average for name, average in trainer.average.items()})
    settle(finished, scenes.pictures[: 4 * CHUNK], device)
    return finished


def _cropped(pictures: Tensor, rng: random.Random) -> Tensor:
    """A square of the pictures (B, H, W, 3), the same of each."""
    y, x = (rng.randrange(architecture.SIZE_PX - CROP_PX + 1) for _ in range(2))
    return pictures[:, y : y + CROP_PX, x : x + CROP_PX]


def _waited(tensor: Tensor) -> float:
    """The time at which a tensor is there: devices work on while the program goes on."""
    tensor[:1].sum().item()
    return time.monotonic()


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


@torch.no_grad()
def settle(vae: AutoencoderKL, pictures: Tensor, device: torch.device) -> None:
    """Makes each latent channel's mean 0 and variance 1 over the pictures, by the autoencoder's innermost layers."""
    latents = encoded(vae, pictures, device).float()
    mean, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    inward, outward = vae.quant_conv, vae.post_quant_conv
    inward.weight[:channels] /= spread[:, None, None, None]
    inward.bias[:channels] = (inward.bias[:channels] - mean) / spread
    inward.bias[channels:] -= 2 * spread.log()
    outward.bias += (outward.weight[:, :, 0, 0] * mean).sum(1)
    outward.weight *= spread[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encoded(vae: AutoencoderKL, pictures: Tensor, device: torch.device, *, mirrored: bool = False) -> Tensor:
    """Posterior means (B, C, H, W) of pictures (B, H, W, 3) uint8, or of their mirror images, in the VAE's type."""
    dtype = next(vae.parameters()).dtype
    parts = []
    for part in pictures.split(256):
        x = to_tensor(part.flip(2) if mirrored else part, device)
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        parts.append(vae.encode(x).latent_dist.mean.contiguous())
    return torch.cat(parts)


def new_pipeline(vae: AutoencoderKL, tokenizer: Path, *, seed: int) -> StableDiffusionPipeline:
    """The pipeline around a trained VAE, UNet and text encoder untrained."""
    torch.manual_seed(seed + 1)
    words = _tokenizer_at(tokenizer)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=architecture.new_text_encoder(words),
        tokenizer=words,
        unet=architecture.new_unet(),
        scheduler=architecture.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_unet(
    pipeline: StableDiffusionPipeline,
    scenes: Scenes,
    work: Path,
    preset: Preset,
    *,
    seconds: float,
    seed: int,
    device: torch.device,
    publish: Callable[[Trainer], None],
) -> Trainer:
    """Trains the pipeline's UNet and text encoder together; `publish` is called after every checkpoint."""
    vae, scheduler = pipeline.vae.to(device), pipeline.scheduler
    dtype = torch.bfloat16 if preset.bfloat16 else torch.float32
    started = time.monotonic()
    encoder = copy.deepcopy(vae).to(dtype)
    latents = torch.stack([encoded(encoder, scenes.pictures, device, mirrored=m) for m in (False, True)])
    latents *= vae.config.scaling_factor
    del scenes.pictures, encoder
    log.info("%d scenes encoded, %.0f s", scenes.total, time.monotonic() - started)
    text_encoder = pipeline.text_encoder.to(device, dtype).train()
    unet = on_device(pipeline.unet, device, dtype)
    attention = contextlib.nullcontext() if device.type == "cuda" else Fp32Attention()
    weights, kept = loss_weights(scheduler).to(device), scheduler.alphas_cumprod.to(device)
    trainer = Trainer(
        {"unet": unet, "text_encoder": text_encoder},
        path=work / "unet.safetensors",
        seconds=seconds - (time.monotonic() - started),
        learning_rate=preset.learning_rate,
        save_every=preset.save_every,
    )
    trainer.after_save = publish
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + trainer.step)
    empty = _tokens(pipeline.tokenizer, [""]).to(device, torch.int32)
    batch, steps = preset.unet_batch, len(kept)
    report = _Report("unet", batch, trainer)
    for _ in trainer:

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        chosen = torch.randint(scenes.total, (batch,), generator=generator, device=device)
        mirror = torch.randint(2, (batch,), generator=generator, device=device)
        caption = torch.randint(CAPTIONS, (batch,), generator=generator, device=device)
        tokens = torch.where(uniform(batch, 1) < EMPTY_CAPTION_SHARE, empty, scenes.tokens[chosen, caption]).long()
        x = latents[mirror, chosen].float()
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
    return trainer


def learnt_tokenizer(folder: Path, seed: int) -> None:
    """Learns a tokenizer from captions and writes it into a folder, unless it is there.

    Kept, because merges of equal frequency may be learnt in another order when training resumes.
    """
    if not folder.exists():
        rng = random.Random(seed)
        captions = [training_scene_at(seed, index).caption(rng) for index in range(4000)]
        partial = folder.with_suffix(".partial")
        architecture.train_tokenizer(captions).save_pretrained(partial)
        os.replace(partial, folder)


def save(pipeline: StableDiffusionPipeline, out: Path) -> None:
    """Writes the pipeline in fp16 into the folder `out`, its files readable by everyone and without local paths."""
    pipeline.to("cpu", torch.float16).save_pretrained(out, safe_serialization=True, max_shard_size=SHARD)
    for path in (out / "model_index.json", *out.glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        # Where a part was loaded from, which is no setting.
        config.pop("_name_or_path", None)
        if path.parent.name == "text_encoder":
            # transformers loads in this type, or without it in that of the weights, and diffusers loads in fp32: a
            # stock pipeline with default settings would mix the two and fail at the first sentence.
            config.pop("torch_dtype", None)
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # transformers 5.6 and later leave out a prefix that earlier versions need and all take.
    text_encoder = out / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(text_encoder).items()}
    save_file(tensors, text_encoder, metadata={"format": "pt"})
    # transformers 4 reads the vocabulary from these two files, transformers 5 from tokenizer.json.
    pipeline.tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))
    for path in out.rglob("*"):
        # safetensors makes files that only their owner may read.
        path.chmod(0o755 if path.is_dir() else 0o644)


def save_average(pipeline: StableDiffusionPipeline, trainer: Trainer | None, tokenizer: Path, out: Path) -> None:
    """Writes the pipeline as it would be if training ended now; the pipeline goes on as it is."""
    copies = {"vae": architecture.new_vae(), "unet": architecture.new_unet()}
    copies["text_encoder"] = architecture.new_text_encoder(_tokenizer_at(tokenizer))
    for name, module in copies.items():
        module.load_state_dict(getattr(pipeline, name).state_dict())
        own = dict(module.named_parameters())
        if trainer is not None:
            with torch.no_grad():
                for key, average in trainer.average.items():
                    prefix, _, parameter = key.partition(".")
                    if prefix == name:
                        own[parameter].copy_(average)
    copies["vae"].register_to_config(scaling_factor=pipeline.vae.config.scaling_factor)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(
        StableDiffusionPipeline(
            **copies,
            tokenizer=_tokenizer_at(tokenizer),
            scheduler=pipeline.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ),
        partial,
    )
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)


def main() -> None:
    """Command line of the training script."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--work", type=Path, help="folder for checkpoints [OUT.work]")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu", help="sizes for a machine [cpu]")
    parser.add_argument("--minutes", type=float, help="time in all [8 on gpu, 1440 on cpu]")
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of scenes, weights and draws [{SEED}]")
    parser.add_argument("--start-from", type=Path, metavar="DIR", help="a finished folder, to be trained further")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    preset = PRESETS[args.preset]
    work = args.work or args.out.with_name(args.out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    minutes = args.minutes or preset.minutes
    train(preset, args.out, work, minutes=minutes, seed=args.seed, device=device, start=args.start_from, since=started)


def train(
    preset: Preset,
    out: Path,
    work: Path,
    *,
    minutes: float,
    seed: int,
    device: torch.device,
    start: Path | None,
    since: float,
) -> None:
    """Both trainings, and the finished folder; see the command line."""
    tokenizer = work / "tokenizer"
    if start is not None and not tokenizer.exists():
        shutil.copytree(start / "tokenizer", tokenizer)
    learnt_tokenizer(tokenizer, seed)
    scenes = Scenes(tokenizer, preset, seed=seed, device=device)
    seconds = 60 * minutes
    trained = work / "trained_vae.safetensors"
    if start is not None:
        pipeline = StableDiffusionPipeline.from_pretrained(
            start, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
        scenes.grow(scenes.total)
    else:
        if trained.exists():
            vae = architecture.new_vae().to(device, memory_format=torch.channels_last)
            vae.load_state_dict(load_file(trained))
            vae.register_to_config(scaling_factor=1.0)
            scenes.grow(scenes.total)
        else:
            share = seconds * preset.autoencoder_share - (time.monotonic() - since)
            vae = train_vae(scenes, work, preset, seconds=share, seed=seed, device=device)
            save_file({name: t.contiguous() for name, t in vae.state_dict().items()}, trained)
        pipeline = new_pipeline(vae.eval(), tokenizer, seed=seed)
    log.info("autoencoder: %s", kept_by(pipeline.vae.to(device), preset.measured, device))
    trainer_seconds = seconds * (1 - (preset.autoencoder_share if start is None else 0)) - WRITING_SECONDS
    trainer = train_unet(
        pipeline,
        scenes,
        work,
        preset,
        seconds=min(trainer_seconds, seconds - WRITING_SECONDS - (time.monotonic() - since)),
        seed=seed,
        device=device,
        publish=lambda trainer: save_average(pipeline, trainer, tokenizer, out),
    )
    save_average(pipeline, trainer, tokenizer, out)
    log.info("wrote %s, %.0f s in all", out, time.monotonic() - since)


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
