"""Reads the tensors of safetensors files; 8-bit weights are multiplied by their scales.

8-bit weights are stored with separate scales, under many names. A weight is its stored number times its scale, and is
never read without it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import IncompleteModelError, WrongFamilyError
from ...storage.regular_files import open_regular
from .reading import check_regular

MAX_HEADER_BYTES = 16 * 2**20
"""Size limit of a header: 3,000 tensors take 400 kB, pictures and recipes in the metadata a few MB."""
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Types of the tensors that are read, by name in the format."""
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_SCALE_TYPES = {"F64", "F32", "F16", "BF16"}
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv", "weight_scales", "weight.scale", "SCB")
"""Endings of the names of scales: of ComfyUI (two spellings), of compressed-tensors and TensorRT, of DeepSeek's blocks
(also multiplied, in spite of its name), and of bitsandbytes' int8."""
_BLOCK = 128
"""Side of a block of weights with one scale, if the scales do not divide the weight evenly."""
_OF_ACTIVATIONS = ("input_scale", "scale_input", "output_scale", "scale_output")
"""Scales of activations, for programs that compute in 8 bits; the weights do not depend on them."""
_NOTES = ("comfy_quant", "scaled_fp8", "weight_format")
"""Notes about the format beside the weights."""
_COMFY_FORMATS = {"float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_blockwise"}
_FOREIGN = {
    "GPTQ or AWQ": re.compile(r"\.(qweight|qzeros|g_idx|wscales|wzeros)$"),
    "bitsandbytes 4-bit": re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.[\w.]+)$"),
    "quanto": re.compile(r"\._(data|scale|shift)$"),
    "a format with a zero point": re.compile(r"\.(weight_zero_point|zero_point|weight_shift)$"),
    "NVFP4 or MXFP8": re.compile(r"\.(weight_scale_2|weight_scalar|block_scale|weight_packed)$"),
}
"""Unsupported formats, by the names of their tensors."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, not read yet."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Its first byte, counted from the start of the file."""


