"""Renders an edit with the ComfyUI nodes in a real checkout of ComfyUI; a program for `tests.test_share_comfyui`.

``python comfyui_driver.py CHECKOUT FOLDER``: the folder, which is ComfyUI's own, has the files of `export`,
``unet.safetensors`` (diffusers' names), ``unet.json`` (its configuration), ``schedule.json``, ``text.safetensors``
(embeddings by sentence), ``pooled.safetensors`` (the same for SDXL's vectors) and ``cells.json``. It gets
``latents.safetensors``. ComfyUI's server also has to accept the workflow.
"""

import asyncio
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from comfyui_checkout import prepare

checkout, folder = sys.argv[1], Path(sys.argv[2])
prepare(checkout, folder)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def comfy_model(config: dict[str, Any], schedule: dict[str, Any], weights: dict[str, torch.Tensor]) -> Any:
    """A tiny UNet of diffusers as a model of ComfyUI: a Stable Diffusion 1, or an XL if it takes sizes."""
    large = config["addition_embed_type"] == "text_time"
    channels, blocks = config["block_out_channels"], config["layers_per_block"]
    depths, heads = config["transformer_layers_per_block"], config["attention_head_dim"]
    depths = depths if isinstance(depths, list) else [depths] * len(channels)

    def by_layer(kinds: list[str], layers: int) -> list[int]:
        """Transformer blocks behind every layer."""
        return [
            depth * kind.startswith("CrossAttn")
            for kind, depth in zip(kinds, depths, strict=True)
            for _ in range(layers)
        ]

    unet_config = {
        "image_size": 32,
        "use_checkpoint": False,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [c // channels[0] for c in channels],
        "num_res_blocks": [blocks] * len(channels),
        "transformer_depth": by_layer(config["down_block_types"], blocks),
        "transformer_depth_output": by_layer(config["up_block_types"][::-1], blocks + 1),
        "transformer_depth_middle": depths[-1],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": large,
        "context_dim": config["cross_attention_dim"],
        "num_classes": "sequential" if large else None,
        "adm_in_channels": config["projection_class_embeddings_input_dim"],
        "use_temporal_attention": False,
        "legacy": False,
        "dtype": torch.float32,
    }
    names = comfy.utils.unet_to_diffusers(unet_config)
    kind = (comfy.supported_models.SDXL if large else comfy.supported_models.SD15)(dict(unet_config))
    # Its constructor sets the numbers of the published models.
    if large:
        kind.unet_config.update(num_heads=-1, num_head_channels=channels[0] // heads[0])
    else:
        kind.unet_config.update(num_heads=heads, num_head_channels=-1)
    kind.sampling_settings = {"zsnr": schedule["rescale_betas_zero_snr"]}
    kind.set_inference_dtype(torch.float32, None)
    predicts = {"epsilon": "EPS", "v_prediction": "V_PREDICTION"}[schedule["prediction_type"]]
    model = (comfy.model_base.SDXL if large else comfy.model_base.BaseModel)(
        kind, comfy.model_base.ModelType[predicts], device=torch.device("cpu")
    )
    if large:
        model.embedder = type(model.embedder)(config["addition_time_embed_dim"])
    state = {names[name]: tensor for name, tensor in weights.items() if name in names}
    missing, unexpected = model.diffusion_model.load_state_dict(state, strict=False)
    assert not missing and not unexpected and len(state) == len(weights), (missing, unexpected, weights.keys() - names)
    for module in model.diffusion_model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = config["norm_num_groups"]
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


class Clip:
    """A text encoder with the embeddings, and SDXL's vectors, of some sentences."""

    def __init__(self, embeddings: dict[str, torch.Tensor], pooled: dict[str, torch.Tensor]) -> None:
        self.embeddings, self.pooled = embeddings, pooled

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> Any:
        pooled = self.pooled.get(tokens, torch.zeros(4))
        return [[self.embeddings[tokens][None], {"pooled_output": pooled[None]}]]


def by_sentence(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a file whose names are sentences."""
    return {json.loads(sentence): tensor for sentence, tensor in load_file(folder / name).items()}


sys.path.insert(0, str(folder / "custom_nodes"))
nodes = importlib.import_module("imagic_edit").NODE_CLASS_MAPPINGS
configs = (json.loads((folder / name).read_text()) for name in ("unet.json", "schedule.json"))
model = comfy_model(*configs, load_file(folder / "unet.safetensors"))
clip = Clip(by_sentence("text.safetensors"), by_sentence("pooled.safetensors"))
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
