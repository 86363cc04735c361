"""Bytes and arithmetic of training and rendering, phase by phase, from an architecture before any weight is read.

Runs the real passes on the meta device (see `counting`): the family's own encoders and networks, and the trainer's own
pass with its adapters, forward and backward.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..engine.base import BaseModel
from ..families.conditioning import Conditioning, Part
from ..families.family import Denoiser, Family
from ..geometry import Size
from ..layers.adapter_pack import AdapterPack
from ..layers.flat_pack import FlatPack, kept_gradient
from ..layers.frozen import FrozenLinear4bit, Int8Conv2d, weight_bytes
from ..settings.stages import EditConfig
from ..training.loop import TrainedTensor, Trainer
from ..training.pack import stages
from .counting import Cost, Counts, cost_of, fused_attention, peak_of

_META = torch.device("meta")


@dataclass(frozen=True)
class _Linear:
    """A linear model of bytes by rows and edits."""

    fixed: float
    row: float
    edit: float

    def of(self, rows: int, edits: int) -> int:
        return math.ceil(self.fixed + self.row * rows + self.edit * edits)

    @staticmethod
    def through(measure: Callable[[int, int], int]) -> "_Linear":
        """A linear model of `measure` (rows, edits), fitted at (1, 1), (2, 1) and (2, 2)."""
        least = measure(1, 1)
        row, edit = measure(2, 1) - least, measure(2, 2) - measure(2, 1)
        return _Linear(least - row - edit, row, edit)


T = TypeVar("T")


def _once(method: Callable[..., T]) -> Callable[..., T]:
    """Caches a method of `Costs` by its arguments."""

    @wraps(method)
    def remembered(self: "Costs", *args: Any, **kwargs: Any) -> T:
        key = (method.__name__, args, tuple(sorted(kwargs.items())))
        if key not in self.known:
            self.known[key] = method(self, *args, **kwargs)
        result: T = self.known[key]
        return result

    return remembered


class Costs:
    """Bytes of an architecture's phases under some settings, each measured on the meta device at its first use.

    Args:
        family: the model family.
        config: settings of all stages.
        weights: format of the denoisers' weights, one of `WEIGHT_FORMATS`.
        dtype: compute type of the denoisers.
        part_dtype: type of the text encoders.
        codec_dtype: type of the autoencoder; None takes `part_dtype`.
        attention: of the denoisers, "sdpa" or "xformers"; text encoder and autoencoder have torch's.
        size: width and height of the pictures; None for the model's own, which no photo exceeds.

    Attributes:
        stages: stages of training by name, in their order.
    """

    def __init__(
        self,
        family: Family,
        config: EditConfig,
        *,
        weights: str,
        dtype: torch.dtype,
        part_dtype: torch.dtype,
        codec_dtype: torch.dtype | None = None,
        attention: str = "sdpa",
        size: Size | None = None,
    ) -> None:
        self.family, self.config = family, config.for_group(family.group)
        self._part_dtype, self._codec_dtype = part_dtype, codec_dtype or part_dtype
        self._size, self._attention = size or family.sizes.own, attention
        self._base = BaseModel(family, device=_META, weights=weights, attention="sdpa", checkpointing=False)
        self._base.dtype = dtype
        self.known: dict[Any, Any] = {}
        self.stages = {stage.name: stage for stage in stages(self.config, family.denoisers)}
        trained = [part.shape for part in family.text.values() if part.trained]
        self._text_numbers = sum(map(math.prod, trained))

    @cached_property
    def networks(self) -> int:
        """Bytes of the frozen denoisers."""
        return sum(self._network_bytes)

    @cached_property
    def largest_network(self) -> int:
        """Bytes of the largest of them, for a base whose networks take turns."""
        return max(self._network_bytes)

    @property
    def _network_bytes(self) -> list[int]:
        return [weight_bytes(self._base.network(denoiser)) for denoiser in self._base.denoisers]

    @cached_property
    def load(self) -> int:
        """Most bytes while the denoisers are loaded and quantised, the denoisers included.

        While it is quantised, a convolution kernel exists in half precision (from the file), in fp32, and twice in 8
        bits (see `layers.frozen.Int8Conv2d.quantize_`); any other weight in half precision and in its final format.
        """
        networks = [self._base.network(denoiser) for denoiser in self._base.denoisers]
        modules = [module for network in networks for module in network.modules()]
        kernels = [7 * layer.weight.numel() for layer in modules if isinstance(layer, Int8Conv2d)]
        linear = [layer for layer in modules if isinstance(layer, FrozenLinear4bit)]
        packed = [2 * int(layer.in_features * layer.out_features) for layer in linear]
        others = [2 * parameter.numel() for network in networks for parameter in network.parameters()]
        return self.networks + max([*kernels, *packed, *others])

    @cached_property
    def load_in_turn(self) -> int:
        """The same with one denoiser on the device at a time."""
        return self.load - self.networks + self.largest_network

    @cached_property
    def adapter_weights(self) -> int:
        """Numbers in one edit's adapters."""
        return sum(map(self._adapter_weights, range(len(self._base.denoisers))))

    @_once
    def _adapter_weights(self, number: int) -> int:
        """Numbers in one edit's adapter of a denoiser."""
        return self._adapters(self._base.denoisers[number], 1).weights.numel()

    def adapters(self, slots: int) -> int:
        """Bytes of adapters and embeddings in `slots` slots, fp32, with gradients and two moments."""
        return slots * 16 * (self.adapter_weights + self._text_numbers)

    def train(self, rows: int, edits: int, *, checkpointing: bool, stage: str = "", recorded: bool = False) -> int:
        """Most bytes of a training pass and of the optimiser step after it (two copies, see `PackedAdam.step`).

        A recorded pass (see `engine.cuda_graphs`) keeps its bytes during the optimiser step. Without a stage's name it
        is that of the stage that takes the most.
        """
        stage = stage or max(
            self.stages,
            key=lambda name: self.train(1, 1, checkpointing=checkpointing, stage=name, recorded=recorded),
        )
        way = self.stages[stage]
        stepped = self._text_numbers * bool(way.rate("text")) + self.adapter_weights * bool(way.rate("adapter"))
        both = self.training_pass(rows, edits, checkpointing, stage).peak, 2 * 4 * edits * stepped
        return sum(both) if recorded else max(both)

    def train_about(self, *, checkpointing: bool, recorded: bool = False) -> Callable[[int, int], int]:
        """An estimate of `train` for (rows, edits), to a few percent, without running each case."""

        def exactly(rows: int, edits: int) -> int:
            return self.train(rows, edits, checkpointing=checkpointing, recorded=recorded)

        return _Linear.through(exactly).of

    def sample(self, rows: int, edits: int = 1) -> int:
        """Most bytes of a sampling batch, adapters included."""
        return max(
            self.sampling_pass(rows, edits, number).peak + 4 * edits * self._adapter_weights(number)
            for number in range(len(self._base.denoisers))
        )

    @_once
    def sampling_pass(self, rows: int, edits: int, number: int) -> Cost:
        """The cost of a sampling batch of one denoiser, by its number, beside the adapters."""
        denoiser = self._base.denoisers[number]
        pack = self._adapters(denoiser, edits)
        # Rows of several edits gather their factors.
        pack.set_rows(torch.zeros(rows, dtype=torch.int64, device=_META))

        def run() -> None:
            # With guidance, the text of half the rows and its negative are joined.
            halves = [self._conditioning(denoiser, 1 + rows // 2) for _ in range(2)]
            conditioning = Conditioning.cat(halves).rows(slice(rows))
            x = torch.cat([self._x(denoiser, rows) for _ in range(2)])[:rows]
            self._base.predict(denoiser, x, self._at(denoiser, rows), conditioning)

        with torch.no_grad(), fused_attention(self._attention), pack.attached(self._base.network(denoiser)):
            return cost_of(run)

    @cached_property
    def _text(self) -> tuple[int, int]:
        """Bytes of the text encoder that takes the most while it encodes a sentence, and of what it computes."""
        encoders = list[tuple[int, int]]()

        @contextlib.contextmanager
        def loaded(name: str) -> Iterator[nn.Module]:
            encoder = self.family.load_text_encoder(
                name, weights=self._base.weights, device=_META, dtype=self._part_dtype
            )
            with Counts() as count:
                yield encoder
            encoders.append((weight_bytes(encoder), count.peak))

        with torch.no_grad(), fused_attention():
            self.family.encode_text(["a sentence"], loaded)
        return max(encoders, key=sum)

    @property
    def text_encoder(self) -> int:
        """Bytes of the text encoder, the largest of several: they are loaded one after the other."""
        return self._text[0]

    def encode_text(self) -> int:
        """Most bytes while a sentence is encoded."""
        return self._text[1]

    def _codec(self, tiling: bool) -> Any:
        return self.family.load_codec(device=_META, dtype=self._codec_dtype, tiling=tiling)

    @cached_property
    def vae(self) -> int:
        """Bytes of the autoencoder."""
        return weight_bytes(self._codec(False))

    @_once
    def encode(self, *, tiling: bool = False) -> int:
        """Most bytes while a picture is encoded."""
        codec, (width, height) = self._codec(tiling), self._size
        picture = torch.empty(1, 3, height, width, device=_META)
        with torch.no_grad(), fused_attention():
            return peak_of(lambda: self.family.encode(codec, picture))

    @_once
    def decode(self, *, tiling: bool = False) -> int:
        """Most bytes while a picture is decoded."""
        codec = self._codec(tiling)
        with torch.no_grad(), fused_attention():
            return peak_of(lambda: self.family.decode(codec, self._x(self._base.denoisers[-1], 1)))

    def _x(self, denoiser: Denoiser, rows: int) -> Tensor:
        """Rows of noisy latents for a denoiser."""
        return torch.empty(rows, *denoiser.shape(self._size), device=_META)

    def _at(self, denoiser: Denoiser, rows: int) -> Tensor:
        """Positions in the schedule, one per row."""
        return torch.empty(rows, dtype=denoiser.schedule.spread(1).dtype, device=_META)

    def _conditioning(self, denoiser: Denoiser, rows: int) -> Conditioning:
        """Rows of a denoiser's conditioning."""
        return self._rows(self.family.text, rows) | self._extra(denoiser, rows)

    def _extra(self, denoiser: Denoiser, rows: int) -> Conditioning:
        """Rows of a denoiser's conditioning beside the text, for pictures of the size."""
        number = [one.name for one in self._base.denoisers].index(denoiser.name)
        lower = self._x(self._base.denoisers[number - 1], rows) if number else None
        return self.family.make_extra(denoiser, rows, self._size, lower).to(_META)

    def _rows(self, parts: Mapping[str, Part], rows: int) -> Conditioning:
        """Rows of parts of a conditioning."""
        return Conditioning(
            {name: torch.empty(rows, *part.shape, dtype=part.dtype, device=_META) for name, part in parts.items()}
        )

    def _adapters(self, denoiser: Denoiser, edits: int) -> AdapterPack:
        tuned = self.config.finetune
        return AdapterPack(
            self._base.network(denoiser),
            denoiser.names,
            count=edits,
            adapt=tuned.adapt,
            blocks=tuned.blocks,
            rank=tuned.lora_rank,
            alpha=tuned.lora_alpha,
            device=_META,
        )

    @_once
    def training_pass(self, rows: int, edits: int, checkpointing: bool, stage: str) -> Cost:
        """The cost of the trainer's pass, forward and backward."""
        way = self.stages[stage]
        denoiser, network = way.denoiser, self._base.network(way.denoiser)
        self._base.recompute(checkpointing)
        shapes = {name: part.shape for name, part in self.family.text.items() if part.trained}
        text, conditioning = FlatPack(edits, shapes, device=_META), self._rows(self.family.text, edits)
        trained, packs = list[TrainedTensor](), dict[str, AdapterPack]()
        if way.rate("text"):
            trained.append(TrainedTensor(text.weights, text.enable_gradients(), way.rate("text")))
            conditioning |= {name: kept_gradient(part, part.dtype) for name, part in text.parameters.items()}
        if way.rate("adapter"):
            packs[denoiser.name] = self._adapters(denoiser, edits)
            weights = packs[denoiser.name].weights
            trained.append(TrainedTensor(weights, packs[denoiser.name].enable_gradients(), way.rate("adapter")))
        trainer = Trainer(self._base, trained, lambda *_: conditioning, packs=packs)
        index = torch.empty(edits, dtype=torch.int64, device=_META)

        def run() -> None:
            noisy, at, extra = self._x(denoiser, rows), self._at(denoiser, rows), self._extra(denoiser, rows)
            beside = [extra[name] for name in denoiser.extra]
            trainer.run_pass(denoiser, True, 1.0, noisy, at, torch.empty_like(noisy), index, *beside)

        with fused_attention(self._attention), contextlib.ExitStack() as attached:
            for pack in packs.values():
                attached.enter_context(pack.attached(network))
            return cost_of(run)
