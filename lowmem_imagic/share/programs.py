"""What other programs do with an edit file, told from its header; needs no torch.

The facts come from runs of these programs' own code, or from their source where the words say so; see
``docs/other_programs.md``.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..edits.header import describe, layer_names, read_bytes, summary
from ..edits.layouts import KOHYA, layout_of
from ..plain_text import shown
from ..storage.safetensors_reader import parse

_TRANSFORMER = r"transformer_blocks_\d+_(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2))"
_ATTENTION = rf"attentions_\d+_(proj_in|proj_out|{_TRANSFORMER})"
_RESNET = r"resnets_\d+_(conv1|conv2|conv_shortcut|time_emb_proj)"
_SAMPLERS = r"down_blocks_\d+_downsamplers_0_conv|up_blocks_\d+_upsamplers_0_conv"
COMFYUI = re.compile(rf"lora_unet_(((down|up)_blocks_\d+|mid_block)_({_ATTENTION}|{_RESNET})|{_SAMPLERS})")
"""Layers that ComfyUI maps (``unet_to_diffusers`` in ``comfy/utils.py``)."""
A1111 = re.compile(
    r"lora_unet_((down|up)_blocks_\d+_(attentions|resnets)_\d+_.+|mid_block_(attentions|resnets)_\d+_.+|"
    rf"{_SAMPLERS})"
)
"""Layers that A1111 and Forge map (``convert_diffusers_name_to_compvis`` in their ``networks.py``)."""
_DOUBLE = r"transformer\.transformer_blocks\.\d+\."
_DOUBLE_ATTENTION = rf"{_DOUBLE}attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
_SINGLE = r"transformer\.single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
FLUX2_COMFYUI = re.compile(rf"{_DOUBLE_ATTENTION}|{_DOUBLE}ff(_context)?\.linear_(in|out)|{_SINGLE}")
"""Layers of a FLUX.2 that ComfyUI was seen to map (``tests/test_klein_comfyui.py``)."""
FLUX2_CPP = re.compile(_DOUBLE_ATTENTION)
"""Those that stable-diffusion.cpp maps (``convert_diffusers_dit_to_original_flux`` in its ``name_conversion.cpp``)."""

_PICTURES = "the photo and the edit at any eta"
_LORA = "the LoRA alone"
_NO_INPUT = "the photo and the edit: it has no input for the embedding and the photo's noise"
_NO_NAMES = "the photo and the edit: it has no names for some layers"
_UNMIXED = "the photo and the edit, unless you mix the embeddings"
_MASK = "the mask, which keeps unchanged places, and a source prompt"


@dataclass(frozen=True)
class Use:
    """What a program does with an edit file."""

    program: str
    loads: str
    """``all`` of the adapter, ``part`` of it, ``no``, or ``unknown``."""
    does: str
    """What comes out."""
    lacks: str
    """What does not; if it does not load, the reason."""

    def __str__(self) -> str:
        if self.loads in ("no", "unknown"):
            return f"{'cannot load it' if self.loads == 'no' else 'unknown'}: {self.lacks}"
        return f"{'loads part of it: ' if self.loads == 'part' else ''}{self.does}; not {self.lacks}"


def inspected(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of an edit file (`edits.header.describe`), and under ``programs`` the uses of it.

    Raises:
        EditFileError: the file is no edit.
    """
    contents = describe(path)
    container = parse(read_bytes(path))
    layers = layer_names(container, layout_of(container.entries))
    return contents | {"programs": [asdict(use) for use in uses(contents, layers, container.metadata)]}


