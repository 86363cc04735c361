"""Facts about the seam between model families: a family unlike Stable Diffusion works (`tests.other_family`)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

from lowmem_imagic import read_edit, write_edit
from lowmem_imagic.actions.console import Console
from lowmem_imagic.actions.render import render
from lowmem_imagic.actions.result_folder import ResultFolder
from lowmem_imagic.edits.edit import LoraFactors
from lowmem_imagic.edits.header import describe, summary
from lowmem_imagic.engine.memory import Meter
from lowmem_imagic.errors import BaseMismatchError, MemoryLimitError, NonFiniteEditError
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.pictures import Photo
from lowmem_imagic.pipeline.apply import apply_edits, check_base
from lowmem_imagic.pipeline.make import make_edits, stream_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.planning.costs import Costs
from lowmem_imagic.planning.plan import Budget, plan, plan_for, planned
from lowmem_imagic.sampling.sample import Cell
from lowmem_imagic.settings.stages import EditConfig, EmbedConfig, FinetuneConfig, SampleConfig
from lowmem_imagic.training.embed import as_stored
from lowmem_imagic.training.stage import Slot
from tests.other_family import SIDE, TEXT, OtherFamily, other_base

SENTENCE = "a blue cube on sand"


def photo(shade: int = 90) -> Photo:
    """A photo with a gradient."""
    image = Image.linear_gradient("L").resize((40, 30)).point(lambda level: (level + shade) % 256).convert("RGB")
    return Photo(image=image, sha256=f"{shade:064x}", name="photo", notes=(), icc_profile=None)


def config(**sampling: Any) -> EditConfig:
    """Settings of a short edit."""
    sample = {"etas": (0.0, 1.0), "num_inference_steps": 4, "scheduler": "Euler", "start": "inverted", "mask": 0.3}
    return EditConfig(
        embed=EmbedConfig(steps=3, draws=2, learning_rate=1e-2),
        finetune=FinetuneConfig(steps=4, draws=2, learning_rate=1e-2, adapt="attn+ff", lora_rank=2, lora_alpha=3.0),
        sample=SampleConfig(**{**sample, **sampling}),
    )


@pytest.fixture(scope="module")
def base() -> Any:
    """The other family's base in 8 bit."""
    return other_base()


@pytest.fixture(scope="module")
def edit(base: Any) -> Any:
    """An edit of one photo."""
    [trained] = make_edits(base, [Job(photo(), SENTENCE)], config())
    return trained


