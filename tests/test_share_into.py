"""Edits in pipelines of diffusers: `load_into` gives the pictures of this package."""

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from lowmem_imagic import Cell, apply_edits, load_into
from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.edits.edit import Edit, LoraFactors
from lowmem_imagic.edits.identity import SourcePicture
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.errors import BaseMismatchError, ConfigError, PromptError, WrongFamilyError
from lowmem_imagic.pictures.letterbox import psnr
from lowmem_imagic.settings.stages import SampleConfig
from tests import calls, tiny_xl

SAMPLING = SampleConfig(
    num_inference_steps=6, guidance_scale=4.0, photo_guidance=1.0, start="inverted", negative_prompt="grass"
)


def made(base: BaseModel, **options: Any) -> Edit:
    """An edit with random factors, own noise and recorded settings."""
    edit = calls.random_edit(base, **options)
    shape = base.denoisers[0].shape(base.sizes.own)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    width, height = base.sizes.own
    source = SourcePicture(
        sha256="0" * 64, width_px=3 * width, height_px=2 * height, size=(width, height), box=(0, 2, width, height - 2)
    )
    return replace(edit, noise={"unet": noise}, settings={"sample": SAMPLING.__dict__}, source=source)


def ours(base: BaseModel, edit: Edit, *cells: Cell) -> list[Image.Image]:
    """This package's pictures, without a mask."""
    return apply_edits(base, [edit], list(cells), SAMPLING)


def picture(loaded: Any, *arguments: Any, **options: Any) -> Image.Image:
    """The pipeline's picture at the photo's size."""
    return loaded.framed(loaded.pipeline(**loaded.at(*arguments, **options)).images[0])


def alike(one: Image.Image, other: Image.Image) -> bool:
    """Whether two pictures are equal to rounding."""
    return psnr(one, other) >= 55


@pytest.fixture
def pipeline(tiny_folder: Path) -> StableDiffusionPipeline:
    """diffusers' own pipeline of the tiny model."""
    return quiet(StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None, use_safetensors=True))


def quiet(pipeline: Any) -> Any:
    """A pipeline without progress bars."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def fp32(load_base: Callable[..., BaseModel]) -> BaseModel:
    """The tiny model in fp32."""
    return load_base(weights="fp32")


def test_a_pipeline_gives_our_pictures(fp32: BaseModel, pipeline: Any) -> None:
    """At every eta, seed, strength and sentence the pipeline's picture is this package's, at the photo's own size."""
    edit = made(fp32, adapt="all", keep=0.5)
    loaded = load_into(pipeline, edit)
    pipeline.scheduler = loaded.scheduler()
    cells = [
        Cell(0, 0.0, 0),
        Cell(0, 0.7, 0),
        Cell(0, 1.3, 0),
        Cell(0, -0.4, 0),
        Cell(0, 1.0, 3),
        Cell(0, 1.0, 0, strength=0.5),
        Cell(0, 1.0, 0, strength=(0.0, 1.5, 0.3)),
        Cell(0, 1.0, 0, sentence="two birds"),
    ]
    rendered = ours(fp32, edit, *cells)
    theirs = [picture(loaded, c.eta, c.sentence, seed=c.seed, strength=c.strength) for c in cells]
    assert [one.size for one in theirs] == [(48, 32)] * len(cells)
    assert [alike(*pair) for pair in zip(rendered, theirs, strict=True)] == [True] * len(cells)
    others = [alike(rendered[1], other) for other in (*rendered[:1], *rendered[2:])]
    assert not any(others)


@pytest.mark.process
def test_sdxl(tmp_path: Path) -> None:
    """A pipeline of Stable Diffusion XL takes both tensors of text, and gives this package's pictures."""
    base = BaseModel.load(str(tiny_xl.write_tiny(tmp_path / "xl")), device="cpu", weights="fp32")
    edit = made(base, adapt="all", keep=0.5)
    pipeline = quiet(StableDiffusionXLPipeline.from_pretrained(tmp_path / "xl", use_safetensors=True))
    loaded = load_into(pipeline, edit, "cube")
    pipeline.scheduler = loaded.scheduler()
    cells = [Cell(0, 0.0, 0), Cell(0, 0.7, 1), Cell(0, 1.3, 0, sentence="grass")]
    theirs = [picture(loaded, c.eta, c.sentence, seed=c.seed) for c in cells]
    assert [alike(*pair) for pair in zip(ours(base, edit, *cells), theirs, strict=True)] == [True] * 3


