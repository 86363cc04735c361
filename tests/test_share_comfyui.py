"""The ComfyUI nodes: in ComfyUI's node protocol, and in a real checkout of ComfyUI where one is given."""

import contextlib
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem_imagic import Cell
from lowmem_imagic.actions.console import Silent
from lowmem_imagic.actions.export import export
from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.edits.edit import Edit
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.families.adapter_names import kohya_key
from lowmem_imagic.geometry import Sizes
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.pipeline.apply import render_latents
from lowmem_imagic.share.export import files_for
from tests import calls, tiny_xl
from tests.test_share_into import SAMPLING, made

COMFYUI = "LOWMEM_IMAGIC_COMFYUI"
"""Environment variable with the folder of a checkout of ComfyUI; with ``_PYTHON`` behind it, of its Python."""
needs_comfyui = pytest.mark.skipif(COMFYUI not in os.environ, reason=f"needs a checkout of ComfyUI, named by {COMFYUI}")
STRENGTHS = (0.5, 1.5, 0.0)
CELLS = (
    Cell(0, 0.0, 0),
    Cell(0, 0.7, 0),
    Cell(0, 1.4, 0),
    Cell(0, -0.5, 3),
    Cell(0, 1.0, 0, strength=STRENGTHS),
    Cell(0, 1.0, 0, sentence="two birds"),
)


@pytest.fixture(scope="module")
def fp32(load_base: Callable[..., BaseModel]) -> BaseModel:
    """The tiny model in fp32."""
    return load_base(weights="fp32")


@pytest.fixture(scope="module")
def edit(fp32: BaseModel) -> Edit:
    """An edit of all layers, of several ranks."""
    return made(fp32, adapt="all", keep=0.5)


def exported(edit: Edit, folder: Path) -> Path:
    """ComfyUI's folder, made in another, with an exported edit."""
    path = folder / "edit.safetensors"
    edit_file.write(edit, path)
    export(path, "comfyui", path.parent / "ComfyUI", force=False, console=Silent())
    return path.parent / "ComfyUI"


