"""A training stage as a value: what is trained, from where it starts, how it ends."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..families.conditioning import Conditioning, Part
from ..families.family import Denoiser
from ..layers.adapter_pack import AdapterPack
from ..settings.stages import StageConfig


@dataclass(frozen=True)
class Slot:
    """An edit's row of everything that a pack trains."""

    text: Mapping[str, Tensor]
    """The trained parts of the edit's text conditioning, fp32: views, to be changed in place."""
    parts: Mapping[str, Part]
    """The family's description of them."""
    adapters: AdapterPack
    """Adapters of the stage's denoiser."""
    number: int
    """Number of the row in `adapters`."""
    target: Conditioning
    """e_tgt, one row."""
    generator: torch.Generator
    """What the edit draws from, on the CPU."""


@dataclass(frozen=True)
class Stage:
    """A training stage, as the pack runs it."""

    name: str
    """In reports, saved states and edit files."""
    denoiser: Denoiser
    """The network that predicts."""
    trains: Literal["text", "adapter", "both"]
    config: StageConfig
    """Steps, draws and rate."""
    start: Callable[[Slot], None]
    """Gives a slot the values that its first step starts from."""
    end: Callable[[Slot], None]
    """Gives a slot the values that later stages and the edit file have."""
    cheaper: str
    """Settings that take less memory, for an error."""

    def rate(self, part: Literal["text", "adapter"]) -> float:
        """Learning rate of the text or of the adapter, 0 for the one that is fixed."""
        return self.config.learning_rate if self.trains in (part, "both") else 0.0


def unchanged(_: Slot) -> None:
    """Leaves a slot as it is."""
