"""Both training stages as plain loops over all edits at once: the reference for `Pack`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowmem_imagic.errors import DivergenceError
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.settings.stages import EmbedConfig, FinetuneConfig, StageConfig
from lowmem_imagic.training.loop import TrainedTensor, Trainer
from lowmem_imagic.training.run import Run, tail
from tests import calls

Progress = Callable[[int, int], None]
"""Called as ``progress(step, steps)`` after every step."""


@dataclass(frozen=True)
class Losses:
    """The losses of a training stage."""

    per_step: Tensor
    """(steps, N) mean squared error of each edit; NaN after one that broke."""
    steps_run: tuple[int, ...]
    """Steps each edit took."""

    def tail(self, edit: int) -> float | None:
        """Mean loss of an edit over the last fifth of its steps; None when it took none."""
        return tail(self.per_step[: self.steps_run[edit], edit].tolist())


class Finetuned(NamedTuple):
    """The result of stage 2."""

    adapters: AdapterPack
    losses: Losses


def embed(
    base: Any,
    latents: Tensor,
    target_embeddings: Tensor,
    config: EmbedConfig,
    generators: Sequence[torch.Generator],
    progress: Progress | None = None,
    *,
    start_noise: Tensor | None = None,
) -> tuple[Tensor, Losses]:
    """Stage 1: e_opt (N, T, D), and the losses on the way; the embedding is trained from e_tgt."""
    # Contiguous: otherwise its rows would be copies, and training would not change the tensor.
    optimized = target_embeddings.float().clone(memory_format=torch.contiguous_format).requires_grad_()
    optimized.grad = torch.zeros_like(optimized)
    part = TrainedTensor(optimized.detach().flatten(1), optimized.grad.flatten(1), config.learning_rate)
    try:
        losses = train(
            base, latents, lambda: optimized, part, config, generators, start_noise=start_noise, progress=progress
        )
    except DivergenceError as error:
        raise base.fault(error, base.denoisers[0], latents[0], calls.row(target_embeddings[0])) from error
    return optimized.detach(), losses


def finetune(
    base: Any,
    latents: Tensor,
    optimized_embeddings: Tensor,
    config: FinetuneConfig,
    generators: Sequence[torch.Generator],
    progress: Progress | None = None,
    *,
    start_noise: Tensor | None = None,
) -> Finetuned:
    """Stage 2: adapters, and the losses on the way; e_opt (N, T, D) is fixed."""
    pack = AdapterPack(
        calls.unet(base),
        calls.NAMES,
        count=len(latents),
        adapt=config.adapt,
        blocks=config.blocks,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
    )
    for edit, generator in enumerate(generators):
        pack.initialize_edit(edit, generator)
    part = TrainedTensor(pack.weights, pack.enable_gradients(), config.learning_rate)
    fixed = optimized_embeddings.float()
    try:
        with pack.attached(calls.unet(base)):
            losses = train(
                base,
                latents,
                lambda: fixed,
                part,
                config,
                generators,
                start_noise=start_noise,
                pack=pack,
                progress=progress,
            )
    except DivergenceError as error:
        raise base.fault(error, base.denoisers[0], latents[0], calls.row(optimized_embeddings[0])) from error
    for parameter in pack.parameters:
        parameter.grad = None
        parameter.requires_grad_(False)
    return Finetuned(pack, losses)


def train(
    base: Any,
    latents: Tensor,
    text: Callable[[], Tensor],
    part: TrainedTensor,
    config: StageConfig,
    generators: Sequence[torch.Generator],
    *,
    start_noise: Tensor | None = None,
    pack: AdapterPack | None = None,
    progress: Progress | None = None,
) -> Losses:
    """Takes edits that begin together through one stage; `part` changes in place.

    Raises:
        DivergenceError: a loss is no longer finite.
    """
    trainer = Trainer(base, [part], lambda *_: calls.given(text()), packs=None if pack is None else {calls.UNET: pack})
    noise = [None] * len(latents) if start_noise is None else start_noise
    rows, denoiser = zip(latents, generators, noise, strict=True), base.denoisers[0]
    runs = [Run(denoiser, x, config, generator, own) for x, generator, own in rows]
    for slot, run in enumerate(runs if config.steps else []):
        trainer.begin(slot, run)
    for step in range(1, config.steps + 1):
        for run in trainer.step().values():
            if run.diverged:
                raise run.diverged
        if progress is not None:
            progress(step, config.steps)
    per_step = torch.tensor([run.losses for run in runs]).view(len(runs), config.steps).T
    return Losses(per_step, tuple(len(run.losses) for run in runs))