def test_several_edits_in_one_pipeline(fp32: BaseModel, pipeline: Any) -> None:
    """Edits under several names leave each other alone, in any order, and leave no trace once they are removed."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    text = torch.randn(1, *made(fp32).conditioning["embeds"].shape, generator=torch.Generator().manual_seed(2))

    def predicted() -> torch.Tensor:
        with torch.no_grad():
            return pipeline.unet(latents, torch.tensor([500]), encoder_hidden_states=text).sample

    alone = predicted()
    edits = {name: made(fp32, adapt=adapt, seed=seed) for name, adapt, seed in (("a", "attn", 3), ("b", "all", 5))}
    loaded = {name: load_into(pipeline, edit, name) for name, edit in edits.items()}
    pipeline.scheduler = loaded["a"].scheduler()
    for name in ("a", "b", "a"):
        assert alike(picture(loaded[name], 0.8), ours(fp32, edits[name], Cell(0, 0.8, 0))[0])
    with pytest.raises(ConfigError, match="an adapter 'a' already"):
        load_into(pipeline, edits["b"], "a")
    for one in loaded.values():
        one.remove()
    assert torch.allclose(predicted(), alone, atol=1e-6)


def test_hot_swap(fp32: BaseModel, pipeline: Any) -> None:
    """An edit takes another's place in the very same tensors, whatever its layers and ranks; too large a one is
    refused."""
    edits = [made(fp32, adapt="attn", seed=3), made(fp32, adapt="all", keep=0.3, seed=5), made(fp32, seed=7)]
    first = load_into(pipeline, edits[0], "slot", hotswap_rank=8)
    pipeline.scheduler = first.scheduler()
    tensors = {name: x.data_ptr() for name, x in pipeline.unet.named_parameters() if "lora_" in name}
    assert alike(picture(first, 0.8), ours(fp32, edits[0], Cell(0, 0.8, 0))[0])
    for edit in edits[1:]:
        loaded = load_into(pipeline, edit, "slot", hotswap_rank=8)
        assert alike(picture(loaded, 0.8), ours(fp32, edit, Cell(0, 0.8, 0))[0])
        assert {name: x.data_ptr() for name, x in pipeline.unet.named_parameters() if "lora_" in name} == tensors
    with pytest.raises(ConfigError, match="layers of rank 8"):
        load_into(pipeline, edits[0], "slot", hotswap_rank=4)
    with pytest.raises(ConfigError, match="not among the layers for hot-swapping"):
        load_into(pipeline, made(fp32, adapt="conv_in"), "slot", hotswap_rank=8)
    # Another rank would be other tensors; a plain adapter has other layers. Neither is touched.
    load_into(pipeline, edits[0], "plain")
    for name, rank, words in (("slot", 16, "it has rank 8"), ("plain", 8, "it covers other layers")):
        before = pipeline.get_list_adapters()
        with pytest.raises(ConfigError, match=f"'{name}' was not loaded with hotswap_rank={rank}: {words}"):
            load_into(pipeline, edits[2], name, hotswap_rank=rank)
        assert pipeline.get_list_adapters() == before
    for name in ("", "cat.v2"):
        with pytest.raises(ConfigError, match="the adapter's name"):
            load_into(pipeline, edits[0], name)


def test_another_base_is_refused(fp32: BaseModel, pipeline: Any) -> None:
    """Layers of other sizes, another kind of prediction, other text and another kind of pipeline are named."""
    edit = made(fp32)
    key, factors = next(iter(edit.adapters["unet"].items()))
    wide = LoraFactors(torch.ones(2, 7), factors.up[:, :2], 1.0)
    with pytest.raises(BaseMismatchError, match=r"does not fit this pipeline.*maps 7 to"):
        load_into(pipeline, replace(edit, adapters={"unet": {key: wide}}))
    with pytest.raises(BaseMismatchError, match="no such layer"):
        load_into(pipeline, replace(edit, adapters={"unet": {"lora_unet_elsewhere": factors}}))
    interface = replace(edit.base.interface, denoisers={"unet": "v_prediction"})
    with pytest.raises(BaseMismatchError, match="predicts v_prediction"):
        load_into(pipeline, replace(edit, base=replace(edit.base, interface=interface)))
    smaller = replace(edit, base=replace(edit.base, family="ssd-1b"))
    pipeline.unet.register_to_config(transformer_layers_per_block=[1, 2, 10])
    with pytest.raises(BaseMismatchError, match="a ssd-1b; the pipeline is sdxl"):
        load_into(pipeline, smaller)
    short = replace(edit, conditioning={"embeds": edit.conditioning["embeds"][:3]})
    with pytest.raises(BaseMismatchError, match="embedding has the shapes"):
        load_into(pipeline, short).at(0.5)
    with pytest.raises(WrongFamilyError, match="expected a pipeline such as"):
        load_into(object(), edit)
    image_to_image = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    with pytest.raises(WrongFamilyError, match="StableDiffusionImg2ImgPipeline takes no latents"):
        load_into(image_to_image, edit)


def test_an_edit_without_a_sentence(fp32: BaseModel, pipeline: Any) -> None:
    """It gives its photo, and any sentence that is asked."""
    edit = replace(made(fp32), sentences=(), start_sentence="a photo")
    loaded = load_into(pipeline, edit)
    pipeline.scheduler = loaded.scheduler()
    assert alike(picture(loaded, 0.0), ours(fp32, edit, Cell(0, 0.0, 0))[0])
    with pytest.raises(PromptError, match="give one"):
        loaded.at(0.5)
    asked = Cell(0, 0.5, 0, sentence="a blue sphere")
    assert alike(picture(loaded, 0.5, "a blue sphere"), ours(fp32, edit, asked)[0])


def test_a_source_prompt_is_mentioned(fp32: BaseModel, pipeline: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A pipeline cannot follow an edit's source prompt; a warning says so, except of the photo, which has none."""
    edit = made(fp32)
    told = replace(edit, settings={"sample": {**SAMPLING.__dict__, "source_prompt": "a cat"}})
    loaded = load_into(pipeline, told)
    loaded.at(0.0)
    assert "source prompt" not in caplog.text
    loaded.at(0.6)
    assert "source prompt 'a cat'" in caplog.text


