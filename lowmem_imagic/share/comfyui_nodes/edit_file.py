"""The header of an edit file: embedding, starting latents and settings.

The format is described in lowmem-imagic's ``docs/edit_file.md``. Messages are for the person at ComfyUI.
"""

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NEWEST = 3
"""Newest version of the format that these nodes read."""
MAX_VALUES = 8 * 2**20
"""Most numbers of a tensor in the header."""
_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
_FIRST = {"imagic.e_opt": "text.embeds", "imagic.coarse_latents": "coarse.", "imagic.inverted_noise": "noise."}
"""Header entries of version 1, by the beginnings of their names in later versions."""
LAYER = "lora_unet_"
"""Beginning of the names of the adapter's tensors."""


@dataclass(frozen=True)
class ImagicEdit:
    """An edit without its adapter."""

    text: Mapping[str, Tensor]
    """e_opt: ``embeds`` (T, D) and, for Stable Diffusion XL, ``pooled`` (P,)."""
    coarse: Tensor
    """The photo's low frequencies (C, h, w)."""
    noise: Tensor | None
    """The photo's own noise (C, H, W)."""
    size: tuple[int, int]
    """Width and height of the model's picture."""
    sentences: tuple[str, ...]
    base: str
    """The base model's name."""
    family: str
    """Its kind, such as ``sdxl``."""
    prediction: str
    """What its network predicts: ``epsilon`` or ``v_prediction``."""
    settings: Mapping[str, Any]
    """The recorded settings of sampling."""

    def number(self, name: str, default: float) -> float:
        """A recorded number; the default if it is missing or none."""
        value = self.settings.get(name)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else default


class _OtherModelError(ValueError):
    """Tensors are outside the header, where edits of other kinds of models have them."""


def read_edit(metadata: Mapping[str, str] | None, name: str) -> ImagicEdit:
    """The edit in a file's header strings.

    Raises:
        ValueError: they are no edit's, or of a newer version.
    """
    if not metadata or "imagic.spec" not in metadata:
        raise ValueError(f"{name} is a LoRA but no Imagic edit: its header has no imagic.spec")
    spec = metadata["imagic.spec"]
    if not spec.isdecimal() or not 1 <= int(spec) <= NEWEST:
        raise ValueError(f"{name} has format {spec[:20]}, these nodes read 1 to {NEWEST}; update the nodes")
    try:
        meta, base = json.loads(metadata["imagic.meta"]), json.loads(metadata["imagic.base"])
        if int(spec) == 1:
            entries = {place: json.loads(metadata[key]) for key, place in _FIRST.items() if key in metadata}
        else:
            entries = json.loads(metadata["imagic.tensors"])
        tensors = {place: _tensor(entry) for place, entry in entries.items()}
        source = meta["source"]
        width, height = source["size"] if "size" in source else (source["size_px"], source["size_px"])
        predictions = base["interface"]["denoisers"].values() if "interface" in base else [base["prediction_type"]]
        sentences = [meta["target_prompt"]] if "target_prompt" in meta else meta["sentences"]
        recorded = meta["settings"].get("sample")
        return ImagicEdit(
            text={place[5:]: tensor for place, tensor in tensors.items() if place.startswith("text.")},
            coarse=next(tensor for place, tensor in tensors.items() if place.startswith("coarse.")),
            noise=next((tensor for place, tensor in tensors.items() if place.startswith("noise.")), None),
            size=(int(width), int(height)),
            sentences=tuple(str(sentence) for sentence in sentences),
            base=str(base["source"])[:100],
            family=str(base["family"]),
            prediction=str(next(iter(predictions))),
            settings=recorded if isinstance(recorded, dict) else {},
        )
    except _OtherModelError:
        raise ValueError(
            f"{name} is an edit of a model that these nodes do not know; they take Stable Diffusion 1, 2 and XL"
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, RecursionError, binascii.Error) as error:
        kind = type(error).__name__
        raise ValueError(f"{name} is a damaged Imagic edit ({kind}: {str(error)[:100]}); fetch it again") from error


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    """A tensor of the header, in fp32."""
    if "data" not in entry:
        raise _OtherModelError
    shape = [int(side) for side in entry["shape"]]
    if not 1 <= len(shape) <= 4 or not all(1 <= side <= MAX_VALUES for side in shape) or math.prod(shape) > MAX_VALUES:
        raise ValueError(f"a tensor has the shape {shape[:4]}")
    raw = bytearray(base64.b64decode(entry["data"], validate=True))
    if len(raw) != 2 * math.prod(shape):
        raise ValueError(f"a tensor of the shape {shape} has {len(raw)} bytes")
    tensor = torch.frombuffer(raw, dtype=_TYPES[entry["dtype"]]).reshape(shape).float()
    if not bool(tensor.isfinite().all()):
        raise ValueError("a tensor has NaN or infinity")
    return tensor
