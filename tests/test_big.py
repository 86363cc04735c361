"""The real SDXL configuration: plans for cards, and an edit with random weights end to end on a CPU.

The edit takes a quarter of an hour and more, 7 GB of disk and 8 GB of memory.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.random_folder import write_random_folder
from lowmem_imagic import read_edit
from lowmem_imagic.edits.header import describe
from lowmem_imagic.families import load_architecture
from lowmem_imagic.planning.costs import Costs
from lowmem_imagic.planning.plan import CUDA_CONTEXT_BYTES, plan
from lowmem_imagic.settings.presets import preset

pytestmark = pytest.mark.big

SENTENCE = "a photo of a red cube on the grass"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL for pictures of 512 px, in real size but for that."""
    return write_random_folder(tmp_path_factory.mktemp("big") / "random-xl", model="sdxl", unet={"sample_size": 64})


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    """The report of an edit of one photo in two steps a stage, in a process of its own."""
    photo = folder.parent / "photo.png"
    Image.linear_gradient("L").resize((640, 640)).convert("RGB").save(photo)
    words = ["edit", photo, SENTENCE, "--model", folder, "--device", "cpu", "--out", folder.parent / "out"]
    words += ["--steps-embed", 2, "--steps-finetune", 2, "--draws", 1, "--vram", "12GB", "--checkpointing"]
    words += ["--etas", 1, "--steps-sample", 2, "--start", "photo", "--mask", 0, "--quiet"]
    run = [sys.executable, "-m", "lowmem_imagic", *map(str, words)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written: dict[str, Any] = json.loads((folder.parent / "out" / "report.json").read_text())
    print(json.dumps({name: written[name] for name in ("plan", "stages", "seconds", "edit_bytes")}, indent=1))
    return written


def test_an_edit_is_made_saved_and_read(report: dict[str, Any], folder: Path) -> None:
    """The file has at most 12 MB, is read again, and a picture of the photo's size was rendered from it."""
    [picture] = report["pictures"]
    with Image.open(folder.parent / "out" / picture) as image:
        assert image.size == (640, 640)
    path = folder.parent / "out" / report["edit_file"]
    edit = read_edit(path)
    assert path.stat().st_size <= 12e6 and edit.source.size == (512, 512)
    assert {name: tuple(part.shape) for name, part in edit.conditioning.items()} == {
        "embeds": (77, 2048),
        "pooled": (1280,),
    }
    assert describe(path)["base"]["family"] == "sdxl"
    assert 0 < edit.settings["result"]["energy_kept"] <= 1


@pytest.mark.parametrize(
    ("stage", "phase"),
    [("encode", "encode"), ("load", "load"), ("embed", "embed"), ("finetune", "finetune"), ("sample", "sample")],
)
def test_memory_is_what_the_plan_says(report: dict[str, Any], stage: str, phase: str) -> None:
    """The process's resident peak in a stage is within 10 % of the plan's bytes, or below."""
    planned, measured = report["plan"]["phases"][phase]["total"], report["stages"][stage]["peak_bytes"]
    assert measured <= 1.1 * planned


def test_cards_of_8_and_12_gb_train_at_1024_px() -> None:
    """Both train several photos of a batch at once, with checkpointing, and sample in common batches.

    One photo alone trains without checkpointing on 12 GB.
    """
    types = {"dtype": torch.bfloat16, "part_dtype": torch.float16, "codec_dtype": torch.bfloat16}
    real = Costs(load_architecture("sdxl"), preset("balanced"), weights="int8", **types)
    words: dict[str, Any] = {"jobs": 40, "beside": True, "context_bytes": CUDA_CONTEXT_BYTES}
    small = plan(real, preset("balanced"), budget_bytes=8 * 10**9, **words)
    assert small.checkpointing and small.slots >= 2 and small.batch_rows >= 8 and not small.text_on_cpu
    large = plan(real, preset("balanced"), budget_bytes=12 * 10**9, **words)
    assert large.checkpointing and large.slots > small.slots
    assert not plan(real, preset("balanced"), budget_bytes=12 * 10**9, context_bytes=CUDA_CONTEXT_BYTES).checkpointing