def read_header(path: Path, name: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file and its metadata; `name` is model and file, for messages.

    Raises:
        IncompleteModelError: the file is missing, not a regular file, not safetensors, or cut short.
    """
    size = check_regular(path, name)
    broken = IncompleteModelError(f"{name} is no safetensors file or cut short; download it again")
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if size < 8 or header > size - 8:
            raise broken
        if header > MAX_HEADER_BYTES:
            raise IncompleteModelError(f"{name} has a header of {header} bytes, expected at most {MAX_HEADER_BYTES}")
        # The library checks everything, but does not say where a tensor begins.
        with safe_open(path, framework="pt"):
            pass
        with open_regular(path) as (file, _):
            contents = json.loads(file.read(8 + header)[8:])
        metadata = contents.pop("__metadata__", None) or {}
        return {
            key: Entry(path, part["dtype"], tuple(part["shape"]), 8 + header + part["data_offsets"][0])
            for key, part in contents.items()
        }, metadata
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise broken from error


class Weights:
    """Tensors by name, each read on access; 8-bit weights with their scales applied.

    Args:
        entries: all tensors of one part of a model, by name.
        label: the model and the part, for messages.

    Raises:
        WrongFamilyError: the weights have an unsupported format, or 8 bits without scales.
    """

    def __init__(self, entries: Mapping[str, Entry], label: str) -> None:
        self._entries, self._label = entries, label
        self._scales: dict[str, str] = {}
        beside = {name for name in entries if name.endswith(_OF_ACTIVATIONS)}
        for name in entries:
            for kind, pattern in _FOREIGN.items():
                if pattern.search(name):
                    self._refuse(f"weights of {kind} ({name[:100]})")
            if name.rpartition(".")[2] in _NOTES:
                self._check_note(name)
                beside.add(name)
            suffix = next((suffix for suffix in SCALES if name.endswith(f".{suffix}")), None)
            weight = f"{name.removesuffix(suffix)}weight" if suffix else ""
            if weight in entries:
                self._add_scale(weight, name)
                beside.add(name)
        self.names = [name for name in entries if name not in beside]
        for name in self.names:
            dtype = entries[name].dtype
            if dtype == "I8" and name not in self._scales:
                self._refuse(f"{name[:100]} in 8-bit integers without a scale")
            if dtype not in _FLOATS | {"I8"} and not (
                dtype in ("I64", "I32") and name.endswith(("position_ids", "num_batches_tracked"))
            ):
                self._refuse(f"{name[:100]} in the type {dtype}")

    def _add_scale(self, weight: str, scale: str) -> None:
        if weight in self._scales:
            self._refuse(f"two scales for {weight[:100]}, {self._scales[weight][-40:]} and {scale[-40:]}")
        if self._entries[scale].dtype not in _SCALE_TYPES:
            self._refuse(f"{scale[:100]} in the type {self._entries[scale].dtype}")
        self._scales[weight] = scale
        # Checks the shapes now, before tensors are read.
        self._blocks(weight)

    def _blocks(self, weight: str) -> tuple[int, int] | None:
        """Rows and columns of the weight for each number of its scale; None for one scale in all or per row."""
        shape, scale = self.shape(weight), self.shape(self._scales[weight])
        numbers = math.prod(scale)
        if numbers == 1 or (len(shape) > 0 and numbers == shape[0] == max(scale)):
            return None
        if len(shape) == len(scale) == 2:
            if shape[0] % scale[0] == 0 == shape[1] % scale[1]:
                return shape[0] // scale[0], shape[1] // scale[1]
            if scale == tuple(-(-side // _BLOCK) for side in shape):
                return _BLOCK, _BLOCK
        self._refuse(f"{self._scales[weight][:100]} of shape {list(scale)} for a weight of shape {list(shape)}")

    def _refuse(self, problem: str) -> NoReturn:
        raise WrongFamilyError(
            f"{self._label} has {problem}; expected plain weights (fp32, fp16, bf16, fp8), or 8-bit weights with a "
            f"scale each ({', '.join(SCALES[:3])} or SCB); take the model in half precision"
        )

    def _check_note(self, name: str) -> None:
        """Checks that ComfyUI's note about a layer names a supported format.

        Raises:
            WrongFamilyError: the format is not supported.
        """
        if not name.endswith("comfy_quant") or math.prod(self.shape(name)) > 4096:
            return
        try:
            text = bytes(self._read(name).to(torch.uint8).flatten().tolist()).decode()
            kind = str(json.loads(text)["format"])
        except (ValueError, KeyError, TypeError, RecursionError):
            kind = "unreadable"
        if kind not in _COMFY_FORMATS:
            self._refuse(f"weights in ComfyUI's format {kind[:40]!r} ({name[:100]})")

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._entries[name].shape

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`; in fp32 if it was scaled or stored in 8 bits.

        Raises:
            IncompleteModelError: the tensor cannot be read, or its scale is not finite.
        """
        tensor = self._read(name)
        if name not in self._scales:
            return tensor.float() if self._entries[name].dtype.startswith("F8") else tensor
        scale = self._read(self._scales[name]).float()
        if not scale.isfinite().all():
            raise IncompleteModelError(f"{self._label}: {self._scales[name][:100]} is not finite; download it again")
        if self._scales[name].endswith(".SCB"):
            # bitsandbytes stores the largest absolute value of a row, which is 127 in int8.
            scale = scale / 127
        blocks = self._blocks(name)
        if blocks is None:
            return tensor.float() * (
                scale.reshape(-1, *[1] * (tensor.dim() - 1)) if tensor.dim() else scale.reshape(())
            )
        spread = scale.repeat_interleave(blocks[0], 0).repeat_interleave(blocks[1], 1)
        return tensor.float() * spread[: tensor.shape[0], : tensor.shape[1]]

    def _read(self, name: str) -> Tensor:
        """The stored tensor, in memory of its own.

        The file is not mapped into memory: mapped pages would count as this process's until the last tensor is gone,
        and a file that shrinks under a map would end the process.
        """
        entry = self._entries[name]
        kind = _TYPES[entry.dtype]
        buffer = torch.empty(math.prod(entry.shape) * kind.itemsize, dtype=torch.uint8)
        try:
            with open_regular(entry.path) as (file, _):
                file.seek(entry.begin)
                if file.readinto(buffer.numpy().data) < len(buffer):
                    raise EOFError
        except (OSError, ValueError, EOFError) as error:
            raise IncompleteModelError(f"{self._label}: {name[:100]} cannot be read; download it again") from error
        return buffer.view(kind).reshape(entry.shape)
