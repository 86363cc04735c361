"""A training stage as a value: the trained tensors, their start, and the end of the stage."""

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
    """An edit's rows of the tensors that a pack trains."""

    text: Mapping[str, Tensor]
    """The trained parts of the edit's text conditioning, fp32: views, changed in place."""
    parts: Mapping[str, Part]
    """The family's descriptions of these parts."""
    adapters: AdapterPack
    """Adapters of the stage's denoiser."""
    number: int
    """Number of the row in `adapters`."""
    target: Conditioning
    """The start sentence's conditioning, one row; e_tgt for an edit with one sentence."""
    generator: torch.Generator
    """Source of the edit's random draws, on the CPU."""


@dataclass(frozen=True)
class Stage:
    """A training stage, as the pack runs it."""

    name: str
    """Its name in reports, saved states and edit files."""
    denoiser: Denoiser
    """The predicting network."""
    trains: Literal["text", "adapter", "both"]
    config: StageConfig
    """Steps, draws and rate."""
    start: Callable[[Slot], None]
    """Sets a slot to the starting values of the stage."""
    end: Callable[[Slot], None]
    """Sets a slot to the values for later stages and the edit file."""
    cheaper: str
    """Settings that take less memory, for an error message."""

    def rate(self, part: Literal["text", "adapter"]) -> float:
        """Learning rate of the text or of the adapter; 0 if it is fixed in this stage."""
        return self.config.learning_rate if self.trains in (part, "both") else 0.0


def unchanged(_: Slot) -> None:
    """Leaves a slot as it is."""
