"""Facts about the benchmark of GPUs: its parts run on any device with a base; without a GPU all figures are null."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, random_unet
from lowmem_imagic.planning.plan import Budget
from lowmem_imagic.settings.presets import preset
from lowmem_imagic.training import loop as training
from tests import calls

pytestmark = pytest.mark.benchmark

CONFIG = preset(
    "fast",
    {
        "embed": {"steps": 2, "draws": 1},
        "finetune": {"steps": 2, "draws": 2},
        "sample": {"num_inference_steps": 3},
    },
)


def test_edits_are_trained_and_rendered(base: Any) -> None:
    """Every edit has its own sentence, photo and noise, and a picture at every eta."""
    made = gpu.train(base, CONFIG, 3, slots=2)
    assert [edit.number for edit in made.edits] == [0, 1, 2] and all(edit.adapters for edit in made.edits)
    pictures = gpu.render(base, CONFIG, made, (0.0, 1.0))
    assert pictures.shape == (6, *base.family.latent_shape) and pictures.isfinite().all()
    assert len({tuple(picture.flatten()[:4].tolist()) for picture in pictures}) == 6
    seconds = gpu.whole_edits(base, CONFIG, 2, (0.0, 1.0))
    assert seconds["train_s"] > 0 and seconds["sample_s"] > 0


def test_a_card_says_what_was_planned_and_what_was_taken(load_base: Any) -> None:
    """Every planned phase that is run has its prediction beside its peak, both without what came before any tensor."""
    found = gpu.card(load_base(), CONFIG, Budget(3_000_000_000, 1_000_000_000), jobs=3)
    assert found["plan"]["slots"] == 3 and found["plan"]["checkpointing"] is False
    assert set(found["peaks"]) == {"embed", "finetune", "sample"}
    for name, peak in found["peaks"].items():
        assert peak["predicted"] == found["plan"]["phases"][name]["total"] - 1_000_000_000
        assert peak["measured"] > 0


def test_recorded_steps_are_compared_with_others(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack's steps are timed as they are and recorded, every one of them moves the weights, and all agree here."""
    found = gpu.compared(base, CONFIG, slots=2)
    assert found["step_s"] > 0 and found["recorded_step_s"] > 0 and not base.replays
    assert found["apart"] == found["recorded_apart"] == 0
    few, more = (gpu.paced(base, CONFIG, 2, steps).came_to for steps in (4, 5))
    assert len(more) == len(few) + 2 and gpu.apart(more[10:], few[8:]) > 1e-3

    class Stale(training.Replay):
        """A recording that does not see its inputs."""

        def __init__(self, run: Any, inputs: Any, **options: Any) -> None:
            super().__init__(run, inputs, **options)
            self.first = list(inputs)

        def __call__(self, *_: Tensor) -> Tensor:
            return super().__call__(*self.first)

    monkeypatch.setattr(training, "Replay", Stale)
    assert gpu.compared(base, CONFIG, slots=2)["recorded_apart"] > 1e-3


def test_without_a_gpu_every_figure_is_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table names the planned measurements, and the file has no number."""
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(path)])
    assert gpu.main() == 0
    result = json.loads(path.read_text())
    assert len(result["lines"]) == 29 and all(line["value"] is None for line in result["lines"])
    goals = [line for line in result["lines"] if line["goal"] is not None]
    assert {line["goal"] for line in goals} == {12.0, 3.0, 8.0, 0.4, 0.1}
    assert "not measured" in capsys.readouterr().out


def test_a_random_base_knows_its_sentences() -> None:
    """Without a text encoder equal sentences have equal embeddings, and others have others."""
    base = random_unet.random_sd15(weights="int8", device=torch.device("cpu"), dtype=torch.float32, checkpointing=False)
    one, other, again = calls.encode_text(base, ["a cat", "a dog", "a cat"])
    assert one.shape == (77, 768) and torch.equal(one, again) and not torch.equal(one, other)


def test_the_preset_is_the_products() -> None:
    """The timed edits use `balanced` and eight etas, as in the goal."""
    assert len(gpu.ETAS) == 8 and gpu.EDITS == 16
    assert preset("balanced").sample.num_inference_steps == 30
