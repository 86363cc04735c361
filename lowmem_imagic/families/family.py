"""Protocols of model families; code outside of `families` uses only these."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..edits.identity import BaseIdentity
from ..geometry import Size, Sizes
from ..layers.adapter_pack import Factors, LayerNames
from .conditioning import Conditioning, Part
from .vocabulary import Vocabulary

Loaded = Callable[[str], AbstractContextManager[nn.Module]]
"""Loads a part by its name for a ``with`` block."""
Shape = tuple[int, ...]
"""(C, H, W) of a denoiser's input."""


class Sampler(Protocol):
    """Steps through a schedule: from noise to a picture, or back."""

    @property
    def at(self) -> Sequence[Tensor]:
        """The position () of every step."""

    def start(self, noise: Tensor, below: Tensor | None) -> Tensor:
        """The input (B, C, H, W) of the first step, from standard normal noise; the noise is laid over the picture
        `below` if the schedule never reaches pure noise."""

    def scaled(self, x: Tensor, step: int) -> Tensor:
        """The network's input for x in a step."""

    def stepped(
        self, prediction: Tensor, step: int, x: Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """x after a step with the network's prediction; a step that draws noise uses each row's generator."""


class Inverter(Sampler, Protocol):
    """A sampler from a picture to noise."""

    @property
    def end(self) -> Tensor:
        """The final position (), after the last step."""


class Schedule(Protocol):
    """The mixing of pictures with noise. A position is a network's time input: an integer timestep or a float."""

    def positions(self, draws: int, generator: torch.Generator, span: tuple[float, float]) -> Tensor:
        """Positions (draws,), one in each of equal parts of `span`; 0 is the clean end of the schedule, 1 the noisy."""

    def spread(self, count: int) -> Tensor:
        """Positions (count,) spread over the schedule, both ends included."""

    def position(self, share: float) -> Tensor:
        """The position () at a share of the schedule."""

    def noised(self, x: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """The picture x (R, C, H, W) with noise at positions (R,)."""

    def target(self, x: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """The right prediction (R, C, H, W)."""

    def noise_in(self, noisy: Tensor, x: Tensor, at: Tensor) -> Tensor:
        """The noise in `noisy`: `noised` solved for the noise."""

    def sampler(
        self, name: str, steps: int, shape: Shape, device: torch.device | str = "cpu", *, guided: bool = True
    ) -> Sampler:
        """A sampler by name, for x of this shape on a device.

        Args:
            name: its name.
            steps: number of its steps.
            shape: (C, H, W) of x.
            device: place of its numbers.
            guided: whether the predictions are guided; a remedy against guidance (dynamic thresholding) is left out
                otherwise, so that the steps undo those of `inverter`.

        Raises:
            ConfigError: the name is unknown, or the sampler cannot take this many steps.
        """

    def inverter(self, steps: int, shape: Shape) -> "Inverter":
        """A deterministic sampler from a picture to noise."""

    def error_of(self, name: str, steps: int) -> float:
        """Error of a sampler's result when every prediction is right, as a share of the picture's norm.

        Raises:
            ConfigError: the sampler cannot take this many steps.
        """


class Denoiser(Protocol):
    """A network that is frozen, adapted and sampled. A latent model has one, a cascade several."""

    @property
    def name(self) -> str:
        """Its name in files, plans and settings."""

    @property
    def title(self) -> str:
        """Its name in messages, such as "UNet"."""

    @property
    def schedule(self) -> Schedule:
        """The noise schedule of its training."""

    @property
    def extra(self) -> Mapping[str, Part]:
        """The parts of its conditioning beside the text, see `Family.make_extra`."""

    @property
    def guidance_share(self) -> float:
        """Share of the guidance above 1 that it is sampled with: 1, or less for a later stage that is told much by the
        picture below it."""

    @property
    def follows_eta(self) -> bool:
        """Whether it is trained under e_opt and sampled along eta, as the first denoiser always is.

        Otherwise it is trained under the start sentence's own conditioning, and sampled under the sentence's at every
        eta (the start sentence's at eta 0), as the paper's later stages are. With a source prompt it is sampled under
        the start sentence's and the difference, as the others are under e_opt.
        """

    @property
    def names(self) -> LayerNames:
        """Names of the layers to adapt, and of their factors in files."""

    @property
    def guided(self) -> bool:
        """Whether a negative sentence has an effect (not for distilled models)."""

    def shape(self, size: Size) -> Shape:
        """(C, H, W) of the network's input for a picture of this size."""

    def load(self, *, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The frozen network; on the meta device no weights are read."""

    def use_xformers(self, network: nn.Module) -> None:
        """Switches the network's attention to xformers; the caller has checked that it runs."""

    def recompute(self, network: nn.Module, on: bool) -> None:
        """Switches gradient checkpointing on or off."""

    def drawn(self, extra: Conditioning, generators: Sequence[torch.Generator], *, training: bool) -> Conditioning:
        """`extra` with its random part drawn, such as the noise over a lower picture; `extra` itself if it has none.

        Args:
            extra: the conditioning of `Family.make_extra`, a row for each generator.
            generators: source of each row's draws.
            training: whether the noise's level is drawn too; sampling has a level of its own.
        """

    def portable(self, adapter: Mapping[str, Factors], network: nn.Module) -> Mapping[str, Factors]:
        """The same adapter, as fp32 on the CPU, in the form that other programs read from a file.

        Args:
            adapter: factors by the keys of `names`.
            network: the network that it was trained on.
        """

    def predict(self, network: nn.Module, x: Tensor, at: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The prediction (R, C, H, W) for x of the same shape at positions (R,), in the schedule's terms."""


class Family(Protocol):
    """The parts of one model, each loaded on request and owned by the caller."""

    def __hash__(self) -> int:
        """Hash by identity: two objects are different families."""

    @property
    def family(self) -> str:
        """Its name, such as ``sd1``."""

    @property
    def source(self) -> Any:
        """Its files."""

    @property
    def denoisers(self) -> Sequence[Denoiser]:
        """The denoisers, in the order of sampling."""

    @property
    def text(self) -> Mapping[str, Part]:
        """The parts of a sentence's conditioning."""

    @property
    def sizes(self) -> Sizes:
        """The sizes of the pictures that the model edits."""

    @property
    def group(self) -> str:
        """The group of networks whose settings presets have (`settings.presets.GROUPS`); "" for the usual ones.

        ``large``: adapters of a preset's usual size would outweigh the network's activations. ``flow``: a flow
        transformer, which has samplers of its own. ``cascade``: several networks one after the other, in pixels.
        """

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The words that it knows if they are few; None for a base that knows whole languages."""

    def check_trainable(self) -> None:
        """Checks that adapters can be trained on this base; edits of other bases may be rendered with any.

        Raises:
            WrongFamilyError: the base is distilled to few steps, which training would undo.
        """

    @property
    def identity(self) -> BaseIdentity:
        """Identity of this base, with the hashes of its files."""

    @property
    def sentence_tokens(self) -> int:
        """Most tokens of a sentence that the text encoder reads."""

    def check_prompt(self, prompt: str) -> str:
        """The words that do not fit into the text encoder ("" if all do).

        Raises:
            PromptError: there is nothing to encode.
        """

    @property
    def text_in_fp16(self) -> bool:
        """Whether the text encoders' numbers fit into fp16; otherwise they compute in bfloat16 or fp32."""

    def load_text_encoder(self, name: str, *, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The frozen text encoder of a name that `encode_text` asks for.

        Args:
            name: the text encoder.
            weights: format of the base's weights, one of `settings.stages.WEIGHT_FORMATS`; a text encoder of a few
                hundred MB may be in `dtype` instead.
            device: device of the weights.
            dtype: type of the arithmetic.
        """

    def encode_text(self, sentences: Sequence[str], loaded: Loaded) -> Conditioning:
        """The conditioning of sentences, on the text encoder's device; each sentence is encoded alone.

        The empty sentence stands for none: its conditioning is the one that guidance goes away from.

        Args:
            sentences: B sentences.
            loaded: the context in which a text encoder is loaded, by name. Several text encoders are taken one after
                the other, so that one at a time takes memory.
        """

    @property
    def codec_in_fp16(self) -> bool:
        """Whether the codec's numbers fit into fp16; otherwise it is loaded in bfloat16 or fp32."""

    def load_codec(self, *, device: torch.device, dtype: torch.dtype, tiling: bool) -> nn.Module:
        """The frozen codec between pictures and latents (an autoencoder); `tiling` takes a fraction of the memory."""

    def encode(self, codec: nn.Module, pictures: Tensor) -> Mapping[str, Tensor]:
        """Latents of pictures (B, 3, H, W) in [-1, 1] for each denoiser, by its name."""

    def decode(self, codec: nn.Module, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) from the last denoiser's latents."""

    def make_extra(self, denoiser: Denoiser, count: int, size: Size, lower: Tensor | None) -> Conditioning:
        """A denoiser's conditioning beside the text, for `count` rows; see `Denoiser.drawn` for its random part.

        Args:
            denoiser: the denoiser.
            count: B, the number of rows.
            size: width and height of the pictures.
            lower: results (B, C, H, W) of the previous denoiser; None for the first.
        """
