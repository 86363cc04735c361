"""Facts about GPUs: the product's own calls on Stable Diffusion 1.5 at its real size, with random weights.

``pytest -m gpu`` runs them, to take under three minutes on one card. Facts that a CPU can show too are shown there on
the tiny model, in the default tier.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.random_folder import write_random_folder
from lowmem_imagic import (
    BaseModel,
    Budget,
    Cell,
    EditConfig,
    Job,
    Meter,
    apply_edits,
    load_photo,
    make_edits,
    plan_for,
    planned,
    preset,
    read_edit,
    write_edit,
)
from lowmem_imagic.layers.frozen import FrozenLinear8bit, Int8Conv2d
from lowmem_imagic.pictures.letterbox import psnr
from tests import calls, tiny_if

SENTENCES = ("a blue sphere on a wooden floor", "two birds kissing")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
SHORT: dict[str, dict[str, Any]] = {
    "embed": {"steps": 3},
    "finetune": {"steps": 3},
    "sample": {"num_inference_steps": 4, "etas": (0.0, 1.0), "start": "photo"},
}
"""Of stages that are made short; inverting a photo takes 30 passes."""


@dataclass(frozen=True)
class Place:
    """A device and the model that it can hold."""

    device: str
    folder: Path

    def load(self, **options: Any) -> BaseModel:
        """A fresh base."""
        return BaseModel.load(str(self.folder), device=self.device, **options)

    @property
    def on_gpu(self) -> bool:
        """Whether this is a GPU."""
        return self.device == "cuda"


@pytest.fixture(scope="module")
def full_size_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.5 with random weights."""
    return write_random_folder(tmp_path_factory.mktemp("sd15"), device="cuda")


@pytest.fixture(scope="module", params=["cpu", GPU])
def place(request: pytest.FixtureRequest) -> Place:
    """The CPU with the tiny model, and a GPU with Stable Diffusion 1.5."""
    name = "full_size_folder" if request.param == "cuda" else "tiny_folder"
    return Place(request.param, request.getfixturevalue(name))


@pytest.fixture
def gpu(full_size_folder: Path) -> Place:
    """A GPU with Stable Diffusion 1.5."""
    return Place("cuda", full_size_folder)


