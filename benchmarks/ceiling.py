"""The most an editor can get here: the ground truth itself, judged as if it were an edit.

    python -m benchmarks.ceiling

Once as rendered, which shows what the judge misreads, and once through the base's autoencoder, which every picture of
the base comes from.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from lowmem_imagic.base_model import BaseModel
from lowmem_imagic.letterbox import to_images, to_tensor

from .edit_judge import bootstrap, judge
from .oracle import Oracle
from .results import provenance, write_result
from .scene_edits import HARD_KINDS, SETS, SceneEdit


def judged(oracle: Oracle, items: Sequence[SceneEdit], pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Shares of good, done and kept pictures of some items, and the names of those that are not good."""
    verdicts = judge(oracle, items, pictures)
    return {
        "good": bootstrap([verdict.good for verdict in verdicts]),
        "success": bootstrap([verdict.success for verdict in verdicts]),
        "kept": bootstrap([verdict.kept for verdict in verdicts]),
        "not_good": [item.name for item, verdict in zip(items, verdicts, strict=True) if not verdict.good],
    }


def ceiling(base: BaseModel, oracle: Oracle, items: Sequence[SceneEdit]) -> dict[str, Any]:
    """What the judge says of the ground truth of some items."""
    truth = [item.truth_picture(base.size_px) for item in items]
    latents = torch.cat([base.encode_images(to_tensor(picture)) for picture in truth])
    return {
        "ground_truth": judged(oracle, items, truth),
        "round_trip": judged(oracle, items, to_images(base.decode(latents))),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    base, oracle = BaseModel.load("demo", device=args.device), Oracle.load()
    origin = provenance(base.device)
    result: dict[str, Any] = {
        "model": {"name": base.name, "sha256": base.identity.files},
        "judge": {"sha256": oracle.sha256},
    }
    for name, chosen in SETS.items():
        result[name] = ceiling(base, oracle, [item for item in chosen.items() if item.kind not in HARD_KINDS])
        for what in ("ground_truth", "round_trip"):
            print(f"{name}, {what}: {result[name][what]['good']}")
    print(f"result: {write_result('edit_ceiling', result, origin=origin).name}")


if __name__ == "__main__":
    main()
