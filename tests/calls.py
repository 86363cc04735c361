"""The engine's calls for Stable Diffusion, whose conditioning is one tensor (T, D) and whose denoiser is one."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_imagic.batch.executors import local as executor
from lowmem_imagic.edits.edit import Edit, LoraFactors
from lowmem_imagic.edits.identity import SourcePicture
from lowmem_imagic.families.adapter_names import KohyaNames
from lowmem_imagic.families.conditioning import Conditioning
from lowmem_imagic.families.portable import portable
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.layers.truncation import truncated
from lowmem_imagic.sampling import inversion, masking
from lowmem_imagic.sampling import sample as sampling
from lowmem_imagic.training.pack import TrainingInput

UNET, EMBEDS = "unet", "embeds"
NAMES = KohyaNames()
"""Names of the UNet's layers."""

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Latents, timesteps and text (R, T, D) to a prediction."""


def given(text: Tensor) -> Conditioning:
    """Text (B, T, D) as the engine takes it."""
    return Conditioning({EMBEDS: text})


def row(text: Tensor) -> Conditioning:
    """Text (T, D) as one row."""
    return given(text[None])


def unet(base: Any) -> Any:
    """The UNet of a base."""
    return base.network(base.denoisers[0])


def encode_text(base: Any, sentences: Sequence[str]) -> Tensor:
    """Text (B, T, D) of some sentences."""
    return base.encode_text(sentences)[EMBEDS]


def random_edit(base: Any, adapt: str = "attn", *, keep: float = 1.0, seed: int = 3) -> Edit:
    """An edit with random factors, an alpha that differs from its rank, and spectra that differ by layer."""
    generator = torch.Generator().manual_seed(seed)
    pack = AdapterPack(unet(base), NAMES, count=1, adapt=adapt, rank=8, alpha=3.0)
    pack.weights.copy_(0.1 * torch.randn(pack.weights.shape, generator=generator))
    whole = pack.export(0)
    for number, (down, _, _) in enumerate(whole.values()):
        down *= torch.logspace(0, -(number % 7) / 3, len(down)).reshape(-1, *[1] * (down.dim() - 1))
    text = base.encode_text(["a"])
    stored = portable(truncated(whole, keep), unet(base))
    return Edit(
        adapters={"unet": {key: LoraFactors(*factors) for key, factors in stored.items()}},
        conditioning={name: torch.randn(part.shape[1:], generator=generator) for name, part in text.items()},
        coarse={"unet": torch.randn(4, 4, 4, generator=generator)},
        sentences=("a blue sphere",),
        base=base.identity,
        settings={},
        seed=0,
        etas=(0.0, 1.0),
        eta_default=1.0,
        source=SourcePicture(sha256="0" * 64, width_px=16, height_px=16, size=(16, 16), box=(0, 0, 16, 16)),
        base_weights="fp32",
        versions={},
        measured={},
        title="a blue sphere",
    )


def predict(base: Any, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """The UNet's prediction."""
    return base.predict(base.denoisers[0], latents, timesteps, given(text))


def plain(base: Any) -> Predict:
    """The base's present `predict`, even if a test replaces it later."""
    now, denoiser = base.predict, base.denoisers[0]
    return lambda latents, timesteps, text: now(denoiser, latents, timesteps, given(text))


def in_place(function: Predict) -> Any:
    """A function to put in the place of `BaseModel.predict`."""
    return lambda denoiser, x, at, conditioning: function(x, at, conditioning[EMBEDS])


def sample(
    base: Any,
    pack: AdapterPack,
    target: Tensor,
    optimized: Tensor,
    cells: Sequence[sampling.Cell],
    config: Any,
    progress: Any = None,
    *,
    coarse_latents: Tensor | None = None,
    inverted_noise: Tensor | None = None,
) -> Tensor:
    """See `lowmem_imagic.sampling.sample`."""
    return sampling.sample(
        base,
        {UNET: pack},
        given(target),
        given(optimized),
        cells,
        config,
        progress,
        coarse=None if coarse_latents is None else {UNET: coarse_latents},
        noise=None if inverted_noise is None else {UNET: inverted_noise},
    )[UNET]


def change_mask(base: Any, latents: Tensor, optimized: Tensor, target: Tensor, threshold: float, **options: Any) -> Any:
    """See `lowmem_imagic.sampling.masking`."""
    return masking.change_mask(base, base.denoisers[0], latents, row(optimized), row(target), threshold, **options)


def own_noise(base: Any, latents: Tensor, generator: torch.Generator, progress: Any = None) -> Tensor:
    """See `lowmem_imagic.sampling.inversion`."""
    return inversion.own_noise(base, base.denoisers[0], latents, generator, progress)


def training_input(
    latents: Tensor, target: Tensor, generator: torch.Generator, start_noise: Tensor, state: Any = None
) -> TrainingInput:
    """An edit to train; the target is (T, D)."""
    return TrainingInput({UNET: latents}, row(target), generator, {UNET: start_noise}, state=state)


def before_each_edit(monkeypatch: pytest.MonkeyPatch, action: Callable[[int], None]) -> None:
    """Lets a batch in this process call `action` with a count from 0 whenever trained edits are to be finished."""
    stream, counts = executor.stream_edits, itertools.count()

    def streaming(*args: Any, **options: Any) -> Iterator[Any]:
        for group in stream(*args, **options):
            action(next(counts))
            yield group

    monkeypatch.setattr(executor, "stream_edits", streaming)
