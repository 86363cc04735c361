"""Facts about a family unlike Stable Diffusion (`tests.other_family`), beside the facts of `test_families`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

from lowmem_imagic import read_edit, write_edit
from lowmem_imagic.edits.header import describe, summary
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.pictures import Photo
from lowmem_imagic.pipeline.make import make_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.settings.stages import EditConfig, EmbedConfig, FinetuneConfig, SampleConfig
from lowmem_imagic.training.embed import as_stored
from lowmem_imagic.training.stage import Slot
from tests.other_family import SIDE, TEXT, other_base

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


def test_e_opt_is_rounded_as_its_file_stores_it(base: Any) -> None:
    """Stage 1 rounds each tensor to its stored type, so stage 2 trains on the values that sampling reads."""
    drawn = {name: torch.randn(*TEXT[name].shape) for name in ("tokens", "pooled")}
    text = {name: tensor.clone() for name, tensor in drawn.items()}
    pack = AdapterPack(base.network(base.denoisers[0]), base.denoisers[0].names, count=1, adapt="attn", rank=1, alpha=1)
    as_stored(Slot(text, TEXT, pack, 0, base.encode_text([SENTENCE]), torch.Generator()))
    assert torch.equal(text["tokens"], drawn["tokens"].half().float())
    assert torch.equal(text["pooled"], drawn["pooled"].bfloat16().float())


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
