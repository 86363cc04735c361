"""Facts about the suggested eta: its parts, on a model with known losses, and its repeatability."""

import contextlib
import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_imagic.diffusion.schedules import DiscreteNoise
from lowmem_imagic.sampling.suggestion import PRICE
from tests import calls

WORDS = {"photo": torch.full((2, 3), -1.0), "sentence": torch.full((2, 3), 1.0)}


class Critic:
    """A model that finds fault with a picture as far as its mean is from the text's: its noise is off by that much."""

    denoisers = (types.SimpleNamespace(schedule=DiscreteNoise(torch.full((1000,), 0.5), "epsilon")),)

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures
        self.used = contextlib.nullcontext

    def predict(self, denoiser: Any, latents: Tensor, timesteps: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        # Which picture a row is of, and so its noise, follows from the picture itself.
        candidates = (latents[:, None] - 0.5**0.5 * self.pictures[None]) / 0.5**0.5
        pick = candidates.square().mean((2, 3, 4)).sub(1).abs().argmin(1)
        noise = candidates[torch.arange(len(latents)), pick]
        fault = self.pictures[pick].mean((1, 2, 3)) - given["embeds"].mean((1, 2))
        return noise + fault[:, None, None, None]


def flat(*means: float) -> Tensor:
    """Pictures (K, 4, 8, 8) with these means, told apart by a pattern of their own."""
    patterns = torch.randn(len(means), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    patterns -= patterns.mean((1, 2, 3), keepdim=True)
    return 3 * patterns[:1] + torch.tensor(means).view(-1, 1, 1, 1)


def suggested(pictures: Tensor, etas: Sequence[float]) -> Any:
    """The suggestion for pictures that the critic judges."""
    return calls.suggest_eta(Critic(pictures), pictures, etas, WORDS["sentence"], WORDS["photo"], draws=4)


def test_scores_are_differences_of_losses() -> None:
    """`follows` is loss under the photo's text less loss under the sentence's, `distance` the RMS from the photo."""
    means = (-1.0, 0.0, 1.0)
    pictures = flat(*means)
    suggestion = calls.suggest_eta(
        Critic(pictures), pictures, (0.0, 0.5, 1.0), WORDS["sentence"], WORDS["photo"], draws=4
    )
    for mean, score in zip(means, suggestion.scores, strict=True):
        assert score.follows == pytest.approx((mean + 1) ** 2 - (mean - 1) ** 2, abs=1e-3)
        assert score.distance == pytest.approx(mean + 1, abs=1e-4)
        assert score.worth == pytest.approx((mean + 1) / 2 * (1 - PRICE), abs=1e-3)
    assert suggestion.eta == 1.0
    assert json.loads(json.dumps(suggestion.as_json()))["scores"][2]["eta"] == 1.0


def test_what_leaves_the_photo_for_nothing_is_not_suggested() -> None:
    """Among pictures that follow the sentence equally, the one nearest to the photo is suggested, in any order."""
    pictures = flat(1.0, -1.0, 1.0)
    pictures[0] += 5 * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1)).sub_(0)
    pictures[0] -= pictures[0].mean() - 1.0
    suggestion = calls.suggest_eta(
        Critic(pictures), pictures, (1.2, 0.0, 0.8), WORDS["sentence"], WORDS["photo"], draws=4
    )
    assert suggestion.eta == 0.8


def test_the_photo_is_at_eta_0() -> None:
    """Distances are from the picture at eta 0, also beside one at a negative eta."""
    distances = [score.distance for score in suggested(flat(-2.0, 0.0, 1.0), (-1.0, 0.0, 1.0)).scores]
    assert distances == pytest.approx([2.0, 0.0, 1.0], abs=1e-4)


@pytest.mark.parametrize("etas", [(0.0,), (0.5, 1.0)])
def test_one_picture_or_no_photo_leaves_no_choice(etas: tuple[float, ...]) -> None:
    """Fewer than two etas are refused, and etas without the photo's."""
    with pytest.raises(ValueError, match="two etas or more, 0 among them"):
        suggested(flat(*etas), etas)


def test_the_real_model_is_asked_without_adapters(load_base: Callable[..., Any]) -> None:
    """On a real UNet the scores are finite, repeatable, and the same in any order of the etas."""
    base = load_base()
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    target, optimized = calls.encode_text(base, ["a blue sphere", "two birds kissing"])
    one = calls.suggest_eta(base, latents, (0.0, 0.6, 1.0), target, optimized, draws=4)
    other = calls.suggest_eta(base, latents.flip(0), (1.0, 0.6, 0.0), target, optimized, draws=4)
    assert one == calls.suggest_eta(base, latents, (0.0, 0.6, 1.0), target, optimized, draws=4)
    for mine, theirs in zip(one.scores, other.scores[::-1], strict=True):
        assert mine.follows == pytest.approx(theirs.follows, rel=1e-3, abs=1e-6)
