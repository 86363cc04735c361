"""One frozen, quantised base shared by every edit: encode text, encode pictures, predict, decode.

**Memory**: text encoder and autoencoder are loaded for each use and dropped afterwards; only the denoisers stay. So
encode everything first, then train (`release` drops the denoisers too).
"""

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..edits.identity import BaseIdentity
from ..errors import BaseInUseError, ConfigError, DivergenceError, NonFiniteModelError
from ..families import DEMO, load_family
from ..families.conditioning import Conditioning
from ..families.family import Denoiser, Family
from ..geometry import Sizes
from ..layers.frozen import drop_weights, move_weights, weight_bytes
from ..settings.stages import base_problems
from .device import pick_device, pick_dtype, resolve_attention
from .memory import loading_memory, with_fallbacks

log = logging.getLogger(__name__)

MAX_SENTENCES = 128
"""Sentences with cached embeddings; more than are ever in training and waiting together."""
MAX_SENTENCES_BYTES = 2**29
"""Most bytes of cached embeddings: a sentence of Stable Diffusion takes 0.2 MB, of FLUX.2 klein 16 MB."""
PROBES = 8
"""Positions at which `BaseModel.check_denoiser` tries a denoiser."""


class BaseModel:
    """A frozen base model; see `load`.

    Attributes:
        family: the code and constants of its model family.
        device, dtype: device and compute type of the denoisers.
        weights: format of the denoisers' weights, one of `settings.stages.WEIGHT_FORMATS`.
        attention: ``"xformers"`` or ``"sdpa"``, as resolved.
        checkpointing: whether activations are recomputed in the backward pass.
        vae_tiling: whether the autoencoder works in tiles.
        text_on_cpu: whether all sentences are encoded on the CPU; once a denoiser is loaded, they are in any case.
        in_turn: whether one network of a cascade is on the device at a time; the others wait in main memory. Off by
            default: it has not run on a GPU yet.
        replays: whether a GPU records training passes and replays them (see `engine.cuda_graphs`); not with
            checkpointing. Off by default: it has not run on a GPU yet. Starting 6,600 kernels one by one took five
            sixths of a step's time on one GPU (``benchmarks/results/gpu_first_run.json``).
        fallbacks: fallbacks taken because memory ran out, in words and in order, since the base was loaded.
        most_rows, most_images: limits of a training pass and of a sampling batch, found by running out of memory; None
            if that has not happened.

    For one thread at a time, as adapters and memory limits belong to the base. A second thread gets `BaseInUseError`.
    """

    def __init__(
        self,
        family: Family,
        *,
        device: torch.device,
        weights: str,
        attention: str,
        checkpointing: bool,
        compute: str = "auto",
    ) -> None:
        self.family = family
        self.device, self.weights = device, weights
        self.dtype = pick_dtype(device, weights, compute)
        self.attention, self.checkpointing = attention, checkpointing
        self.vae_tiling = False
        self.text_on_cpu = device.type == "cpu"
        self.in_turn = False
        self.replays = False
        self.fallbacks: list[str] = []
        self.most_rows: int | None = None
        self.most_images: int | None = None
        self.remembered: dict[Any, Any] = {}
        """Cache for callers: their results about this base, by their own keys."""
        self._networks: dict[str, nn.Module] = {}
        self._waiting: set[str] = set()
        """The networks in main memory, by their denoisers' names, see `in_turn`."""
        self._encoded: dict[str, Conditioning] = {}
        self._user = threading.RLock()
        self._restoring = False

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within the block only this thread uses the base; blocks may be nested.

        Raises:
            BaseInUseError: another thread is using it.
        """
        if not self._user.acquire(blocking=False):
            raise BaseInUseError(
                f"{self.name} is in use by another thread; a base serves one at a time: wait, or load a second base"
            )
        try:
            yield
        finally:
            self._user.release()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Undoes changes of the memory settings, fallbacks included, at the end of the block.

        Nested blocks restore at the end of the outermost one.
        """
        if self._restoring:
            yield
            return
        names = ("vae_tiling", "text_on_cpu", "in_turn", "replays", "most_rows", "most_images")
        before, checkpointing = {name: getattr(self, name) for name in names}, self.checkpointing
        self._restoring = True
        try:
            yield
        finally:
            self._restoring = False
            for name, value in before.items():
                setattr(self, name, value)
            self.recompute(checkpointing)

    @staticmethod
    def load(
        name: str = DEMO,
        *,
        revision: str | None = None,
        device: str = "auto",
        weights: str = "int8",
        attention: str = "auto",
        compute: str = "auto",
        checkpointing: bool = False,
        config_folder: str | Path | None = None,
        vae: str | Path | None = None,
        text_from: str | Path | None = None,
    ) -> "BaseModel":
        """The base called `name`; reads configurations now and weights at their first use.

        Args:
            name: "demo", a short name, a diffusers folder, a ``.safetensors`` file or a Hub id.
            revision: Hub commit, tag or branch.
            device: "auto", "cpu", "cuda" or "cuda:N".
            weights: "int8", "nf4", "bnb-int8" (stock bitsandbytes), "bf16" or "fp32".
            attention: "auto", "xformers" or "sdpa".
            compute: type of the arithmetic: "auto" (see `pick_dtype`), "bf16", "fp16" or "fp32". Adapters are fp32.
            checkpointing: recompute activations: less memory, about 1.3 times the arithmetic.
            config_folder: source of a single file's configuration: a short name, a Hub id or a diffusers folder.
            vae: folder of a model, or of an autoencoder alone; its autoencoder is taken.
            text_from: folder of a model whose text encoders and tokenizers are taken.

        Raises:
            ModelError: the model is unknown, incomplete or of another kind, or a backend is missing.
            ConfigError: unknown option values.
        """
        if problems := base_problems(device=device, weights=weights, attention=attention, compute=compute):
            raise ConfigError(problems)
        place = pick_device(device)
        return BaseModel(
            load_family(name, revision=revision, config_folder=config_folder, vae=vae, text_from=text_from),
            device=place,
            weights=weights,
            attention=resolve_attention(attention, place),
            checkpointing=checkpointing,
            compute=compute,
        )

    @property
    def name(self) -> str:
        """Name of this base in edit files."""
        return str(self.family.source.label)

    @property
    def identity(self) -> BaseIdentity:
        """Identity of this base, with the hashes of its files."""
        return self.family.identity

    @property
    def sizes(self) -> Sizes:
        """The sizes of the pictures that this base edits."""
        return self.family.sizes

    @property
    def denoisers(self) -> Sequence[Denoiser]:
        """The denoisers, in the order of sampling."""
        return self.family.denoisers

    @property
    def guided(self) -> bool:
        """Whether pictures have classifier-free guidance; models distilled to few steps have none."""
        return all(denoiser.guided for denoiser in self.denoisers)

    def check_steps(self, name: str, steps: int) -> None:
        """Checks that a sampler can take this many steps, by running it without a model.

        Raises:
            ConfigError: it cannot.
            NonFiniteModelError: it gives NaN or infinity from right predictions.
        """
        if not math.isfinite(self.sampler_error(name, steps)):
            raise NonFiniteModelError(
                f"scheduler {name} makes NaN or infinity of the noise schedule of {self.name} in {steps} steps; the "
                "model's scheduler configuration is unsuitable: choose another scheduler, or another model"
            )

    def sampler_error(self, name: str, steps: int) -> float:
        """Largest error of a sampler's result over all schedules when every prediction is right.

        Raises:
            ConfigError: it cannot take this many steps.
        """
        errors = [denoiser.schedule.error_of(name, steps) for denoiser in self.denoisers]
        return max(errors, key=lambda error: (not math.isfinite(error), error))

    def network(self, denoiser: Denoiser) -> nn.Module:
        """A denoiser's frozen network, loaded and quantised at the first use.

        If networks take turns, no adapter may be attached to another one.
        """
        if self.in_turn:
            for name in self._networks.keys() - self._waiting - {denoiser.name}:
                move_weights(self._networks[name], torch.device("cpu"))
                self._waiting.add(name)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        if denoiser.name in self._waiting:
            move_weights(self._networks[denoiser.name], self.device)
            self._waiting.remove(denoiser.name)
        if denoiser.name not in self._networks:
            with self._loading(self.device):
                network = denoiser.load(weights=self.weights, device=self.device, dtype=self.dtype)
            if self.attention == "xformers":
                denoiser.use_xformers(network)
            if self.checkpointing:
                denoiser.recompute(network, True)
            log.info(
                "%s of %s: %s weights, %.0f MB, %s attention, checkpointing %s",
                denoiser.name,
                self.name,
                self.weights,
                weight_bytes(network) / 1e6,
                self.attention,
                "on" if self.checkpointing else "off",
            )
            self._networks[denoiser.name] = network
        return self._networks[denoiser.name]

    def recompute(self, on: bool = True) -> None:
        """Switches gradient checkpointing on or off."""
        self.checkpointing = on
        for denoiser in self.denoisers:
            if denoiser.name in self._networks:
                denoiser.recompute(self._networks[denoiser.name], on)

    def fall_back(self, words: str) -> None:
        """Records a fallback that was taken because memory ran out."""
        log.warning("out of memory; going on with %s", words)
        self.fallbacks.append(words)

    def release(self) -> None:
        """Drops the denoisers; the next `predict` loads them again."""
        self._networks.clear()
        self._waiting.clear()

    def _loading(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """The context in which weights are loaded onto a device."""
        return loading_memory(large=self.family.group != "") if device.type == "cpu" else contextlib.nullcontext()

    @contextlib.contextmanager
    def _part(self, load: Any, device: torch.device, dtype: torch.dtype) -> Iterator[nn.Module]:
        """Loads a part for a ``with`` block; afterwards the device holds nothing of it."""
        with self._loading(device):
            part: nn.Module = load(device=device, dtype=dtype)
        try:
            yield part
        finally:
            # The caller's variable outlives the block and would keep the weights alive.
            drop_weights(part)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @property
    def part_dtype(self) -> torch.dtype:
        """Type of text encoders and autoencoder: half precision on GPUs, where fp32 activations would set the peak."""
        return torch.float16 if self.device.type == "cuda" else torch.float32

    @property
    def text_dtype(self) -> torch.dtype:
        """Type of the text encoders' arithmetic on the device: `part_dtype`, but fp16 only if their numbers fit."""
        return self._fitting(self.family.text_in_fp16)

    @property
    def codec_dtype(self) -> torch.dtype:
        """Type of the autoencoder: `part_dtype`, but fp16 only if its numbers fit."""
        return self._fitting(self.family.codec_in_fp16)

    def _fitting(self, in_fp16: bool) -> torch.dtype:
        """The type of a part on the device, by whether its numbers fit into fp16."""
        if self.part_dtype != torch.float16 or in_fp16:
            return self.part_dtype
        half = pick_dtype(self.device, "int8")
        return torch.float32 if half == torch.float16 else half

    def encode_text(self, sentences: Sequence[str]) -> Conditioning:
        """The conditioning of sentences, a row each, in fp32 on the CPU.

        The last `MAX_SENTENCES` are cached, or fewer large ones. Sentences are encoded one by one, so an
        embedding's last bits do not depend on other sentences.

        Raises:
            NonFiniteModelError: the text encoder gives NaN or infinity.
        """
        with self.used():
            with_fallbacks(lambda: self._encode_new(sentences), self._text_to_cpu)
        for sentence in sentences:
            # Move to the end of the cache: the least recently used sentence is dropped first.
            self._encoded[sentence] = self._encoded.pop(sentence)
        rows = Conditioning.cat([self._encoded[sentence] for sentence in sentences])
        each = max(1, sum(part.nbytes for part in rows.values()) // rows.count)
        most = max(len(set(sentences)), min(MAX_SENTENCES, MAX_SENTENCES_BYTES // each))
        for sentence in list(self._encoded)[:-most]:
            del self._encoded[sentence]
        return rows

    def _encode_new(self, sentences: Sequence[str]) -> None:
        """Encodes the sentences that are not cached."""
        new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in self._encoded]
        if not new:
            return
        # Beside a denoiser an encoder would only raise the peak: a sentence takes a second or two on a CPU.
        on_cpu = self.text_on_cpu or bool(self._networks)
        device, dtype = (torch.device("cpu"), torch.float32) if on_cpu else (self.device, self.text_dtype)
        # Some models overflow in half precision.
        for precision in dict.fromkeys((dtype, torch.float32)):

            def loaded(name: str, dtype: torch.dtype = precision) -> contextlib.AbstractContextManager[nn.Module]:
                load = partial(self.family.load_text_encoder, name, weights=self.weights)
                return self._part(load, device, dtype)

            rows = self.family.encode_text(new, loaded).to(torch.device("cpu"), torch.float32)
            for number, sentence in enumerate(new):
                if (row := rows.rows([number])).finite:
                    self._encoded[sentence] = row
            new = [sentence for sentence in new if sentence not in self._encoded]
            if not new:
                return
        raise self.damaged("the text encoder")

    def _text_to_cpu(self) -> bool:
        """Moves the text encoder to the CPU, its only fallback; returns False if it is there already."""
        if self.text_on_cpu:
            return False
        self.text_on_cpu = True
        self.fall_back("the text encoder on the CPU")
        return True

    def encode(self, pictures: Tensor) -> dict[str, Tensor]:
        """Latents (B, C, H, W) for each denoiser, fp32 on the CPU, of pictures (B, 3, H, W) in [-1, 1].

        Raises:
            NonFiniteModelError: the autoencoder gives NaN, infinity, or numbers too large for half precision.
        """
        latents = self._in_either_precision(
            lambda codec: {name: x.float().cpu() for name, x in self.family.encode(codec, pictures).items()}
        )
        # Edits store latents in half precision.
        if not all(bool(x.half().isfinite().all()) for x in latents.values()):
            raise self.damaged("the autoencoder's encoder")
        return latents

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, H, W) for the last denoiser, the input of `decode`; see `encode`."""
        return self.encode(images)[self.denoisers[-1].name]

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], fp32 on the CPU; not finite if the latents are not finite, or huge.

        Raises:
            NonFiniteModelError: the autoencoder gives NaN or infinity even for latents of zeros.
        """

        def decoded(x: Tensor, codec: nn.Module) -> dict[str, Tensor]:
            return {"pictures": self.family.decode(codec, x).float().cpu()}

        pictures = self._in_either_precision(partial(decoded, latents))["pictures"]
        if not pictures.isfinite().all():
            grey = self._with_codec(partial(decoded, torch.zeros_like(latents[:1])), torch.float32)["pictures"]
            if not grey.isfinite().all():
                raise self.damaged("the autoencoder's decoder")
        return pictures

    def _in_either_precision(self, work: Callable[[nn.Module], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The result of `work` with the autoencoder; in fp32 if half precision gives a result that is not finite."""
        result = self._with_codec(work, self.codec_dtype)
        if self.codec_dtype == torch.float32 or all(bool(x.isfinite().all()) for x in result.values()):
            return result
        return self._with_codec(work, torch.float32)

    def _with_codec(self, work: Callable[[nn.Module], dict[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
        """The result of `work` with the autoencoder; in tiles if it does not fit in memory."""

        def run() -> dict[str, Tensor]:
            with self._part(partial(self.family.load_codec, tiling=self.vae_tiling), self.device, dtype) as codec:
                return work(codec)

        def cheaper() -> bool:
            if self.vae_tiling:
                return False
            self.vae_tiling = True
            self.fall_back("the autoencoder in tiles")
            return True

        with self.used():
            return with_fallbacks(run, cheaper)

    def predict(self, denoiser: Denoiser, x: Tensor, at: Tensor, given: Conditioning) -> Tensor:
        """A denoiser's prediction (R, C, H, W) for x of the same shape at positions (R,); `given` has R rows."""
        return denoiser.predict(
            self.network(denoiser), x.to(self.device, self.dtype), at.to(self.device), given.to(self.device, self.dtype)
        )

    @torch.no_grad()
    def check_denoiser(self, denoiser: Denoiser, latents: Tensor, given: Conditioning) -> None:
        """Checks that a denoiser alone predicts finite values over the whole noise schedule.

        Runs `PROBES` passes, to tell a fault of the base from a fault of the edit. No adapter may be attached.

        Args:
            denoiser: the denoiser.
            latents: a picture (C, H, W).
            given: a row of conditioning from the base.

        Raises:
            NonFiniteModelError: a prediction is not finite.

        **Memory**: one row, nothing for a backward pass.
        """
        if not (latents.isfinite().all() and given.finite):
            return  # not the denoiser's fault
        noise = torch.randn(latents[None].shape, generator=torch.Generator().manual_seed(0))
        for at in denoiser.schedule.spread(PROBES).view(-1, 1):
            noisy = denoiser.schedule.noised(latents[None], noise, at)
            if not self.predict(denoiser, noisy, at, given).isfinite().all():
                raise self.damaged(f"the {denoiser.title}")

    def fault(
        self, error: DivergenceError, denoiser: Denoiser, latents: Tensor, given: Conditioning
    ) -> DivergenceError | NonFiniteModelError:
        """The error to report when training diverged: `error`, or an error about a damaged denoiser.

        See `check_denoiser`.
        """
        try:
            self.check_denoiser(denoiser, latents, given)
        except NonFiniteModelError as damaged:
            return damaged
        return error

    def damaged(self, part: str) -> NonFiniteModelError:
        """The error to raise when a part of the base gives NaN or infinity."""
        return NonFiniteModelError(
            f"{part} of {self.name} gives NaN or infinity; the model is damaged or unsuitable: download it again, or "
            "choose another"
        )
