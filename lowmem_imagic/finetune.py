"""Stage 2: the model is tuned on the photo with e_opt fixed (paper section 3.2, "Model fine-tuning"); here by LoRA."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapters import AdapterPack
from .base_model import BaseModel
from .config import FinetuneConfig
from .training import Losses, Progress, train


def finetune(
    base: BaseModel,
    latents: Tensor,
    optimized_embeddings: Tensor,
    config: FinetuneConfig,
    generators: Sequence[torch.Generator],
    progress: Progress | None = None,
) -> tuple[AdapterPack, Losses]:
    """The trained adapters of all edits, and the losses on the way; the base is left as it was.

    Same loss as stage 1 (eq. 2), over the adapters' weights instead of the embedding.

    Args:
        base: the frozen base.
        latents: the photos, (N, C, H, W), fp32 on the CPU.
        optimized_embeddings: e_opt, (N, T, D).
        config: steps, learning rate, draws per step, layers, rank, alpha.
        generators: one CPU generator per edit.
        progress: called after every step.

    **Memory**: adapters in fp32, their gradients and two Adam moments: 16 bytes a weight.
    """
    pack = AdapterPack(
        base.unet,
        edits=len(latents),
        adapt=config.adapt,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        device=base.device,
    )
    pack.initialize(generators)
    grads = pack.enable_gradients()
    pack.set_rows(None)
    embeddings = optimized_embeddings.to(base.device)
    with pack.attached(base.unet):
        losses = train(
            base,
            latents,
            lambda: embeddings,
            weights=pack.weights,
            grads=grads,
            config=config,
            generators=generators,
            progress=progress,
        )
    pack.disable_gradients()
    return pack, losses
