"""Edits as the files of other programs, and what `inspect` says of them."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from safetensors import safe_open
from typer.testing import CliRunner

from lowmem_imagic.actions.console import Silent
from lowmem_imagic.actions.export import export
from lowmem_imagic.cli.commands import app
from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.edits.edit import Edit, LoraFactors
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.errors import ConfigError, EditFileError, OutputExistsError
from lowmem_imagic.families import load_architecture
from lowmem_imagic.families.adapter_names import kohya_key, module_name
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.pipeline.make import make_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.share.export import PROGRAMS
from tests import calls
from tests.other_family import other_base
from tests.test_other_family import SENTENCE, config, photo
from tests.test_share_into import made


@pytest.fixture(scope="module")
def fp32(load_base: Callable[..., BaseModel]) -> BaseModel:
    """The tiny model in fp32."""
    return load_base(weights="fp32")


@pytest.fixture(scope="module")
def cascade() -> Edit:
    """An edit of a family with two networks and peft's names."""
    [edit] = make_edits(other_base(), [Job(photo(), SENTENCE)], config())
    return edit


def exported(edit: Edit, program: str, folder: Path, **options: Any) -> Path:
    """The folder with the edit's files for a program, which is below `folder`."""
    edit_file.write(edit, folder / "cat.safetensors", overwrite=True)
    export(folder / "cat.safetensors", program, folder / program, **{"force": False, "console": Silent(), **options})
    return folder / program


def alphas_differ(edit: Edit) -> Edit:
    """The edit with the rank of each layer as its alpha, as the first edit files had it."""
    own = {key: LoraFactors(f.down, f.up, float(f.rank)) for key, f in edit.adapters["unet"].items()}
    return replace(edit, adapters={"unet": own})


def predictions(base: BaseModel, edit: Edit, theirs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Our UNet's prediction with the edit, and another UNet's."""
    generator = torch.Generator().manual_seed(4)
    x, at = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10, 700])
    text = edit.conditioning["embeds"].float().expand(2, -1, -1)
    factors = {key: (f.down.float(), f.up.float(), f.alpha) for key, f in edit.adapters["unet"].items()}
    pack = AdapterPack.load(calls.unet(base), calls.NAMES, [factors])
    with torch.no_grad():
        alone = calls.predict(base, x, at, text)
        with pack.attached(calls.unet(base)):
            ours = calls.predict(base, x, at, text)
        other: torch.Tensor = theirs(x, at, encoder_hidden_states=text).sample
    assert (ours - alone).norm() > 1e-3 * alone.norm()
    return ours, other


@pytest.mark.parametrize("change", [lambda edit: edit, alphas_differ], ids=["one alpha", "several alphas"])
@pytest.mark.parametrize(("adapt", "keep"), [("all", 0.5), ("attn", 1.0), ("conv_in,time_embedding.linear_1", 1.0)])
def test_peft_loads_an_exported_edit(
    adapt: str, keep: float, change: Callable[[Edit], Edit], fp32: BaseModel, tiny_folder: Path, tmp_path: Path
) -> None:
    """`PeftModel.from_pretrained` gives this package's predictions to 1e-5, for layers of any ranks and alphas."""
    edit = change(made(fp32, adapt=adapt, keep=keep))
    folder = exported(edit, "peft", tmp_path)
    unet = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None).unet
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, theirs = predictions(fp32, edit, PeftModel.from_pretrained(unet, folder))
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


def test_an_edit_of_several_networks_has_a_folder_for_each(cascade: Edit, tmp_path: Path) -> None:
    """A cascade's edit is exported as one peft folder for each of its networks."""
    edit = cascade
    folder = exported(edit, "peft", tmp_path)
    assert len(edit.adapters) > 1
    for denoiser, adapter in edit.adapters.items():
        config = json.loads((folder / denoiser / "adapter_config.json").read_text())
        assert len(config["target_modules"]) == len(adapter)
    first, note = next(iter(edit.adapters)), (folder / "README.md").read_text()
    assert f'from_pretrained(pipeline.{first}, "{first}")' in note and "a folder of its own" in note
    for program in ("a1111", "comfyui"):
        with pytest.raises(EditFileError, match="cannot load an edit of"):
            exported(edit, program, tmp_path)


