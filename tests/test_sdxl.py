"""Facts about Stable Diffusion XL: it computes what diffusers' pipeline does, and its files are read by other programs."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from lowmem_imagic import BaseModel, Cell, Job, make_edits, write_edit
from lowmem_imagic.edits.header import describe, summary
from lowmem_imagic.errors import IncompleteModelError, ModelError, WrongFamilyError
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.sampling.sample import sample
from lowmem_imagic.settings.stages import EditConfig, EmbedConfig, FinetuneConfig, SampleConfig
from tests.tiny_xl import LATENT_SIDE, POOLED, SIDE, WIDTHS, write_tiny

SENTENCE = "a photo of a red cube on the grass"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny SDXL that predicts noise, and one that predicts v with zero terminal SNR."""
    root = tmp_path_factory.mktemp("xl")
    return {
        "epsilon": write_tiny(root / "tiny-xl"),
        "v_prediction": write_tiny(root / "tiny-xl-v", "v_prediction", zero_snr=True),
    }


def load(folder: Path, **options: Any) -> BaseModel:
    """The base in a folder, on the CPU."""
    return BaseModel.load(str(folder), device="cpu", **{"weights": "fp32", **options})


def pipeline_of(folder: Path) -> StableDiffusionXLPipeline:
    """diffusers' pipeline of a folder."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The distance of a tensor from a reference, as a share of the reference's norm."""
    return float((ours - theirs.detach()).norm() / theirs.detach().norm())


@pytest.mark.parametrize("sentence", [SENTENCE, "two birds kissing " * 30])
def test_text_is_encoded_as_the_pipeline_does(folders: dict[str, Path], sentence: str) -> None:
    """Tokens and vector are those of diffusers' pipeline, also for a sentence that is too long."""
    ours = load(folders["epsilon"]).encode_text([sentence])
    tokens, _, pooled, _ = pipeline_of(folders["epsilon"]).encode_prompt(sentence)
    assert ours["embeds"].shape[2] == sum(WIDTHS) and ours["pooled"].shape[1] == POOLED
    assert distance(ours["embeds"], tokens) <= 1e-6 and distance(ours["pooled"], pooled) <= 1e-6


def test_guidance_goes_away_from_zeros(folders: dict[str, Path], tmp_path: Path) -> None:
    """No negative sentence means zeros, as the base was trained; a base without that setting encodes the empty one."""
    text = load(folders["epsilon"]).encode_text(["", SENTENCE])
    assert not text["embeds"][0].any() and not text["pooled"][0].any() and text["pooled"][1].any()
    folder = write_tiny(tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    ours = load(folder).encode_text([""])
    _, tokens, _, pooled = pipeline_of(folder).encode_prompt(SENTENCE)
    assert distance(ours["embeds"], tokens) <= 1e-6 and distance(ours["pooled"], pooled) <= 1e-6


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        ("epsilon", EulerDiscreteScheduler),
        ("epsilon", DDIMScheduler),
        ("v_prediction", EulerDiscreteScheduler),
        ("v_prediction", DDIMScheduler),
    ],
)
@pytest.mark.parametrize("negative", ["", "a blue sphere"])
def test_pictures_are_those_of_the_pipeline(folders: dict[str, Path], kind: str, scheduler: Any, negative: str) -> None:
    """From the same noise, latents under a sentence equal those of diffusers' pipeline with the same network.

    The network is this program's on both sides: its layers round differently from diffusers', and a schedule that
    begins at a noise level of 4096 makes that larger.
    """
    base, pipeline = load(folders[kind]), pipeline_of(folders[kind])
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.unet = base.network(base.denoisers[0])
    noise = torch.randn(1, 4, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(3))
    theirs = pipeline(
        SENTENCE,
        negative_prompt=negative or None,
        num_inference_steps=6,
        guidance_scale=5.0,
        latents=noise,
        height=SIDE,
        width=SIDE,
        output_type="latent",
    ).images
    config = SampleConfig(
        num_inference_steps=6,
        guidance_scale=5.0,
        negative_prompt=negative,
        scheduler=scheduler.__name__,
        mask=0.0,
    )
    text = base.encode_text([SENTENCE])
    ours = sample(base, {"unet": adapters(base, 0)}, text, text, [Cell(0, 1.0, 3)], config)["unet"]
    assert distance(ours, theirs) <= 1e-6


