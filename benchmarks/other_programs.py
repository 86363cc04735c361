"""Compares diffusers' pictures of an edit file with this package's, with all and with some of the file's data.

    python -m benchmarks.other_programs            # pictures of the bundled model, and the UNet's output
    PYTHONPATH=FOLDER python -m benchmarks.other_programs --unet-only   # with the diffusers that lies in FOLDER

One file has the results of several versions of diffusers; a run replaces the results of its own version.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lowmem_imagic.diffusion.schedules import refined
from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.edits.edit import Edit
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.families.adapter_names import KohyaNames
from lowmem_imagic.families.files.published import PUBLISHED
from lowmem_imagic.families.portable import portable
from lowmem_imagic.layers.adapter_pack import AdapterPack, Factors
from lowmem_imagic.layers.truncation import truncated
from lowmem_imagic.pictures.letterbox import psnr
from lowmem_imagic.pipeline.apply import apply_edits
from lowmem_imagic.pipeline.make import make_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.sampling.sample import Cell
from lowmem_imagic.settings.presets import preset
from lowmem_imagic.storage.safetensors_writer import serialize

from .bundled import model_of
from .edit_methods import as_photo
from .results import RESULTS, provenance, write_result
from .scene_edits import VALIDATION

NAME = "other_programs"
DEMO = Path(__file__).parent.parent / "lowmem_imagic" / "demo" / "model"
ETAS = (0.0, 0.8, 1.2)
UNETS = (("demo", "all", 16, 0.108), ("sd15", "all", 16, 0.108), ("sd15", "attn", 16, 0.3), ("sd21", "all", 8, 0.3))
"""Shape, layers, rank, share of the adapter that is kept."""


def pictures(base: BaseModel, preset_name: str, number: int) -> dict[str, Any]:
    """PSNR in dB of a photo of the validation set reproduced from parts of its edit (eta 0), and the PSNR of the whole
    recipe's pictures to this package's."""
    item = VALIDATION.items()[number]
    photo = item.photo_picture(base.sizes.own[0])
    config = preset(preset_name, {"sample": {"mask": 0.0}})
    [edit] = make_edits(base, [Job(as_photo(photo), item.sentence)], config)
    whole = BaseModel.load("demo", device="cpu", weights="fp32")
    ours = apply_edits(whole, [edit], [Cell(0, eta, 0) for eta in ETAS], config.sample)
    with tempfile.TemporaryDirectory() as folder:
        edit_file.write(edit, Path(folder) / "edit.safetensors")
        pipeline = StableDiffusionPipeline.from_pretrained(DEMO, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_lora_weights(folder, weight_name="edit.safetensors")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    draw = _drawer(pipeline, edit, config.sample.num_inference_steps)
    theirs = [draw(eta) for eta in ETAS]
    e_opt = {"embedding": edit.conditioning["embeds"].float()[None]}
    other = {"noise": torch.randn(edit.noise["unet"].shape, generator=torch.Generator().manual_seed(1))[None]}
    bare = {"noise": edit.noise["unet"].float()[None]}
    nothing = {"embedding": pipeline.encode_prompt("", "cpu", 1, True)[0]}
    sentence = {"embedding": pipeline.encode_prompt(edit.target_prompt, "cpu", 1, True)[0]}
    back = {
        "this package": ours[0],
        "LoRA, e_opt, own noise over coarse latents, guidance 1": theirs[0],
        "LoRA, e_opt, own noise, guidance 1": draw(0, **e_opt, **bare),
        "LoRA, e_opt, own noise, guidance 7.5": draw(0, guidance=7.5, **e_opt, **bare),
        "LoRA, e_opt, another noise, guidance 1": draw(0, **e_opt, **other),
        "LoRA, e_opt, another noise, guidance 7.5": draw(0, guidance=7.5, **e_opt, **other),
        "LoRA, the sentence, another noise, guidance 7.5": draw(0, guidance=7.5, **sentence, **other),
        "LoRA alone (no sentence, another noise)": draw(0, guidance=7.5, **nothing, **other),
    }
    return {
        "model": model_of(base),
        "preset": preset_name,
        "item": item.name,
        "photo_db": {words: round(psnr(picture, photo), 2) for words, picture in back.items()},
        "recipe_to_ours_db": {
            f"{eta:g}": round(min(psnr(*pair), 99.0), 2) for eta, *pair in zip(ETAS, ours, theirs, strict=True)
        },
    }


def _drawer(pipeline: Any, edit: Edit, steps: int) -> Callable[..., Image.Image]:
    """Draws with diffusers' pipeline: the recipe at an eta, or with another embedding, noise or guidance."""
    target, negative = pipeline.encode_prompt(edit.target_prompt, "cpu", 1, True)
    assert edit.noise
    own, coarse = edit.noise["unet"].float()[None], edit.coarse["unet"].float()[None]
    pipeline.scheduler.set_timesteps(steps)
    start = pipeline.scheduler.add_noise(refined(coarse, *own.shape[-2:]), own, pipeline.scheduler.timesteps[:1])

    def draw(
        eta: float, embedding: Tensor | None = None, noise: Tensor | None = None, guidance: float | None = None
    ) -> Image.Image:
        mixed = eta * target + (1 - eta) * edit.conditioning["embeds"].float()
        picture: Image.Image = pipeline(
            prompt_embeds=mixed if embedding is None else embedding,
            negative_prompt_embeds=negative,
            latents=start if noise is None else noise,
            guidance_scale=1 + 5.0 * min(max(eta, 0.0), 1.0) if guidance is None else guidance,
            num_inference_steps=steps,
        ).images[0]
        return picture

    return draw


