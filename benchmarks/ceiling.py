"""Limits of quality: the ground truth judged as if it were an edit, and edits with some knowledge of the ground truth.

    python -m benchmarks.ceiling --work DIR
    python -m benchmarks.ceiling --truth-only

The ground truth is judged as rendered, which shows the judge's errors, and through the base's autoencoder, which all
pictures of the base come from; and with everything that no editor can know drawn anew, such as the direction in which
an object lies that stood in the photo. The reader of patterns has to tell ground truths without their pattern, or with
another one drawn anew, from coarse, dark, and slightly displaced ones, which still have their identity. The edits of
`balanced` are rendered again: with the ground truth's own mask, under a sentence that also names the unchanged
attributes (size and material), and with both. They show the remaining errors of an editor with the right mask and a
complete description.
"""

import argparse
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lowmem_imagic.demo.render import render
from lowmem_imagic.demo.scene import Scene
from lowmem_imagic.demo.strangers import STRANGE
from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.pictures.letterbox import to_images, to_tensor
from lowmem_imagic.pipeline.apply import apply_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.sampling import sample
from lowmem_imagic.sampling.sample import Cell
from lowmem_imagic.settings.presets import preset
from lowmem_imagic.settings.stages import EditConfig

from .averages import level, share
from .bundled import model_of
from .edit_judge import OVERLAP, Verdict, by_half, judge
from .edit_methods import SEED, as_photo, trained
from .edit_quality import best_eta
from .identity import reader
from .oracle import Oracle
from .results import provenance, write_result
from .scene_edits import HALVES, SAME_LEVELS, STRANGERS, TEST, VALIDATION, SceneEdit, rows_of

ETAS = (0.8, 1.0, 1.2)
"""Etas to try; the one with the most good items on validation is reported."""
TOLD = {"told_where": (True, False), "told_in_full": (False, True), "told_both": (True, True)}
"""Kinds of knowledge: whether an edit gets the true mask, and whether it gets the full sentence."""


