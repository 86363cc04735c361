"""Edits as the files that other programs read."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from ..edits.edit import Edit, LoraFactors, picture_kind
from ..edits.file import encode, stored_tensors
from ..edits.layouts import KOHYA, PEFT
from ..errors import ConfigError, EditFileError
from ..families.adapter_names import module_name
from ..families.portable import scaled_alike
from ..plain_text import shown
from ..storage.safetensors_writer import serialize
from .card import escaped
from .hub import EDIT_FILE

Files = dict[str, bytes]
"""Contents of files by their path in the export's folder, with slashes."""

EMBEDDINGS = "imagic.safetensors"
"""The file with an edit's embedding and starting latents as tensors."""
NODES = Path(__file__).parent / "comfyui_nodes"
WORKFLOW = "example_workflows/imagic_edit.json"
_NOTES = Path(__file__).parent / "notes"
_OF_NODES = (".py", ".toml", ".md", ".json")
_VERSIONS = {"stable-diffusion-v1": "SD1", "stable-diffusion-v2": "SD2", "stable-diffusion-xl": "SDXL"}
"""A1111's names of kinds of models, by the beginning of ``modelspec.architecture``."""
_CHECKPOINTS = {
    "stable-diffusion-v2-768": "v2-1_768-ema-pruned.safetensors",
    "stable-diffusion-v2-512": "v2-1_512-ema-pruned.safetensors",
    "stable-diffusion-xl": "sd_xl_base_1.0.safetensors",
}
"""Published checkpoints of other kinds of models than the workflow's own, by the same beginnings; see `WORKFLOW`."""
_SMALLER = {"ssd-1b": "SSD-1B.safetensors", "vega": "segmind-vega.safetensors"}
"""The same by family, for those with the label of Stable Diffusion XL."""


def files_for(program: str, edit: Edit, name: str) -> Files:
    """The files of an edit for a program.

    Args:
        program: one of `PROGRAMS`.
        edit: the edit.
        name: a stem for files that have no fixed name.

    Raises:
        ConfigError: there is no such program.
        EditFileError: the program cannot load this kind of edit.
    """
    if program not in PROGRAMS:
        raise ConfigError(f"`to` is {program!r}, expected one of {', '.join(PROGRAMS)}")
    return PROGRAMS[program](edit, name)


def _peft(edit: Edit, name: str) -> Files:
    """Folders for ``PeftModel.from_pretrained``: the only network's own, or one for each."""
    files: Files = {}
    for denoiser, adapter in edit.adapters.items():
        folder = "" if len(edit.adapters) == 1 else f"{denoiser}/"
        layers = {_module(edit, denoiser, key): factors for key, factors in adapter.items()}
        tensors: dict[str, Tensor] = {}
        for layer, factors in layers.items():
            pair = zip(PEFT.parts, (factors.down, factors.up), strict=True)
            tensors |= {f"base_model.model.{layer}.{part}": tensor for part, tensor in pair}
        files[f"{folder}adapter_model.safetensors"] = serialize(tensors, {"format": "pt"})
        files[f"{folder}adapter_config.json"] = _json(_peft_config(edit, layers))
    return files | {EMBEDDINGS: _embeddings(edit), "README.md": _note("peft", edit, name)}


def _module(edit: Edit, denoiser: str, key: str) -> str:
    """The name in its network of the module with a layer's key."""
    return module_name(key) if edit.layout is KOHYA else key.removeprefix(f"{denoiser}.")


def _peft_config(edit: Edit, layers: Mapping[str, LoraFactors]) -> dict[str, Any]:
    """The fields of peft's `LoraConfig` that matter: other versions of peft may not know others."""
    rank = max(factors.rank for factors in layers.values())
    alpha = next(factors.alpha for factors in layers.values() if factors.rank == rank)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": edit.base.source,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{layer}$": factors.rank for layer, factors in layers.items() if factors.rank != rank},
        "alpha_pattern": {f"^{layer}$": factors.alpha for layer, factors in layers.items() if factors.alpha != alpha},
        "target_modules": sorted(layers),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _diffusers(edit: Edit, name: str) -> Files:
    """The edit file under the name that diffusers looks for, and its other tensors."""
    return {
        EDIT_FILE: encode(_scaled_alike(edit)),
        EMBEDDINGS: _embeddings(edit),
        # `load_into` is for pipelines whose adapters have kohya's names.
        "README.md": _note("diffusers" if edit.layout is KOHYA else "diffusers_networks", edit, name),
    }


