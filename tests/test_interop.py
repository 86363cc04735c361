"""Other programs can use an edit file as an ordinary LoRA."""

import re
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import other_programs
from lowmem_imagic import Cell, Job, apply_edits, load_photo, make_edits, preset
from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.families import load_architecture
from lowmem_imagic.families.adapter_names import TARGETS, kohya_key
from lowmem_imagic.families.portable import MIN_RANK, portable
from lowmem_imagic.geometry import Sizes
from lowmem_imagic.layers.adapter_pack import AdapterPack, target_modules
from lowmem_imagic.layers.truncation import truncated
from lowmem_imagic.pictures.letterbox import psnr
from lowmem_imagic.share.programs import A1111, COMFYUI
from lowmem_imagic.storage.safetensors_reader import parse
from tests import calls

EXPRESSIONS = ("to_q,to_v", "all-linear", r"mid_block\..*(conv1|to_q)", "conv_in,time_embedding.linear_1,ff.net.2")
"""peft's ways to choose layers."""


@pytest.mark.parametrize(("adapt", "keep"), [*product(sorted(TARGETS), (1.0, 0.5, 0.2)), *product(EXPRESSIONS, (0.5,))])
def test_diffusers_loads_an_edit_as_a_lora(adapt, keep, load_base, tiny_folder, tmp_path):
    """diffusers' load_lora_weights gives the same UNet as ours on an fp32 base, at an embedding given by hand.

    Edits are whole, and truncated to layers of several ranks as the presets write them.
    """
    from diffusers import StableDiffusionPipeline

    base = load_base(weights="fp32")
    edit = calls.random_edit(base, adapt, keep=keep)
    assert keep == 1 or len({factors.rank for factors in edit.adapters["unet"].values()}) > 2
    edit_file.write(edit, tmp_path / "edit.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None, use_safetensors=True)
        pipeline.load_lora_weights(tmp_path, weight_name="edit.safetensors", use_safetensors=True)

    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([10, 700])
    eta = 0.7
    target = calls.encode_text(base, [edit.target_prompt])[0]
    embedding = (eta * target + (1 - eta) * edit.conditioning["embeds"].float()).expand(2, -1, -1)
    factors = {key: (f.down.float(), f.up.float(), f.alpha) for key, f in edit.adapters["unet"].items()}
    pack = AdapterPack.load(calls.unet(base), calls.NAMES, [factors])
    with torch.no_grad():
        alone = calls.predict(base, latents, timesteps, embedding)
        with pack.attached(calls.unet(base)):
            ours = calls.predict(base, latents, timesteps, embedding)
        theirs = pipeline.unet(latents, timesteps, encoder_hidden_states=embedding).sample
    assert (ours - alone).norm() > 0.01 * alone.norm()
    assert (ours - theirs).norm() <= 1e-5 * ours.norm()


@pytest.mark.parametrize(
    ("model", "adapt", "count"),
    [
        *(("sd15", adapt, None) for adapt in sorted(TARGETS)),
        ("sdxl", "all", 788),
        ("sdxl", "attn+ff", 722),
        ("ssd-1b", "all", 423),
        ("vega", "all", 233),
    ],
)
def test_keys_are_ones_that_comfyui_and_a1111_map(model, adapt, count):
    """On the real UNets, every adapted layer's key is in ComfyUI's map and in A1111's patterns."""
    [denoiser] = load_architecture(model).denoisers
    unet = denoiser.load(weights="bf16", device=torch.device("meta"), dtype=torch.bfloat16)
    keys = [kohya_key(name) for name in target_modules(unet, denoiser.names, adapt)]
    assert len(keys) == len(set(keys)) == (count or len(keys))
    assert [key for key in keys if not COMFYUI.fullmatch(key)] == []
    assert [key for key in keys if not A1111.fullmatch(key)] == []


def test_file_holds_no_tensor_beside_the_lora(load_base):
    """The tensors are kohya's three per layer and nothing else: an extra one makes diffusers load nothing."""
    edit = calls.random_edit(load_base(weights="fp32"), "attn")
    names = set(parse(edit_file.encode(edit)).entries)
    assert names == {
        f"{layer}.{part}" for layer in edit.adapters["unet"] for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("keep", [1.0, 0.4, 0.01])
def test_a_file_has_one_alpha_and_no_layer_of_rank_one(rank, keep, load_base):
    """diffusers 0.33 to 0.42 misread alphas that differ by layer, stable-diffusion.cpp the scale of rank 1."""
    base = load_base(weights="fp32")
    pack = AdapterPack(calls.unet(base), calls.NAMES, count=1, adapt="all", rank=rank, alpha=2.0)
    pack.weights.copy_(torch.randn(pack.weights.shape, generator=torch.Generator().manual_seed(5)))
    stored = portable(truncated(pack.export(0), keep), calls.unet(base))
    assert len({alpha for _, _, alpha in stored.values()}) == 1
    assert min(down.shape[0] for down, _, _ in stored.values()) >= MIN_RANK


def _invokeai_width(keys: dict[str, tuple[int, ...]]) -> int | None:
    """Input width of the layer by which InvokeAI 6.14 tells SD 1 (768), SD 2 (1024) and SDXL (1280, 2048) apart.

    The part of `lora_token_vector_length` (invokeai/backend/model_manager/util/model_util.py) for kohya's UNet keys.
    """
    for key, shape in keys.items():
        text = "_attn2_to_k." in key or "_attn2_to_v." in key
        if (text and key.endswith("lora_down.weight")) or "time_emb_proj.lora_down" in key:
            return shape[1]
    return None


@pytest.mark.parametrize("blocks", [("up",), ("down", "mid", "up"), ("mid",)])
@pytest.mark.parametrize("adapt", sorted(TARGETS))
def test_invokeai_sees_the_width_of_the_text(adapt, blocks, load_base):
    """For any blocks and layers of an edit, the layer that tells InvokeAI the base's kind projects the text."""
    base = load_base(weights="fp32")
    pack = AdapterPack(calls.unet(base), calls.NAMES, count=1, adapt=adapt, rank=4, alpha=4.0, blocks=blocks)
    pack.weights.copy_(torch.randn(pack.weights.shape, generator=torch.Generator().manual_seed(6)))
    whole = pack.export(0)
    for key, (down, _, _) in whole.items():
        down *= 1e-3 if "_attn2_" in key else 1.0  # so that a small share keeps none of the text's layers
    for keep in (1.0, 0.1):
        stored = portable(truncated(whole, keep), calls.unet(base))
        shapes = {f"{key}.lora_down.weight": tuple(down.shape) for key, (down, _, _) in sorted(stored.items())}
        assert _invokeai_width(shapes) == base.family.cross_attention_dim


def test_layers_added_for_other_programs_change_nothing(load_base):
    """An adapter of the up blocks alone gives the same prediction with and without the layer InvokeAI needs."""
    base = load_base(weights="fp32")
    pack = AdapterPack(calls.unet(base), calls.NAMES, count=1, adapt="all", rank=1, alpha=2.0, blocks=("up",))
    pack.weights.copy_(torch.randn(pack.weights.shape, generator=torch.Generator().manual_seed(7)))
    whole = pack.export(0)
    stored = portable(whole, calls.unet(base))
    assert len(stored) == len(whole) + 1
    latents, text = torch.randn(1, 4, 8, 8), calls.encode_text(base, ["a"])
    predictions = []
    for adapter in (whole, stored):
        loaded = AdapterPack.load(calls.unet(base), calls.NAMES, [adapter])
        with torch.no_grad(), loaded.attached(calls.unet(base)):
            predictions.append(calls.predict(base, latents, torch.tensor([300]), text))
    torch.testing.assert_close(*predictions, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "version"), [((16, 16), 1), ((20, 12), 2)])
def test_the_recipe_for_diffusers_gives_the_same_pictures(load_base, tiny_folder, tmp_path, monkeypatch, size, version):
    """The recipe in docs/other_programs.md gives our pictures from a truncated edit to 60 dB, at eta 0 and beyond, of a
    square photo (format 1) and of another (format 2)."""
    base = load_base(weights="fp32")
    monkeypatch.setattr(type(base.family), "sizes", Sizes((16, 16), 4, 8))
    finetune = {"steps": 4, "lora_rank": 8, "lora_alpha": 8.0, "keep": 0.3}
    sampling = {"num_inference_steps": 8, "mask": 0.0}
    settings = preset("fast", {"embed": {"steps": 2}, "finetune": finetune, "sample": sampling})
    rng = np.random.default_rng(8)
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))
    picture.save(tmp_path / "photo.png")
    [edit] = make_edits(base, [Job(load_photo(tmp_path / "photo.png"), "a blue sphere")], settings)
    assert edit.version == version
    edit_file.write(edit, tmp_path / "edit.safetensors")
    etas = (0.0, 0.8, 1.2)
    ours = apply_edits(base, [edit], [Cell(0, eta, 0) for eta in etas], settings.sample)

    text = (Path(__file__).parent.parent / "docs/other_programs.md").read_text(encoding="utf-8")
    [code] = re.findall(r"<!-- code: diffusers -->\n```python\n(.+?)```", text, re.DOTALL)
    code = code.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(tiny_folder))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "docs/other_programs.md", "exec"), names)
        theirs = [names["picture"](eta) for eta in etas]
    assert [psnr(*pair) >= 60 for pair in zip(ours, theirs, strict=True)] == [True] * len(etas)
    assert psnr(ours[0], ours[-1]) < 40


@pytest.mark.benchmark
def test_the_benchmark_of_the_unets_output_runs_with_the_bundled_model():
    """`benchmarks.other_programs` finds an edit of the bundled model the same in our UNet, in diffusers' and merged."""
    found = other_programs.unet_output("demo", "attn", 4, 0.5)
    assert found["moves"] > 1e-3 and max(found["diffusers"], found["merged_by_hand"]) < 1e-4