def test_predictions_are_those_of_diffusers(folders: dict[str, Path]) -> None:
    """The UNet predicts what diffusers' own does, with the vector of the sentence and the picture's own size."""
    size = (48, 24)
    base, unet = load(folders["epsilon"]), pipeline_of(folders["epsilon"]).unet
    denoiser = base.denoisers[0]
    x, at = torch.randn(2, *denoiser.shape(size), generator=torch.Generator().manual_seed(0)), torch.tensor([10, 700])
    text = base.encode_text([SENTENCE, "a blue sphere"])
    width, height = size
    sizes = torch.tensor([[height, width, 0, 0, height, width]]).float().expand(2, -1)
    with torch.no_grad():
        ours = base.predict(denoiser, x, at, text | base.family.make_extra(denoiser, 2, size, None))
        beside = {"text_embeds": text["pooled"], "time_ids": sizes}
        theirs = unet(x, at, encoder_hidden_states=text["embeds"], added_cond_kwargs=beside).sample
        wrong = {"text_embeds": text["pooled"], "time_ids": sizes.flip(1)}
        other = unet(x, at, encoder_hidden_states=text["embeds"], added_cond_kwargs=wrong).sample
    assert distance(ours, theirs) <= 2e-6 < 1e-3 < distance(other, theirs)


def adapters(base: BaseModel, scale: float, adapt: str = "all", rank: int = 4) -> AdapterPack:
    """Adapters with random numbers of this size."""
    denoiser = base.denoisers[0]
    pack = AdapterPack(base.network(denoiser), denoiser.names, count=1, adapt=adapt, rank=rank, alpha=3.0)
    pack.weights.copy_(scale * torch.randn(pack.weights.shape, generator=torch.Generator().manual_seed(1)))
    return pack


def config(**changes: Any) -> EditConfig:
    """Settings of a short edit."""
    return EditConfig(
        embed=EmbedConfig(steps=3, draws=2, learning_rate=1e-2),
        finetune=FinetuneConfig(steps=3, draws=2, learning_rate=1e-2, lora_rank=4, lora_alpha=4.0, **changes),
        sample=SampleConfig(etas=(0.0, 1.0), num_inference_steps=4, start="inverted", guidance_scale=3.0),
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("adapt", "keep"), [("all", 1.0), ("attn", 0.5), ("attn+ff", 0.2)])
def test_diffusers_loads_an_edit_as_a_lora(
    folders: dict[str, Path], kind: str, adapt: str, keep: float, tmp_path: Path
) -> None:
    """A stock pipeline with an edit's file as its LoRA predicts what this program does; the file names SDXL's base."""
    base = load(folders[kind])
    [edit] = make_edits(base, [Job(a_photo(), SENTENCE)], config(adapt=adapt, keep=keep))
    path = tmp_path / "edit.safetensors"
    write_edit(edit, path)
    pipeline = pipeline_of(folders[kind])
    pipeline.load_lora_weights(tmp_path, weight_name=path.name, use_safetensors=True)
    denoiser, generator = base.denoisers[0], torch.Generator().manual_seed(4)
    x, at = torch.randn(2, 4, LATENT_SIDE, LATENT_SIDE, generator=generator), torch.tensor([10, 700])
    text = base.encode_text([SENTENCE, ""])
    given = text | base.family.make_extra(denoiser, 2, (SIDE, SIDE), None)
    factors = {key: (f.down.float(), f.up.float(), f.alpha) for key, f in edit.adapters["unet"].items()}
    pack = AdapterPack.load(base.network(denoiser), denoiser.names, [factors])
    with torch.no_grad():
        alone = base.predict(denoiser, x, at, given)
        with pack.attached(base.network(denoiser)):
            ours = base.predict(denoiser, x, at, given)
        beside = {"text_embeds": text["pooled"], "time_ids": torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 2)}
        theirs = pipeline.unet(x, at, encoder_hidden_states=text["embeds"], added_cond_kwargs=beside).sample
    assert distance(ours, theirs) <= 1e-5 and distance(alone, theirs) > 1e-3
    assert all(name.startswith("lora_unet_") for name in load_file(path))


def a_photo(width: int = 48, height: int = 48) -> Any:
    """A photo with a gradient."""
    from PIL import Image

    from lowmem_imagic.pictures import Photo

    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    return Photo(image=image, sha256=f"{width:032x}{height:032x}", name="photo", notes=(), icc_profile=None)
