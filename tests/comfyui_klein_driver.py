"""Loads a klein and an edit of it in a real checkout of ComfyUI; a program for `tests.test_klein_comfyui`.

``python comfyui_klein_driver.py CHECKOUT FOLDER``: the folder, which is ComfyUI's own, has
``models/diffusion_models/klein.safetensors`` (the transformer in its original layout),
``models/loras/edit.safetensors``, ``custom_nodes/imagic_edit`` and ``inputs.safetensors`` (latents, positions, text,
noise, the positions of sampling, and guidance). It gets ``outputs.safetensors`` (predictions, samples and the patched
weights) and ``told.json`` (the model's class, the log of loading, and what the node for edits says).
"""

import importlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

from comfyui_checkout import prepare

checkout, folder = sys.argv[1], Path(sys.argv[2])
prepare(checkout, folder, "--force-fp32")

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.samplers  # noqa: E402
import nodes  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


class Lines(logging.Handler):
    """The warnings of a log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def prediction(model: Any) -> torch.Tensor:
    """The velocity of a model at the inputs, from its denoised latents."""
    x, at = inputs["x"], inputs["at"]
    comfy.model_management.load_models_gpu([model], force_patch_weights=True)
    with torch.no_grad():
        denoised = model.model.apply_model(x, at, c_crossattn=inputs["text"][:1])
    return (x - denoised) / at.view(-1, 1, 1, 1)


def sampled(model: Any) -> torch.Tensor:
    """Latents of ComfyUI's sampler ``euler``, with guidance."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*([[row[None], {}]] for row in inputs["text"]))
    guider.set_cfg(float(inputs["guidance"]))
    empty, sampler = torch.zeros_like(inputs["noise"]), comfy.samplers.sampler_object("euler")
    latents: torch.Tensor = guider.sample(inputs["noise"], empty, sampler, inputs["positions"], disable_pbar=True)
    return latents


inputs = load_file(folder / "inputs.safetensors")
warnings = Lines()
logging.getLogger().addHandler(warnings)
(model,) = nodes.UNETLoader().load_unet("klein.safetensors", "default")
outputs = {"before": prediction(model)}
(patched,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, "edit.safetensors", 1.0)
outputs |= {"after": prediction(patched), "sampled": sampled(patched)}
(half,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, "edit.safetensors", 0.5)
outputs["half"] = prediction(half)
comfy.model_management.load_models_gpu([patched], force_patch_weights=True)
outputs |= {f"weights.{name}": tensor for name, tensor in patched.model.diffusion_model.state_dict().items()}
save_file(
    {name: tensor.float().contiguous().clone() for name, tensor in outputs.items()}, folder / "outputs.safetensors"
)

sys.path.insert(0, str(folder / "custom_nodes"))
load = importlib.import_module("imagic_edit").NODE_CLASS_MAPPINGS["LoadImagicEdit"]()
try:
    load.load(model, "edit.safetensors", 1.0, 1.0, 1.0, 1.0)
    refusal = ""
except ValueError as error:
    refusal = str(error)
told = {"model": type(model.model).__name__, "warnings": warnings.lines, "refusal": refusal}
(folder / "told.json").write_text(json.dumps(told))
