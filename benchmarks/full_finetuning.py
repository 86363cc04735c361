"""Imagic as published: the embedding, then every weight of the UNet (paper section 3.2), with Adam.

The baseline for this package's adapters; it needs a base in fp32, and its edits are whole UNets.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor

from lowmem_imagic.diffusion.schedules import COARSE_SIDE, coarse, loss_per_edit
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.families.conditioning import Conditioning
from lowmem_imagic.families.stable_diffusion import EMBEDS
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.pictures.letterbox import to_images, to_tensor
from lowmem_imagic.sampling.inversion import own_noise
from lowmem_imagic.sampling.sample import Cell, sample
from lowmem_imagic.settings.stages import EmbedConfig, SampleConfig
from lowmem_imagic.storage.atomic import write_bytes
from lowmem_imagic.training.loop import TrainedTensor, Trainer, draw_rows
from lowmem_imagic.training.run import Run

from .edit_methods import SEED, Method, Outcome, as_photo, digest, embeds, unet_of

EMBED_RATE = 1e-2
"""Learning rate of stage 1, this package's own."""


def full_finetune(
    learning_rate: float,
    *,
    embed_steps: int,
    steps: int,
    draws: int,
    sampling: SampleConfig,
    folder: Path | None = None,
) -> Method:
    """The method; it restores the base's UNet afterwards.

    Args:
        learning_rate: rate for the weights; the paper's is for its own batch size, so it is tuned here.
        embed_steps: steps of stage 1, at rate `EMBED_RATE`.
        steps: steps of stage 2.
        draws: (timestep, noise) draws per step, both stages.
        sampling: settings of sampling; training does not use them.
        folder: folder for each item's embedding and weights (about twice the base's file), so that a stopped run can
            continue and sampling variants share them.
    """
    first = EmbedConfig(steps=embed_steps, draws=draws, learning_rate=EMBED_RATE)

    def run(base: BaseModel, photos: Sequence[Image.Image], sentences: Sequence[str], etas: Sequence[float]) -> Outcome:
        if base.weights != "fp32":
            raise ValueError(f"full fine-tuning needs weights in fp32, the base has {base.weights}")
        untouched = {name: weight.clone() for name, weight in unet_of(base).state_dict().items()}
        pictures: dict[float, list[Image.Image]] = {eta: [] for eta in etas}
        train_s = sample_s = 0.0
        for photo, sentence in zip(photos, sentences, strict=True):
            latents = base.encode_images(to_tensor(photo))
            target = base.encode_text([sentence, sampling.negative_prompt]).rows(slice(1))
            facts: dict[str, Any] = {
                "embed": asdict(first),
                "base": base.identity.files,
                "photo": as_photo(photo).sha256,
                "sentence": sentence,
            }
            stage1 = _remembered(folder, facts, partial(_embed, base, latents, target, first))
            facts |= {"rate": learning_rate, "steps": steps, "draws": draws}
            tune = partial(_finetune, base, latents, stage1, learning_rate, steps, draws)
            stage2 = _remembered(folder, facts, tune)
            train_s += sum(float(stage.pop("seconds")) for stage in (stage1, stage2))
            started = time.perf_counter()
            noise = None
            if sampling.start == "inverted":
                noise = own_noise(base, base.denoisers[0], latents[0], torch.Generator().manual_seed(SEED))[None]
            unet_of(base).load_state_dict(stage2)
            # An adapter of zeros, so that sampling is exactly this package's own.
            nothing = AdapterPack(
                unet_of(base), base.denoisers[0].names, count=1, adapt="attn", rank=1, alpha=1.0, device=base.device
            )
            cells, low = [Cell(0, eta, SEED) for eta in etas], coarse(latents, COARSE_SIDE)
            made = sample(
                base,
                {"unet": nothing},
                target,
                embeds(stage1["embedding"]),
                cells,
                sampling,
                coarse={"unet": low},
                noise=None if noise is None else {"unet": noise},
            )["unet"]
            for eta, picture in zip(etas, to_images(base.decode(made)), strict=True):
                pictures[eta].append(picture)
            unet_of(base).load_state_dict(untouched)
            sample_s += time.perf_counter() - started
        passes, rendered = (embed_steps + steps) * draws, len(photos) * len(etas)
        return Outcome(pictures, passes, train_s / len(photos), sample_s / rendered)

    settings = {
        "embed": asdict(first),
        "finetune": {"learning_rate": learning_rate, "steps": steps, "draws": draws},
        "sample": asdict(sampling),
    }
    return Method(settings, run)


def _embed(base: BaseModel, latents: Tensor, target: Conditioning, config: EmbedConfig) -> dict[str, Tensor]:
    """e_opt (1, T, D), and the state of its generator."""
    run = Run(base.denoisers[0], latents[0], config, torch.Generator().manual_seed(SEED))
    optimized = target[EMBEDS].to(base.device).clone().requires_grad_()
    optimized.grad = torch.zeros_like(optimized)
    part = TrainedTensor(optimized.detach().flatten(1), optimized.grad.flatten(1), config.learning_rate)
    trainer = Trainer(base, [part], lambda *_: embeds(optimized))
    trainer.begin(0, run)
    while trainer.runs:
        trainer.step()
    if run.diverged:
        raise run.diverged
    return {"embedding": optimized.detach().cpu(), "generator": run.generator.get_state()}


def _finetune(
    base: BaseModel, latents: Tensor, stage1: Mapping[str, Tensor], learning_rate: float, steps: int, draws: int
) -> dict[str, Tensor]:
    """The UNet's weights after stage 2; changes the base's own weights."""
    generator = torch.Generator()
    generator.set_state(stage1["generator"])
    text = stage1["embedding"].repeat_interleave(draws, 0)
    weights = list(unet_of(base).parameters())
    optimizer = torch.optim.Adam([w.requires_grad_() for w in weights], lr=learning_rate, foreach=True)
    for _ in range(steps):
        noisy, timesteps, wanted = draw_rows(latents, draws, base.denoisers[0].schedule, [generator])
        optimizer.zero_grad()
        loss_per_edit(base.predict(base.denoisers[0], noisy, timesteps, embeds(text)), wanted, 1).sum().backward()
        optimizer.step()
    unet_of(base).requires_grad_(False)
    return {
        name: weight.clone(memory_format=torch.contiguous_format) for name, weight in unet_of(base).state_dict().items()
    }


def _remembered(
    folder: Path | None, facts: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The result of `make` with its "seconds"; taken from `folder` if it is there."""
    path = None if folder is None else folder / f"full-{digest(facts)}.safetensors"
    if path is not None and path.exists():
        return load_file(path)
    started = time.perf_counter()
    made = make()
    made["seconds"] = torch.tensor(time.perf_counter() - started)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save(made), overwrite=True)
    return made