@torch.no_grad()
def unet_output(shape: str, adapt: str, rank: int, keep: float) -> dict[str, Any]:
    """Relative difference of our UNet's output to the installed diffusers', and to a UNet with the update merged by
    hand as in ComfyUI: for an edit of random factors, truncated to layers of several ranks."""
    torch.manual_seed(0)
    unet = (
        UNet2DConditionModel.from_pretrained(DEMO / "unet", torch_dtype=torch.float32).float()
        if shape == "demo"
        else UNet2DConditionModel.from_config(PUBLISHED[shape]["unet"])
    ).eval()
    generator = torch.Generator().manual_seed(1)
    stored = _mixed(unet, adapt, rank, keep, generator)
    latents = torch.randn(2, unet.config.in_channels, 16, 16, generator=generator)
    timesteps = torch.tensor([10, 700])
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)

    def predict() -> Tensor:
        prediction: Tensor = unet(latents, timesteps, encoder_hidden_states=text).sample
        return prediction

    alone = predict()
    with AdapterPack.load(unet, KohyaNames(), [stored]).attached(unet):
        ours = predict()
    layers = {f"lora_unet_{name.replace('.', '_')}": layer for name, layer in unet.named_modules()}
    before = {key: layers[key].weight.clone() for key in stored}
    for key, (down, up, alpha) in stored.items():
        weight = layers[key].weight
        weight += (alpha / down.shape[0] * up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    merged = predict()
    for key, weight in before.items():
        layers[key].weight.copy_(weight)
    _load(unet, stored)
    theirs = predict()
    ranks = sorted({down.shape[0] for down, _, _ in stored.values()})
    return {
        "shape": shape,
        "adapt": adapt,
        "layers": len(stored),
        "ranks": ranks,
        "moves": _relative(ours, alone),
        "diffusers": _relative(theirs, ours),
        "merged_by_hand": _relative(merged, ours),
    }


def _mixed(unet: nn.Module, adapt: str, rank: int, keep: float, generator: torch.Generator) -> dict[str, Factors]:
    """An adapter with different spectra in its layers, rounded as in files."""
    pack = AdapterPack(unet, KohyaNames(), count=1, adapt=adapt, rank=rank, alpha=float(rank))
    pack.weights.copy_(0.1 * torch.randn(pack.weights.shape, generator=generator))
    whole = pack.export(0)
    for number, (down, _, _) in enumerate(whole.values()):
        down *= torch.logspace(0, -(number % 7) / 3, len(down)).reshape(-1, *[1] * (down.dim() - 1))
    stored = portable(truncated(whole, keep), unet)
    return {key: (down.half().float(), up.half().float(), alpha) for key, (down, up, alpha) in stored.items()}


def _load(unet: nn.Module, stored: Mapping[str, Factors]) -> None:
    """Loads an adapter's file into a UNet with diffusers' own `load_lora_weights`."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,)),
        text_encoder=text_encoder,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    tensors: dict[str, Tensor] = {}
    for key, (down, up, alpha) in stored.items():
        tensors |= {f"{key}.lora_down.weight": down.half(), f"{key}.lora_up.weight": up.half()}
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "edit.safetensors").write_bytes(serialize(tensors, {"format": "pt"}))
        pipeline.load_lora_weights(folder, weight_name="edit.safetensors", use_safetensors=True)


def _relative(one: Tensor, other: Tensor) -> float:
    return float(f"{float((one - other).norm() / other.norm()):.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unet-only", action="store_true", help="leave the pictures as they were measured")
    words = parser.parse_args()
    warnings.simplefilter("ignore")
    origin, path = provenance(), RESULTS / f"{NAME}.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"pictures": [], "unet": {}}
    versions = {"diffusers": diffusers.__version__, "peft": peft.__version__}
    rows = [unet_output(*case) for case in UNETS]
    for row in rows:
        print(versions["diffusers"], row)
    result["unet"][versions["diffusers"]] = {**versions, "rows": rows}
    if not words.unet_only:
        base = BaseModel.load("demo", device="cpu")
        result["pictures"] = [pictures(base, "fast", 0), pictures(base, "balanced", 1)]
        for row in result["pictures"]:
            print(json.dumps(row, indent=1))
    write_result(NAME, {"pictures": result["pictures"], "unet": result["unet"]}, origin=origin)


if __name__ == "__main__":
    main()
