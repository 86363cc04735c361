"""Facts about a base in use: memory limits end with their call, one thread at a time, and fp16."""

import logging
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel

from lowmem_imagic import (
    BaseModel,
    Budget,
    Cell,
    Edit,
    Job,
    apply_edits,
    load_photo,
    make_edits,
    plan_for,
    planned,
    preset,
    stream_edits,
)
from lowmem_imagic.engine.device import COMPUTE_TYPES, pick_dtype
from lowmem_imagic.errors import BaseInUseError, ConfigError, DivergenceError, MemoryLimitError
from lowmem_imagic.sampling.losses import Draws, in_fewer_rows
from lowmem_imagic.training import loop
from lowmem_imagic.training.state import TrainingState
from tests import calls

CONFIG = preset(
    "fast",
    {
        "embed": {"steps": 3, "draws": 4},
        "finetune": {"steps": 4, "draws": 4},
        "sample": {"num_inference_steps": 3, "start": "photo"},
    },
)
SENTENCES = ("a red cube", "two birds kissing")


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    """A photo under two sentences."""
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(tmp_path / "photo.png")
    return [Job(load_photo(tmp_path / "photo.png"), sentence) for sentence in SENTENCES]


def out_of_memory_once(base: BaseModel, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The first call of a method of the base runs out of memory."""
    method, calls = getattr(base, name), list[None]()

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return method(*args, **kwargs)

    monkeypatch.setattr(base, name, failing)


def test_what_ran_out_once_is_tried_again_in_the_next_call(
    load_base: Callable[..., BaseModel], jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training pass that ran out of memory becomes smaller only for the present call, which reports it."""
    base = load_base()
    out_of_memory_once(base, monkeypatch, "predict")
    [edit] = make_edits(base, jobs[:1], CONFIG)
    assert edit.measured["rungs"] == ["2 rows a training pass"]
    assert base.most_rows is None
    assert make_edits(base, jobs[:1], CONFIG)[0].measured["rungs"] == []


def test_rendering_that_ran_out_is_tried_again(
    load_base: Callable[..., BaseModel], jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampling batch that ran out of memory becomes smaller only for the present call."""
    base = load_base()
    edits = make_edits(base, jobs[:1], CONFIG)
    out_of_memory_once(base, monkeypatch, "predict")
    apply_edits(base, edits, [Cell(0, eta, 0) for eta in (0.8, 1.0, 1.2)], replace(CONFIG.sample, mask=0.0))
    assert base.most_images is None and base.fallbacks[-1].endswith("images a sampling batch")


def test_what_ran_out_while_the_first_photo_is_encoded_is_recorded(
    load_base: Callable[..., BaseModel], jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit says that its photo went through the autoencoder in tiles, whose seams may show."""
    base = load_base()
    load, loads = base.family.load_codec, list[None]()

    def failing(**options: Any) -> Any:
        loads.append(None)
        if len(loads) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return load(**options)

    monkeypatch.setattr(base.family, "load_codec", failing)
    [edit] = make_edits(base, jobs[:1], CONFIG)
    assert edit.measured["rungs"] == ["the autoencoder in tiles"]


def test_a_comparison_of_sentences_that_ran_out_takes_fewer_rows(
    load_base: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses of a picture under sentences, by which a base describes a photo, are halved in rows when memory runs out,
    and are the same."""
    base = load_base()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text, draws = base.encode_text(SENTENCES), Draws(base.denoisers[0], (4, 8, 8), 6, (0.2, 0.8), seed=0)

    def losses() -> Tensor:
        return in_fewer_rows(base, lambda rows: draws.losses(base, latents, text, rows), 8, "describe the photo")

    expected = losses()
    assert not base.fallbacks
    out_of_memory_once(base, monkeypatch, "predict")
    torch.testing.assert_close(losses(), expected)
    assert base.fallbacks == ["4 rows at once to describe the photo"]


@pytest.mark.parametrize("method", ["encode_text", "decode"])
def test_running_out_for_good_names_the_stage(
    method: str, load_base: Callable[..., BaseModel], jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no cheaper way is left for a sentence or a picture, the error says which stage did not fit."""
    base = load_base()
    edits = make_edits(base, jobs[:1], CONFIG)

    def failing(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(base, method, failing)
    with pytest.raises(MemoryLimitError, match="out of memory in stage"):
        apply_edits(base, edits, [Cell(0, 1.0, 0)], CONFIG.sample, prompts=["a new sentence"])


@pytest.mark.process
def test_a_plan_is_followed_as_long_as_asked(load_base: Callable[..., BaseModel], jobs: list[Job]) -> None:
    """Checkpointing that a plan asks for is on inside of `planned` and off afterwards, in the network too."""
    base = load_base()
    calls.unet(base)
    held = Budget.of(base.device, "20GB")
    assert held is not None
    generous = plan_for(base, CONFIG, held)
    assert generous is not None and not generous.checkpointing
    tight = next(
        plan
        for room in range(200_000, 40_000_000, 200_000)
        if (plan := _plan_or_none(base, Budget(held.context + room, held.context))) is not None
    )
    assert tight.checkpointing

    def checkpointed() -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in calls.unet(base).modules())

    with planned(base, tight, held):
        assert base.checkpointing and checkpointed()
        make_edits(base, jobs[:1], CONFIG, max_rows=tight.rows)
        assert base.checkpointing and checkpointed()
    assert not base.checkpointing and not checkpointed()


def _plan_or_none(base: BaseModel, budget: Budget) -> Any:
    try:
        return plan_for(base, CONFIG, budget)
    except Exception:
        return None


def test_a_second_thread_is_refused(
    load_base: Callable[..., BaseModel], jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an edit trains, another thread that uses the base gets an error at once, and the edit is finished."""
    base, refused = load_base(), list[BaseException]()

    def other() -> None:
        try:
            base.encode_text(["another sentence"])
        except BaseInUseError as error:
            refused.append(error)

    def progress(*_: Any) -> None:
        if not refused:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    assert len(make_edits(base, jobs[:1], CONFIG, progress=progress)) == 1
    assert "in use by another thread" in str(refused[0])
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(refused) == 1


def test_a_photo_is_read_while_another_thread_works(
    load_base: Callable[..., BaseModel], jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that reads a photo waits neither for a part that is loaded nor for a backward pass."""
    photo, reached = tmp_path / "photo.png", list[str]()

    def meanwhile(place: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            thread = threading.Thread(target=load_photo, args=(photo,), daemon=True)
            thread.start()
            # Far longer than it takes: only a photo that waits for this call takes it all.
            thread.join(30)
            assert not thread.is_alive(), place
            reached.append(place)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(CLIPTextModel, "__init__", meanwhile("load", CLIPTextModel.__init__))
    monkeypatch.setattr(Tensor, "backward", meanwhile("backward", Tensor.backward))
    make_edits(load_base(), jobs[:1], CONFIG)
    assert {"load", "backward"} <= set(reached)


def test_training_together_warns_of_nothing(load_base: Callable[..., BaseModel], jobs: list[Job]) -> None:
    """Edits that train side by side, whose gradients lie in one buffer, raise no warning of torch's."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_edits(load_base(), jobs, CONFIG)
    finally:
        torch.set_warn_always(always)
    assert not [text for text in (str(warning.message) for warning in caught) if "grad" in text]


def test_the_type_of_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards before Ampere compute in fp16, later ones in bfloat16, CPUs in fp32; an explicit setting wins."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((8, 9), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert pick_dtype(gpu, "int8") == expected
        assert pick_dtype(gpu, "int8", "fp32") == torch.float32
    assert pick_dtype(cpu, "int8") == torch.float32 and pick_dtype(cpu, "int8", "fp16") == torch.float16
    assert pick_dtype(gpu, "fp32") == torch.float32


def test_an_unknown_type(tiny_folder: Path) -> None:
    """An unknown type is refused, with a list of the valid ones."""
    with pytest.raises(ConfigError, match="`compute` is 'fp8', expected one of auto, bf16, fp16, fp32"):
        BaseModel.load(str(tiny_folder), device="cpu", compute="fp8")


@pytest.mark.parametrize(("weights", "compute"), [("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "fp32")])
def test_a_format_that_the_arithmetic_would_change(
    weights: str, compute: str, load_base: Callable[..., BaseModel]
) -> None:
    """A base has its weights in the named format, so arithmetic of another type is refused for bf16 and fp32; 8 bits
    compute in any type."""
    with pytest.raises(ConfigError, match=f"`compute` is '{compute}' and `base_weights` is '{weights}'"):
        load_base(weights=weights, compute=compute)
    base = load_base(weights=weights, compute=weights)
    assert {weight.dtype for weight in calls.unet(base).parameters()} == {COMPUTE_TYPES[weights]}
    assert load_base(compute=compute).dtype == COMPUTE_TYPES[compute]


def distance(edit: Edit, other: Edit) -> float:
    """Distance of two edits' e_opt, as a share of how far the second is from its sentence's own."""
    return float((edit.conditioning["embeds"].float() - other.conditioning["embeds"].float()).norm())


def test_fp16_trains_what_fp32_trains(load_base: Callable[..., BaseModel], jobs: list[Job]) -> None:
    """In fp16 an edit has the losses it has in fp32, beside another edit as alone, and no step overflows."""
    exact, half = load_base(), load_base(compute="fp16")
    assert half.dtype == torch.float16
    together = make_edits(half, jobs, CONFIG)
    for edit, job in zip(together, jobs, strict=True):
        [expected], [alone] = make_edits(exact, [job], CONFIG), make_edits(half, [job], CONFIG)
        for stage in ("embed_loss", "finetune_loss"):
            assert edit.settings["result"][stage] == pytest.approx(expected.settings["result"][stage], rel=0.02)
            assert edit.settings["result"][stage] == pytest.approx(alone.settings["result"][stage], rel=0.01)
        assert "skipped_steps" not in edit.measured["stages"]["finetune"]


def test_an_overflow_in_fp16_skips_a_step(
    load_base: Callable[..., BaseModel],
    jobs: list[Job],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A loss scale too large for fp16 costs steps, which the edit counts, also over a stop, and ends no edit; there is
    a warning if they are many."""
    config = preset(
        "fast",
        {"embed": {"steps": 12, "draws": 2}, "finetune": {"steps": 12, "draws": 2}, "sample": {"start": "photo"}},
    )
    usual = make_edits(load_base(compute="fp16"), jobs[:1], config)[0]
    assert not caplog.text
    monkeypatch.setattr(loop, "FIRST_SCALE", 2.0**24)
    base, states = load_base(compute="fp16"), list[TrainingState]()
    [[(_, edit)]] = stream_edits(
        base, jobs[:1], config, between=lambda pack: states.extend(state for _, state in pack.states())
    )
    assert isinstance(edit, Edit)
    skipped = edit.measured["stages"]["finetune"]["skipped_steps"]
    assert 3 <= skipped < 12
    assert f"{skipped} of 12 steps of finetune for 'a red cube' overflowed in fp16" in caplog.text
    assert edit.settings["result"]["finetune_steps"] == 12
    assert edit.conditioning["embeds"].isfinite().all()
    assert distance(edit, usual) > 0
    state = states[14]
    assert state.measured["finetune"]["skipped_steps"] == len(state.losses["finetune"]) == 2
    [resumed] = make_edits(base, [replace(jobs[0], state=state)], config)
    assert resumed.measured["stages"]["finetune"]["skipped_steps"] == skipped


def test_an_overflow_is_of_what_an_edit_trains(
    load_base: Callable[..., BaseModel], jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In stage 1 an edit skips the steps that it skips alone, also beside an edit whose adapter is trained already."""
    config = replace(CONFIG, embed=replace(CONFIG.embed, steps=8), finetune=replace(CONFIG.finetune, steps=20))
    monkeypatch.setattr(loop, "FIRST_SCALE", 2.0**24)
    base, states = load_base(compute="fp16"), list[TrainingState]()
    list(stream_edits(base, jobs[:1], config, between=lambda pack: states.extend(state for _, state in pack.states())))
    ahead = replace(jobs[0], state=next(state for state in states if state.stage == "finetune"))
    [alone] = make_edits(base, jobs[1:2], config)
    _, beside = make_edits(base, [ahead, jobs[1]], config)
    skipped = [edit.measured["stages"]["embed"]["skipped_steps"] for edit in (alone, beside)]
    assert skipped[0] == skipped[1] < 8


@pytest.mark.parametrize("stage", ["embed", "finetune"])
def test_an_edit_whose_steps_all_overflowed_fails(
    stage: str, load_base: Callable[..., BaseModel], jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit in fp16 of which a stage trained nothing is an error that names the type, and no edit."""
    for name in ("FIRST_SCALE", "MOST_SCALE"):
        monkeypatch.setattr(loop, name, 2.0**60)
    config = replace(CONFIG, embed=replace(CONFIG.embed, steps=3 if stage == "embed" else 0))
    steps = config.embed.steps or config.finetune.steps
    with pytest.raises(DivergenceError, match=rf"all {steps} steps of a stage overflowed in fp16.*`compute=fp32`"):
        make_edits(load_base(compute="fp16"), jobs[:1], config)


def test_stock_bitsandbytes_trains_one_edit_at_a_time(load_base: Callable[..., BaseModel], jobs: list[Job]) -> None:
    """Edits on a base in bnb-int8 have the bits that they have alone, however many may train at once."""
    base = load_base(weights="bnb-int8")
    most = list[int]()
    groups = stream_edits(base, jobs, CONFIG, slots=2, between=lambda pack: most.append(len(pack.in_slots)))
    together = dict(one for group in groups for one in group)
    assert set(most) == {1}
    for number, job in enumerate(jobs):
        [alone] = make_edits(base, [job], CONFIG)
        edit = together[number]
        assert isinstance(edit, Edit) and edit.adapters == alone.adapters
        assert distance(edit, alone) == 0


def test_small_gradients_reach_fp16(
    load_base: Callable[..., BaseModel], jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a loss scale gradients of an edit are lost in fp16; with it the embedding moves as in fp32."""
    moved = {}
    for name, compute, scale in (("fp32", "fp32", 2.0**16), ("scaled", "fp16", 2.0**16), ("plain", "fp16", 1.0)):
        monkeypatch.setattr(loop, "FIRST_SCALE", scale)
        base = load_base(compute=compute)
        [edit] = make_edits(base, jobs[:1], CONFIG)
        moved[name] = edit.conditioning["embeds"].float() - calls.encode_text(base, [SENTENCES[0]])[0]
    errors = {name: float((moved[name] - moved["fp32"]).norm() / moved["fp32"].norm()) for name in ("scaled", "plain")}
    assert errors["scaled"] < 0.1 and errors["scaled"] < errors["plain"]


def test_threads_leave_warnings_as_they_were(
    load_base: Callable[..., BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photos that are decoded in one thread while a base is loaded in another leave the process's warnings alone."""
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "photo.png")
    filters, verbosity = list(warnings.filters), logging.getLogger("diffusers").level

    def decode() -> None:
        for _ in range(30):
            load_photo(tmp_path / "photo.png")

    threads = [threading.Thread(target=decode) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        load_base().check_steps("DDIM", 3)
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == filters and logging.getLogger("diffusers").level == verbosity
