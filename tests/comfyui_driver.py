"""Renders an edit with the ComfyUI nodes in a real checkout of ComfyUI; a program for `tests.test_share_comfyui`.

``python comfyui_driver.py CHECKOUT FOLDER``: the folder, which is ComfyUI's own, has the files of `export`,
``unet.safetensors`` (diffusers' names), ``unet.json`` (its configuration), ``text.safetensors`` (embeddings by
sentence) and ``cells.json``. It gets ``latents.safetensors``. ComfyUI's server also has to accept the workflow.
"""

import asyncio
import importlib
import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

checkout, folder = sys.argv[1], Path(sys.argv[2])
sys.argv = ["comfyui", "--cpu", "--base-directory", str(folder)]
sys.path.insert(0, checkout)
for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchaudio"):
    try:
        importlib.import_module(name)
    except ImportError:
        # Models of pictures and sound need these two; Stable Diffusion does not.
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
        sys.modules[name].__path__ = []

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def comfy_model(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    """A tiny UNet of diffusers as a model of ComfyUI."""
    channels, blocks = config["block_out_channels"], config["layers_per_block"]
    down = [int(kind.startswith("CrossAttn")) for kind in config["down_block_types"] for _ in range(blocks)]
    up = [int(kind.startswith("CrossAttn")) for kind in config["up_block_types"][::-1] for _ in range(blocks + 1)]
    unet_config = {
        "image_size": 32,
        "use_checkpoint": False,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [c // channels[0] for c in channels],
        "num_res_blocks": [blocks] * len(channels),
        "transformer_depth": list(down),
        "transformer_depth_output": list(up),
        "transformer_depth_middle": 1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "context_dim": config["cross_attention_dim"],
        "num_heads": config["attention_head_dim"],
        "num_head_channels": -1,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
        "dtype": torch.float32,
    }
    names = comfy.utils.unet_to_diffusers(unet_config)
    kind = comfy.supported_models.SD15(dict(unet_config))
    # Its constructor sets Stable Diffusion's number.
    kind.unet_config["num_heads"] = config["attention_head_dim"]
    kind.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(kind, device=torch.device("cpu"))
    state = {names[name]: tensor for name, tensor in weights.items() if name in names}
    missing, unexpected = model.diffusion_model.load_state_dict(state, strict=False)
    assert not missing and not unexpected and len(state) == len(weights), (missing, unexpected, weights.keys() - names)
    for module in model.diffusion_model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = config["norm_num_groups"]
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


class Clip:
    """A text encoder with the embeddings of some sentences."""

    def __init__(self, embeddings: dict[str, torch.Tensor]) -> None:
        self.embeddings = embeddings

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> Any:
        return [[self.embeddings[tokens][None], {"pooled_output": torch.zeros(1, 4)}]]


sys.path.insert(0, str(folder / "custom_nodes"))
nodes = importlib.import_module("imagic_edit").NODE_CLASS_MAPPINGS
model = comfy_model(json.loads((folder / "unet.json").read_text()), load_file(folder / "unet.safetensors"))
clip = Clip({json.loads(name): tensor for name, tensor in load_file(folder / "text.safetensors").items()})
latents = {}
for number, cell in enumerate(json.loads((folder / "cells.json").read_text())):
    strength = cell["strength"]
    patched, edit = nodes["LoadImagicEdit"]().load(model, "edit.safetensors", 1.0, *strength)
    positive, negative, cfg = nodes["MixImagicEdit"]().mix(edit, clip, cell["eta"], cell["sentence"])
    noise, latent, sigmas = nodes["StartImagicEdit"]().start(edit, patched, cell["seed"])
    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    sampler = comfy.samplers.sampler_object("ddim")
    drawn = noise.generate_noise(latent)
    latents[str(number)] = guider.sample(drawn, latent["samples"], sampler, sigmas, seed=noise.seed, disable_pbar=True)
save_file(
    {name: model.model.process_latent_in(tensor).contiguous() for name, tensor in latents.items()},
    folder / "latents.safetensors",
)


async def accepted(workflow: dict[str, Any]) -> bool:
    """Whether ComfyUI's server would run a workflow, with etas between -2 and 4, and with no other."""
    import execution
    import nodes as own

    module = importlib.import_module("comfy_extras.nodes_custom_sampler")
    if hasattr(module, "NODE_CLASS_MAPPINGS"):
        own.NODE_CLASS_MAPPINGS |= module.NODE_CLASS_MAPPINGS
    else:  # newer versions of ComfyUI
        extension = await module.comfy_entrypoint()
        own.NODE_CLASS_MAPPINGS |= {kind.GET_SCHEMA().node_id: kind for kind in await extension.get_node_list()}
    assert await own.load_custom_node(str(folder / "custom_nodes" / "imagic_edit"))
    links = {link[0]: link for link in workflow["links"]}
    prompt: dict[str, Any] = {}
    for node in workflow["nodes"]:
        linked = {one["name"]: links[one["link"]] for one in node["inputs"]}
        values, inputs = list(node["widgets_values"]), {}
        for name, (kind, *_) in own.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()["required"].items():
            if isinstance(kind, list) or kind in ("FLOAT", "INT", "STRING", "COMBO", "BOOLEAN"):
                inputs[name] = values.pop(0)
                # A seed has a second widget.
                del values[: name == "seed"]
            if name in linked:
                inputs[name] = [str(linked[name][1]), linked[name][2]]
        assert not values, node["type"]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    checkpoint = folder / "models" / "checkpoints" / prompt["1"]["inputs"]["ckpt_name"]
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.touch()
    answers = []
    for eta in (0.8, -1.5, 3.0, 9.0):
        prompt["3"]["inputs"]["eta"] = eta
        answers.append((await execution.validate_prompt("test", prompt, None))[0])
    return answers == [True, True, True, False]


assert asyncio.run(accepted(json.loads((folder / "user/default/workflows/edit.json").read_text())))
