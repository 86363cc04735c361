"""Canonical safetensors bytes: equal tensors and metadata give equal files, on any machine.

The safetensors library orders headers at random, so two of its saves differ. Files written here are ordinary
safetensors files for other programs.

Canonical form:

- header: compact JSON, UTF-8 (no ``\\u`` escapes), keys sorted at every level, space-padded to 8 bytes;
- tensor data: widest element first, then dtype name, then tensor name, so that every tensor is aligned and
  the order equals the library's.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import EditTooLargeError
from .safetensors_reader import MAX_FILE_BYTES, MAX_HEADER_BYTES, Container
from .strict_json import dump_json

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, hash_key: str | None = None) -> bytes:
    """Returns the canonical file for these tensors and this metadata, see `chunks_of`."""
    return b"".join(chunks_of(tensors, metadata, hash_key=hash_key))


def chunks_of(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    hash_key: str | None = None,
    most_bytes: int = MAX_FILE_BYTES,
) -> list[bytes | bytearray | memoryview]:
    """Returns the canonical file for these tensors and this metadata, in parts.

    **Memory**: a part is a view of its tensor, and a copy only of a tensor that is not contiguous.

    Args:
        tensors: CPU tensors of any layout and shape.
        metadata: Header strings.
        hash_key: Header key under which ``0x`` + SHA-256 of the tensor data is added.
        most_bytes: Largest file; the reader has to be given the same.

    Raises:
        EditTooLargeError: The file or its header would be above the caps of the reader.
    """

    def rank(name: str) -> tuple[int, str, str]:
        dtype = tensors[name].dtype
        return (-dtype.itemsize, _DTYPE_NAMES[dtype], name)

    ordered = sorted(tensors, key=rank)
    total = sum(tensors[name].nbytes for name in ordered)
    if total > most_bytes:
        raise EditTooLargeError(f"the tensors take {total} bytes, at most {most_bytes} are allowed")
    chunks = [_view(tensors[name]) for name in ordered]
    header: dict[str, Any] = {}
    digest = hashlib.sha256()
    begin = 0
    for name, chunk in zip(ordered, chunks, strict=True):
        digest.update(chunk)
        header[name] = {
            "dtype": _DTYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, begin := begin + len(chunk)],
        }
    added = {} if hash_key is None else {hash_key: "0x" + digest.hexdigest()}
    header["__metadata__"] = {**metadata, **added}
    text = dump_json(header, "the header").encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES or 8 + len(text) + total > most_bytes:
        raise EditTooLargeError(
            f"a header of {len(text)} bytes and {total} bytes of tensors, "
            f"at most {MAX_HEADER_BYTES} and {most_bytes} in all are allowed"
        )
    return [len(text).to_bytes(8, "little"), text, *chunks]


def tensor_bytes(tensor: Tensor) -> bytearray:
    """Returns the values of a CPU tensor, row by row, in the machine's (little-endian) byte order."""
    return bytearray(_view(tensor))


def _view(tensor: Tensor) -> memoryview:
    """The bytes of `tensor_bytes`, not copied if they lie so in memory."""
    raw = tensor.detach().contiguous().reshape(-1)
    return raw.view(torch.uint8).numpy().data if tensor.nbytes else memoryview(b"")


def bytes_tensor(buffer: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Returns a tensor over `buffer`, whose size must match type and shape exactly."""
    if not buffer:
        return torch.empty(shape, dtype=_DTYPES[dtype])
    return torch.frombuffer(buffer, dtype=_DTYPES[dtype]).reshape(shape)


def container_tensor(container: Container, name: str) -> Tensor:
    """Returns a copy of the named tensor, on the CPU, with the type and shape of its entry."""
    entry = container.entries[name]
    # `raw` copies into a bytearray, because torch warns about (and never protects) read-only buffers.
    return bytes_tensor(container.raw(name), entry.dtype, entry.shape)
