"""What differs between model families, as protocols: everything outside of `families` is written against these."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..edits.identity import BaseIdentity
from ..geometry import Size, Sizes
from ..layers.adapter_pack import Factors, LayerNames
from .conditioning import Conditioning, Part

Shape = tuple[int, ...]
"""(C, H, W) of what a network denoises."""


class Sampler(Protocol):
    """One way through a schedule: from noise to a picture, or back."""

    @property
    def at(self) -> Sequence[Tensor]:
        """The position () of every step."""

    def start(self, noise: Tensor, below: Tensor | None) -> Tensor:
        """What the first step begins with (B, C, H, W), of standard normal noise; laid over the picture `below` where
        the schedule never reaches pure noise."""

    def scaled(self, x: Tensor, step: int) -> Tensor:
        """What the network is given for x in a step."""

    def stepped(
        self, prediction: Tensor, step: int, x: Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """x after a step with the network's prediction; steps that draw noise take it from each row's generator."""


class Inverter(Sampler, Protocol):
    """A sampler from a picture to noise."""

    @property
    def end(self) -> Tensor:
        """The position () that the last step ends at."""


class Schedule(Protocol):
    """Between a picture and noise. A position is what a network takes for the time: a whole step or a float."""

    def positions(self, draws: int, generator: torch.Generator, span: tuple[float, float]) -> Tensor:
        """Positions (draws,), one in each of equal parts of `span`; 0 is the clean end of the schedule, 1 the noisy."""

    def spread(self, count: int) -> Tensor:
        """Positions (count,) all along the schedule, both ends included."""

    def position(self, share: float) -> Tensor:
        """The position () at a share of the schedule."""

    def noised(self, x: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """The picture x (R, C, H, W) with noise at positions (R,)."""

    def target(self, x: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """The right prediction (R, C, H, W)."""

    def noise_in(self, noisy: Tensor, x: Tensor, at: Tensor) -> Tensor:
        """The noise that makes `noisy` of x: `noised` solved for it."""

    def sampler(self, name: str, steps: int, shape: Shape, device: torch.device | str = "cpu") -> Sampler:
        """A sampler by name, for x of a shape on a device.

        Raises:
            ConfigError: unknown, or it cannot take this many steps.
        """

    def inverter(self, steps: int, shape: Shape) -> "Inverter":
        """A deterministic sampler from a picture to noise."""

    def error_of(self, name: str, steps: int) -> float:
        """How far a sampler ends from a picture when every prediction is right, as a share of the picture's size.

        Raises:
            ConfigError: it cannot take this many steps.
        """


class Denoiser(Protocol):
    """A network that is frozen, adapted and sampled. A latent model has one, a cascade several."""

    @property
    def name(self) -> str:
        """In files, plans and settings."""

    @property
    def title(self) -> str:
        """In messages, such as "UNet"."""

    @property
    def schedule(self) -> Schedule:
        """Of the noise that it was trained on."""

    @property
    def extra(self) -> Mapping[str, Part]:
        """What the network takes beside the text, see `Family.extra`."""

    @property
    def names(self) -> LayerNames:
        """Names of the layers to adapt, and of their factors in files."""

    @property
    def guided(self) -> bool:
        """Whether a negative sentence means anything (not for distilled models)."""

    def shape(self, size: Size) -> Shape:
        """(C, H, W) of what is denoised for a picture of this size."""

    def load(self, *, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The frozen network; on the meta device without reading a weight."""

    def use_xformers(self, network: nn.Module) -> None:
        """Makes the network compute attention with xformers, which is known to run."""

    def recompute(self, network: nn.Module, on: bool) -> None:
        """Switches gradient checkpointing."""

    def portable(self, adapter: Mapping[str, Factors], network: nn.Module) -> Mapping[str, Factors]:
        """The same adapter, as fp32 on the CPU, in the form that other programs read from a file.

        Args:
            adapter: factors by the keys of `names`.
            network: the network that it was trained on.
        """

    def predict(self, network: nn.Module, x: Tensor, at: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The prediction (R, C, H, W) for x of the same shape at positions (R,), in the schedule's terms."""


class Family(Protocol):
    """The parts of one model, each loaded when asked for and owned by the caller."""

    def __hash__(self) -> int:
        """Families are told apart by identity."""

    @property
    def family(self) -> str:
        """Its name, such as ``sd1``."""

    @property
    def source(self) -> Any:
        """Where its files are."""

    @property
    def denoisers(self) -> Sequence[Denoiser]:
        """In the order of sampling."""

    @property
    def text(self) -> Mapping[str, Part]:
        """The parts of a sentence's conditioning."""

    @property
    def sizes(self) -> Sizes:
        """The sizes of the pictures that the model edits."""

    @property
    def identity(self) -> BaseIdentity:
        """Which base this is."""

    @property
    def sentence_tokens(self) -> int:
        """Tokens of a sentence that the text encoder reads."""

    def check_prompt(self, prompt: str) -> str:
        """The words that do not fit into the text encoder.

        Raises:
            PromptError: nothing to encode.
        """

    def load_text_encoder(self, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Everything that encodes sentences, frozen."""

    def encode_text(self, encoder: nn.Module, sentences: Sequence[str]) -> Conditioning:
        """The conditioning of sentences, on the encoder's device."""

    def load_codec(self, *, device: torch.device, dtype: torch.dtype, tiling: bool) -> nn.Module:
        """Everything between pictures and what is denoised, frozen; `tiling` takes a fraction of the memory."""

    def encode(self, codec: nn.Module, pictures: Tensor) -> Mapping[str, Tensor]:
        """What each denoiser is to give back for pictures (B, 3, H, W) in [-1, 1], by its name."""

    def decode(self, codec: nn.Module, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of what the last denoiser gives."""

    def make_extra(self, denoiser: Denoiser, count: int, size: Size, lower: Tensor | None) -> Conditioning:
        """What a denoiser takes beside the text, for `count` rows.

        Args:
            denoiser: which.
            count: B.
            size: of the pictures.
            lower: what the denoiser before it gave (B, C, H, W); None for the first.
        """
