"""Agreement of the pictures of small models with their captions: ``python -m benchmarks.world_quality --model DIR``.

For the models of `benchmarks.cascade_world` and `benchmarks.flow_world`, drawn by diffusers' own pipelines with their
own schedules, as `benchmarks.demo_quality` measures the bundled model.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, IFPipeline, IFSuperResolutionPipeline
from torch import Tensor
from tqdm import tqdm

from lowmem_imagic.pictures.png import encode_png
from lowmem_imagic.storage.atomic import write_bytes

from .cascade_world import STAGES
from .oracle import Oracle
from .results import provenance, write_result
from .samples import SCENE_SEED, Prompt, Samples, grid, held_out, read
from .world_training import SIDE_PX

STEPS, GUIDANCE = 30, 3.0
"""As in `benchmarks.demo_quality`."""
Draw = Callable[[Sequence[str], Sequence[torch.Generator]], Tensor]
"""Pictures (B, 3, 128, 128) in [-1, 1] from captions, with a generator each."""


def cascade(folder: Path, steps: int) -> Draw:
    """Both stages of a cascade; stage II is in the folder beside."""
    first = IFPipeline.from_pretrained(folder)
    second = IFSuperResolutionPipeline.from_pretrained(folder.parent / STAGES["second"])
    first, second = quiet(first), quiet(second)
    settings = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "output_type": "pt"}

    def draw(captions: Sequence[str], generators: Sequence[torch.Generator]) -> Tensor:
        text = dict(zip(("prompt_embeds", "negative_prompt_embeds"), first.encode_prompt([*captions]), strict=True))
        small = first(**text, generator=[*generators], **settings).images
        large: Tensor = second(image=small, **text, generator=[*generators], **settings).images
        return large.clamp(-1, 1)

    return draw


def flow(folder: Path, steps: int) -> Draw:
    """A small FLUX.2 klein."""
    pipeline = quiet(Flux2KleinPipeline.from_pretrained(folder))

    def draw(captions: Sequence[str], generators: Sequence[torch.Generator]) -> Tensor:
        images: Tensor = pipeline(
            prompt=[*captions],
            height=SIDE_PX,
            width=SIDE_PX,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=[*generators],
            output_type="pt",
        ).images
        return 2 * images - 1

    return draw


def quiet(pipeline: Any) -> Any:
    """A pipeline without a progress bar of its own, in fp32."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float32)


DRAWING: dict[str, Callable[[Path, int], Draw]] = {"IFPipeline": cascade, "Flux2KleinPipeline": flow}


def drawn(folder: Path, captions: int, *, batch: int = 8, steps: int = STEPS) -> Samples:
    """Pictures of captions of held-out scenes with one object, and the judge's readings.

    Args:
        folder: the model.
        captions: their number; picture number i begins with the noise of seed i.
        batch: pictures drawn together; no picture depends on it.
        steps: sampling steps, of each stage of a cascade.
    """
    kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    draw = DRAWING[kind](folder, steps)
    rng = random.Random(f"{SCENE_SEED}/captions")
    prompts = [Prompt.of(scene, rng) for scene in held_out(captions, 0)]
    images = []
    for begin in tqdm(range(0, captions, batch), desc="drawing"):
        some = [prompt.caption for prompt in prompts[begin : begin + batch]]
        images.append(draw(some, [torch.Generator().manual_seed(begin + row) for row in range(len(some))]))
    pictures = torch.cat(images).float()
    return Samples(prompts, pictures, read(Oracle.load(), pictures, 1))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="a folder of one of the two scripts, such as in worlds"
    )
    parser.add_argument("--captions", type=int, default=48, help="number of captions [48]")
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn together [8]")
    parser.add_argument("--grid", type=Path, metavar="PNG", help="write a sheet of the first samples")
    parser.add_argument("--out", type=Path, required=True, metavar="JSON", help="write the result here")
    args = parser.parse_args()
    started = time.monotonic()
    with torch.no_grad():
        samples = drawn(args.model, args.captions, batch=args.batch)
    result = {
        "model": args.model.name,
        "settings": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE},
        "one_object": samples.summary(1),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_result(args.out.stem, result, path=args.out, origin=provenance(torch.device("cpu")))
    print(json.dumps(result["one_object"]["attributes"], indent=2))
    if args.grid:
        footer = f"guidance {GUIDANCE:g}, {STEPS} steps"
        sheet = grid(samples, range(min(32, args.captions)), footer, f"Samples of {args.model.name}")
        write_bytes(args.grid, encode_png(sheet), overwrite=True)


if __name__ == "__main__":
    main()
