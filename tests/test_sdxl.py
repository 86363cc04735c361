"""Facts about Stable Diffusion XL: it computes what diffusers' pipeline does, and other programs read its files."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from lowmem_imagic import BaseModel, Cell, Job, apply_edits, make_edits, preset, write_edit
from lowmem_imagic.cli.commands import app
from lowmem_imagic.edits.edit import Edit, LoraFactors
from lowmem_imagic.edits.file import encode
from lowmem_imagic.edits.identity import BaseIdentity, Interface, SourcePicture
from lowmem_imagic.engine import base as engine
from lowmem_imagic.errors import IncompleteModelError, NonFiniteModelError, WrongFamilyError
from lowmem_imagic.families import load_architecture
from lowmem_imagic.families.conditioning import Conditioning
from lowmem_imagic.geometry import Sizes
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.layers.truncation import truncated
from lowmem_imagic.pictures import Photo
from lowmem_imagic.planning.costs import Costs
from lowmem_imagic.planning.counting import peak_of
from lowmem_imagic.sampling.sample import sample
from lowmem_imagic.settings.presets import SMALL_KEEP
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
    """No negative sentence means zeros, as the base was trained, also where it does not say so, as in diffusers; a base
    that has it off encodes the empty one."""
    text = load(folders["epsilon"]).encode_text(["", SENTENCE])
    assert not text["embeds"][0].any() and not text["pooled"][0].any() and text["pooled"][1].any()
    folder = write_tiny(tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": False}))
    silent = write_tiny(tmp_path / "silent")
    told = json.loads((silent / "model_index.json").read_text())
    told.pop("force_zeros_for_empty_prompt", None)
    (silent / "model_index.json").write_text(json.dumps(told))
    assert not load(silent).encode_text([""])["embeds"].any()
    assert pipeline_of(silent).config.force_zeros_for_empty_prompt is True
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
    """A stock pipeline with an edit's file as its LoRA predicts what this program does, and draws the same."""
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
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    target = base.encode_text([SENTENCE])
    optimized = Conditioning({name: part.float()[None] for name, part in edit.conditioning.items()})
    tokens, pooled = (0.7 * target[name] + 0.3 * optimized[name] for name in ("embeds", "pooled"))
    drawn = pipeline(
        prompt_embeds=tokens,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=torch.zeros_like(tokens),
        negative_pooled_prompt_embeds=torch.zeros_like(pooled),
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=torch.randn(1, 4, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(3)),
        height=SIDE,
        width=SIDE,
        output_type="latent",
    ).images
    settings = replace(config().sample, start="noise", mask=0.0)
    own = sample(base, {"unet": pack}, target, optimized, [Cell(0, 0.7, 3)], settings)["unet"]
    assert distance(own, drawn) <= 1e-5
    assert all(name.startswith("lora_unet_") for name in load_file(path))


