"""Bytes of edit files.

For the bundled model: real edits with one training step, as the size does not depend on training time. For Stable
Diffusion 1.5: edits of its shape with random factors and a random embedding, written as usual.
"""

import hashlib
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_imagic.demo.render import render
from lowmem_imagic.demo.scene import Scene
from lowmem_imagic.diffusion.schedules import COARSE_SIDE
from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.edits.edit import Edit, LoraFactors
from lowmem_imagic.edits.identity import BaseIdentity, Interface, SourcePicture
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.families import DEMO
from lowmem_imagic.families.adapter_names import KohyaNames
from lowmem_imagic.families.portable import portable
from lowmem_imagic.layers.adapter_pack import AdapterPack, Factors
from lowmem_imagic.layers.truncation import truncated
from lowmem_imagic.pictures import Photo
from lowmem_imagic.pipeline.make import make_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.pipeline.versions import versions
from lowmem_imagic.settings.presets import PRESETS, SMALL_KEEP, preset
from lowmem_imagic.settings.stages import ADAPT_TARGETS, EditConfig

from .goals import Line, fresh
from .random_unet import TOKENS, meta_unet

SMALL = "small"
"""The preset ``balanced`` with ``--small``."""
RANK = 4
"""Rank of the adapters for the comparison of layers."""
GOALS_MB = {
    ("sd15", "attn"): 1.9,
    ("sd15", "balanced"): 4.0,
    ("sd15", SMALL): 1.9,
    ("model", "balanced"): 0.6,
    ("model", SMALL): 0.25,
}


def measure(*, quick: bool, model: str = DEMO) -> tuple[dict[str, Any], list[Line]]:
    """The result and its table; sizes do not depend on `quick`."""
    wanted: list[tuple[str, tuple[str, ...]]]
    names = (*PRESETS, SMALL)
    wanted = [(f"sd15, {adapt}, rank {RANK}", ("sd15", adapt)) for adapt in ADAPT_TARGETS]
    wanted += [(f"sd15, {_title(name)}", ("sd15", name)) for name in names]
    if has_model(model):
        label = Path(model).name
        wanted += [(f"{label}, {_title(name)}", ("model", model, name)) for name in names]
        wanted += [(f"{label}, attn, rank {RANK}", ("model", model, "attn"))]
    else:
        print("size: the bundled model is not there; skipped", file=sys.stderr)
    found, lines = {}, []
    for name, words in wanted:
        print(f"size: {name}", file=sys.stderr)
        found[name] = result = fresh("benchmarks.engine_size", *words)
        size = None if result is None else result["file_bytes"] / 1e6
        lines.append(Line(name, size, "MB", GOALS_MB.get((words[0], words[-1]))))
    return {"files": found}, lines


def has_model(model: str) -> bool:
    """Whether a base can be loaded."""
    try:
        BaseModel.load(model, device="cpu")
    except Exception:
        return False
    return True


def _title(name: str) -> str:
    return "preset balanced, --small" if name == SMALL else f"preset {name}"


def of_sd15(name: str, path: Path) -> dict[str, Any]:
    """Sizes of an edit of Stable Diffusion 1.5's shape with the settings of `_config`; leaves the edit at `path`."""
    config = _config(name)
    tuning = config.finetune
    unet = meta_unet("sd15")
    pack = AdapterPack(unet, KohyaNames(), count=1, adapt=tuning.adapt, rank=tuning.lora_rank, alpha=tuning.lora_alpha)
    generator = torch.Generator().manual_seed(0)
    pack.weights.normal_(0.0, 0.02, generator=generator)
    whole = {key: _evened(*factors) for key, factors in pack.export(0).items()}
    sentence = "a photo of a sleeping cat on a wooden floor"
    stored = portable(truncated(whole, tuning.keep), unet)
    made = Edit(
        adapters={"unet": {key: LoraFactors(*factors) for key, factors in stored.items()}},
        conditioning={"embeds": torch.randn(TOKENS, 768, generator=generator)},
        coarse={"unet": torch.randn(4, COARSE_SIDE, COARSE_SIDE, generator=generator)},
        noise={"unet": torch.randn(4, 64, 64, generator=generator)} if config.sample.start == "inverted" else {},
        sentences=(sentence,),
        base=BaseIdentity(
            source="stable-diffusion-v1-5/stable-diffusion-v1-5",
            revision=hashlib.sha1(b"revision").hexdigest(),
            family="sd1",
            interface=Interface(text={"embeds": 768}, denoisers={"unet": "epsilon"}),
            files={name: _digest(name) for name in ("unet", "vae", "text_encoder", "tokenizer")},
        ),
        settings={**config.to_dict(), "result": {"embed_steps": config.embed.steps, "finetune_steps": tuning.steps}},
        seed=0,
        etas=config.sample.etas,
        eta_default=1.0,
        source=SourcePicture(
            sha256=_digest("photo"), width_px=4032, height_px=3024, size=(512, 512), box=(0, 64, 512, 448)
        ),
        base_weights="int8",
        versions=versions(),
        measured={
            "stages": {name: {"seconds": 12.345, "peak_bytes": 2**30} for name in ("encode", "embed", "finetune")}
        },
        title=sentence,
    )
    edit_file.write(made, path, overwrite=True)
    return _sizes(made, path)


def _evened(down: Tensor, up: Tensor, alpha: float) -> Factors:
    """The factors scaled so that all layers' directions have about equal energy per byte.

    Truncation then keeps directions in nearly every layer, which needs the longest header.
    """
    inputs, outputs = down[0].numel(), len(up)
    return down, up * math.sqrt((inputs + outputs) / (inputs * outputs)), alpha


def of_model(model: str, name: str, path: Path) -> dict[str, Any]:
    """Sizes of an edit of a base with the settings of `_config`; leaves the edit at `path`."""
    config = _config(name)
    base = BaseModel.load(model, device="cpu")
    image = render(Scene.from_sentence("a red cube on a wooden floor", seed=0), base.sizes.own[0])
    photo = Photo(image=image, sha256=_digest("photo"), name="scene", notes=(), icc_profile=None)
    made = make_edits(base, [Job(photo, "a blue cube on a wooden floor")], config)[0]
    edit_file.write(made, path, overwrite=True)
    return _sizes(made, path)


def _config(name: str) -> EditConfig:
    """A preset with one step per stage, ``--small``, or whole adapters of `RANK` on the layers called `name`."""
    short = {"steps": 1, "draws": 1}
    changes: dict[str, Any] = {"embed": short, "finetune": dict(short)}
    if name == SMALL:
        changes["finetune"] |= {"keep": SMALL_KEEP}
    elif name not in PRESETS:
        changes["finetune"] |= {"adapt": name, "lora_rank": RANK, "lora_alpha": float(RANK), "keep": 1.0}
    return preset(name if name in PRESETS else "balanced", changes)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _sizes(made: Edit, path: Path) -> dict[str, Any]:
    """Size of the file, in all and by part."""
    return {
        "file_bytes": path.stat().st_size,
        "factor_bytes": sum(f.down.nbytes + f.up.nbytes for f in made.adapters["unet"].values()),
        "embedding_bytes": made.conditioning["embeds"].nbytes,
        "layers": len(made.adapters["unet"]),
        "rank": made.rank,
    }


def main(words: list[str]) -> None:
    """One measurement in this process: ``sd15 NAME`` or ``model MODEL NAME``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edit.safetensors"
        result = of_sd15(words[1], path) if words[0] == "sd15" else of_model(words[1], words[2], path)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
