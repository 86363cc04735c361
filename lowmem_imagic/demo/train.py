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

``--start-from DIR`` takes the tokenizer of a folder, and of its weights those whose names and shapes agree.
"""

import argparse
import contextlib
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

from . import architecture, codec, fused_norm, vocabulary
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
from .trainer import Trainer, averaged

log = logging.getLogger("lowmem_imagic.demo.train")

EMPTY_CAPTION_SHARE = 0.1
CAPTIONS = 4
"""Captions of a scene; each training step takes one of them."""
MIN_SNR, MAX_WEIGHT = 5.0, 10.0
"""Bounds of the weight of a timestep, see `loss_weights`."""
SEED = 8
"""Of the bundled model's scenes; 1 is the judge's, 2, 5 and 6 are held out for benchmarks."""
CODE_SEED = 1008
"""Of the pictures that the encoder is computed from; the same for every model, so that latents are comparable."""
WRITING_SECONDS = 8
"""Kept for writing the folder."""
CROP_PX, WHOLE_FROM = 64, 0.8
"""The decoder sees crops, which make for more steps, until this share of its time; then fewer whole pictures, or what
it learnt of a crop's borders would show inside them."""
LATENT_NOISE = 0.01
"""Deviation of the noise on latents that the decoder is trained with, as a sampler's latents are not exact."""
SHARD = "15MB"
"""Largest file of a finished folder."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What fits a machine."""

    minutes: float
    decoder_share: float
    """Of the time."""
    scenes: int
    """Scenes in all."""
    uses: float
    """Training samples of a scene, before there are as many as `scenes`."""
    kept_pictures: int
    """Scenes whose pictures are kept for the decoder."""
    code_pictures: int
    """Pictures of each kind that the encoder is computed from."""
    procedural: int
    """Procedural pictures in stock."""
    together: int
    """Pictures drawn at a time."""
    decoder_batch: int
    decoder_rate: float
    unet_batch: int
    unet_rate: float
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
        decoder_share=0.3,
        scenes=64 * 1024,
        uses=8,
        kept_pictures=16 * 1024,
        code_pictures=1024,
        procedural=8192,
        together=128,
        decoder_batch=256,
        decoder_rate=0.02,
        unet_batch=1024,
        unet_rate=0.02,
        supersampling=2,
        bfloat16=True,
        processes=6,
        save_every=60,
        measured=128,
    ),
    "cpu": Preset(
        minutes=1440,
        decoder_share=0.2,
        scenes=64 * 1024,
        uses=32,
        kept_pictures=2048,
        code_pictures=512,
        procedural=2048,
        together=8,
        decoder_batch=32,
        decoder_rate=0.01,
        unet_batch=32,
        unet_rate=0.01,
        supersampling=2,
        bfloat16=True,
        processes=1,
        save_every=300,
        measured=32,
    ),
    # Checks that everything runs, in seconds; the model is of no use.
    "tiny": Preset(
        minutes=0.2,
        decoder_share=0.4,
        scenes=CHUNK,
        uses=4,
        kept_pictures=16,
        code_pictures=8,
        procedural=8,
        together=4,
        decoder_batch=6,
        decoder_rate=0.01,
        unet_batch=4,
        unet_rate=0.01,
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
        # By position in transformers, by name in diffusers' transformers.
        named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        if func is not F.scaled_dot_product_attention or named["query"].is_cuda:
            return func(*args, **(kwargs or {}))

        def exact(value: Any) -> Any:
            return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

        result = func(*map(exact, args), **{name: exact(value) for name, value in (kwargs or {}).items()})
        return result.to(named["query"].dtype)


def _reconstruction_loss(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a picture's reconstruction is trained by, and its squared error alone (B,)."""
    edges = sum(F.l1_loss(torch.diff(y, dim=dim), torch.diff(x, dim=dim)) for dim in (-1, -2))
    mse = F.mse_loss(y, x, reduction="none").mean((1, 2, 3))
    return 0.25 * F.l1_loss(y, x) + 3 * mse.mean() + 0.15 * edges, mse


class Scenes:
    """Training scenes on the device, as latents and tokens of their captions; the first ones as pictures, too.

    They are rendered little by little, a chunk at a time, and each chunk is kept in a file.
    """

    def __init__(
        self, work: Path, tokenizer: Path, code: codec.LinearCode, preset: Preset, *, seed: int, device: torch.device
    ) -> None:
        self.folder = work / f"scenes-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.preset, self.code, self.device, self.count = preset, code, device, 0
        size, side = architecture.SIZE_PX, architecture.SIZE_PX // architecture.DOWNSAMPLING
        self.total = preset.scenes
        shape = (self.total, architecture.LATENT_CHANNELS, side, side)
        self.latents = torch.empty(shape, dtype=torch.float16, device=device)
        self.tokens = torch.empty(self.total, CAPTIONS, architecture.TOKENS, dtype=torch.int32, device=device)
        self.pictures = torch.empty(preset.kept_pictures, size, size, 3, dtype=torch.uint8, device=device)
        there = 0
        while self._file(there).exists():
            self._take(load_file(self._file(there)))
            there += 1
        self._chunks: Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]] = prepared(
            functools.partial(_prepare, tokenizer), seed, self.total, processes=preset.processes, start=self.count
        )

    def _file(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}.safetensors"

    def _take(self, chunk: dict[str, Tensor]) -> None:
        rows = min(CHUNK, self.total - self.count)
        place = slice(self.count, self.count + rows)
        self.latents[place] = chunk["latents"][:rows].to(self.device)
        self.tokens[place] = chunk["tokens"][:rows].to(self.device)
        kept = self.pictures[place]
        kept.copy_(chunk["pictures"][: len(kept)])
        self.count += rows

    def grow(self, count: int) -> None:
        """Renders until there are at least so many."""
        while self.count < min(count, self.total):
            rows, tokens = next(self._chunks)
            path = self._file(self.count // CHUNK)
            if path.exists():
                # Another process, which trains the other part, was here first.
                self._take(load_file(path))
                continue
            pictures = render_batch(
                rows, architecture.SIZE_PX, supersampling=self.preset.supersampling, device=self.device
            )
            kept = max(0, min(CHUNK, len(self.pictures) - self.count))
            chunk = {
                "latents": torch.cat([self.code.encode(to_tensor(p, self.device)) for p in pictures.split(64)]).half(),
                "tokens": torch.from_numpy(tokens),
                "pictures": pictures[:kept],
            }
            self._take(chunk)
            partial = path.with_suffix(f".partial-{os.getpid()}")
            save_file({name: part.cpu().contiguous() for name, part in chunk.items()}, partial)
            os.replace(partial, path)


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
    seed: int,
    device: torch.device,
    publish: Callable[[], None],
) -> None:
    """Trains the decoder on the scenes and on procedural pictures; `publish` is called after every checkpoint."""
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
        learning_rate=preset.decoder_rate,
        adam_rate=1.5e-3,
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
    seed: int,
    device: torch.device,
    publish: Callable[[], None],
) -> None:
    """Trains the pipeline's UNet and text encoder together; `publish` is called after every checkpoint."""
    started = time.monotonic()
    dtype = torch.bfloat16 if preset.bfloat16 else torch.float32
    scheduler = pipeline.scheduler
    text_encoder = pipeline.text_encoder.to(device, dtype).train()
    unet = on_device(pipeline.unet, device, dtype)
    attention = contextlib.nullcontext() if device.type == "cuda" else Fp32Attention()
    weights, kept = loss_weights(scheduler).to(device), scheduler.alphas_cumprod.to(device)
    scenes.grow(min(2 * CHUNK, scenes.total))
    trainer = Trainer(
        {"unet": unet, "text_encoder": text_encoder},
        path=work / "unet.safetensors",
        seconds=seconds - (time.monotonic() - started),
        learning_rate=preset.unet_rate,
        adam_rate=7e-4,
        save_every=preset.save_every,
        averaging=0.9995,
    )
    trainer.after_save = publish
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + trainer.step)
    empty = _tokens(pipeline.tokenizer, [""]).to(device, torch.int32)
    batch, steps = preset.unet_batch, len(kept)
    report = _Report("unet", batch, trainer)
    for step in trainer:
        scenes.grow(int((step + 1) * batch / preset.uses))

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        chosen = torch.randint(scenes.count, (batch,), generator=generator, device=device)
        mirror = torch.randint(2, (batch, 1, 1, 1), generator=generator, device=device)
        caption = torch.randint(CAPTIONS, (batch,), generator=generator, device=device)
        tokens = torch.where(uniform(batch, 1) < EMPTY_CAPTION_SHARE, empty, scenes.tokens[chosen, caption]).long()
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


