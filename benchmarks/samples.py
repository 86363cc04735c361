"""Draws pictures from captions of held-out scenes, and counts the attributes that agree with the caption.

A caption always names colour, shape and floor, and the other attributes at random. The judge (`benchmarks.oracle`)
reads the sample; an attribute is right if its reading agrees with the caption. With two objects, either may be the left
one (training mirrors pictures and not their captions): readings are matched to the caption's objects in the better
order.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from lowmem_imagic.demo.pictures import scene_at
from lowmem_imagic.demo.scene import LYING_SHAPES, Scene
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.families.stable_diffusion import EMBEDS
from lowmem_imagic.pictures.png import contact_sheet
from lowmem_imagic.settings.stages import SampleConfig

from .oracle import WORDS, Attributes, Oracle
from .training_free import denoised

SCENE_SEED = 2
"""Seed of the held-out scenes; 0, 4, 7 and 8 train the model, 1 the judge, 12 and 13 are the edits."""
NAMED = ("shape", "color", "floor")
"""Attributes every caption names."""
SHARE_TARGETS = {"shape": 0.97, "color": 0.97, "floor": 0.97, "size": 0.97, "pose": 0.97, "material": 0.95}
"""Target shares of right values where a caption of one object names the attribute."""
PAIR_TARGET = 0.85
"""Target share of pictures of two objects whose every shape and colour, and whose floor, are as named."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of sampling."""

    num_inference_steps: int = 30
    guidance_scale: float = 3.0
    scheduler: str = "DDIM"
    batch: int = 50
    """Pictures sampled together; no picture depends on it."""
    seed: int = 0
    """Sample number i starts from the noise of seed ``seed + i``."""


@dataclass(frozen=True)
class Prompt:
    """A caption and its named attributes."""

    caption: str
    scene: Scene
    named: tuple[frozenset[str], ...]
    """Attributes the caption names of each object; the floor is named with every object."""

    @staticmethod
    def of(scene: Scene, rng: random.Random) -> "Prompt":
        """A caption of the scene that names colour, shape and floor, and each other attribute half of the time."""
        phrases, named = [], []
        for solid in scene.objects:
            says = {name: rng.random() < 0.5 for name in ("size", "material", "pose")}
            phrases.append(solid.words(size=says["size"], material=says["material"], pose=says["pose"]))
            says["pose"] &= solid.shape in LYING_SHAPES
            named.append(frozenset(NAMED) | {name for name, said in says.items() if said})
        return Prompt(f"a photo of {' and '.join(phrases)} on a {scene.floor} floor", scene, tuple(named))

    def verdicts(self, readings: Sequence[Attributes]) -> list[dict[str, bool]]:
        """For each object the named attributes, and whether its reading agrees; readings in the best order."""
        orders = [list(readings), list(readings)[::-1]][: len(readings)]
        judged = [
            [
                {name: getattr(found, name) == getattr(Attributes.of(self.scene, index), name) for name in names}
                for index, (names, found) in enumerate(zip(self.named, order, strict=True))
            ]
            for order in orders
        ]

        def agreement(objects: list[dict[str, bool]]) -> tuple[int, int]:
            named = sum(verdict[name] for verdict in objects for name in NAMED)
            return named, sum(sum(verdict.values()) for verdict in objects)

        return max(judged, key=agreement)


def held_out(singles: int, pairs: int) -> list[Scene]:
    """The first held-out scenes: `singles` with one object, then `pairs` with two."""
    wanted, found = {1: singles, 2: pairs}, {1: list[Scene](), 2: list[Scene]()}
    index = 0
    while any(len(found[count]) < number for count, number in wanted.items()):
        scene = scene_at(SCENE_SEED, index)
        kind = len(scene.objects)
        if len(found[kind]) < wanted[kind]:
            found[kind].append(scene)
        index += 1
    return found[1] + found[2]


