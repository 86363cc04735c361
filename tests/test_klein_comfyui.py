"""Edits of FLUX.2 klein in ComfyUI: its own loaders and sampler in a real checkout, where one is given."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from safetensors.torch import load_file, save_file

from lowmem_imagic import write_edit
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.pipeline.make import make_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.share.export import NODES
from tests.test_klein import SENTENCE, photo, quick, sampled
from tests.test_share_comfyui import COMFYUI, needs_comfyui
from tests.tiny_klein import original_layout, write_tiny

SHAPE = {"num_layers": 2, "attention_head_dim": 128, "axes_dims_rope": [32] * 4, "timestep_guidance_channels": 256}
"""Sizes of which ComfyUI knows no others; it reads width and depth from the file."""
CHANNELS = 32
"""Channels of the autoencoder, likewise."""
STEPS, GUIDANCE = 3, 3.0


@dataclass(frozen=True)
class Run:
    """Results of ComfyUI, and of diffusers and this package in its place."""

    comfyui: dict[str, torch.Tensor]
    """Predictions, latents and weights, see `tests.comfyui_klein_driver`."""
    told: dict[str, Any]
    """ComfyUI's words."""
    expected: dict[str, torch.Tensor]
    """The same predictions and weights by diffusers and peft, and the latents by this package."""


def in_comfyui(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The outputs of ComfyUI's run in a folder with its inputs, and its words."""
    python = os.environ.get(f"{COMFYUI}_PYTHON", sys.executable)
    driver = Path(__file__).parent / "comfyui_klein_driver.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, str(driver), os.environ[COMFYUI], str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "outputs.safetensors"), json.loads((folder / "told.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained edit of all layers, of several ranks, in ComfyUI and in diffusers."""
    folder, model = tmp_path_factory.mktemp("ComfyUI"), tmp_path_factory.mktemp("models") / "tiny-klein"
    base = BaseModel.load(str(write_tiny(model, channels=CHANNELS, **SHAPE)), device="cpu", weights="fp32")
    [denoiser] = base.denoisers
    [edit] = make_edits(base, [Job(photo(), SENTENCE)], quick())
    loras, models = folder / "models/loras", folder / "models/diffusion_models"
    for place in (loras, models, folder / "custom_nodes"):
        place.mkdir(parents=True)
    (folder / "custom_nodes/imagic_edit").symlink_to(NODES)
    write_edit(edit, loras / "edit.safetensors")
    pipeline = Flux2KleinPipeline.from_pretrained(model)
    network = pipeline.transformer
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in original_layout(network.state_dict()).items()},
        models / "klein.safetensors",
    )
    shape, text = denoiser.shape(base.sizes.own), base.encode_text([SENTENCE, ""])
    x, noise = torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(7))
    at = torch.tensor([0.6])
    inputs = {
        "x": x,
        "at": at,
        "text": text["embeds"],
        "noise": noise,
        "positions": denoiser.schedule.sampler("Euler", STEPS, shape).times,
        "guidance": torch.tensor(GUIDANCE),
    }
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / "inputs.safetensors")
    results = in_comfyui(folder)

    def predicted() -> torch.Tensor:
        with torch.no_grad():
            prediction: torch.Tensor = denoiser.predict(network, x, at, text.rows([0]))
            return prediction

    expected = {"before": predicted()}
    pipeline.load_lora_weights(str(loras), weight_name="edit.safetensors", adapter_name="edit")
    for name, strength in (("half", 0.5), ("after", 1.0)):
        pipeline.set_adapters(["edit"], [strength])
        expected[name] = predicted()
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = original_layout(network.state_dict())
    expected |= {f"weights.{name}": tensor for name, tensor in fused.items()}
    pack = AdapterPack.load(base.network(denoiser), denoiser.names, [edit.adapters["transformer"]])
    with pack.attached(base.network(denoiser)):
        expected["sampled"] = sampled(base, text, noise, STEPS, GUIDANCE)
    return Run(*results, expected)


@needs_comfyui
def test_comfyui_builds_klein_from_its_original_layout(run: Run, relative: Any) -> None:
    """ComfyUI tells a klein from its file, and predicts as diffusers without an edit."""
    assert run.told["model"] == "Flux2"
    assert relative(run.comfyui["before"], run.expected["before"]) < 1e-5


@needs_comfyui
def test_comfyui_takes_every_layer_of_an_edit(run: Run) -> None:
    """ComfyUI's loader of LoRA files takes the edit file as it is: beside its other tensors no name is left over, and
    every weight becomes that of diffusers with the edit fused, also inside joined matrices."""
    left = {line.rpartition(" ")[2] for line in run.told["warnings"] if "not loaded" in line.lower()}
    assert left == {"lora_imagic.text.embeds", "lora_imagic.coarse.transformer", "lora_imagic.noise.transformer"}
    weights = {name: tensor for name, tensor in run.expected.items() if name.startswith("weights.")}
    for name, tensor in weights.items():
        theirs = run.comfyui.get(name, run.comfyui.get(name.removesuffix(".scale") + ".weight"))
        torch.testing.assert_close(theirs, tensor, rtol=1e-5, atol=1e-6)


@needs_comfyui
def test_comfyui_predicts_with_an_edit_as_diffusers(run: Run, relative: Any) -> None:
    """With the edit at full and at half strength ComfyUI predicts as diffusers, and samples as this package."""
    for name in ("after", "half"):
        assert (
            relative(run.comfyui[name], run.expected[name]) < 1e-5 < relative(run.comfyui[name], run.comfyui["before"])
        )
    assert relative(run.comfyui["sampled"], run.expected["sampled"]) < 1e-5


@needs_comfyui
def test_our_nodes_say_that_they_do_not_take_klein(run: Run) -> None:
    """This package's node for edits refuses one of klein, and says which models it takes."""
    assert "a model that these nodes do not know; they take Stable Diffusion" in run.told["refusal"]
