"""What the denoisers of diffusers' networks have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .conditioning import Conditioning, Part


class DiffusersDenoiser:
    """A denoiser of one text-conditioned network, see `family.Denoiser`; it takes nothing beside the text."""

    extra: Mapping[str, Part] = {}
    guidance_share = 1.0
    follows_eta = True

    def recompute(self, network: nn.Module, on: bool) -> None:
        """Switches diffusers' gradient checkpointing on or off."""
        model: Any = network
        (model.enable_gradient_checkpointing if on else model.disable_gradient_checkpointing)()

    def drawn(self, extra: Conditioning, generators: Sequence[torch.Generator], *, training: bool) -> Conditioning:
        """`extra`, which has no random part."""
        return extra
