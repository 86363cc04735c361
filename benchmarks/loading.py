"""Resident memory while a UNet is loaded from one checkpoint file, layer by layer.

    python -m benchmarks.loading --models sd15,sdxl

Writes an all-in-one file in the original layout, with random fp16 weights in the real configuration (2.1 GB for Stable
Diffusion 1.5, 6.9 GB for XL), and loads its UNet in int8 in a process of its own. The goal is the int8 result beside
the largest layer in the file's precision. Memory is the process's resident memory over that before the first weight.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.engine.memory import peak_bytes, reset_peak, resident_bytes
from lowmem_imagic.families.files.published import PUBLISHED
from lowmem_imagic.layers.frozen import weight_bytes
from tests.ldm_layout import TEXT, UNET, VAE, XL_TEXT, XL_TEXT_2, text_to_ldm, unet_to_ldm, vae_to_ldm

from .goals import Line, fresh, in_gib, table
from .random_unet import drawn
from .results import provenance, write_result

CPU = torch.device("cpu")


def write_checkpoint(path: Path, model: str) -> None:
    """Writes an all-in-one file with random fp16 weights, one tensor in memory at a time."""
    parts = list(_tensors(model))
    header, begin = {}, 0
    for name, tensor in parts:
        size = 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in parts:
            file.write(drawn(name, tensor.shape, generator).numpy().tobytes())


def _tensors(model: str) -> Iterator[tuple[str, Tensor]]:
    """Yields names in the original layout and tensors on the meta device."""
    configurations = PUBLISHED[model]
    with init_empty_weights(include_buffers=False):
        unet: nn.Module = UNet2DConditionModel.from_config(configurations["unet"])
        vae: nn.Module = AutoencoderKL.from_config(configurations["vae"])
        text = CLIPTextModel(CLIPTextConfig(**configurations["text_encoder"]))
        more = configurations.get("text_encoder_2")
        text_2 = None if more is None else CLIPTextModelWithProjection(CLIPTextConfig(**more))
    parts = {
        UNET: unet_to_ldm(dict(unet.named_parameters()), configurations["unet"]),
        VAE: vae_to_ldm(dict(vae.named_parameters()), configurations["vae"]),
        XL_TEXT if text_2 else TEXT: text_to_ldm(dict(text.named_parameters())),
    }
    if text_2:
        parts[XL_TEXT_2] = text_to_ldm(dict(text_2.named_parameters()), open_clip=True)
    for prefix, tensors in parts.items():
        for name, tensor in tensors.items():
            yield prefix + name, tensor


def load(path: Path) -> dict[str, Any]:
    """Loads the file's UNet in this process; bytes of the process, the result and the largest layer."""
    torch.set_num_threads(1)
    base = BaseModel.load(str(path), device="cpu")
    [denoiser] = base.denoisers
    # As a plan does. It imports the rest of the libraries, which are no weights.
    denoiser.load(weights="int8", device=torch.device("meta"), dtype=torch.float32)
    gc.collect()
    before = resident_bytes()
    reset_peak(CPU)
    unet = base.network(denoiser)
    peak, after = peak_bytes(CPU), resident_bytes()
    assert before is not None and peak is not None and after is not None
    layers = (sum(p.numel() for p in module.parameters(recurse=False)) for module in unet.modules())
    return {
        "file_bytes": path.stat().st_size,
        "largest_layer_bytes": 2 * max(layers),
        "result_bytes": weight_bytes(unet),
        "peak_over_baseline_bytes": peak - before,
        "resident_over_baseline_bytes": after - before,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="sd15", help="comma-separated short names")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(args.load)))
        return
    origin, results, lines = provenance(), {}, list[Line]()
    for model in args.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{model}.safetensors"
            print(f"loading: {model}", file=sys.stderr)
            write_checkpoint(path, model)
            measured = fresh("benchmarks.loading", "--load", str(path))
        results[model] = measured
        figures = measured or {}
        least = figures["largest_layer_bytes"] + figures["result_bytes"] if measured else None
        lines.append(Line(f"{model}: the file", in_gib(figures.get("file_bytes")), "GiB"))
        lines.append(Line(f"{model}: the UNet in int8", in_gib(figures.get("result_bytes")), "GiB"))
        lines.append(
            Line(f"{model}: peak of loading", in_gib(figures.get("peak_over_baseline_bytes")), "GiB", in_gib(least))
        )
    print("\n".join(table(lines)))
    write_result("loading", {"models": results, "lines": [line.as_json() for line in lines]}, origin=origin)


if __name__ == "__main__":
    main()
