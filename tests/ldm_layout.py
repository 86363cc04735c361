"""A diffusers folder rewritten as one checkpoint in Stable Diffusion's original (LDM) layout.

The inverse of what diffusers' ``from_single_file`` does, for any number of blocks and layers.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
XL_TEXT, XL_TEXT_2 = "conditioner.embedders.0.", "conditioner.embedders.1."

_UNET_ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
_UNET_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.",
    "conv_shortcut.": "skip_connection.",
}
_VAE_ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}
_OPEN_CLIP_LAYER = {
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def write_checkpoint(folder: Path, path: Path, *, dtype: torch.dtype | None = None, open_clip: bool = False) -> Path:
    """Writes the folder's weights to `path`, which is returned.

    Args:
        folder: a diffusers pipeline folder of Stable Diffusion 1.x or 2.x.
        path: the checkpoint.
        dtype: type of the weights, as in the folder if None.
        open_clip: the text encoder in Stable Diffusion 2.x's layout instead of 1.x's.
    """
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder" / "model.safetensors")
    tensors = {UNET + name: tensor for name, tensor in unet_to_ldm(unet, _config(folder, "unet")).items()}
    tensors |= {VAE + name: tensor for name, tensor in vae_to_ldm(vae, _config(folder, "vae")).items()}
    tensors |= {TEXT + name: tensor for name, tensor in text_to_ldm(text, open_clip=open_clip).items()}
    tensors = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
    # Real checkpoints carry the noise schedule too, in fp32 whatever the weights are.
    save_file({**tensors, "betas": torch.linspace(0, 1, 10)}, path)
    return path


def xl_tensors(folder: Path, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a diffusers folder of Stable Diffusion XL, as one checkpoint has them."""
    parts = {
        part: load_file(folder / part / f"{stem}.safetensors")
        for part, stem in (
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
            ("text_encoder_2", "model"),
        )
    }
    named = {
        UNET: unet_to_ldm(parts["unet"], _config(folder, "unet")),
        VAE: vae_to_ldm(parts["vae"], _config(folder, "vae")),
        XL_TEXT: text_to_ldm(parts["text_encoder"]),
        XL_TEXT_2: text_to_ldm(parts["text_encoder_2"], open_clip=True),
    }
    tensors = {prefix + name: tensor for prefix, part in named.items() for name, tensor in part.items()}
    # Both are in the published file, and no component needs them.
    tensors[f"{XL_TEXT}transformer.text_model.embeddings.position_ids"] = torch.arange(8)[None]
    tensors[f"{XL_TEXT_2}model.logit_scale"] = torch.tensor(4.6)
    return {
        name: tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in tensors.items()
    }


def unet_to_ldm(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The UNet's tensors by their original names, without the prefix."""
    layers = config["layers_per_block"]
    return {_unet_name(name, layers, state): tensor for name, tensor in state.items()}


def _unet_name(name: str, layers: int, state: dict[str, Tensor]) -> str:
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name):
        kind, index, rest = match[1], int(match[2]), match[3]
        return f"middle_block.{2 * index + (kind == 'attentions')}.{_within(kind, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    assert match, name
    side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (block + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        # Behind the last layer's attention, where there is one.
        place = 2 if any(other.startswith(f"up_blocks.{block}.attentions.") for other in state) else 1
        return f"output_blocks.{(layers + 1) * block + layers}.{place}.{rest}"
    place = int(kind == "attentions")
    if side == "down":
        return f"input_blocks.{(layers + 1) * block + index + 1}.{place}.{_within(kind, rest)}"
    return f"output_blocks.{(layers + 1) * block + index}.{place}.{_within(kind, rest)}"


def _within(kind: str, rest: str) -> str:
    """A name inside a ResNet block or an attention; the latter has kept its names."""
    return _replaced(rest, _UNET_RESNET) if kind == "resnets" else rest


def vae_to_ldm(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The autoencoder's tensors by their original names, without the prefix."""
    blocks = len(config["block_out_channels"])
    tensors = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(encoder|decoder)\.(down|up|mid)_block(?:s\.(\d+))?\.(\w+)\.(\d+)\.(.+)", name)
        if not match:
            tensors[name.replace("conv_norm_out.", "norm_out.")] = tensor
            continue
        coder, side, block, kind, index, rest = match[1], match[2], match[3], match[4], int(match[5]), match[6]
        rest = rest.replace("conv_shortcut.", "nin_shortcut.")
        if side == "mid" and kind == "attentions":
            # Linear layers today, 1x1 convolutions then.
            tensor = tensor[..., None, None] if tensor.dim() == 2 else tensor
            tensors[f"{coder}.mid.attn_1.{_replaced(rest, _VAE_ATTENTION)}"] = tensor
        elif side == "mid":
            tensors[f"{coder}.mid.block_{index + 1}.{rest}"] = tensor
        else:
            # The decoder counts its levels from the picture's side.
            level = int(block) if side == "down" else blocks - 1 - int(block)
            place = f"block.{index}" if kind == "resnets" else f"{side}sample"
            tensors[f"{coder}.{side}.{level}.{place}.{rest}"] = tensor
    return tensors


def text_to_ldm(state: dict[str, Tensor], *, open_clip: bool = False) -> dict[str, Tensor]:
    """The text encoder's tensors by their original names, without the prefix."""
    plain = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    if not open_clip:
        return {f"transformer.text_model.{name}": tensor for name, tensor in plain.items()}
    tensors = {}
    for name, tensor in plain.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
        if name == "text_projection.weight":
            # OpenCLIP multiplies by it from the other side.
            tensors["model.text_projection"] = tensor.T
        elif not match:
            tensors[f"model.{_OPEN_CLIP_ENDS[name]}"] = tensor
        elif part := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", match[2]):
            if part[1] == "q":
                three = [plain[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
                tensors[f"model.transformer.resblocks.{match[1]}.attn.in_proj_{part[2]}"] = torch.cat(three)
        else:
            tensors[f"model.transformer.resblocks.{match[1]}.{_replaced(match[2], _OPEN_CLIP_LAYER)}"] = tensor
    return tensors


def _replaced(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _config(folder: Path, component: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / component / "config.json").read_text(encoding="utf-8"))
    return values