def test_an_edit_holds_every_network_and_every_tensor_of_text(base: Any, edit: Any) -> None:
    """Both networks are adapted, both stored tensors are trained, each in its own type; the mask is the sentence's."""
    assert set(edit.adapters) == {"small", "large"}
    assert {key.split(".")[0] for adapter in edit.adapters.values() for key in adapter} == {"small", "large"}
    assert {name: part.dtype for name, part in edit.conditioning.items()} == {
        "tokens": torch.float16,
        "pooled": torch.bfloat16,
    }
    target = base.encode_text([SENTENCE])
    assert all(not torch.equal(part.float(), target[name][0]) for name, part in edit.conditioning.items())
    assert all(f.up.abs().max() > 0 for adapter in edit.adapters.values() for f in adapter.values())
    assert {name: tuple(noise.shape) for name, noise in edit.noise.items()} == {
        "small": (3, SIDE // 2, SIDE // 2),
        "large": (3, SIDE, SIDE),
    }
    assert {"embed_loss", "finetune_loss", "finetune_large_loss"} <= edit.settings["result"].keys()


def test_it_is_written_read_and_shown(edit: Any, tmp_path: Path) -> None:
    """Its file is of version 2, with peft's keys and a few tensors beside the layers."""
    path = tmp_path / "edit.safetensors"
    write_edit(edit, path)
    assert read_edit(path) == edit
    extra = sorted(name for name in load_file(path) if name.startswith("lora_imagic."))
    assert extra == [
        f"lora_imagic.{name}"
        for name in ("coarse.large", "coarse.small", "noise.large", "noise.small", "text.pooled", "text.tokens")
    ]
    shown = describe(path)
    assert shown["format"] == 2 and shown["base"]["interface"]["denoisers"] == {"large": "flow", "small": "flow"}
    assert "(other, flow)" in summary(shown)


def test_a_file_renders_as_the_edit_does(base: Any, edit: Any, tmp_path: Path) -> None:
    """Pictures from the file equal those from the edit bit for bit, and differ along eta and with the adapters."""
    path = tmp_path / "edit.safetensors"
    write_edit(edit, path)
    cells = [Cell(0, 0.0, 0), Cell(0, 1.0, 0), Cell(0, 1.0, 0, strength=0.0)]
    mine, read = (
        [picture.tobytes() for picture in apply_edits(base, [one], cells, config().sample)]
        for one in (edit, read_edit(path))
    )
    assert mine == read
    assert len(set(mine)) == 3
    assert apply_edits(base, [edit], cells, config().sample)[0].size == (40, 30)


def test_e_opt_is_rounded_as_its_file_stores_it(base: Any) -> None:
    """Stage 1 rounds each tensor to its stored type, so stage 2 trains on the values that sampling reads."""
    drawn = {name: torch.randn(*TEXT[name].shape) for name in ("tokens", "pooled")}
    text = {name: tensor.clone() for name, tensor in drawn.items()}
    pack = AdapterPack(base.network(base.denoisers[0]), base.denoisers[0].names, count=1, adapt="attn", rank=1, alpha=1)
    as_stored(Slot(text, TEXT, pack, 0, base.encode_text([SENTENCE]), torch.Generator()))
    assert torch.equal(text["tokens"], drawn["tokens"].half().float())
    assert torch.equal(text["pooled"], drawn["pooled"].bfloat16().float())


def test_a_pack_gives_what_each_edit_gets_alone(base: Any, edit: Any) -> None:
    """An edit trained beside another equals the edit trained alone, to rounding."""
    [first, second] = make_edits(base, [Job(photo(), SENTENCE), Job(photo(30), "a red cat")], config(), slots=2)
    assert second.conditioning["tokens"].shape == first.conditioning["tokens"].shape
    for name, adapter in edit.adapters.items():
        for key, factors in adapter.items():
            mine = first.adapters[name][key]
            assert torch.allclose(
                mine.up.float() @ mine.down.float(), factors.up.float() @ factors.down.float(), atol=2e-3
            )


def test_training_goes_on_where_it_was_saved(base: Any, edit: Any) -> None:
    """An edit that is stopped in any stage and resumed has the same bits."""
    states = []

    def keep(pack: Any) -> None:
        states.extend(state for _, state in pack.states())

    for _ in stream_edits(base, [Job(photo(), SENTENCE)], config(), between=keep):
        pass
    assert {state.stage for state in states} == {"embed", "finetune", "finetune_large"}
    for state in states[1::3]:
        [resumed] = make_edits(base, [Job(photo(), SENTENCE, state)], config())
        assert resumed.adapters == edit.adapters
        assert all(torch.equal(resumed.conditioning[name], part) for name, part in edit.conditioning.items())


def test_peft_reads_the_adapters(base: Any, edit: Any, tmp_path: Path, relative: Any) -> None:
    """peft with the file's tensors of a network computes the same as the pack."""
    path = tmp_path / "edit.safetensors"
    write_edit(edit, path)
    plain = other_base(weights="fp32")
    for denoiser in plain.denoisers:
        prefix = f"{denoiser.name}."
        tensors = {k.removeprefix(prefix): v.float() for k, v in load_file(path).items() if k.startswith(prefix)}
        network = denoiser.load(weights="fp32", device=torch.device("cpu"), dtype=torch.float32)
        rank = next(iter(edit.adapters[denoiser.name].values())).rank
        targets = sorted({name.rsplit(".", 2)[0] for name in tensors})
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), network)
        assert not set_peft_model_state_dict(network, tensors).unexpected_keys
        x, text = torch.randn(1, *denoiser.shape((SIDE, SIDE))), plain.encode_text([SENTENCE])
        conditioning = text | {name: torch.randn(1, *part.shape) for name, part in denoiser.extra.items()}
        theirs = denoiser.predict(network, x, torch.tensor([0.5]), conditioning)
        pack = AdapterPack.load(plain.network(denoiser), denoiser.names, [edit.adapters[denoiser.name]])
        with pack.attached(plain.network(denoiser)):
            ours = plain.predict(denoiser, x, torch.tensor([0.5]), conditioning)
        assert relative(ours, theirs) < 1e-5
        assert relative(ours, plain.predict(denoiser, x, torch.tensor([0.5]), conditioning)) > 1e-3


