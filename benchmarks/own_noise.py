"""The photo's own noise by two ways of inversion: how white it is.

    python -m benchmarks.own_noise

A picture starts from its photo's own noise (`lowmem_imagic.sampling.inversion`): DDIM inversion, which is Euler's
method, of the photo with a little noise on it, because without that *softening* the noise is too quiet. FireFlow (Deng
et al. 2024, arXiv 2412.07517, algorithm 1) is of second order with one prediction a step. On flow models it gives white
noise where Euler's method does not. White noise has a standard deviation of 1, and its neighbours are independent.
"""

import argparse
from collections.abc import Callable
from itertools import pairwise
from statistics import mean
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.families import DEMO
from lowmem_imagic.families.conditioning import Conditioning
from lowmem_imagic.families.family import Denoiser
from lowmem_imagic.pictures.letterbox import to_tensor
from lowmem_imagic.sampling import inversion

from .bundled import model_of
from .edit_methods import SEED
from .results import provenance, write_result
from .scene_edits import HALVES, VALIDATION, rows_of

Inversion = Callable[..., Tensor]
"""As `lowmem_imagic.sampling.inversion.own_noise`."""


def fireflow(softening: float) -> Inversion:
    """FireFlow's inversion of a photo with `softening` of noise on it, in as many steps as DDIM's.

    A discrete schedule is a flow in ``x / sqrt(alpha_bar)`` over ``s = sqrt((1 - alpha_bar) / alpha_bar)``, whose
    velocity is the predicted noise (Song et al. 2021, arXiv 2010.02502, equation 14).
    """

    @torch.no_grad()
    def invert(
        base: BaseModel,
        denoiser: Denoiser,
        latents: Tensor,
        generator: torch.Generator,
        progress: Callable[[int, int, str], None] | None = None,
        *,
        extra: Conditioning | None = None,
    ) -> Tensor:
        schedule: Any = denoiser.schedule
        levels = ((1 - schedule.alpha_bar) / schedule.alpha_bar).sqrt().double()
        text = base.encode_text([""]) | (extra or {})

        def velocity(y: Tensor, s: float) -> Tensor:
            at = _position(levels, s)
            predicted = base.predict(denoiser, (y / (1 + s * s) ** 0.5).float(), torch.tensor([at]), text)
            return predicted.float().cpu().double()

        steps = levels[torch.linspace(0, len(levels) - 1, inversion.STEPS + 1).round().long()].tolist()
        y = (latents[None] + softening * torch.randn(latents[None].shape, generator=generator)).double()
        kept = velocity(y, steps[0])
        for number, (s, after) in enumerate(pairwise(steps), start=1):
            kept = velocity(y + (after - s) / 2 * kept, (s + after) / 2)
            y = y + (after - s) * kept
            if progress is not None:
                progress(number, inversion.STEPS, "")
        return ((y - latents[None]) / steps[-1])[0].float()

    return invert


def _position(levels: Tensor, s: float) -> float:
    """The timestep, between two whole ones, at which a rising schedule has the level `s`."""
    above = int(torch.searchsorted(levels, s).clamp(1, len(levels) - 1))
    low, high = levels[above - 1].log(), levels[above].log()
    return above - 1 + float((torch.tensor(s).double().log() - low) / (high - low))


def ddim(softening: float) -> Inversion:
    """This package's inversion, with this `softening`."""

    def invert(base: BaseModel, denoiser: Denoiser, latents: Tensor, generator: torch.Generator) -> Tensor:
        with mock.patch.object(inversion, "SOFTENING", softening):
            return inversion.own_noise(base, denoiser, latents, generator)

    return invert


WAYS: dict[str, tuple[Callable[[float], Inversion], float]] = {
    "ddim": (ddim, inversion.SOFTENING),
    "ddim, not softened": (ddim, 0.0),
    "fireflow": (fireflow, inversion.SOFTENING),
    "fireflow, not softened": (fireflow, 0.0),
}


def whiteness(noises: list[Tensor]) -> dict[str, float]:
    """Mean standard deviation, and mean correlation of horizontal neighbours, of noises (C, H, W)."""
    return {
        "standard_deviation": round(mean(float(x.std()) for x in noises), 3),
        "correlation": round(mean(float((x[..., 1:] * x[..., :-1]).mean() / x.var()) for x in noises), 3),
    }


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=32, metavar="N", help="the first N photos of validation [32]")
    args = parser.parse_args()
    base, items = BaseModel.load(DEMO), VALIDATION.items()[: args.items]
    origin, [denoiser] = provenance(base.device), base.denoisers
    found: dict[str, list[Tensor]] = {name: [] for name in WAYS}
    for item in tqdm(items):
        [latents] = base.encode_images(to_tensor(item.photo_picture(base.sizes.own[0])))
        for name, (way, softening) in WAYS.items():
            found[name].append(way(softening)(base, denoiser, latents, torch.Generator().manual_seed(SEED)))
    result = {
        "model": model_of(base),
        "steps": inversion.STEPS,
        "softening": inversion.SOFTENING,
        "items": len(items),
        "ways": {
            name: {half: whiteness([noises[row] for row in rows_of(items, half=half)]) for half in HALVES}
            for name, noises in found.items()
        },
    }
    for name, halves in result["ways"].items():
        print(name, halves)
    write_result("own_noise", result, origin=origin)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
