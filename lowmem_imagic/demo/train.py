"""Trains the bundled model from nothing but the renderer: ``python -m lowmem_imagic.demo.train --out DIR``.

Four steps, each resumable (run the same command again) and seeded: render scenes; train the VAE;
encode the pictures; train UNet and text encoder together, with 10 % empty captions. The result is a
diffusers ``StableDiffusionPipeline`` folder in fp16. About 90 minutes on two CPU cores.

``--start-from DIR`` goes on from a finished folder instead, on scenes of another ``--seed``: its tokenizer and the
encoder of its VAE are kept, so that latents stay what they are, and the rest is trained further: the decoder for
``--decoder-steps``, UNet and text encoder for ``--unet-steps``.

``--bfloat16`` is for processors with matrix units (AMX), where a UNet step in fp32 takes half as long again. Attention
stays in fp32: its backward pass in bfloat16 has no fast path on CPUs (measured: 0.53 of 1.19 s a step).

What a step draws depends only on (seed, step), so a resumed training draws what an uninterrupted
one would have drawn. Checkpoints are safetensors: weights, averages and optimiser moments.
"""

import argparse
import json
import logging
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import CLIPTokenizerFast

from . import architecture, vocabulary
from .pictures import rendered, scene_at, to_tensor
from .scene import Scene
from .trainer import Trainer

log = logging.getLogger("lowmem_imagic.demo.train")

EMPTY_CAPTION_SHARE = 0.1
MIN_SNR, MAX_WEIGHT = 5.0, 10.0
"""Bounds of the weight of a timestep, see `loss_weights`."""


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
    """Computes attention in fp32 inside of bfloat16 autocast."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value, *rest = args
        with torch.autocast(query.device.type, enabled=False):
            return func(query.float(), key.float(), value.float(), *rest, **(kwargs or {})).to(query.dtype)


def _reconstruction_loss(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a picture's reconstruction is trained by, and its mean squared error alone."""
    edges = sum(F.l1_loss(torch.diff(y, dim=dim), torch.diff(x, dim=dim)) for dim in (-1, -2))
    mse = F.mse_loss(y, x)
    return 0.5 * F.l1_loss(y, x) + 3 * mse + 0.25 * edges, mse