def new_pipeline(code: codec.LinearCode, tokenizer: Path, start: Path | None, *, seed: int) -> StableDiffusionPipeline:
    """The whole model with its encoder; all else is untrained, or taken from `start` where names and shapes agree."""
    torch.manual_seed(seed + 1)
    words = _tokenizer_at(tokenizer)
    vae, unet, text_encoder = architecture.new_vae(), architecture.new_unet(), architecture.new_text_encoder(words)
    if start is not None:
        for part, module in (("vae", vae), ("unet", unet), ("text_encoder", text_encoder)):
            own = module.state_dict()
            theirs = {
                name.removeprefix("text_model."): tensor
                for path in (start / part).glob("*.safetensors")
                for name, tensor in load_file(path).items()
            }
            fitting = {name: t.float() for name, t in theirs.items() if name in own and t.shape == own[name].shape}
            if part == "vae" and len(fitting) < len(own):
                # Pieces of another autoencoder's decoder are worth nothing.
                continue
            module.load_state_dict(fitting, strict=False)
            log.info("%s: %d of %d tensors from %s", part, len(fitting), len(own), start.name)
    codec.write_linear_encoder(vae, code)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=words,
        unet=unet,
        scheduler=architecture.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


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
    vocabulary.write(out)
    # transformers 4 reads the vocabulary from these two files, transformers 5 from tokenizer.json.
    pipeline.tokenizer.backend_tokenizer.model.save(str(out / "tokenizer"))
    for path in out.rglob("*"):
        # safetensors makes files that only their owner may read.
        path.chmod(0o755 if path.is_dir() else 0o644)


def publish(code: codec.LinearCode, tokenizer: Path, start: Path | None, work: Path, out: Path, *, seed: int) -> None:
    """Writes the folder `out` from the averaged weights of all checkpoints that there are."""
    pipeline = new_pipeline(code, tokenizer, start, seed=seed)
    modules = {
        "unet.unet": pipeline.unet,
        "unet.text_encoder": pipeline.text_encoder,
        "decoder.decoder": pipeline.vae.decoder,
        "decoder.post_quant_conv": pipeline.vae.post_quant_conv,
    }
    for place, module in modules.items():
        file, _, prefix = place.partition(".")
        path = work / f"{file}.safetensors"
        if not path.exists():
            continue
        weights = averaged(path)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(weights[f"{prefix}.{name}"].view(parameter.shape))
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    save(pipeline, partial)
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
    common: dict[str, Any] = {"seed": seed, "device": device, "publish": write}
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
