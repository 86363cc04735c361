"""A photo's description in the base's own words: where stage 1 starts if no single sentence tells it.

A base with a vocabulary (`families.vocabulary`) is asked word by word: of each kind of words the one under which the
base denoises the photo best, kind after kind. No other network is involved. Any other base starts from `NEUTRAL`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..engine.base import BaseModel
from ..families.conditioning import Conditioning
from ..families.vocabulary import Vocabulary
from .losses import BATCH, Draws, in_fewer_rows

NEUTRAL = "a photo"
"""The sentence that fits every photo."""
DRAWS = 8
"""(position, noise) draws, the same for every sentence."""
MOST_TOGETHER = 64
"""Most sentences to choose the first words from."""
SPAN = (0.2, 0.9)
"""Part of the noise schedule for the losses; near its ends the text hardly matters."""

Losses = Callable[[Sequence[str]], list[float]]
"""The base's loss on a photo under each of some sentences."""


def describe(
    base: BaseModel,
    latents: Tensor,
    extra: Conditioning,
    progress: Callable[[int, int, str], None] | None = None,
    *,
    seed: int = 0,
) -> str:
    """The sentence that describes a photo to the base.

    Args:
        base: the base, without adapters.
        latents: the photo (C, H, W) as the first denoiser sees it.
        extra: that denoiser's conditioning beside the text, one row.
        progress: called after every few sentences that were compared.
        seed: seed of the draws.

    Raises:
        NonFiniteModelError: the base gives NaN or infinity.

    **Memory**: `BATCH` rows, and the text encoder beside the denoisers.
    """
    vocabulary = base.family.vocabulary
    if vocabulary is None:
        return NEUTRAL
    draws = Draws(base.denoisers[0], tuple(latents.shape), DRAWS, SPAN, seed)
    total, compared = sentences_tried(vocabulary), 0

    def losses(sentences: Sequence[str]) -> list[float]:
        nonlocal compared
        text = base.encode_text(sentences) | extra.expand(len(sentences))

        def by_group(rows: int) -> Tensor:
            values = list[Tensor]()
            # As many sentences as fill a pass.
            for numbers in torch.arange(len(sentences)).split(BATCH // DRAWS):
                pictures = latents.expand(len(numbers), *latents.shape)
                values.append(draws.losses(base, pictures, text.rows(numbers), rows))
                if progress is not None:
                    progress(compared + int(numbers[-1]) + 1, total, "")
            return torch.cat(values)

        values = in_fewer_rows(base, by_group, BATCH, "describe the photo")
        compared += len(sentences)
        if not values.isfinite().all():
            base.check_denoiser(draws.denoiser, latents, text.rows([0]))
        return [float(value) for value in values]

    return best_words(vocabulary, losses)


def sentences_tried(vocabulary: Vocabulary) -> int:
    """The number of sentences whose losses `describe` compares."""
    count = 0

    def counted(sentences: Sequence[str]) -> list[float]:
        nonlocal count
        count += len(sentences)
        return [0.0] * len(sentences)

    best_words(vocabulary, counted)
    return count


def best_words(vocabulary: Vocabulary, losses: Losses) -> str:
    """The sentence with a word of every kind, those of the least loss.

    The first kinds are chosen together, because the sentences of the base's training have them all; the further ones
    each by itself beside them.
    """
    firsts: list[dict[str, str]] = [{}]
    further = dict(vocabulary.groups)
    for name, words in vocabulary.groups.items():
        if firsts != [{}] and len(firsts) * len(words) > MOST_TOGETHER:
            break
        firsts = [{**one, name: word} for one in firsts for word in words]
        del further[name]
    chosen = _least(firsts, losses([vocabulary.sentence(one) for one in firsts]))
    added = [{name: word} for name, words in further.items() for word in words]
    lost = losses([vocabulary.sentence(chosen | one) for one in added]) if added else []
    best: dict[str, str] = {}
    for name in further:
        numbers = [number for number, one in enumerate(added) if name in one]
        best |= _least([added[number] for number in numbers], [lost[number] for number in numbers])
    return vocabulary.sentence(chosen | best)


def _least(choices: Sequence[dict[str, str]], losses: Sequence[float]) -> dict[str, str]:
    """The choice with the least loss."""
    return min(zip(choices, losses, strict=True), key=lambda pair: pair[1])[0]