def uses(contents: Mapping[str, Any], layers: Iterable[str], metadata: Mapping[str, str]) -> list[Use]:
    """The use that each program makes of an edit.

    Args:
        contents: of `edits.header.describe`.
        layers: the keys of the adapted layers.
        metadata: the file's header strings.
    """
    keys, adapter = list(layers), contents["adapter"]
    if keys and all(key.startswith("transformer.") for key in keys):
        return _of_flux2(keys)
    known = has_base(metadata)
    kohya = all(KOHYA.layer.fullmatch(key) for key in keys)
    alike = len(adapter["alphas"]) <= 1
    wrong = "" if alike else "; its own loader scales some layers wrongly in versions 0.33 to 0.42 (export does not)"
    told = [
        Use("diffusers", "all", f"{_PICTURES}, by load_into{wrong}", _MASK)
        if kohya
        else Use("diffusers", "all", "the LoRA, by each network's own load_lora_adapter", _UNMIXED),
        Use("peft", "all", "the LoRA, by export to peft", _UNMIXED),
    ]
    others = ("ComfyUI", "A1111, Forge, SD.Next", "InvokeAI", "stable-diffusion.cpp")
    if not (kohya and known):
        base = shown(str(contents["base"]["source"]))
        return [*told, *(Use(name, "no", "", f"it has no base such as {base}") for name in others)]
    comfyui = _loads(keys, COMFYUI)
    rank_one = 1 in adapter["ranks"]
    return [
        *told,
        Use("ComfyUI", comfyui, f"{_PICTURES}, with the nodes of export to comfyui", _MASK)
        if comfyui == "all"
        else Use("ComfyUI", comfyui, _LORA, _NO_NAMES),
        Use("A1111, Forge, SD.Next", _loads(keys, A1111), _LORA, _NO_INPUT),
        Use("InvokeAI", "all", _LORA, _NO_INPUT),
        Use("stable-diffusion.cpp", "part" if rank_one else _loads(keys, A1111), _LORA, _NO_INPUT),
    ]


def _of_flux2(keys: list[str]) -> list[Use]:
    """The uses of an edit of a FLUX.2 klein, whose layers' keys these are."""
    both = "the LoRA, by its pipeline's load_lora_weights or the network's load_lora_adapter"
    return [
        Use("diffusers", "all", both, _UNMIXED),
        Use("peft", "all", "the LoRA, by export to peft", _UNMIXED),
        # The nodes for ComfyUI are for Stable Diffusion alone.
        Use("ComfyUI", comfyui, _LORA, _NO_INPUT if comfyui == "all" else _NO_NAMES)
        if (comfyui := _loads(keys, FLUX2_COMFYUI)) != "no"
        else Use("ComfyUI", "unknown", "", "not tried with these layers"),
        Use("A1111, Forge, SD.Next", "unknown", "", "not tried with edits of this kind"),
        # Every name in a file must be a LoRA's (``flux_diffusers_lora_conversion_utils.py`` in InvokeAI 6.14).
        Use(
            "InvokeAI",
            "no",
            "",
            "by its source it refuses the embedding's tensors beside a LoRA; adapter_model.safetensors of export to "
            "peft has none",
        ),
        Use("stable-diffusion.cpp", "part", f"by its source, {_LORA} on the double blocks' attention", _NO_NAMES)
        if _loads(keys, FLUX2_CPP) != "no"
        else Use("stable-diffusion.cpp", "no", "", "by its source it has no names for these layers"),
    ]


def has_base(labels: Mapping[str, str]) -> bool:
    """Whether other programs have bases of the kind that a file's labels name (`edits.identity.LABELS`)."""
    return labels.get("modelspec.architecture", "").startswith("stable-diffusion")


def _loads(keys: list[str], known: re.Pattern[str]) -> str:
    """How much of an adapter a program loads that knows these layers."""
    matched = sum(bool(known.fullmatch(key)) for key in keys)
    return "all" if matched == len(keys) else "part" if matched else "no"


def told(contents: Mapping[str, Any]) -> str:
    """`inspected`'s result as lines for people."""
    names = [use["program"] for use in contents["programs"]]
    width = max(map(len, names)) + 2
    lines = [f"  {name + ':':<{width}}{Use(**use)}" for name, use in zip(names, contents["programs"], strict=True)]
    return "\n".join([summary(contents), "other programs:", *lines])