@pytest.fixture(autouse=True)
def _whole_card() -> Iterator[None]:
    """Every test begins with an empty, unlimited card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    yield


@pytest.fixture(scope="module")
def photo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photo of 96 x 64 with structure at every scale."""
    rng = np.random.default_rng(5)
    rows = [np.kron(rng.integers(0, 256, (64 // s, 96 // s, 3)), np.ones((s, s, 1))) for s in (16, 4, 1)]
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray((sum(rows) / 3).astype(np.uint8)).save(path)
    return path


@contextmanager
def capped(more_bytes: int) -> Iterator[None]:
    """A card with room for this many bytes beyond what is allocated now."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + more_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def jobs(photo_file: Path) -> list[Job]:
    """One photo under two sentences."""
    return [Job(load_photo(photo_file), sentence) for sentence in SENTENCES]


def test_edits_are_trained_stored_and_rendered(place: Place, photo_file: Path, tmp_path: Path) -> None:
    """Both stages, the file and the pictures work on the device, in 8 bit, and every stage reports its peak."""
    inverted = {**SHORT, "sample": {**SHORT["sample"], "start": "inverted"}}
    base, config, meter = place.load(), preset("balanced", inverted), Meter(torch.device(place.device))
    edits = make_edits(base, jobs(photo_file), config, meter=meter)
    layers = [m for m in calls.unet(base).modules() if isinstance(m, (FrozenLinear8bit, Int8Conv2d))]
    assert layers and {next(layer.parameters()).device.type for layer in layers} == {place.device}
    assert edits[0].measured["dtype"] == ("torch.bfloat16" if place.on_gpu else "torch.float32")
    for number, edit in enumerate(edits):
        path = tmp_path / f"{number}.safetensors"
        write_edit(edit, path)
        pictures = apply_edits(base, [read_edit(path)], [Cell(0, eta, 0) for eta in (0.0, 1.0)], config.sample)
        assert [picture.size for picture in pictures] == [(96, 64)] * 2
        assert all(np.ptp(np.asarray(picture)) > 0 for picture in pictures)
    assert {"encode", "invert", "embed", "finetune"} <= set(meter.stages)
    assert all(stage["peak_bytes"] for stage in meter.stages.values())


def test_a_pack_gives_each_edit_what_it_gets_alone(place: Place, photo_file: Path) -> None:
    """An edit that trains beside another has the losses it has alone, to the rounding of the device's arithmetic."""
    base, config = place.load(), preset("fast", SHORT)
    together = make_edits(base, jobs(photo_file), config)
    alone = [make_edits(base, [job], config)[0] for job in jobs(photo_file)]
    bound = 2e-2 if place.on_gpu else 1e-3
    for one, other in zip(together, alone, strict=True):
        for stage in ("embed_loss", "finetune_loss"):
            assert one.settings["result"][stage] == pytest.approx(other.settings["result"][stage], rel=bound)


@pytest.mark.gpu
def test_an_edit_made_on_one_device_renders_alike_on_the_cpu(photo_file: Path, tmp_path: Path) -> None:
    """An edit of the bundled model gives the same picture on the CPU as where it was made, at least to the eye."""
    there, here = BaseModel.load("demo", device="cuda"), BaseModel.load("demo", device="cpu")
    config = preset("fast")
    [edit] = make_edits(there, [Job(load_photo(photo_file), SENTENCES[0])], config)
    write_edit(edit, tmp_path / "edit.safetensors")
    cells = [Cell(0, eta, 0) for eta in (0.0, 1.0)]
    pictures = [
        apply_edits(base, [read_edit(tmp_path / "edit.safetensors")], cells, config.sample) for base in (there, here)
    ]
    for one, other in zip(*pictures, strict=True):
        assert psnr(one, other) > 30


@pytest.mark.gpu
def test_peaks_are_as_planned(gpu: Place, photo_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every phase of a plan for 8 GB takes the predicted bytes, to a tenth."""
    base = gpu.load()
    config = preset("balanced", {**SHORT, "sample": {**SHORT["sample"], "start": "inverted"}})
    budget = Budget.of(base.device, "8GB")
    plan = plan_for(base, config, budget, jobs=2)
    assert plan is not None
    meter, cells = Meter(base.device), [Cell(0, eta / 100, 0) for eta in range(plan.batch_rows)]
    with planned(base, plan, budget):
        edits = make_edits(base, jobs(photo_file), config, slots=plan.slots, max_rows=plan.rows, meter=meter)
        apply_edits(base, edits, cells, config.sample, meter=meter)
    rows = []
    for name, phase in plan.phases.items():
        measured = meter.stages[name]["peak_bytes"]
        rows.append((name, phase.total - phase.context, measured, measured / (phase.total - phase.context)))
    with capsys.disabled():
        print(f"\nplan: {plan}")
        for row in rows:
            print("  {:9} predicted {:>13,} measured {:>13,} ratio {:.3f}".format(*row))
    assert {name: ratio for name, _, _, ratio in rows if not 0.9 <= ratio <= 1.1} == {}


@pytest.mark.gpu
def test_xformers_gives_what_torch_attention_gives(gpu: Place, relative: Callable[..., float]) -> None:
    """Predictions and gradients with xformers are as near to fp32 as those of torch's own attention."""
    pytest.importorskip("xformers")
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 64, 64, generator=generator), torch.randn(2, 77, 768, generator=generator)
    outputs = {}
    for name in ("fp32", "sdpa", "xformers"):
        weights, attention = ("fp32", "sdpa") if name == "fp32" else ("int8", name)
        base = gpu.load(weights=weights, attention=attention)
        given = text.clone().requires_grad_()
        prediction = calls.predict(base, latents, torch.tensor([100, 700]), given)
        prediction.float().square().sum().backward()
        outputs[name] = prediction.detach().float().cpu(), given.grad
        base.release()
    errors = {
        name: [relative(one, exact) for one, exact in zip(outputs[name], outputs["fp32"], strict=True)]
        for name in ("sdpa", "xformers")
    }
    assert all(x <= 1.3 * s + 1e-3 for s, x in zip(errors["sdpa"], errors["xformers"], strict=True)), errors


@pytest.mark.gpu
def test_what_is_encoded_leaves_the_card(gpu: Place, photo_file: Path) -> None:
    """After sentences and photos are encoded, nothing more stays reserved than before."""
    base, before = gpu.load(), torch.cuda.memory_reserved()
    calls.encode_text(base, SENTENCES)
    after_text = torch.cuda.memory_reserved()
    base.encode(torch.zeros(1, 3, 512, 512))
    assert (after_text - before, torch.cuda.memory_reserved() - before) == (0, 0)


MB = 1_000_000


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("room", "work", "words"),
    [
        (200 * MB, lambda base: calls.encode_text(base, SENTENCES), "the text encoder on the CPU"),
        (370 * MB, lambda base: base.encode(torch.zeros(1, 3, 512, 512)), "the autoencoder in tiles"),
        (420 * MB, lambda base: base.decode(torch.zeros(1, 4, 64, 64)), "the autoencoder in tiles"),
    ],
)
def test_parts_that_do_not_fit_take_a_cheaper_way(
    gpu: Place, room: int, work: Callable[[BaseModel], Any], words: str
) -> None:
    """Encoding and decoding finish on a card too small for the usual way, and report their fallbacks."""
    base = gpu.load()
    with capped(room):
        work(base)
    assert base.fallbacks == [words]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("room", "words"), [(1500 * MB, "rows a training pass"), (520 * MB, "checkpointing")], ids=["rows", "checkpointing"]
)
@pytest.mark.parametrize("replays", [False, True], ids=["plain", "recorded"])
def test_training_that_does_not_fit_takes_a_cheaper_way(
    gpu: Place, photo_file: Path, room: int, words: str, replays: bool
) -> None:
    """Training finishes on a card too small for a whole step, recorded or not, and the edit says how."""
    config = preset("balanced", {**SHORT, "embed": {"steps": 2, "draws": 8}, "finetune": {"steps": 2, "draws": 8}})
    base = gpu.load()
    base.replays = replays
    calls.encode_text(base, [*SENTENCES, ""])
    base.encode(torch.zeros(1, 3, 512, 512))
    _ = calls.unet(base)
    with capped(room + 4 * 4 * 20 * MB):
        [edit] = make_edits(base, jobs(photo_file)[:1], config)
    assert any(words in rung for rung in edit.measured["rungs"]), edit.measured["rungs"]


@pytest.mark.gpu
def test_sampling_that_does_not_fit_takes_fewer_pictures(gpu: Place, photo_file: Path) -> None:
    """Pictures are rendered in smaller batches on a card too small for the batch that was asked for."""
    base = gpu.load()
    config: EditConfig = preset("balanced", {**SHORT, "sample": {**SHORT["sample"], "batch_rows": 64}})
    [edit] = make_edits(base, jobs(photo_file)[:1], config)
    with capped(1200 * MB):
        pictures = apply_edits(base, [edit], [Cell(0, eta / 20, 0) for eta in range(20)], config.sample)
    assert len(pictures) == 20 and any("images a sampling batch" in rung for rung in base.fallbacks)


@pytest.mark.gpu
def test_recorded_steps_give_what_others_give(gpu: Place, photo_file: Path) -> None:
    """An edit trained in recorded steps is as near to one trained without as another of those."""
    config = preset("fast", {**SHORT, "embed": {"steps": 4}, "finetune": {"steps": 4}})
    ends = []
    for replays in (False, False, True):
        base = gpu.load()
        base.replays = replays
        [edit] = make_edits(base, jobs(photo_file)[:1], config)
        ends.append(edit.conditioning["embeds"].float())
    usual, recorded = ((ends[0] - other).norm() / ends[0].norm() for other in ends[1:])
    assert recorded <= 3 * max(float(usual), 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["int8", "nf4", "bf16"])
def test_networks_of_a_cascade_take_turns_on_a_card(tmp_path: Path, photo_file: Path, weights: str) -> None:
    """The network that waits takes no memory of the card, and edits and pictures are the same as without turns."""
    base = BaseModel.load(str(tiny_if.write_tiny(tmp_path)), device="cuda", weights=weights)
    config, cells = preset("fast", SHORT), [Cell(0, 0.0, 0), Cell(0, 1.0, 0)]
    jobs = [Job(load_photo(photo_file), SENTENCES[0])]
    [plain] = make_edits(base, jobs, config)
    pictures = apply_edits(base, [plain], cells, config.sample)
    first, second = (base.network(denoiser) for denoiser in base.denoisers)
    with base.restored():
        base.in_turn = True
        base.network(base.denoisers[0])
        assert {weight.device.type for weight in second.parameters()} == {"cpu"}
        base.network(base.denoisers[1])
        assert {weight.device.type for weight in first.parameters()} == {"cpu"}
        [turned] = make_edits(base, jobs, config)
        again = apply_edits(base, [plain], cells, config.sample)
    assert all(psnr(*pair) > 40 for pair in zip(pictures, again, strict=True))
    for name, adapter in plain.adapters.items():
        for key, factors in adapter.items():
            assert torch.allclose(turned.adapters[name][key].down, factors.down, atol=1e-2)