def train_vae(
    pictures: np.ndarray, work: Path, *, steps: int, batch: int, seed: int, device: torch.device
) -> AutoencoderKL:
    """The autoencoder trained on `pictures`, its `scaling_factor` set so that latents have unit variance."""
    torch.manual_seed(seed)
    vae = architecture.new_vae().to(device, memory_format=torch.channels_last)
    trainer = Trainer({"vae": vae}, path=work / "vae.safetensors", steps=steps, learning_rate=1.5e-3)
    started = time.monotonic()
    for step in trainer:
        draw = np.random.default_rng([seed, step])
        x = to_tensor(pictures[draw.integers(len(pictures), size=batch)], device)
        x = (x.flip(-1) if draw.random() < 0.5 else x).contiguous(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        error, mse = _reconstruction_loss(y, x)
        trainer.update(error + 2e-6 * posterior.kl().mean())
        if step % 100 == 0:
            psnr = 10 * math.log10(4 / mse.item())
            log.info("vae step %d: %.2f dB, %.0f s", step, psnr, time.monotonic() - started)
    trainer.use_average()
    means = encoded(vae, pictures[:512], device)
    vae.register_to_config(scaling_factor=round(1 / means.std().item(), 5))
    return vae.eval()


def train_decoder(
    vae: AutoencoderKL,
    pictures: np.ndarray,
    work: Path,
    *,
    steps: int,
    batch: int,
    seed: int,
    device: torch.device,
    bfloat16: bool = False,
) -> None:
    """Trains the decoder of a finished autoencoder further, on the latents that its encoder gives: those stay."""
    vae = vae.to(device)
    decoding: dict[str, torch.nn.Module] = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    trainer = Trainer(decoding, path=work / "decoder.safetensors", steps=steps, learning_rate=1e-3)
    if trainer.step < steps:
        latents = encoded_both_ways(vae, pictures, device)
    started = time.monotonic()
    for step in trainer:
        draw = np.random.default_rng([seed, step])
        chosen, flip = draw.integers(len(pictures), size=batch), int(draw.random() < 0.5)
        x = to_tensor(pictures[chosen], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            y = vae.decode(latents[flip][chosen].to(device)).sample
        error, mse = _reconstruction_loss(y.float(), x.flip(-1) if flip else x)
        trainer.update(error)
        if step % 100 == 0:
            psnr = 10 * math.log10(4 / mse.item())
            log.info("decoder step %d: %.2f dB, %.0f s", step, psnr, time.monotonic() - started)
    trainer.use_average()
    vae.eval()


@torch.no_grad()
def encoded(vae: AutoencoderKL, pictures: np.ndarray, device: torch.device) -> Tensor:
    """Posterior means (B, 4, 16, 16) of the pictures, not scaled."""
    parts = [
        vae.encode(to_tensor(pictures[i : i + 64], device).contiguous(memory_format=torch.channels_last))
        .latent_dist.mean.cpu()
        .contiguous()
        for i in range(0, len(pictures), 64)
    ]
    return torch.cat(parts)


def encoded_both_ways(vae: AutoencoderKL, pictures: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """`encoded` of the pictures and of their mirror images."""
    return encoded(vae, pictures, device), encoded(vae, np.ascontiguousarray(pictures[:, :, ::-1]), device)


def new_pipeline(vae: AutoencoderKL, scenes: list[Scene], work: Path, *, seed: int) -> StableDiffusionPipeline:
    """The pipeline around a trained VAE, UNet and text encoder untrained."""
    torch.manual_seed(seed + 1)
    tokenizer = _tokenizer(scenes[:4000], work / "tokenizer", seed)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=architecture.new_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=architecture.new_unet(),
        scheduler=architecture.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_unet(
    pipeline: StableDiffusionPipeline,
    pictures: np.ndarray,
    scenes: list[Scene],
    work: Path,
    *,
    steps: int,
    batch: int,
    seed: int,
    device: torch.device,
    learning_rate: float = 1e-3,
    compiled: bool = False,
    bfloat16: bool = False,
) -> None:
    """Trains the pipeline's UNet and text encoder together on latents and captions of the scenes."""
    vae, tokenizer, scheduler = pipeline.vae.to(device), pipeline.tokenizer, pipeline.scheduler
    text_encoder = pipeline.text_encoder.to(device).train()
    # Both ways measured: in fp32 channels last is the faster one, in bfloat16 the slower.
    layout = torch.contiguous_format if bfloat16 else torch.channels_last
    unet = pipeline.unet.to(device, memory_format=layout).train()
    predict = torch.compile(unet) if compiled else unet
    weights = loss_weights(scheduler).to(device)
    scale = vae.config.scaling_factor
    trainer = Trainer(
        {"unet": unet, "text_encoder": text_encoder},
        path=work / "unet.safetensors",
        steps=steps,
        learning_rate=learning_rate,
    )
    if trainer.step < steps:
        latents, mirrored = (scale * part for part in encoded_both_ways(vae, pictures, device))
    started, losses = time.monotonic(), []
    for step in trainer:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        flip = torch.rand(batch, generator=generator) < 0.5
        rng = random.Random(f"{seed}/captions/{step}")
        captions = [
            "" if rng.random() < EMPTY_CAPTION_SHARE else scenes[index].caption(rng) for index in chosen.tolist()
        ]
        tokens = tokenizer(
            captions,
            padding="max_length",
            max_length=architecture.TOKENS,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(device)
        x = torch.where(flip[:, None, None, None], mirrored[chosen], latents[chosen]).to(device)
        noise = torch.randn(x.shape, generator=generator).to(device)
        # Stratified timesteps: one from each of `batch` equal parts of the schedule.
        parts = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        timesteps = (parts * scheduler.config.num_train_timesteps).long().to(device)
        noisy = scheduler.add_noise(x, noise, timesteps).contiguous(memory_format=layout)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16), Fp32Attention():
            noise_pred = predict(noisy, timesteps, text_encoder(tokens)[0]).sample
        errors = F.mse_loss(noise_pred.float(), noise, reduction="none").mean((1, 2, 3))
        loss = (weights[timesteps] * errors).mean()
        trainer.update(loss)
        losses.append(loss.item())
        if step % 100 == 0:
            mean = sum(losses[-100:]) / len(losses[-100:])
            log.info("unet step %d: loss %.4f, %.0f s", step, mean, time.monotonic() - started)
    trainer.use_average()
    text_encoder.eval()
    unet.eval()


def _tokenizer(scenes: list[Scene], folder: Path, seed: int) -> CLIPTokenizerFast:
    """The tokenizer learnt from captions of `scenes`; the one in `folder` where it was learnt before.

    Kept, because merges of equal frequency may be learnt in another order when training resumes.
    """
    if not folder.exists():
        rng = random.Random(seed)
        partial = folder.with_suffix(".partial")
        architecture.train_tokenizer([scene.caption(rng) for scene in scenes]).save_pretrained(partial)
        os.replace(partial, folder)
    return CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)


def save(pipeline: StableDiffusionPipeline, out: Path) -> None:
    """Writes the pipeline in fp16 into the folder `out`, its files readable by everyone and without local paths."""
    pipeline.to("cpu", torch.float16).save_pretrained(out, safe_serialization=True)
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
    vocabulary.write(out)
    # transformers 4 reads the vocabulary from these two files, transformers 5 from tokenizer.json.
    pipeline.tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))
    for path in out.rglob("*"):
        # safetensors makes files that only their owner may read.
        path.chmod(0o755 if path.is_dir() else 0o644)


