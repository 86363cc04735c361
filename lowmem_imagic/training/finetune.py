"""Stage 2: the model is tuned on the photo with e_opt fixed (paper section 3.2, "Model fine-tuning"); here by LoRA."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.base import BaseModel
from ..errors import DivergenceError
from ..layers.adapter_pack import AdapterPack
from ..settings.stages import FinetuneConfig
from .loop import Progress, Trained, train
from .run import Losses


class Finetuned(NamedTuple):
    """What stage 2 leaves."""

    adapters: AdapterPack
    losses: Losses
    optimized_embeddings: Tensor
    """e_opt, (N, T, D), fp32 on the CPU: as given, unless it was trained on."""


def finetune(
    base: BaseModel,
    latents: Tensor,
    optimized_embeddings: Tensor,
    config: FinetuneConfig,
    generators: Sequence[torch.Generator],
    progress: Progress | None = None,
    *,
    start_noise: Tensor | None = None,
) -> Finetuned:
    """The trained adapters of all edits, and the losses on the way: stage 2 by itself; the base is left as it was.

    Same loss as stage 1 (eq. 2), over the adapters' weights instead of the embedding. With an
    `embedding_learning_rate`, the embedding goes on training beside them (as in Forgedit, arXiv 2309.10556).

    Args:
        base: the frozen base.
        latents: the photos, (N, C, H, W), fp32 on the CPU.
        optimized_embeddings: e_opt, (N, T, D).
        config: steps, learning rate, draws per step, layers, rank, alpha.
        generators: one CPU generator per edit.
        progress: called after every step.
        start_noise: what sampling will start from, (N, C, H, W); see `StageConfig.anchor`.

    Raises:
        DivergenceError: a loss is no longer finite.
        NonFiniteModelError: neither is what the UNet predicts without adapters.

    **Memory**: adapters in fp32, their gradients and two Adam moments: 16 bytes a weight, 4 more with averaging.
    """
    pack = AdapterPack(
        base.unet,
        edits=len(latents),
        adapt=config.adapt,
        blocks=config.blocks,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        device=base.device,
    )
    pack.initialize(generators)
    trained = [Trained(pack.weights, pack.enable_gradients(), config.learning_rate, config.weight_decay)]
    # Contiguous, or its rows below would be copies and training them would change nothing.
    embeddings = optimized_embeddings.to(base.device, torch.float32).clone(memory_format=torch.contiguous_format)
    if config.embedding_learning_rate:
        embeddings.requires_grad_()
        embeddings.grad = torch.zeros_like(embeddings)
        trained.append(
            Trained(embeddings.detach().flatten(1), embeddings.grad.flatten(1), config.embedding_learning_rate)
        )
    try:
        with pack.attached(base.unet):
            losses = train(
                base,
                latents,
                lambda: embeddings,
                trained=trained,
                config=config,
                generators=generators,
                start_noise=start_noise,
                pack=pack,
                progress=progress,
            )
    except DivergenceError as error:
        raise base.fault(error, latents[0], optimized_embeddings[0]) from error
    pack.disable_gradients()
    return Finetuned(pack, losses, embeddings.detach().cpu())