@pytest.fixture(scope="module")
def folder(edit: Edit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folder with an exported edit."""
    return exported(edit, tmp_path_factory.mktemp("export"))


def ours(base: BaseModel, edit: Edit) -> list[torch.Tensor]:
    """This package's latents of `CELLS`, without a mask."""
    settings = replace(SAMPLING, negative_prompt=edit.settings["sample"]["negative_prompt"])
    return [latents["unet"] for latents in render_latents(base, [edit], list(CELLS), settings)]


def embeddings(base: BaseModel, edit: Edit) -> dict[str, torch.Tensor]:
    """The embeddings of all sentences of `CELLS`, and of the negative one."""
    sentences = (*edit.sentences, "two birds", SAMPLING.negative_prompt)
    return dict(zip(sentences, calls.encode_text(base, sentences), strict=True))


class Clip:
    """ComfyUI's text encoder, with the embeddings of some sentences."""

    def __init__(self, known: dict[str, torch.Tensor]) -> None:
        self.known = known

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> Any:
        return [[self.known[tokens][None], {"pooled_output": None}]]


class Velocity(types.SimpleNamespace):
    """In place of the class of ComfyUI's models that predict the velocity."""


class Model:
    """ComfyUI's model, as far as the nodes use it; remembers the LoRAs that are put into it."""

    def __init__(self, base: BaseModel, loras: tuple[Any, ...] = ()) -> None:
        self.base, self.loras = base, loras
        self.model = self

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(calls.unet(self.base).state_dict())

    def get_model_object(self, name: str) -> Any:
        if name == "latent_format":
            return types.SimpleNamespace(latent_channels=4, process_out=lambda latents: latents / 0.5)
        alpha_bar = self.base.denoisers[0].schedule.alpha_bar
        return types.SimpleNamespace(sigmas=((1 - alpha_bar) / alpha_bar).sqrt())


@pytest.fixture
def nodes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The exported nodes, imported beside stand-ins for the functions of ComfyUI that they call."""
    loras = folder / "models/loras"

    def load_torch_file(path: str, safe_load: bool, return_metadata: bool) -> Any:
        from safetensors import safe_open

        assert safe_load and return_metadata
        with safe_open(path, "pt") as file:
            return load_file(path), file.metadata()

    def load_lora_for_models(model: Any, clip: None, lora: Any, strength: float, clip_strength: float) -> Any:
        return Model(model.base, (*model.loras, (lora, strength))), None

    def layers_of(model: Any, known: dict[str, str]) -> dict[str, str]:
        names = [name for name, module in calls.unet(model.base).named_modules() if hasattr(module, "weight")]
        return {kohya_key(name): f"{name}.weight" for name in names}

    stubs = {
        "comfy": {},
        "comfy.lora": {"model_lora_keys_unet": layers_of},
        "comfy.model_sampling": {"V_PREDICTION": Velocity},
        "comfy.sd": {"load_lora_for_models": load_lora_for_models},
        "comfy.utils": {"load_torch_file": load_torch_file},
        "folder_paths": {
            "get_filename_list": lambda kind: sorted(path.name for path in loras.iterdir()),
            "get_full_path_or_raise": lambda kind, name: str(loras / name),
        },
    }
    for name, members in stubs.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    monkeypatch.syspath_prepend(str(folder / "custom_nodes"))
    yield importlib.import_module("imagic_edit")
    for name in [name for name in sys.modules if name.partition(".")[0] == "imagic_edit"]:
        del sys.modules[name]


def sampled(base: BaseModel, model: Model, positive: Any, negative: Any, cfg: float, start: Any) -> torch.Tensor:
    """The latents of ComfyUI's sampler ddim: Euler's steps from sigma to sigma, with guidance."""
    noise, latent, sigmas = start
    factors = {}
    for lora, strength in model.loras:
        for name in (name.removesuffix(".alpha") for name in lora if name.endswith(".alpha")):
            down, up, alpha = (
                lora[f"{name}.{part}"].float() for part in ("lora_down.weight", "lora_up.weight", "alpha")
            )
            factors[name] = (down, strength * up, float(alpha))
    x = 0.5 * latent["samples"] + sigmas[0] * noise.generate_noise(latent)
    alpha_bar = base.denoisers[0].schedule.alpha_bar
    known = ((1 - alpha_bar) / alpha_bar).sqrt()
    pack = AdapterPack.load(calls.unet(base), calls.NAMES, [factors])
    with torch.no_grad(), pack.attached(calls.unet(base)):
        for sigma, after in itertools.pairwise(sigmas):
            at = (known - sigma).abs().argmin()[None]
            scaled = x / (1 + sigma**2).sqrt()
            eps, away = (calls.predict(base, scaled, at, text[0][0]) for text in (positive, negative))
            x = x + (after - sigma) * (away + cfg * (eps - away) if cfg != 1 else eps)
    return x[0]


def test_the_nodes_give_our_pictures(fp32: BaseModel, edit: Edit, nodes: Any) -> None:
    """With ComfyUI's steps the nodes give this package's latents, at any eta, seed, sentence and strength by block."""
    load, mix, start = (
        nodes.NODE_CLASS_MAPPINGS[name]() for name in ("LoadImagicEdit", "MixImagicEdit", "StartImagicEdit")
    )
    clip = Clip(embeddings(fp32, edit))
    for cell, expected in zip(CELLS, ours(fp32, edit), strict=True):
        strengths = cell.strength if isinstance(cell.strength, tuple) else (1.0, 1.0, 1.0)
        model, loaded = load.load(Model(fp32), "edit.safetensors", 1.0, *strengths)
        conditioning = mix.mix(loaded, clip, cell.eta, cell.sentence or "")
        latents = sampled(fp32, model, *conditioning, start.start(loaded, model, cell.seed))
        assert (latents - expected).norm() <= 2e-3 * expected.norm()


def test_the_node_protocol(nodes: Any) -> None:
    """Every node has what ComfyUI asks of one: inputs with types and limits, outputs with names, a function."""
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for kind in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = kind.INPUT_TYPES()["required"]
        assert len(kind.RETURN_TYPES) == len(kind.RETURN_NAMES) and kind.CATEGORY and kind.DESCRIPTION
        code = getattr(kind, kind.FUNCTION).__code__
        assert list(inputs) == list(code.co_varnames[1 : code.co_argcount])
        for name, (type_, *options) in inputs.items():
            assert type_ == type_.upper() if isinstance(type_, str) else name == "edit_name"
            if type_ in ("FLOAT", "INT"):
                assert options[0]["min"] <= options[0]["default"] <= options[0]["max"]
    eta = nodes.NODE_CLASS_MAPPINGS["MixImagicEdit"].INPUT_TYPES()["required"]["eta"][1]
    assert eta["min"] < 0 and eta["max"] > 1


def test_files_that_do_not_fit_are_refused(fp32: BaseModel, edit: Edit, folder: Path, nodes: Any) -> None:
    """A LoRA that is no edit, a damaged or newer edit, and one of another base give one sentence each."""
    load = nodes.NODE_CLASS_MAPPINGS["LoadImagicEdit"]()
    loras = folder / "models/loras"
    data = (loras / "edit.safetensors").read_bytes()
    save_file({"lora_unet_a.lora_up.weight": torch.ones(2, 2)}, loras / "plain.safetensors")
    (loras / "newer.safetensors").write_bytes(data.replace(b'"imagic.spec":"1"', b'"imagic.spec":"9"'))
    (loras / "damaged.safetensors").write_bytes(data.replace(b'"imagic.base"', b'"imagic.bane"'))
    for name, told in (("plain", "no Imagic edit"), ("newer", "update the nodes"), ("damaged", "damaged Imagic edit")):
        with pytest.raises(ValueError, match=told):
            load.load(Model(fp32), f"{name}.safetensors", 1.0, 1.0, 1.0, 1.0)
        (loras / f"{name}.safetensors").unlink()

    class Other(Model):
        def state_dict(self) -> dict[str, torch.Tensor]:
            return {name: tensor[:1] for name, tensor in super().state_dict().items()}

    class Predicting(Model):
        def get_model_object(self, name: str) -> Any:
            return Velocity(**super().get_model_object(name).__dict__)

    class Deep(Model):
        model_config = types.SimpleNamespace(unet_config={"transformer_depth": [0, 0, 2, 2, 10, 10]})

    with pytest.raises(ValueError, match="made for tiny-sd and does not fit this model"):
        load.load(Other(fp32), "edit.safetensors", 1.0, 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="predicts epsilon, and this model predicts v_prediction"):
        load.load(Predicting(fp32), "edit.safetensors", 1.0, 1.0, 1.0, 1.0)
    # Stable Diffusion XL has all layers of its smaller descendants.
    for family, fits in (("sdxl", True), ("ssd-1b", False)):
        path = loras / f"{family}.safetensors"
        edit_file.write(replace(edit, base=replace(edit.base, family=family)), path)
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="this model has other layers"):
            load.load(Deep(fp32), path.name, 1.0, 1.0, 1.0, 1.0)
        path.unlink()
    _, loaded = load.load(Model(fp32), "edit.safetensors", 1.0, 1.0, 1.0, 1.0)
    mix = nodes.NODE_CLASS_MAPPINGS["MixImagicEdit"]()
    known = embeddings(fp32, edit)["two birds"]
    with pytest.raises(ValueError, match="too long"):
        mix.mix(loaded, Clip({"long": torch.cat([known, known])}), 1.0, "long")
    with pytest.raises(ValueError, match="use the text encoder of tiny-sd"):
        mix.mix(loaded, Clip({"wide": torch.cat([known, known], 1)}), 1.0, "wide")


def test_another_scheduler_is_mentioned(
    fp32: BaseModel, edit: Edit, nodes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The node for DDIM names the scheduler that an edit's own pictures have."""
    load, start = (nodes.NODE_CLASS_MAPPINGS[name]() for name in ("LoadImagicEdit", "StartImagicEdit"))
    model, loaded = load.load(Model(fp32), "edit.safetensors", 1.0, 1.0, 1.0, 1.0)
    start.start(loaded, model, 0)
    assert "scheduler" not in caplog.text
    start.start(replace(loaded, settings={**loaded.settings, "scheduler": "EulerAncestralDiscrete"}), model, 0)
    assert "EulerAncestralDiscrete" in caplog.text


def test_both_tensors_of_sdxls_text_go_along_eta(nodes: Any) -> None:
    """Tokens and vector are mixed at eta, guidance goes away from zeros, and the picture's own size is beside both."""
    own, target = (torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    edit = nodes.nodes.ImagicEdit(
        text={"embeds": own[:2], "pooled": own[2]},
        coarse=torch.zeros(4, 4, 4),
        noise=None,
        size=(1152, 896),
        sentences=("a",),
        base="xl",
        family="sdxl",
        prediction="epsilon",
        settings={},
    )

    class TwoTensors(Clip):
        def encode_from_tokens_scheduled(self, tokens: str) -> Any:
            return [[target[None, :2], {"pooled_output": target[None, 2]}]]

    for eta in (-0.5, 0.0, 0.7, 1.4):
        [[tokens, beside]], [[away, beside_away]], _ = nodes.nodes.MixImagicEdit().mix(edit, TwoTensors({}), eta, "")
        mixed = eta * target + (1 - eta) * own
        torch.testing.assert_close(torch.cat([tokens[0], beside["pooled_output"]]), mixed)
        assert not away.any() and not beside_away["pooled_output"].any()
        for conditioning in (beside, beside_away):
            assert (conditioning["width"], conditioning["height"]) == (1152, 896)


def test_strength_zero_is_the_base(fp32: BaseModel, nodes: Any) -> None:
    """A strength of 0, or 0 for a block, puts nothing of the adapter into the model."""
    load = nodes.NODE_CLASS_MAPPINGS["LoadImagicEdit"]()
    model, _ = load.load(Model(fp32), "edit.safetensors", 0.0, 1.0, 1.0, 1.0)
    assert model.loras == ()
    model, _ = load.load(Model(fp32), "edit.safetensors", 0.5, 0.0, 2.0, 0.0)
    [(lora, strength)] = model.loras
    assert strength == 1.0 and all(name.startswith("lora_unet_mid_block") for name in lora)


def workflow(folder: Path) -> dict[str, Any]:
    """The exported workflow."""
    return dict(json.loads((folder / "user/default/workflows/edit.json").read_text()))


def test_the_workflow_fits_the_nodes(folder: Path, nodes: Any) -> None:
    """The workflow's links join outputs and inputs of one type, and its nodes are the exported ones as they are now."""
    parts = workflow(folder)
    by_id = {node["id"]: node for node in parts["nodes"]}
    assert len({link[0] for link in parts["links"]}) == len(parts["links"]) == parts["last_link_id"]
    for number, source, out, target, slot, type_ in parts["links"]:
        assert by_id[source]["outputs"][out]["type"] == type_ == by_id[target]["inputs"][slot]["type"]
        assert number in by_id[source]["outputs"][out]["links"] and by_id[target]["inputs"][slot]["link"] == number
    for node in parts["nodes"]:
        if (kind := nodes.NODE_CLASS_MAPPINGS.get(node["type"])) is not None:
            inputs = kind.INPUT_TYPES()["required"]
            linked = [one["name"] for one in node["inputs"]]
            assert [one["type"] for one in node["outputs"]] == list(kind.RETURN_TYPES)
            assert linked == [name for name in inputs if inputs[name][0] in ("MODEL", "CLIP", "IMAGIC_EDIT")]
            # ComfyUI adds a choice of what happens to a seed.
            assert len(node["widgets_values"]) == len(inputs) - len(linked) + ("seed" in inputs)
    assert {node["type"] for node in parts["nodes"]} >= nodes.NODE_CLASS_MAPPINGS.keys()
    [load] = [node for node in parts["nodes"] if node["type"] == "LoadImagicEdit"]
    assert load["widgets_values"][0] == "edit.safetensors"


@pytest.mark.parametrize(
    ("architecture", "checkpoint"),
    [
        ("stable-diffusion-xl-v1-base/lora", "sd_xl_base_1.0.safetensors"),
        ("ssd-1b: stable-diffusion-xl-v1-base/lora", "SSD-1B.safetensors"),
        ("stable-diffusion-v2-768-v/lora", "v2-1_768-ema-pruned.safetensors"),
        ("stable-diffusion-v2-512/lora", "v2-1_512-ema-pruned.safetensors"),
        ("stable-diffusion-v1/lora", "v1-5-pruned-emaonly.safetensors"),
    ],
)
def test_the_workflow_names_a_checkpoint_of_the_edits_kind(architecture: str, checkpoint: str, edit: Edit) -> None:
    """The workflow names the edit, and the published checkpoint of its base's kind."""
    family, _, label = architecture.rpartition(": ")
    labels = {**edit.base.labels, "modelspec.architecture": label}
    base = replace(edit.base, labels=labels, family=family or edit.base.family)
    files = files_for("comfyui", replace(edit, base=base), "cat")
    nodes = {node["type"]: node for node in json.loads(files["user/default/workflows/cat.json"])["nodes"]}
    assert nodes["CheckpointLoaderSimple"]["widgets_values"] == [checkpoint]
    assert nodes["LoadImagicEdit"]["widgets_values"][0] == "cat.safetensors"


def test_the_nodes_need_nothing_of_this_package(folder: Path) -> None:
    """The exported folder imports only torch, ComfyUI and Python's own modules."""
    for path in (folder / "custom_nodes").rglob("*.py"):
        names = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        others = {name.partition(".")[0] for name in names} - {"torch", "comfy", "folder_paths", ""}
        assert others <= sys.stdlib_module_names


def in_comfyui(base: BaseModel, edit: Edit, folder: Path) -> list[float]:
    """Errors of the latents of `CELLS` that ComfyUI's own model, LoRA patches and sampler give, against this package's.

    The negative sentence's embedding is not zero for SDXL, not even the empty one's, as in ComfyUI.
    """
    schedule = base.denoisers[0].schedule.values
    (folder / "unet.json").write_text(json.dumps(dict(calls.unet(base).config)))
    (folder / "schedule.json").write_text(json.dumps(schedule))
    save_file({name: x.contiguous() for name, x in calls.unet(base).state_dict().items()}, folder / "unet.safetensors")
    sentences = (*edit.sentences, "two birds", edit.settings["sample"]["negative_prompt"])
    rows = base.encode_text(sentences)
    for part, name in (("embeds", "text"), ("pooled", "pooled")):
        known = {
            json.dumps(sentence): row.clone() if sentence else torch.ones_like(row)
            for sentence, row in zip(sentences, rows.get(part, ()), strict=part == "embeds")
        }
        save_file(known, folder / f"{name}.safetensors")
    cells = [
        {
            "eta": cell.eta,
            "seed": cell.seed,
            "sentence": cell.sentence or "",
            "strength": cell.strength if isinstance(cell.strength, tuple) else (1.0, 1.0, 1.0),
        }
        for cell in CELLS
    ]
    (folder / "cells.json").write_text(json.dumps(cells))
    python = os.environ.get(f"{COMFYUI}_PYTHON", sys.executable)
    driver = Path(__file__).parent / "comfyui_driver.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(driver), os.environ[COMFYUI], str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    latents = load_file(folder / "latents.safetensors")
    return [
        float((latents[str(number)][0] - expected).norm() / expected.norm())
        for number, expected in enumerate(ours(base, edit))
    ]


@needs_comfyui
def test_in_a_real_comfyui(fp32: BaseModel, edit: Edit, folder: Path) -> None:
    """ComfyUI's own model, LoRA patches and sampler give this package's latents, and its server takes the workflow."""
    assert max(in_comfyui(fp32, edit, folder)) <= 2e-3


@needs_comfyui
@pytest.mark.parametrize(("prediction_type", "negative"), [("epsilon", "grass"), ("epsilon", ""), ("v_prediction", "")])
def test_sdxl_in_a_real_comfyui(
    prediction_type: str, negative: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for Stable Diffusion XL: both tensors of text go along eta, guidance goes away from zeros unless there
    is a negative sentence, and the picture's own size is the conditioning beside the text."""
    # Normalisation in ComfyUI begins with groups of 32 channels.
    folder = tmp_path / "xl"
    tiny_xl.tiny_pipeline(
        prediction_type, zero_snr=prediction_type == "v_prediction", block_out_channels=(32, 64, 64)
    ).save_pretrained(folder)
    base = BaseModel.load(str(folder), device="cpu", weights="fp32")
    monkeypatch.setattr(type(base.family), "sizes", Sizes((32, 32), 8, 16))
    whole, size = made(base, adapt="all", keep=0.5), base.sizes.nearest(3, 2)
    noise = torch.randn(base.denoisers[0].shape(size), generator=torch.Generator().manual_seed(9))
    edit = replace(
        whole,
        settings={"sample": {**SAMPLING.__dict__, "negative_prompt": negative}},
        noise={"unet": noise},
        source=replace(whole.source, size=size, box=(0, 0, *size)),
    )
    assert max(in_comfyui(base, edit, exported(edit, tmp_path))) <= 2e-3
