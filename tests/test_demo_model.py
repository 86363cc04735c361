"""The bundled model end to end: what the tool is for happens, on photos of the bundled world."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lowmem_imagic.demo.render import object_mask, render
from lowmem_imagic.demo.scene import Scene
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.families.files.source import Folder
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.pictures import load_photo
from lowmem_imagic.pictures.letterbox import psnr
from lowmem_imagic.pictures.png import encode_png
from lowmem_imagic.pipeline.apply import apply_edits
from lowmem_imagic.pipeline.make import make_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.sampling.sample import Cell
from lowmem_imagic.settings.presets import preset
from tests import calls

SEED = 11
PX = 128
SCENES = [
    (Scene.from_sentence("a large red rubber cube on a wooden floor", seed=3), "grass"),
    (Scene.from_sentence("a large yellow rubber sphere on a grass floor", seed=8), "wooden"),
    (Scene.from_sentence("a large green rubber cylinder on a stone floor", seed=5), "wooden"),
]


def whole(preset_name: str) -> Any:
    """Whole edits with a preset: a minute of work, which one process of the second tier does once."""
    return pytest.param(preset_name, marks=pytest.mark.process)


@pytest.fixture(scope="module", params=[whole("fast"), whole("balanced")])
def results(request, tmp_path_factory) -> dict[str, list]:
    """Three floor edits trained as one pack, rendered at eta 0 and 1 and by the sentence alone."""
    folder = tmp_path_factory.mktemp("photos")
    base = BaseModel.load("demo", device="cpu")
    settings = preset(request.param)
    jobs = []
    for number, (scene, floor) in enumerate(SCENES):
        path = folder / f"{number}.png"
        path.write_bytes(encode_png(render(scene, PX), provenance=None))
        jobs.append(Job(load_photo(path), scene.edit(floor=floor).caption()))
    edits = make_edits(base, jobs, settings)
    cells = [Cell(edit, eta, SEED, strength) for edit in range(3) for eta, strength in ((0, 1), (1, 1), (1, 0))]
    pictures = apply_edits(base, edits, cells, settings.sample)
    return {
        "jobs": jobs,
        "photo": [job.photo.image for job in jobs],
        "edits": edits,
        "eta 0": pictures[0::3],
        "eta 1": pictures[1::3],
        "sentence alone": pictures[2::3],
    }


def test_eta_0_reproduces_the_photo_better_than_the_sentence_alone(results):
    """At eta 0 every photo comes back closer (PSNR) than the sentence alone; by 3 dB in the median."""
    gains = [
        psnr(mine, photo) - psnr(alone, photo)
        for photo, mine, alone in zip(results["photo"], results["eta 0"], results["sentence alone"], strict=True)
    ]
    assert min(gains) > 0
    assert np.median(gains) > 3


@pytest.mark.parametrize("results", [whole("fast")], indirect=True)
def test_an_edit_of_a_pack_looks_like_the_one_made_alone(results):
    """After a whole training alone, pictures are those of the edit that trained in a pack: 35 dB and more."""
    base = BaseModel.load("demo", device="cpu")
    settings = preset("fast")
    edits = make_edits(base, results["jobs"][1:2], settings)
    alone = apply_edits(base, edits, [Cell(0, 0, SEED), Cell(0, 1, SEED)], settings.sample)
    packed = [results["eta 0"][1], results["eta 1"][1]]
    assert min(psnr(mine, theirs) for mine, theirs in zip(alone, packed, strict=True)) >= 35


def _floor_color(picture, scene: Scene) -> np.ndarray:
    """Mean colour of the lower third of a picture, where the floor is near, outside the object."""
    near = (object_mask(scene, PX) == 0) & (np.arange(PX)[:, None] > PX * 2 / 3)
    return np.asarray(picture, float)[near].mean(0)


@pytest.mark.parametrize("results", [whole("balanced")], indirect=True)
def test_eta_1_changes_the_named_floor(results):
    """At eta 1 the floor's mean colour is nearer to the ground-truth edit's than to the photo's."""
    for (scene, floor), photo, edited in zip(SCENES, results["photo"], results["eta 1"], strict=True):
        asked = _floor_color(render(scene.edit(floor=floor), PX), scene)
        before, after = (_floor_color(picture, scene) for picture in (photo, edited))
        assert np.linalg.norm(after - asked) < np.linalg.norm(after - before)


def test_eta_1_keeps_the_object_better_than_the_sentence_alone(results):
    """At eta 1 the object is closer to the photo's, where it was, than in a picture drawn from the sentence."""
    gains = []
    for (scene, _), photo, mine, alone in zip(
        SCENES, results["photo"], results["eta 1"], results["sentence alone"], strict=True
    ):
        inside = object_mask(scene, PX) > 0
        errors = [
            ((np.asarray(picture, float) - np.asarray(photo, float))[inside] ** 2).mean() for picture in (alone, mine)
        ]
        gains.append(errors[0] / errors[1])
    assert np.median(gains) > 1.5


def test_losses_fall_from_stage_to_stage(results):
    """Fine-tuning ends at a lower loss than the embedding alone, for every edit."""
    for edit in results["edits"]:
        assert edit.settings["result"]["finetune_loss"] < edit.settings["result"]["embed_loss"]


def test_the_bundled_model_is_small_and_readable():
    """The model ships as fp16 safetensors of at most 30 MB in all, without pickles, readable by everyone."""
    base = BaseModel.load("demo", device="cpu")
    assert isinstance(base.family.source, Folder)
    files = [path for path in base.family.source.path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)
    for component in ("unet", "vae", "text_encoder"):
        from safetensors.torch import load_file

        for path in base.family.source.weight_files(component):
            assert {t.dtype for t in load_file(path).values()} == {torch.float16}


def test_the_sentence_decides_what_the_base_draws():
    """The base alone draws a red and a blue object for "red" and "blue", with the same noise."""
    base = BaseModel.load("demo", device="cpu")
    settings = replace(preset("fast").sample, start="noise")
    prompts = ["a photo of a large red cube on a stone floor", "a photo of a large blue cube on a stone floor"]
    text = calls.encode_text(base, prompts)
    nothing = AdapterPack(calls.unet(base), calls.NAMES, count=2, adapt="attn", rank=1, alpha=1.0)
    latents = calls.sample(base, nothing, text, text, [Cell(edit, 1.0, SEED) for edit in range(2)], settings)
    red, blue = base.decode(latents)
    excess = [picture[0] - picture[2] for picture in (red, blue)]
    # The colour shows where the object is: the most coloured tenth of the picture.
    assert excess[0].flatten().topk(PX**2 // 10).values.mean() > 0.5
    assert excess[1].flatten().neg().topk(PX**2 // 10).values.mean() > 0.5


def test_the_folder_works_in_a_stock_pipeline():
    """diffusers' own pipeline makes a picture from the bundled folder with default settings, all parts in fp32."""
    import diffusers

    source = BaseModel.load("demo", device="cpu").family.source
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(source.path, local_files_only=True)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {next(part.parameters()).dtype for part in parts} == {torch.float32}
    [picture] = pipeline("a red cube", num_inference_steps=1, output_type="np").images
    assert np.isfinite(picture).all()