def test_the_file_names_its_base_to_other_programs(folders: dict[str, Path]) -> None:
    """Edits of SDXL and of its relatives say so where ComfyUI and sd-scripts look; a tiny model has its own kind."""
    for name in ("sdxl", "ssd-1b", "vega"):
        labels = load_architecture(name).labels
        assert labels["ss_base_model_version"] == "sdxl_base_v1-0"
        assert labels["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert load(folders["epsilon"]).identity.labels["ss_base_model_version"] == "lowmem_imagic_sdxl-48"


# Conditioning


def test_text_encoders_are_loaded_one_after_the_other(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sentences go through the first text encoder, then through the second; no part is in memory beside another."""
    base, alive, order = load(folders["epsilon"]), list[weakref.ref[nn.Module]](), list[str]()
    parts = base.family.load_text_encoder

    def watched(name: str, **options: Any) -> nn.Module:
        assert not any(part() is not None and next(part().parameters()).device.type != "meta" for part in alive)
        part = parts(name, **options)
        alive.append(weakref.ref(part))
        order.append(name)
        return part

    monkeypatch.setattr(base.family, "load_text_encoder", watched)
    base.encode_text([SENTENCE, "a blue sphere", ""])
    assert order == ["text_encoder", "text_encoder_2"]


def test_a_long_sentence_is_told_once(folders: dict[str, Path], tmp_path: Path) -> None:
    """Words beyond the last token are named in one warning, though two text encoders leave them out."""
    photo = tmp_path / "photo.png"
    a_photo().image.save(photo)
    words = ["train", photo, "two birds kissing " * 30, "--model", folders["epsilon"], "--steps-embed", 1]
    words += ["--steps-finetune", 1, "--draws", 1, "--out", tmp_path / "e.safetensors", "--quiet"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert result.output.count("cut from the sentence") == 1


@pytest.mark.parametrize("size", [(48, 24), (24, 48)])
def test_the_size_is_the_same_in_training_and_sampling(
    folders: dict[str, Path], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass is told the height and width of the edited picture and no crop: inversion, both stages, sampling."""
    base = load(folders["epsilon"], weights="int8")
    monkeypatch.setattr(type(base.family), "sizes", Sizes((SIDE, SIDE), 8, 16))
    told: set[tuple[int, ...]] = set()
    predict = base.predict

    def listening(denoiser: Any, x: Tensor, at: Tensor, given: Any) -> Tensor:
        told.update(tuple(row) for row in given["time_ids"].tolist())
        return predict(denoiser, x, at, given)

    monkeypatch.setattr(base, "predict", listening)
    [edit] = make_edits(base, [Job(a_photo(*size), SENTENCE)], config(adapt="attn"))
    apply_edits(base, [edit], [Cell(0, 1.0, 0)], replace(config().sample, mask=0.5))
    width, height = edit.source.size
    assert (width > height) == (size[0] > size[1])
    assert told == {(height, width, 0, 0, height, width)}


# The autoencoder


def test_the_autoencoder_is_never_in_fp16(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card, SDXL's autoencoder is in bfloat16, or in fp32 where there is none; one without the fault in fp16."""
    monkeypatch.setattr(BaseModel, "part_dtype", torch.float16)
    base = load(folders["epsilon"])
    for half, expected in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        monkeypatch.setattr(engine, "pick_dtype", lambda *_, half=half: half)
        assert base.codec_dtype == expected
    folder = write_tiny(tmp_path / "fixed")
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "force_upcast": False}))
    assert load(folder).codec_dtype == torch.float16


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_an_autoencoder_that_overflows_is_named(folders: dict[str, Path], part: str, tmp_path: Path) -> None:
    """Latents and pictures are checked to be finite: an overflow in either half stops with the base's name."""
    folder = Path(shutil.copytree(folders["epsilon"], tmp_path / "broken"))
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors[f"{part}.conv_out.bias"] = torch.full_like(tensors[f"{part}.conv_out.bias"], torch.inf)
    save_file(tensors, path, metadata={"format": "pt"})
    base = load(folder)
    with pytest.raises(NonFiniteModelError, match=f"autoencoder's {part} of broken"):
        base.encode_images(torch.zeros(1, 3, SIDE, SIDE))
        base.decode(torch.zeros(1, 4, LATENT_SIDE, LATENT_SIDE))


def test_tiles_take_less_memory(folders: dict[str, Path]) -> None:
    """In tiles of half a side the autoencoder gives pictures and latents of the same shape in less memory."""
    family, cpu = load(folders["epsilon"]).family, torch.device("cpu")
    pictures, latents = torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1, 4, LATENT_SIDE, LATENT_SIDE)
    peaks = []
    for tiling in (False, True):
        codec = family.load_codec(device=cpu, dtype=torch.float32, tiling=tiling)
        assert family.encode(codec, pictures)["unet"].shape == latents.shape
        assert family.decode(codec, latents).shape == pictures.shape
        peaks.append(
            [peak_of(lambda c=codec: family.encode(c, pictures)), peak_of(lambda c=codec: family.decode(c, latents))]
        )
    assert all(tiled < 0.7 * whole for whole, tiled in zip(*peaks, strict=True))


# Sizes


BUCKETS = {
    *((512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600)),
    *((640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152)),
    *((896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024)),
}
"""Sides of the pictures that SDXL was trained on (arXiv 2307.01952, appendix I)."""


@given(st.integers(1, 400), st.integers(1, 400))
def test_photos_are_edited_in_buckets_of_the_training(width: int, height: int) -> None:
    """A photo of any aspect up to 4 to 1 is edited at a size of SDXL's training; a square has the model's own."""
    sizes = load_architecture("sdxl").sizes
    assert sizes.own == (1024, 1024) and sizes.nearest(3000, 3000) == (1024, 1024)
    assert sizes.nearest(1670, 3840) == (640, 1536)
    if max(width, height) <= 4 * min(width, height):
        size = sizes.nearest(10 * width, 10 * height)
        assert tuple(sorted(size)) in BUCKETS and sizes.nearest(*size) == size


# Memory and files of the real architecture, without weights


@pytest.fixture(scope="module")
def real() -> Costs:
    """What SDXL takes on a card with bfloat16."""
    types = {"dtype": torch.bfloat16, "part_dtype": torch.float16, "codec_dtype": torch.bfloat16}
    return Costs(load_architecture("sdxl"), preset("balanced"), weights="int8", **types)


@pytest.mark.process
def test_one_row_at_1024_px_trains_in_3_4_gib(real: Costs) -> None:
    """The UNet takes at most 2.6 GiB in 8 bit; with a checkpointed row and the preset's adapters at most 3.4 GiB."""
    row = real.train(1, 1, checkpointing=True)
    assert real.networks <= 2.6 * 2**30
    assert real.networks + real.adapters(1) + row <= 3.4 * 2**30