def main() -> None:
    """Command line of the training script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished pipeline")
    parser.add_argument("--work", type=Path, help="folder for pictures and checkpoints [OUT.work]")
    parser.add_argument("--scenes", type=int, default=14000, help="training scenes [14000]")
    parser.add_argument("--vae-steps", type=int, default=1500, help="autoencoder steps [1500]")
    parser.add_argument("--vae-batch", type=int, default=20, help="pictures per autoencoder step [20]")
    parser.add_argument("--decoder-steps", type=int, default=0, help="decoder steps, with --start-from [0]")
    parser.add_argument("--unet-steps", type=int, default=4500, help="UNet and text encoder steps [4500]")
    parser.add_argument("--unet-batch", type=int, default=32, help="pictures per UNet step [32]")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of UNet and text encoder [1e-3]")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes, weights and draws [0]")
    parser.add_argument(
        "--start-from", type=Path, metavar="DIR", help="a finished pipeline, to be trained further; see above"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="decoder and UNet in bfloat16, see above")
    parser.add_argument("--compile", action="store_true", help="a quarter faster; needs a C++ compiler on CPUs")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="rendering processes")
    parser.add_argument(
        "--now",
        action="store_true",
        help="train no further: write the pipeline from the checkpoints as they are",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work = args.work or args.out.with_name(args.out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)

    pictures = rendered(work / "pictures.npy", seed=args.seed, count=args.scenes, processes=args.processes)
    scenes = [scene_at(args.seed, index) for index in range(len(pictures))]
    vae_steps, decoder_steps, unet_steps = args.vae_steps, args.decoder_steps, args.unet_steps
    if args.now:
        unet_steps = int(load_file(work / "unet.safetensors")["step"])
    if args.start_from:
        if args.now and decoder_steps:
            decoder_steps = int(load_file(work / "decoder.safetensors")["step"])
        pipeline = StableDiffusionPipeline.from_pretrained(
            args.start_from, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
        train_decoder(
            pipeline.vae,
            pictures,
            work,
            steps=decoder_steps,
            batch=args.vae_batch,
            seed=args.seed,
            device=device,
            bfloat16=args.bfloat16,
        )
    else:
        if args.now:
            vae_steps = int(load_file(work / "vae.safetensors")["step"])
        vae = train_vae(pictures, work, steps=vae_steps, batch=args.vae_batch, seed=args.seed, device=device)
        pipeline = new_pipeline(vae, scenes, work, seed=args.seed)
    train_unet(
        pipeline,
        pictures,
        scenes,
        work,
        steps=unet_steps,
        batch=args.unet_batch,
        seed=args.seed,
        device=device,
        learning_rate=args.learning_rate,
        compiled=args.compile,
        bfloat16=args.bfloat16,
    )
    save(pipeline, args.out)
    log.info("wrote %s", args.out)


if __name__ == "__main__":
    main()