def _a1111(edit: Edit, name: str) -> Files:
    """The edit file with the card that A1111, Forge, SD.Next and InvokeAI show beside it."""
    _check_kohya(edit, "A1111 and its relatives")
    card = {
        "description": f"Imagic edit of one photo, for {shown(edit.base.source)}",
        "sd version": _by_architecture(edit, _VERSIONS) or "Unknown",
        "activation text": edit.sentences[0] if edit.sentences else "",
        "preferred weight": 1.0,
        "negative text": "",
        "notes": "Changes pictures of its sentence towards the photo; this program has no input for the edit's "
        "embedding and noise, so it gives neither the photo nor the edit. lowmem-imagic, diffusers and ComfyUI do.",
    }
    files = {f"{name}.safetensors": encode(_scaled_alike(edit)), f"{name}.json": _json(card)}
    if edit.thumbnail is not None and picture_kind(edit.thumbnail) == "png":
        files[f"{name}.png"] = edit.thumbnail
    return files


def _comfyui(edit: Edit, name: str) -> Files:
    """The edit file, nodes and a workflow, each where ComfyUI looks for it below its own folder."""
    _check_kohya(edit, "ComfyUI's nodes")
    nodes = {
        f"custom_nodes/imagic_edit/{path.relative_to(NODES).as_posix()}": path.read_bytes()
        for path in sorted(NODES.rglob("*"))
        if path.suffix in _OF_NODES and path.is_file()
    }
    workflow = json.loads((NODES / WORKFLOW).read_text(encoding="utf-8"))
    values = {"LoadImagicEdit": f"{name}.safetensors"}
    if checkpoint := _SMALLER.get(edit.base.family) or _by_architecture(edit, _CHECKPOINTS):
        values["CheckpointLoaderSimple"] = checkpoint
    for node in workflow["nodes"]:
        if node["type"] in values:
            node["widgets_values"][0] = values[node["type"]]
    return {
        f"models/loras/{name}.safetensors": encode(_scaled_alike(edit)),
        f"user/default/workflows/{name}.json": _json(workflow),
        **nodes,
    }


PROGRAMS: Mapping[str, Callable[[Edit, str], Files]] = {
    "peft": _peft,
    "diffusers": _diffusers,
    "a1111": _a1111,
    "comfyui": _comfyui,
}


def _check_kohya(edit: Edit, program: str) -> None:
    """Checks that an edit has the names of layers that UNets have in these programs.

    Raises:
        EditFileError: it has not.
    """
    if edit.layout is not KOHYA:
        raise EditFileError(f"{program} cannot load an edit of {edit.base.source}; export it to diffusers or peft")


def _by_architecture(edit: Edit, values: Mapping[str, str]) -> str | None:
    """The value for the kind of an edit's base; None if the kind is not among them."""
    architecture = edit.base.labels.get("modelspec.architecture", "")
    return next((value for start, value in values.items() if architecture.startswith(start)), None)


def _scaled_alike(edit: Edit) -> Edit:
    """The edit with one alpha for all layers of a network with kohya's names, which every program reads rightly."""
    if edit.layout is not KOHYA:
        return edit
    adapters = {}
    for denoiser, adapter in edit.adapters.items():
        if len({factors.alpha for factors in adapter.values()}) > 1:
            whole = {key: (f.down.float(), f.up.float(), f.alpha) for key, f in adapter.items()}
            adapter = {key: LoraFactors(*factors) for key, factors in scaled_alike(whole).items()}
        adapters[denoiser] = adapter
    return replace(edit, adapters=adapters)


def _embeddings(edit: Edit) -> bytes:
    """The embedding and the starting latents as tensors, with the recorded settings of sampling in the header."""
    recorded = edit.settings.get("sample")
    values = {
        "sentences": list(edit.sentences),
        "start_sentence": edit.start_sentence,
        "size": list(edit.source.size),
        "sample": recorded if isinstance(recorded, dict) else {},
    }
    tensors = {name: _plain(tensor) for name, tensor in stored_tensors(edit).items()}
    return serialize(tensors, {"format": "pt", "imagic": json.dumps(values, sort_keys=True)})


def _plain(tensor: Tensor) -> Tensor:
    """The tensor in fp16; one in bfloat16, or with numbers beyond fp16, in its own type."""
    half = tensor.to(torch.float16)
    fits = tensor.dtype != torch.bfloat16 and bool(half.isfinite().all())
    return half if fits else tensor


def _note(program: str, edit: Edit, name: str) -> bytes:
    """The instructions beside the files of a program; text of the edit is escaped for its place in them."""
    template = Template((_NOTES / f"{program}.md").read_text(encoding="utf-8"))
    # Names of networks have none of Markdown's marks but an underscore, which has no meaning in code.
    networks = [f"`{network}`" for network in edit.adapters]
    first, several = next(iter(edit.adapters)), len(networks) > 1
    words = {
        "networks": " and ".join(networks),
        "first": first,
        "folder": first if several else ".",
        "each": f" Each of {' and '.join(networks)} has a folder of its own." if several else "",
        "base": escaped(edit.base.source),
        # Markdown keeps the marks of a block of code as they are; text on one line cannot end the block or a comment.
        "base_in_code": shown(edit.base.source),
        # An edit without one is asked for any.
        "sentence": "" if edit.sentences else ', "..."',
    }
    return template.substitute(name=name, **words).encode()


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