@pytest.mark.parametrize("model", ["sd15", "sd21", "sdxl", "ssd-1b", "vega"])
def test_layers_have_their_names_back(model: str) -> None:
    """The name of every layer of the real UNets follows from its key."""
    [denoiser] = load_architecture(model).denoisers
    unet = denoiser.load(weights="bf16", device=torch.device("meta"), dtype=torch.bfloat16)
    names = [name for name, layer in unet.named_modules() if hasattr(layer, "weight")]
    assert [module_name(kohya_key(name)) for name in names] == names


def test_diffusers_loads_an_exported_edit(fp32: BaseModel, tiny_folder: Path, tmp_path: Path) -> None:
    """diffusers finds the file in the folder, and scales every layer rightly even if the edit's alphas differ."""
    edit = alphas_differ(made(fp32, adapt="attn", keep=0.4))
    folder = exported(edit, "diffusers", tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
    ours, theirs = predictions(fp32, edit, pipeline.unet)
    assert (ours - theirs).norm() <= 1e-3 * ours.norm()
    assert edit_file.read(folder / "pytorch_lora_weights.safetensors").noise.keys() == edit.noise.keys()


def test_the_rest_of_an_edit_comes_as_tensors(fp32: BaseModel, tmp_path: Path) -> None:
    """Beside the adapter lie the embedding and the starting latents as plain tensors, with the recorded settings."""
    edit = made(fp32)
    for program in ("peft", "diffusers"):
        with safe_open(exported(edit, program, tmp_path) / "imagic.safetensors", "pt") as file:
            values = json.loads(file.metadata()["imagic"])
            assert torch.equal(file.get_tensor("text.embeds"), edit.conditioning["embeds"])
            assert torch.equal(file.get_tensor("noise.unet"), edit.noise["unet"])
        assert values["sample"]["guidance_scale"] == 4.0 and values["sentences"] == ["a blue sphere"]


def test_text_of_an_edit_is_no_markup_of_its_notes(fp32: BaseModel, cascade: Edit, tmp_path: Path) -> None:
    """The base's name is neither emphasis nor hidden text in the README.md of an export, in prose and in code."""
    base = replace(cascade.base, source="__bold__\u3164")
    prose = (exported(replace(cascade, base=base), "diffusers", tmp_path) / "README.md").read_text()
    assert r"\_\_bold\_\_\\u3164" in prose and "__bold__" not in prose and "\u3164" not in prose
    edit = made(fp32)
    edit = replace(edit, base=replace(edit.base, source=base.source))
    for program in ("peft", "diffusers"):
        note = (exported(edit, program, tmp_path, force=True) / "README.md").read_text()
        assert "of __bold__\\u3164\n" in note and "\u3164" not in note


def test_the_lines_of_the_notes_run(
    fp32: BaseModel, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python lines in the exported README.md files run in their folder, also of an edit without a sentence."""
    edit = made(fp32)
    without = replace(edit, sentences=(), start_sentence="a photo")
    for program, one in (("peft", edit), ("diffusers", edit), ("diffusers", without)):
        shutil.rmtree(tmp_path / program, ignore_errors=True)
        folder = exported(one, program, tmp_path)
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        monkeypatch.chdir(folder)
        code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
        exec(compile(code, program, "exec"), {"pipeline": pipeline})
        assert (folder / "edited.png").exists() == (program == "diffusers")


@pytest.mark.parametrize(
    ("architecture", "version"),
    [("stable-diffusion-v1/lora", "SD1"), ("stable-diffusion-xl-v1-base/lora", "SDXL"), ("other/lora", "Unknown")],
)
def test_the_card_for_a1111(architecture: str, version: str, fp32: BaseModel, tmp_path: Path) -> None:
    """Beside the file lies the card that A1111 shows: the kind of the base, the sentence, and what is missing."""
    edit = made(fp32)
    labels = {**edit.base.labels, "modelspec.architecture": architecture}
    edit = replace(edit, base=replace(edit.base, labels=labels))
    console = Silent()
    folder = exported(edit, "a1111", tmp_path, console=console)
    assert (version == "Unknown") == any("no base such as tiny-sd" in warning for warning in console.warnings)
    card = json.loads((folder / "cat.json").read_text())
    assert (card["sd version"], card["activation text"]) == (version, "a blue sphere")
    assert "neither the photo nor the edit" in card["notes"]
    assert sorted(path.name for path in folder.iterdir()) == ["cat.json", "cat.safetensors"]


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_an_export_overwrites_nothing(program: str, fp32: BaseModel, tmp_path: Path) -> None:
    """The same export twice is no error; a file with other contents stays, and nothing is written, unless forced."""
    edit = made(fp32)
    folder = exported(edit, program, tmp_path)
    exported(edit, program, tmp_path)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files[0].write_bytes(b"mine")
    files[-1].unlink()
    with pytest.raises(OutputExistsError, match="with other contents"):
        exported(edit, program, tmp_path)
    assert files[0].read_bytes() == b"mine" and not files[-1].exists()
    exported(edit, program, tmp_path, force=True)
    assert files[0].read_bytes() != b"mine" and files[-1].exists()


def test_an_unknown_program(fp32: BaseModel, tmp_path: Path) -> None:
    """A program without an export is refused with the names of those that have one."""
    with pytest.raises(ConfigError, match="expected one of peft, diffusers, a1111, comfyui"):
        exported(made(fp32), "photoshop", tmp_path)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "cat.safetensors"), str(tmp_path / "x"), "--to", "gimp"])
    assert result.exit_code == 2 and "--to is 'gimp'" in result.stderr


def _uses(edit: Edit, folder: Path) -> dict[str, dict[str, str]]:
    """What `inspect` says of the programs, by their names."""
    edit_file.write(edit, folder / "cat.safetensors", overwrite=True)
    result = CliRunner().invoke(app, ["inspect", str(folder / "cat.safetensors"), "--json"])
    assert result.exit_code == 0, result.output
    text = CliRunner().invoke(app, ["inspect", str(folder / "cat.safetensors")]).stdout
    uses = {use["program"]: use for use in json.loads(result.stdout)["programs"]}
    assert all(f"{name}:" in text for name in uses)
    return uses


def test_inspect_names_the_programs(fp32: BaseModel, tmp_path: Path) -> None:
    """`inspect` says which programs load the file, how much of it, and what is missing."""
    labels = {"modelspec.architecture": "stable-diffusion-v1/lora"}
    edit = made(fp32, adapt="all")
    known = replace(edit, base=replace(edit.base, labels=labels))
    uses = _uses(known, tmp_path)
    assert {name: use["loads"] for name, use in uses.items()} == dict.fromkeys(uses, "all")
    assert "any eta" in uses["diffusers"]["does"] and "mask" in uses["diffusers"]["lacks"]
    assert "no input for the embedding" in uses["A1111, Forge, SD.Next"]["lacks"]

    beyond = made(fp32, adapt="conv_in,to_q")
    uses = _uses(replace(beyond, base=known.base), tmp_path)
    assert uses["ComfyUI"]["loads"] == uses["A1111, Forge, SD.Next"]["loads"] == "part"
    uses = _uses(alphas_differ(replace(made(fp32, keep=0.4), base=known.base)), tmp_path)
    assert "scales some layers wrongly" in uses["diffusers"]["does"]


def test_inspect_of_a_base_that_others_lack(fp32: BaseModel, cascade: Edit, tmp_path: Path) -> None:
    """An edit of a base that no other program has loads in none of them, but in diffusers."""
    for edit in (made(fp32), cascade):
        uses = _uses(edit, tmp_path)
        loads = {name: use["loads"] for name, use in uses.items()}
        assert loads.pop("diffusers") == loads.pop("peft") == "all"
        assert set(loads.values()) == {"no"}
        assert edit.base.source in uses["ComfyUI"]["lacks"]
