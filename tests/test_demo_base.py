"""Facts about the measurement of the bundled autoencoder: photographs leave nothing but figures, patterns are read."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import demo_base, samples, train_oracle
from benchmarks.oracle import Attributes, Oracle
from lowmem_imagic.demo.batch_render import render_batch
from lowmem_imagic.demo.pictures import scene_at, to_tensor
from lowmem_imagic.demo.strangers import STRANGE
from lowmem_imagic.engine.base import BaseModel

pytestmark = pytest.mark.benchmark


def test_only_figures_of_photographs_are_written(tmp_path: Path) -> None:
    """A result has the number of photographs and their PSNR, and neither their names nor their folder."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 90, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "somebody.png")
    base = BaseModel.load("demo", device="cpu")
    result = demo_base.run(base, tmp_path, 2)
    assert (
        result["photographs"]["pictures"] == 1 and result["known"]["pictures"] == result["strangers"]["pictures"] == 2
    )
    assert result["photographs"]["mean_db"] < 20 and not result["photographs"]["passed"]
    assert not any(word in json.dumps(result) for word in ("somebody", tmp_path.name))


def test_overlaps_are_one_for_the_scene_and_nothing_for_grey() -> None:
    """The pattern in a scene's own picture overlaps wholly, and is not found in a grey one."""
    scenes = demo_base.strangers(4)
    assert all(scene.objects[0].pattern.kind in STRANGE.patterns for scene in scenes if scene.objects[0].pattern)
    images = to_tensor(render_batch(scenes, 48), torch.device("cpu"))
    assert [value for value in demo_base.overlaps(scenes, images) if value is not None] == pytest.approx([1.0] * 4)
    grey = [value for value in demo_base.overlaps(scenes, torch.zeros_like(images)) if value is not None]
    assert max(grey) < 0.6


def test_every_attribute_of_a_caption_has_its_goal() -> None:
    """A perfect reading reaches every goal; with one object each attribute has its own, with two the pair has one."""
    rng = random.Random(0)
    scenes = [scene_at(2, index) for index in range(60)]
    for count in (1, 2):
        prompts = [samples.Prompt.of(scene, rng) for scene in scenes if len(scene.objects) == count]
        truth = [[Attributes.of(p.scene, index) for index in range(count)] for p in prompts]
        figures = samples.judged(prompts, truth, single=count == 1)
        goals = {name: part["target"] for name, part in figures["attributes"].items() if "target" in part}
        assert goals == (samples.SHARE_TARGETS if count == 1 else {})
        assert ("target" in figures["shape_color_and_floor"]) == (count == 2)
        assert all(part["share"] == 1 for part in figures["attributes"].values())


def test_the_judge_can_be_trained_again() -> None:
    """The judge's training depends on its seed alone, and can be continued; it reads pictures of any size."""
    scenes = [train_oracle.judged_scene_at(1, index) for index in range(6)]
    assert any(not scene.plain for scene in [train_oracle.judged_scene_at(1, index) for index in range(12)])
    pictures = render_batch(scenes, 32, supersampling=1)
    oracles = [train_oracle.train_oracle(pictures, scenes, steps=2, batch=4) for _ in range(2)]
    readings = [oracle.read(torch.zeros(1, 3, 48, 48)) for oracle in oracles]
    assert readings[0] == readings[1] and oracles[0].size_px == 32
    before = {name: tensor.clone() for name, tensor in oracles[0].state().items()}
    further = train_oracle.train_oracle(pictures, scenes, steps=1, batch=4, start=oracles[0])
    # The first step has a rate of zero: nothing but the statistics of its batch is new.
    assert torch.equal(further.state()["8.weight"], before["8.weight"])


def test_the_committed_judge_knows_patterns() -> None:
    """The judge's own report: on patterned scenes every attribute is read right in nearly nine of ten pictures."""
    report = Oracle.load().report["held_out"]
    assert min(report["one_object"]["accuracy"].values()) >= 0.95
    assert min(report["one_object_with_details"]["accuracy"].values()) >= 0.88
