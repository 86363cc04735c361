"""Trains the bundled model from nothing but the renderer: ``python -m lowmem_imagic.demo.train --out DIR``.

Four steps, each resumable (run the same command again) and seeded: render scenes; train the VAE;
encode the pictures; train UNet and text encoder together, with 10 % empty captions. The result is a
diffusers ``StableDiffusionPipeline`` folder in fp16. About 90 minutes on two CPU cores.

``--start-from DIR`` goes on from a finished folder instead: its VAE and tokenizer are kept, its UNet and text
encoder trained further, on scenes of another ``--seed``.

What a step draws depends only on (seed, step), so a resumed training draws what an uninterrupted
one would have drawn. Checkpoints are safetensors: weights, averages and optimiser moments.
"""

import argparse
import logging
import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTokenizerFast

from . import architecture
from .render import render
from .scene import Scene

log = logging.getLogger("lowmem_imagic.demo.train")

EMPTY_CAPTION_SHARE = 0.1
MIN_SNR, MAX_WEIGHT = 5.0, 10.0
"""Bounds of the weight of a timestep, see `loss_weights`."""


def scene_at(seed: int, index: int) -> Scene:
    """Scene number `index` of the set with this seed."""
    return Scene.draw(random.Random(f"{seed}/{index}"))


def _render_at(item: tuple[int, int]) -> np.ndarray:
    return np.asarray(render(scene_at(*item), architecture.SIZE_PX))


def rendered(path: Path, *, seed: int, count: int, processes: int) -> np.ndarray:
    """Pictures (count, 64, 64, 3) uint8 of scenes 0..count-1; those that `path` holds are not rendered again."""
    size = architecture.SIZE_PX
    pictures = np.empty((count, size, size, 3), np.uint8)
    there = 0
    if path.exists():
        before = np.load(path, allow_pickle=False)[:count]
        there = len(before)
        pictures[:there] = before
    if there == count:
        return pictures
    with multiprocessing.get_context("spawn").Pool(processes, _one_thread) as pool:
        work = pool.imap(_render_at, ((seed, index) for index in range(there, count)), chunksize=32)
        bar = tqdm(work, initial=there, total=count, desc="rendering", mininterval=5)
        for index, picture in enumerate(bar, start=there):
            pictures[index] = picture
    partial = path.with_suffix(".partial.npy")
    np.save(partial, pictures, allow_pickle=False)
    os.replace(partial, path)
    return pictures


def _one_thread() -> None:
    torch.set_num_threads(1)


