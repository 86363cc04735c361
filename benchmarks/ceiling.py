"""The most that can be got here: the ground truth judged as if it were an edit, and edits that are told part of it.

    python -m benchmarks.ceiling --work DIR

The ground truth once as rendered, which shows what the judge misreads, and once through the base's autoencoder, which
every picture of the base comes from. And the edits of `balanced`, rendered anew: with the ground truth's own mask in
place of the one they find, under a sentence that also names what is to stay (size and material), and with both. That is
what would be left to do for an editor that knew where to change the photo, and all that the object is to be.
"""

import argparse
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

from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.pictures.letterbox import to_images, to_tensor
from lowmem_imagic.pipeline.apply import apply_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.sampling import sample
from lowmem_imagic.sampling.sample import Cell
from lowmem_imagic.settings.presets import preset
from lowmem_imagic.settings.stages import EditConfig

from .edit_judge import Verdict, bootstrap, judge
from .edit_methods import SEED, as_photo, trained
from .edit_quality import best_eta
from .oracle import Oracle
from .results import provenance, write_result
from .scene_edits import HARD_KINDS, SAME_LEVELS, TEST, VALIDATION, SceneEdit

ETAS = (0.8, 1.0, 1.2)
"""That an edit is tried at; the one with most good items on validation is reported."""
TOLD = {"told_where": (True, False), "told_in_full": (False, True), "told_both": (True, True)}
"""Ways to tell an edit more: whether it is given the mask, and whether the sentence in full."""


def shares(items: Sequence[SceneEdit], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Shares of good, done and kept pictures of some items, and the names of those that are not good."""
    return {
        "good": bootstrap([verdict.good for verdict in verdicts]),
        "success": bootstrap([verdict.success for verdict in verdicts]),
        "kept": bootstrap([verdict.kept for verdict in verdicts]),
        "not_good": [item.name for item, verdict in zip(items, verdicts, strict=True) if not verdict.good],
    }


def judged(oracle: Oracle, items: Sequence[SceneEdit], pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """What the judge says of pictures, one of each item."""
    return shares(items, judge(oracle, items, pictures))


def ceiling(base: BaseModel, oracle: Oracle, items: Sequence[SceneEdit]) -> dict[str, Any]:
    """What the judge says of the ground truth of some items."""
    truth = [item.truth_picture(base.sizes.own[0]) for item in items]
    latents = torch.cat([base.encode_images(to_tensor(picture)) for picture in truth])
    return {
        "ground_truth": judged(oracle, items, truth),
        "round_trip": judged(oracle, items, to_images(base.decode(latents))),
    }


def truth_mask(base: BaseModel, item: SceneEdit) -> Tensor:
    """Where the ground truth shows something else than the photo, and one cell around: (1, H, W) of latents, 0 or 1."""
    pictures = (item.photo_picture(base.sizes.own[0]), item.truth_picture(base.sizes.own[0]))
    photo, truth = (np.asarray(picture, np.int16) for picture in pictures)
    changed = torch.from_numpy(abs(photo - truth).max(-1) > SAME_LEVELS).float()[None]
    cells = F.adaptive_max_pool2d(changed, base.denoisers[0].shape(base.size)[1:])
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
    """Verdicts at each of `ETAS` on edits that are trained as always, and told more when they are rendered.

    Args:
        base: the base.
        oracle: the judge.
        items: what is asked.
        config: of the edits.
        work: folder of edit files, see `benchmarks.edit_methods.ours`.
        where: change the photo where the ground truth does, and not where the edit's own mask says.
        in_full: ask for it by the sentence in full.
    """
    verdicts: dict[float, list[Verdict]] = {eta: [] for eta in ETAS}
    for item in items:
        data, _ = trained(base, Job(as_photo(item.photo_picture(base.sizes.own[0])), item.sentence), config, work)
        cells, sentence = [Cell(0, eta, SEED) for eta in ETAS], replace(item, in_full=in_full).sentence
        # Nobody has this mask but here, so that sampling has no setting for it.
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
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    base = BaseModel.load("demo", device=args.device, weights="int8")
    oracle, config = Oracle.load(), preset("balanced")
    origin = provenance(base.device)
    result: dict[str, Any] = {
        "model": {"name": base.name, "sha256": base.identity.files},
        "judge": {"sha256": oracle.sha256},
        "settings": config.to_dict(),
        "etas": ETAS,
    }
    eta: dict[str, float] = {}
    for chosen in (VALIDATION, TEST):
        items = [item for item in chosen.items() if item.kind not in HARD_KINDS]
        found = ceiling(base, oracle, items)
        for what, (where, in_full) in TOLD.items():
            verdicts = told(base, oracle, items, config, args.work, where=where, in_full=in_full)
            # The first set is the one that chooses.
            eta.setdefault(what, best_eta(items, verdicts))
            found[what] = {
                "eta": eta[what],
                **shares(items, verdicts[eta[what]]),
                "curve": [{"eta": point, "good": bootstrap([v.good for v in of])} for point, of in verdicts.items()],
            }
        result[chosen.name] = found
        for what, values in found.items():
            print(f"{chosen.name}, {what}: {values['good']}")
    print(f"result: {write_result('edit_ceiling', result, origin=origin).name}")


if __name__ == "__main__":
    main()
