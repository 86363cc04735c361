"""Writes a diffusers folder of Stable Diffusion 1.5 with random weights: every part in its real size, no download.

    python -m benchmarks.random_folder FOLDER

Bytes, kernels and time do not depend on the values of the weights. Only the vocabulary is small: it is learnt from a
few sentences. The model draws noise.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lowmem_imagic.demo.architecture import train_tokenizer
from lowmem_imagic.families.files.published import PUBLISHED

from .random_unet import drawn

CAPTIONS = ("a photo of a red cube on the grass", "a blue sphere on a wooden floor", "two birds kissing")
"""Sentences for learning the vocabulary."""
_MODEL = "sd15"
_PARTS = {
    "unet": ("diffusion_pytorch_model", UNet2DConditionModel.from_config),
    "vae": ("diffusion_pytorch_model", AutoencoderKL.from_config),
    "text_encoder": ("model", lambda values: CLIPTextModel(CLIPTextConfig(**values))),
}
"""Stem of the weight file and builder, by part."""
_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}


def write_random_folder(folder: Path, *, device: torch.device | str = "cpu", seed: int = 0) -> Path:
    """Writes the folder (2.1 GB in fp16) and returns it; weights are drawn on `device`.

    Weights are scaled so that activations neither grow nor vanish. Different devices draw different weights.
    """
    generator = torch.Generator(device).manual_seed(seed)
    configurations = PUBLISHED[_MODEL]
    _write_json(folder / "model_index.json", configurations["."])
    for part, (stem, build) in _PARTS.items():
        values = {**configurations[part], **({"_class_name": _CLASSES[part]} if part in _CLASSES else {})}
        _write_json(folder / part / "config.json", values)
        with init_empty_weights(include_buffers=False):
            network: nn.Module = build(dict(configurations[part]))
        tensors = {name: drawn(name, p.shape, generator).cpu() for name, p in network.named_parameters()}
        save_file(tensors, folder / part / f"{stem}.safetensors", metadata={"format": "pt"})
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {**configurations["scheduler"], "_class_name": _CLASSES["scheduler"]},
    )
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=700)
    tokenizer.model_max_length = configurations["text_encoder"]["max_position_embeddings"]
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    write_random_folder(args.folder, device=args.device)


if __name__ == "__main__":
    main()