def test_parts_take_what_was_counted_elsewhere(real: Costs) -> None:
    """Bytes are those of an independent count: 694.7 M weights of a text encoder, 1286 MiB to encode a picture."""
    assert real.text_encoder == pytest.approx(2 * 694_659_840, abs=1024)
    assert real.encode() == pytest.approx(1286 * 2**20, rel=0.01)
    assert real.decode() == pytest.approx(1536 * 2**20, rel=0.01)
    assert real.decode(tiling=True) == pytest.approx(389 * 2**20, rel=0.05)


@pytest.mark.parametrize(("changes", "most"), [({}, 12e6), ({"finetune": {"keep": SMALL_KEEP}}, 4e6)])
@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_edit_files_are_small(name: str, changes: Any, most: float) -> None:
    """An edit of the real SDXL takes at most 12 MB, a small one 4 MB, with the record of both text encoders."""
    family = load_architecture("sdxl")
    [denoiser] = family.denoisers
    network = denoiser.load(weights="int8", device=torch.device("meta"), dtype=torch.bfloat16)
    tuned = preset(name, changes).for_group(family.group).finetune
    pack = AdapterPack(
        network, denoiser.names, count=1, adapt=tuned.adapt, rank=tuned.lora_rank, alpha=tuned.lora_alpha
    )
    pack.weights.copy_(0.05 * torch.randn(pack.weights.shape, generator=torch.Generator().manual_seed(0)))
    kept = truncated(pack.export(0), tuned.keep)
    shape = denoiser.shape(family.sizes.own)
    edit = Edit(
        adapters={"unet": {key: LoraFactors(*f) for key, f in denoiser.portable(kept, network).items()}},
        conditioning={part: torch.randn(described.shape) for part, described in family.text.items()},
        coarse={"unet": torch.randn(4, 4, 4)},
        noise={"unet": torch.randn(shape)},
        sentences=(SENTENCE,),
        base=BaseIdentity(
            source="sdxl",
            revision=None,
            family=family.family,
            interface=Interface(text={"embeds": 2048, "pooled": 1280}, denoisers={"unet": "epsilon"}),
            files={"unet": "0" * 64},
        ),
        settings={},
        seed=0,
        etas=(0.0, 1.0),
        eta_default=1.0,
        source=SourcePicture(sha256="0" * 64, width_px=9, height_px=9, size=(1024, 1024), box=(0, 0, 1024, 1024)),
        base_weights="int8",
        versions={},
        measured={},
        title=SENTENCE,
    )
    assert len(encode(edit)) <= most


def test_an_edit_says_what_truncation_kept(folders: dict[str, Path]) -> None:
    """The share of the trained adapter's energy in the file is recorded; less of its bytes keeps less of it."""
    base = load(folders["epsilon"], weights="int8")
    kept = []
    for keep in (1.0, 0.5, 0.1):
        [edit] = make_edits(base, [Job(a_photo(), SENTENCE)], config(adapt="attn", keep=keep))
        kept.append(edit.settings["result"].get("energy_kept", 1.0))
    assert 1 == kept[0] > kept[1] > kept[2] > 0


# Models of another kind


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("model_index.json", {"text_encoder": [None, None], "tokenizer": [None, None]}, "is the refiner of SDXL"),
        ("model_index.json", {"_class_name": "StableDiffusionXLInpaintPipeline"}, "StableDiffusionXLInpaintPipeline"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "addition_embed_type text_time"),
        ("unet/config.json", {"in_channels": 9}, r"9 input channels \(inpainting\)"),
        ("unet/config.json", {"in_channels": 8}, r"8 input channels \(InstructPix2Pix\)"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "built-in guidance"),
        ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type text"),
        ("unet/config.json", {"cross_attention_dim": 32}, "text of width 32"),
        ("vae/config.json", {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "Playground"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
    ],
)
def test_models_of_another_kind(
    name: str, changes: dict[str, Any], words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The refiner, inpainting, editing by instructions, distilled and EDM models are refused with their names."""
    folder = Path(shutil.copytree(folders["epsilon"], tmp_path / "other"))
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(WrongFamilyError, match=words):
        load(folder)


def test_half_a_download_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    """A folder without its second text encoder's weights, or without its tokenizer, says which file is missing."""
    for missing in ("text_encoder_2/model.safetensors", "tokenizer_2"):
        folder = Path(shutil.copytree(folders["epsilon"], tmp_path / missing.replace("/", "-")))
        for path in sorted((folder / missing).glob("*")) or [folder / missing]:
            path.unlink()
        with pytest.raises(IncompleteModelError, match=missing.partition("/")[0]):
            load(folder).encode_text([SENTENCE])


def a_photo(width: int = 48, height: int = 48) -> Any:
    """A photo with a gradient."""
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    return Photo(image=image, sha256=f"{width:032x}{height:032x}", name="photo", notes=(), icc_profile=None)