@pytest.mark.parametrize("start", ["photo", "noise"])
def test_its_pictures_are_rendered_with_a_sheet_and_a_suggestion(
    base: Any, edit: Any, tmp_path: Path, start: str
) -> None:
    """The rendering of the commands works on it: sheet, suggested eta, mask, retargeting, hint at its fit."""
    settings = replace(config(start=start).sample, etas=(0.0, 0.5, 1.0), guidance_scale=2.0, negative_prompt="grey")
    folder = ResultFolder.prepare(tmp_path / "out", overwrite=False)
    report = render(
        base,
        edit,
        ["a red cat"],
        settings,
        folder,
        Meter(base.device),
        Console(quiet=True),
        photo=photo(),
        suggest=True,
    )
    assert len(report["pictures"]) == 3 and report["suggestion"]["eta"] in settings.etas
    assert report["fit"]["embedding_distance"] > 0
    assert (tmp_path / "out" / "sheet.png").exists()


def test_plans_are_counted_from_its_own_passes(base: Any) -> None:
    """A plan counts the bytes of all its parts and can be followed; a budget below the least is an error."""
    costs = Costs(OtherFamily(), config(), weights="int8", dtype=torch.float32, part_dtype=torch.float32)
    numbers = sum(
        part.shape[0] * (part.shape[1] if len(part.shape) > 1 else 1) for n, part in TEXT.items() if part.trained
    )
    assert costs.adapters(2) == 2 * 16 * (costs.adapter_weights + numbers)
    large = plan(costs, config(), budget_bytes=10**9, jobs=3)
    assert large.slots == 3 and not large.checkpointing
    assert {"load", "encode", "invert", "embed", "finetune", "sample", "decode"} == large.phases.keys()
    with pytest.raises(MemoryLimitError):
        plan(costs, config(), budget_bytes=10**4)
    budget = Budget(10**9)
    with planned(base, plan_for(base, config(), budget), budget):
        [planned_edit] = make_edits(base, [Job(photo(), SENTENCE)], config())
    assert planned_edit.base == base.identity


def test_it_is_no_other_base(base: Any, edit: Any, load_base: Any) -> None:
    """An edit of one family is refused on another, with both interfaces named; on its own base there is no warning."""
    assert check_base(edit, base) == ""
    with pytest.raises(BaseMismatchError, match="flow, width 12, 12"):
        check_base(edit, load_base())


def test_damaged_numbers_are_told_from_a_damaged_base(base: Any, edit: Any) -> None:
    """An overflow in the adapter of the second network is reported as the edit's fault."""
    large = {
        key: LoraFactors(f.down, torch.full_like(f.up, 1000.0), f.alpha) for key, f in edit.adapters["large"].items()
    }
    huge = {key: LoraFactors(torch.full_like(f.down, 1000.0), f.up, f.alpha) for key, f in large.items()}
    damaged = replace(edit, adapters={**edit.adapters, "large": huge})
    with pytest.raises(NonFiniteEditError):
        apply_edits(base, [damaged], [Cell(0, 1.0, 0)], replace(config().sample, num_inference_steps=40))