def to_tensor(pictures: np.ndarray, device: torch.device) -> Tensor:
    """(B, 3, H, W) in [-1, 1] from (B, H, W, 3) uint8."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def loss_weights(scheduler: DDIMScheduler) -> Tensor:
    """Weight (1000,) of each timestep's squared error of the noise.

    What and where an object is, is settled at high noise, where the plain loss is all but blind: there the weight
    is that of the velocity, 1 + 1/SNR (Salimans and Ho 2022, equation 13 and appendix D), at most `MAX_WEIGHT`.
    At low noise it falls as `MIN_SNR` / SNR (Hang et al. 2023, section 3.4).
    """
    kept: Tensor = scheduler.alphas_cumprod
    snr = kept / (1 - kept)
    return (1 + 1 / snr).clamp_max(MAX_WEIGHT) * (MIN_SNR / snr).clamp_max(1.0)


class Trainer:
    """AdamW with warm-up and cosine decay, an exponential average of the weights, and checkpoints on disk."""

    def __init__(self, modules: dict[str, torch.nn.Module], *, path: Path, steps: int, learning_rate: float) -> None:
        self.path, self.steps, self.step = path, steps, 0
        self.parameters = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
        }
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, foreach=True
        )
        warmup = max(1, min(300, steps // 10))

        def rate(step: int) -> float:
            progress = max(0.0, (step / steps - 0.25) / 0.75)
            return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

        self.rate, self.base_rate = rate, learning_rate
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        if path.exists():
            self._load()

    def _load(self) -> None:
        state = load_file(self.path)
        self.step = int(state["step"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[f"weight/{name}"])
                self.average[name].copy_(state[f"average/{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": state[f"m/{name}"].to(parameter.device),
                    "exp_avg_sq": state[f"v/{name}"].to(parameter.device),
                }

    def save(self) -> None:
        """Writes the checkpoint; an interrupted write leaves the old one."""
        state: dict[str, Tensor] = {"step": torch.tensor(self.step)}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            state[f"weight/{name}"] = parameter.detach().contiguous()
            state[f"average/{name}"] = self.average[name].contiguous()
            state[f"m/{name}"] = moments["exp_avg"].contiguous()
            state[f"v/{name}"] = moments["exp_avg_sq"].contiguous()
        partial = self.path.with_suffix(".partial")
        save_file(state, partial)
        os.replace(partial, self.path)

    def __iter__(self) -> Iterator[int]:
        """The steps still to do; saves every 250 and at the end."""
        bar = tqdm(
            range(self.step, self.steps),
            initial=self.step,
            total=self.steps,
            desc=self.path.stem,
            mininterval=5,
        )
        for step in bar:
            yield step
            self.step = step + 1
            if self.step % 250 == 0 or self.step == self.steps:
                self.save()

    def update(self, loss: Tensor) -> None:
        """One optimiser step on `loss`, and the average follows."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_rate * self.rate(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0, foreach=True)
        self.optimizer.step()
        decay = min(0.999, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    def use_average(self) -> None:
        """Puts the averaged weights into the modules."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])


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
        edges = sum(F.l1_loss(torch.diff(y, dim=dim), torch.diff(x, dim=dim)) for dim in (-1, -2))
        mse = F.mse_loss(y, x)
        trainer.update(0.5 * F.l1_loss(y, x) + 3 * mse + 0.25 * edges + 2e-6 * posterior.kl().mean())
        if step % 100 == 0:
            psnr = 10 * math.log10(4 / mse.item())
            log.info("vae step %d: %.2f dB, %.0f s", step, psnr, time.monotonic() - started)
    trainer.use_average()
    means = encoded(vae, pictures[:512], device)
    vae.register_to_config(scaling_factor=round(1 / means.std().item(), 5))
    return vae.eval()


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
    compiled: bool = False,
) -> None:
    """Trains the pipeline's UNet and text encoder together on latents and captions of the scenes."""
    vae, tokenizer, scheduler = pipeline.vae.to(device), pipeline.tokenizer, pipeline.scheduler
    text_encoder = pipeline.text_encoder.to(device).train()
    unet = pipeline.unet.to(device, memory_format=torch.channels_last).train()
    predict = torch.compile(unet) if compiled else unet
    weights = loss_weights(scheduler).to(device)
    scale = vae.config.scaling_factor
    latents = encoded(vae, pictures, device) * scale
    mirrored = encoded(vae, np.ascontiguousarray(pictures[:, :, ::-1]), device) * scale

    trainer = Trainer(
        {"unet": unet, "text_encoder": text_encoder},
        path=work / "unet.safetensors",
        steps=steps,
        learning_rate=1e-3,
    )
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
        noisy = scheduler.add_noise(x, noise, timesteps).contiguous(memory_format=torch.channels_last)
        noise_pred = predict(noisy, timesteps, text_encoder(tokens)[0]).sample
        errors = F.mse_loss(noise_pred, noise, reduction="none").mean((1, 2, 3))
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
    """Writes the pipeline in fp16 into the folder `out`, its files readable by everyone."""
    pipeline.to("cpu", torch.float16).save_pretrained(out, safe_serialization=True)
    # transformers 5.6 and later leave out a prefix that earlier versions need and all take.
    text_encoder = out / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(text_encoder).items()}
    save_file(tensors, text_encoder, metadata={"format": "pt"})
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
    parser.add_argument("--unet-steps", type=int, default=4500, help="UNet and text encoder steps [4500]")
    parser.add_argument("--unet-batch", type=int, default=32, help="pictures per UNet step [32]")
    parser.add_argument("--seed", type=int, default=0, help="seed of scenes, weights and draws [0]")
    parser.add_argument(
        "--start-from", type=Path, metavar="DIR", help="a finished pipeline whose UNet and text encoder train on"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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
    vae_steps, unet_steps = args.vae_steps, args.unet_steps
    if args.now:
        unet_steps = int(load_file(work / "unet.safetensors")["step"])
    if args.start_from:
        pipeline = StableDiffusionPipeline.from_pretrained(
            args.start_from, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True
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
        compiled=args.compile,
    )
    save(pipeline, args.out)
    log.info("wrote %s", args.out)


if __name__ == "__main__":
    main()
