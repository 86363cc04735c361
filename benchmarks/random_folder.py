"""Writes a diffusers folder of a well-known model with random weights: every part in its real size, no download.

    python -m benchmarks.random_folder FOLDER [--model sdxl]

Bytes, kernels and time do not depend on the values of the weights. Only the vocabulary is small: it is learnt from a
few sentences. The model draws noise.
"""

import argparse
import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lowmem_imagic.demo.architecture import train_tokenizer
from lowmem_imagic.families.files.published import PUBLISHED

from .random_unet import drawn

CAPTIONS = ("a photo of a red cube on the grass", "a blue sphere on a wooden floor", "two birds kissing")
"""Sentences for learning the vocabulary."""
SHARD_BYTES = 2 * 10**9
"""Most bytes of a weight file; a larger part is written as several, so that one at a time is in memory."""
_PARTS = {
    "unet": ("diffusion_pytorch_model", UNet2DConditionModel.from_config),
    "vae": ("diffusion_pytorch_model", AutoencoderKL.from_config),
    "text_encoder": ("model", lambda values: CLIPTextModel(CLIPTextConfig(**values))),
    "text_encoder_2": ("model", lambda values: CLIPTextModelWithProjection(CLIPTextConfig(**values))),
}
"""Stem of the weight file and builder, by part."""
_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def write_random_folder(
    folder: Path,
    *,
    model: str = "sd15",
    device: torch.device | str = "cpu",
    seed: int = 0,
    unet: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the folder (2.1 GB in fp16 for Stable Diffusion 1.5, 7 GB for SDXL) and returns it.

    Weights are scaled so that activations neither grow nor vanish. Different devices draw different weights.

    Args:
        folder: the folder.
        model: a short name.
        device: the device that draws the weights.
        seed: their seed.
        unet: changes of the UNet's configuration, such as ``sample_size``.
    """
    generator = torch.Generator(device).manual_seed(seed)
    configurations = copy.deepcopy(PUBLISHED[model])
    configurations["unet"] |= unet or {}
    _write_json(folder / "model_index.json", configurations["."])
    for part, (stem, build) in _PARTS.items():
        if part not in configurations:
            continue
        values = {**configurations[part], **({"_class_name": _CLASSES[part]} if part in _CLASSES else {})}
        _write_json(folder / part / "config.json", values)
        with init_empty_weights(include_buffers=False):
            network: nn.Module = build(dict(configurations[part]))
        _write_weights(folder / part, stem, network, generator)
        if part in _TOKENIZERS:
            tokenizer = train_tokenizer(CAPTIONS, vocab_size=700)
            tokenizer.model_max_length = configurations[part]["max_position_embeddings"]
            tokenizer.save_pretrained(folder / _TOKENIZERS[part])
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {**configurations["scheduler"], "_class_name": _CLASSES["scheduler"]},
    )
    return folder


def _write_weights(folder: Path, stem: str, network: nn.Module, generator: torch.Generator) -> None:
    """Writes random weights of a part, in one file or in several with their index."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, parameter in network.named_parameters():
        room -= 2 * parameter.numel()
        if room < 0 and shards[-1]:
            shards.append([])
            room = SHARD_BYTES - 2 * parameter.numel()
        shards[-1].append(name)
    parameters, files = dict(network.named_parameters()), dict[str, str]()
    for number, names in enumerate(shards, start=1):
        middle = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        tensors: dict[str, Tensor] = {name: drawn(name, parameters[name].shape, generator).cpu() for name in names}
        save_file(tensors, folder / f"{stem}{middle}.safetensors", metadata={"format": "pt"})
        files |= dict.fromkeys(names, f"{stem}{middle}.safetensors")
    if len(shards) > 1:
        _write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": files})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--model", choices=sorted(PUBLISHED), default="sd15")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    write_random_folder(args.folder, model=args.model, device=args.device)


if __name__ == "__main__":
    main()