def test_guidance_below_1_is_mentioned(fp32: BaseModel, pipeline: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Guidance below 1 weakens the sentence here, and has no effect in pipelines; a warning says so."""
    edit = made(fp32)
    weak = replace(edit, settings={"sample": {**SAMPLING.__dict__, "guidance_scale": 0.5, "photo_guidance": 1.0}})
    loaded = load_into(pipeline, weak)
    loaded.at(0.0)
    assert "guidance" not in caplog.text
    loaded.at(1.0)
    assert "guidance there is 0.5, and pipelines have none below 1" in caplog.text


def test_another_scheduler_is_mentioned(fp32: BaseModel, pipeline: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The pipeline keeps its own scheduler; the log says so if the edit was made for another."""
    loaded = load_into(pipeline, made(fp32))
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config)
    assert picture(loaded, 0.5).size == (48, 32)
    assert "made for the scheduler DDIM, and the pipeline has PNDM" in caplog.text


def test_the_first_edit_files_are_scaled_rightly(fp32: BaseModel, pipeline: Any) -> None:
    """An edit whose alphas differ by layer, which diffusers' own reading of the file scales wrongly, is right here."""
    edit = made(fp32, keep=0.4)
    own = {key: LoraFactors(f.down, f.up, float(f.rank)) for key, f in edit.adapters["unet"].items()}
    edit = replace(edit, adapters={"unet": own})
    assert len({factors.alpha for factors in own.values()}) > 1
    loaded = load_into(pipeline, edit)
    pipeline.scheduler = loaded.scheduler()
    assert alike(picture(loaded, 1.0), ours(fp32, edit, Cell(0, 1.0, 0))[0])


def test_the_ten_lines_of_the_docs(
    fp32: BaseModel, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example in docs/other_programs.md has ten lines at most, and gives this package's pictures."""
    text = (Path(__file__).parent.parent / "docs/other_programs.md").read_text(encoding="utf-8")
    [code] = re.findall(r"<!-- code: load_into -->\n```python\n(.+?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    edit = made(fp32, adapt="all", keep=0.5)
    edit_file.write(edit, tmp_path / "cat.safetensors")
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(tiny_folder)), "docs", "exec"), {})
    etas = sorted(float(path.stem.partition("_")[2]) for path in tmp_path.glob("cat_*.png"))
    assert len(etas) >= 2 and etas[0] == 0
    for eta, rendered in zip(etas, ours(fp32, edit, *(Cell(0, eta, 0) for eta in etas)), strict=True):
        [path] = [path for path in tmp_path.glob("cat_*.png") if float(path.stem.partition("_")[2]) == eta]
        with Image.open(path) as theirs:
            assert alike(theirs, rendered)
