"""Stage 1: the text embedding is optimised until it describes the photo (paper section 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.base import BaseModel
from ..errors import DivergenceError
from ..settings.stages import EmbedConfig
from .loop import Progress, Trained, train
from .run import Losses


def embed(
    base: BaseModel,
    latents: Tensor,
    target_embeddings: Tensor,
    config: EmbedConfig,
    generators: Sequence[torch.Generator],
    progress: Progress | None = None,
    *,
    start_noise: Tensor | None = None,
) -> tuple[Tensor, Losses]:
    """The optimised embeddings e_opt (N, T, D), fp32 on the CPU, and the losses on the way: stage 1 by itself.

    Minimises the denoising loss (eq. 2) over the embedding alone, from e_tgt, few steps so that it stays
    close to it and interpolation remains meaningful.

    Args:
        base: the frozen base.
        latents: the photos, (N, C, H, W), fp32 on the CPU.
        target_embeddings: e_tgt, (N, T, D).
        config: steps, learning rate, draws per step.
        generators: one CPU generator per edit.
        progress: called after every step.
        start_noise: what sampling will start from, (N, C, H, W); see `StageConfig.anchor`.

    Raises:
        DivergenceError: a loss is no longer finite.
        NonFiniteModelError: neither is what the UNet predicts without training.
    """
    # Contiguous, or its rows below would be copies and training them would change nothing.
    optimized = target_embeddings.to(base.device, torch.float32).clone(memory_format=torch.contiguous_format)
    optimized.requires_grad_()
    optimized.grad = torch.zeros_like(optimized)
    try:
        losses = train(
            base,
            latents,
            lambda: optimized,
            trained=[Trained(optimized.detach().flatten(1), optimized.grad.flatten(1), config.learning_rate)],
            config=config,
            generators=generators,
            start_noise=start_noise,
            progress=progress,
        )
    except DivergenceError as error:
        raise base.fault(error, latents[0], target_embeddings[0]) from error
    return optimized.detach().cpu(), losses