def shares(items: Sequence[SceneEdit], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The figures of some items' pictures by half, and the names of items that are not good."""
    return {
        **by_half(items, verdicts),
        "not_good": [item.name for item, verdict in zip(items, verdicts, strict=True) if not verdict.good],
    }


def judged(oracle: Oracle, items: Sequence[SceneEdit], pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """The judge's shares for pictures, one for each item."""
    return shares(items, judge(oracle, items, pictures))


def ceiling(base: BaseModel, oracle: Oracle, items: Sequence[SceneEdit]) -> dict[str, Any]:
    """The judge's shares for the ground truth of some items, in three forms, and for their photos, as if these were
    edits."""
    size_px = base.sizes.own[0]
    truth = [item.truth_picture(size_px) for item in items]

    def returned(pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """The pictures through the autoencoder."""
        return to_images(base.decode(torch.cat([base.encode_images(to_tensor(picture)) for picture in pictures])))

    return {
        "photo": judged(oracle, items, [item.photo_picture(size_px) for item in items]),
        "ground_truth": judged(oracle, items, truth),
        "round_trip": judged(oracle, items, returned(truth)),
        "drawn_anew": judged(oracle, items, returned([render(drawn_anew(item), size_px) for item in items])),
    }


def drawn_anew(item: SceneEdit) -> Scene:
    """The edited scene with what neither photo nor sentence tells drawn anew: another right answer.

    Drawn are the size that "small" or "large" stands for, the direction of an object that lies down or stands up, or
    that gets a shape with sides where the photo's has none to see, all of a second object but shape and colour, and the
    texture of a new floor. The pattern of a stranger tells its direction, except for a new pose.
    """
    rng = random.Random(f"{item.name}/anew")
    other = Scene.draw(rng, objects=2)
    drawn = other.objects[1]
    [was] = item.photo.objects
    own, *added = item.edited.objects
    has_sides = was.pattern is not None or was.shape == "cube" or was.pose == "lying"
    if "pose" in item.asked or ("shape" in item.asked and not has_sides):
        own = replace(own, rotation=drawn.rotation)
    if "size" in item.asked:
        own = replace(own, jitter=drawn.jitter)
    second = [
        replace(one, material=drawn.material, x=drawn.x, z=drawn.z, rotation=drawn.rotation, jitter=drawn.jitter)
        for one in added
    ]
    texture = other.texture_seed if "floor" in item.asked else item.edited.texture_seed
    return replace(item.edited, objects=(own, *second), texture_seed=texture)


def patterns(items: Sequence[SceneEdit], size_px: int) -> dict[str, Any]:
    """Overlaps that the reader of patterns finds in ground truths of strangers that were changed, by the change."""
    overlaps: dict[str, list[float]] = {}
    strange = [items[n] for n in rows_of(items, half=STRANGERS)]
    for item in strange:
        for change, picture in altered(item, size_px).items():
            overlaps.setdefault(change, []).append(reader(item.edited, size_px).overlap(np.asarray(picture)))
    kinds = [item.kind for item in strange]
    return {
        change: {"overlap": level(kinds, values), "identity": share(kinds, [value >= OVERLAP for value in values])}
        for change, values in overlaps.items()
    }


def altered(item: SceneEdit, size_px: int) -> dict[str, Image.Image]:
    """The ground truth of a stranger with changes that keep its identity, and with ones that do not.

    "displaced" is by less than *kept* allows; "another" has the same second colour in another pattern.
    """
    solid, *added = item.edited.objects
    assert solid.pattern is not None
    rng = random.Random(f"{item.name}/altered")
    other = STRANGE.pattern(rng, rotation=solid.rotation)
    assert other is not None

    def drawn(**changes: Any) -> Image.Image:
        return render(replace(item.edited, objects=(replace(solid, **changes), *added)), size_px)

    truth = item.truth_picture(size_px)
    coarse = truth.resize((size_px // 2, size_px // 2), Image.Resampling.BOX)
    return {
        "coarse": coarse.resize(truth.size, Image.Resampling.BILINEAR),
        "dark": truth.point(lambda level: 0.85 * level),
        "displaced": drawn(x=solid.x + 0.1, z=solid.z - 0.15, jitter=1.05 * solid.jitter),
        "another": drawn(pattern=replace(other, color=solid.pattern.color)),
        "removed": drawn(pattern=None),
    }


def truth_mask(base: BaseModel, item: SceneEdit) -> Tensor:
    """Mask of the places where ground truth and photo differ, and one cell around: (1, H, W) of latents, 0 or 1."""
    pictures = (item.photo_picture(base.sizes.own[0]), item.truth_picture(base.sizes.own[0]))
    photo, truth = (np.asarray(picture, np.int16) for picture in pictures)
    changed = torch.from_numpy(abs(photo - truth).max(-1) > SAME_LEVELS).float()[None]
    cells = F.adaptive_max_pool2d(changed, base.denoisers[0].shape(base.sizes.own)[1:])
    return F.max_pool2d(cells, 3, stride=1, padding=1)


def told(
    base: BaseModel,
    oracle: Oracle,
    items: Sequence[SceneEdit],
    config: EditConfig,
    work: Path | None,
    *,
    where: bool,
    in_full: bool,
) -> dict[float, list[Verdict]]:
    """Verdicts at each of `ETAS` on edits that are trained as usual, and rendered with more knowledge.

    Args:
        base: the base.
        oracle: the judge.
        items: the items.
        config: settings of the edits.
        work: folder of edit files, see `benchmarks.edit_methods.ours`.
        where: use the ground truth's mask in place of the edit's own.
        in_full: render under the full sentence.
    """
    verdicts: dict[float, list[Verdict]] = {eta: [] for eta in ETAS}
    for item in items:
        data, _ = trained(base, Job(as_photo(item.photo_picture(base.sizes.own[0])), item.sentence), config, work)
        cells, sentence = [Cell(0, eta, SEED) for eta in ETAS], replace(item, in_full=in_full).sentence
        # Sampling has no setting for a mask, as only this benchmark knows the true one.
        mask = mock.patch.object(sample, "change_mask", return_value=truth_mask(base, item))
        with mask if where else nullcontext():
            made = apply_edits(base, [edit_file.decode(data)], cells, config.sample, prompts=[sentence])
        for eta, picture in zip(ETAS, made, strict=True):
            verdicts[eta] += judge(oracle, [item], [picture])
    return verdicts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep edits here, or take them from here")
    parser.add_argument("--truth-only", action="store_true", help="judge the ground truth alone, without edits")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    base = BaseModel.load("demo", device=args.device, weights="int8")
    oracle, config = Oracle.load(), preset("balanced")
    origin = provenance(base.device)
    result: dict[str, Any] = {
        "model": model_of(base),
        "judge": {"sha256": oracle.sha256},
        "settings": config.to_dict(),
        "etas": ETAS,
    }
    eta: dict[str, float] = {}
    for chosen in (VALIDATION, TEST):
        items = chosen.items()
        found = ceiling(base, oracle, items)
        for what, (where, in_full) in ({} if args.truth_only else TOLD).items():
            verdicts = told(base, oracle, items, config, args.work, where=where, in_full=in_full)
            # The first set is validation, which chooses the eta.
            eta.setdefault(what, best_eta(verdicts))
            found[what] = {
                "eta": eta[what],
                **shares(items, verdicts[eta[what]]),
                "curve": [{"eta": point, **by_half(items, of, kinds=False)} for point, of in verdicts.items()],
            }
        result[chosen.name] = {**found, "patterns": patterns(items, base.sizes.own[0])}
        for part, values in found.items():
            for half in HALVES:
                print(f"{chosen.name}, {part}, {half}: {values[half]['all']['good']}")
        print(f"{chosen.name}, patterns: {result[chosen.name]['patterns']}")
    print(f"result: {write_result('edit_ceiling', result, origin=origin).name}")


if __name__ == "__main__":
    main()