def text_to_image(base: BaseModel, captions: Sequence[str], settings: Settings) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1], fp32 on the CPU, by plain text-to-image with guidance; no adapters."""
    text = base.encode_text(captions)[EMBEDS]
    shape = base.denoisers[0].shape(base.sizes.own)
    # One generator per picture, so that a picture does not depend on its batch.
    noise = torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed + row)) for row in range(len(text))]
    )
    config = SampleConfig(
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        scheduler=settings.scheduler,
    )
    batches = zip(text.split(settings.batch), noise.split(settings.batch), strict=True)
    return torch.cat(
        [
            base.decode(denoised(base, rows, config, start))
            for rows, start in tqdm(batches, desc="sampling", total=-(-len(text) // settings.batch))
        ]
    )


class Samples(NamedTuple):
    """Pictures drawn from captions, and the judge's readings."""

    prompts: list[Prompt]
    images: Tensor
    """(B, 3, H, W) in [-1, 1]."""
    readings: list[tuple[Attributes, ...]]

    @property
    def right(self) -> list[bool]:
        """For each picture, whether shape, colour and floor agree with its caption."""
        pairs = zip(self.prompts, self.readings, strict=True)
        return [all(verdict[name] for verdict in p.verdicts(found) for name in NAMED) for p, found in pairs]

    def summary(self, count: int) -> dict[str, Any] | None:
        """`judged` for the pictures with `count` objects; None if there are none."""
        rows = [i for i, prompt in enumerate(self.prompts) if len(prompt.scene.objects) == count]
        if not rows:
            return None
        return judged([self.prompts[i] for i in rows], [self.readings[i] for i in rows], single=count == 1)


def read(oracle: Oracle, images: Tensor, count: int) -> list[tuple[Attributes, ...]]:
    """The readings of all objects of each picture, which has `count` objects."""
    if not len(images):
        return []
    return [(found,) for found in oracle.read(images)] if count == 1 else [*oracle.read_pairs(images)]


def judged(prompts: Sequence[Prompt], readings: Sequence[Sequence[Attributes]], *, single: bool) -> dict[str, Any]:
    """Shares of right named attributes, one verdict per object, and of pictures that are right as a whole."""
    verdicts = [prompt.verdicts(found) for prompt, found in zip(prompts, readings, strict=True)]
    by_word: dict[str, dict[str, Any]] = {}
    attributes = {}
    for name, values in WORDS.items():
        rows = [
            (getattr(Attributes.of(prompt.scene, index), name), verdict[name])
            for prompt, objects in zip(prompts, verdicts, strict=True)
            for index, verdict in enumerate(objects)
            if name in verdict
        ]
        target = SHARE_TARGETS[name] if single else None
        attributes[name] = share([right for _, right in rows], target)
        by_word[name] = {value: share([right for word, right in rows if word == value]) for value in values}
    return {
        "captions": len(prompts),
        "attributes": attributes,
        "by_word": by_word,
        "shape_color_and_floor": share(
            [all(v[n] for v in objects for n in NAMED) for objects in verdicts], None if single else PAIR_TARGET
        ),
        "all_that_is_named": share([all(all(v.values()) for v in objects) for objects in verdicts]),
    }


def share(verdicts: Sequence[bool], target: float | None = None) -> dict[str, Any] | None:
    """Share of right verdicts, with its 95 % interval (Wilson); None without verdicts."""
    of, right = len(verdicts), sum(verdicts)
    if not of:
        return None
    z = 1.96
    rate, spread = right / of, z * z / of
    middle = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / of + spread / (4 * of)) / (1 + spread)
    result: dict[str, Any] = {
        "right": right,
        "of": of,
        "share": round(rate, 4),
        "interval_95": [round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)],
    }
    if target is not None:
        result |= {"target": target, "passed": rate >= target}
    return result


def grid(
    samples: Samples, rows: Sequence[int], footer: str, title: str = "Samples of the bundled model"
) -> Image.Image:
    """The chosen samples with their captions; a red frame marks a wrong shape, colour or floor."""
    cells, right = [], samples.right
    for row in rows:
        prompt, image = samples.prompts[row], samples.images[row]
        pixels = ((image + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels).resize((160, 160), Image.Resampling.BICUBIC)
        picture = ImageOps.expand(picture, 4, "white" if right[row] else (220, 30, 30))
        cells.append((prompt.caption.removeprefix("a photo of "), picture))
    return contact_sheet(cells, columns=8, title=title, footer=footer, cell_px=168)
