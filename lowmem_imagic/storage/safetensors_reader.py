"""A strict parser of safetensors files that does not trust its input, and needs no torch.

It checks in this order: length, bound, UTF-8, JSON, entries, coverage. It never allocates a size that a file claims.
The safetensors library is not used because it accepts duplicate keys, and because it needs torch or numpy.
"""

import hashlib
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import (
    EditHeaderError,
    EditLayoutError,
    EditTooLargeError,
    NotAnEditFileError,
    TensorDtypeError,
    TensorShapeError,
    TruncatedEditError,
)
from .first_bytes import START_BYTES, kind_of
from .strict_json import load_json

MAX_FILE_BYTES = 2**30
"""Size limit of an edit file, which may come from anyone."""
MAX_HEADER_BYTES = 16 * 2**20
"""Size limit of a header; the library's own limit is 100 MB."""

DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "I16": 2,
    "I32": 4,
    "I64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F16": 2,
    "BF16": 2,
    "F32": 4,
    "F64": 8,
}
"""Bytes of one value, by type name in the format."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a header; its byte range matches its shape."""

    dtype: str
    """Name in the format, as ``F16``."""
    shape: tuple[int, ...]
    """Sizes, outermost first; empty for a scalar."""
    begin: int
    """First byte, counted from the end of the header."""
    end: int
    """One past the last byte."""


@dataclass(frozen=True)
class Container:
    """A parsed file whose header is consistent with its size; tensors are not created yet."""

    metadata: Mapping[str, str]
    """The ``__metadata__`` entries."""
    entries: Mapping[str, Entry]
    """Tensor name to entry."""
    data: memoryview
    """The bytes after the header, covered by the entries without hole or overlap."""

    def raw(self, name: str) -> bytearray:
        """Returns a copy of the named tensor's bytes."""
        entry = self.entries[name]
        return bytearray(self.data[entry.begin : entry.end])

    @property
    def in_canonical_order(self) -> bool:
        """Whether the header's names are in this package's order; the safetensors library shuffles them."""
        return all(list(names) == sorted(names) for names in (self.metadata, self.entries))

    def sha256(self) -> str:
        """Returns the lower-case hex digest of the tensor data."""
        return hashlib.sha256(self.data).hexdigest()


PREFIX_BYTES = 8
"""The header's length, at the start of the file."""


def parse(data: bytes | bytearray | memoryview, *, most_bytes: int = MAX_FILE_BYTES) -> Container:
    """Returns the parsed file, its header checked against its size and every byte accounted for.

    **Memory**: the result refers to `data`; only the header's JSON takes more memory.

    Raises:
        EditFileError: See :func:`parse_head`.
    """
    view = memoryview(data).cast("B")
    head = parse_head(view, len(view), most_bytes=most_bytes)
    return Container(head.metadata, head.entries, view[head_bytes(view, len(view), most_bytes=most_bytes) :])


def head_bytes(data: bytes | memoryview, size: int, *, most_bytes: int = MAX_FILE_BYTES) -> int:
    """Returns the number of bytes before a file's tensors, from its first ten bytes.

    Args:
        data: the file's beginning; with `START_BYTES` of it, messages can name other kinds of files.
        size: bytes of the whole file.
        most_bytes: size limit of the file.

    Raises:
        EditTooLargeError: The file or the header is above the caps.
        TruncatedEditError: The file ends before its header does.
        NotAnEditFileError: The bytes are not safetensors.
    """
    if size > most_bytes:
        raise EditTooLargeError(f"the file has {size} bytes, at most {most_bytes} are allowed")
    if len(data) < PREFIX_BYTES + 2:
        raise TruncatedEditError(f"the file has {size} bytes, expected a length of 8 bytes and a header")
    length = int.from_bytes(data[:PREFIX_BYTES], "little")
    if bytes(data[PREFIX_BYTES : PREFIX_BYTES + 2]) != b'{"':
        kind = kind_of(bytes(data[:START_BYTES]))
        found = f"this is {kind}, not an edit file" if kind else "this is not an edit file"
        raise NotAnEditFileError(f"{found}; expected a .safetensors file that train or edit wrote")
    if length > MAX_HEADER_BYTES:
        raise EditTooLargeError(f"the header claims {length} bytes, at most {MAX_HEADER_BYTES} are allowed")
    if length > size - PREFIX_BYTES:
        raise TruncatedEditError(f"the header claims {length} bytes, the file ends after {size - PREFIX_BYTES}")
    return PREFIX_BYTES + length


def parse_head(data: bytes | memoryview, size: int, *, most_bytes: int = MAX_FILE_BYTES) -> Container:
    """Returns the parsed header, checked against the size of the whole file; `data` of the result is empty.

    Args:
        data: the file's beginning, at least `head_bytes` of it.
        size: bytes of the whole file.
        most_bytes: size limit of the file.

    Raises:
        EditTooLargeError: The file or the header is above the caps.
        TruncatedEditError: The file ends before its header or its tensors do.
        NotAnEditFileError: The bytes are not safetensors.
        EditHeaderError: The header is not a JSON object of the right form.
        TensorDtypeError, TensorShapeError: A tensor of unknown type, or whose size contradicts its shape.
        EditLayoutError: Tensors overlap, leave holes, or are followed by bytes.
    """
    end = head_bytes(data, size, most_bytes=most_bytes)
    try:
        text = str(data[PREFIX_BYTES:end], "utf-8")
    except UnicodeDecodeError as error:
        raise EditHeaderError(f"the header is not UTF-8 at its byte {error.start}") from error
    header = load_json(text, "the header")
    if not isinstance(header, dict):
        raise EditHeaderError("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise EditHeaderError("__metadata__: expected an object whose values are all strings")
    entries = {name: _entry(name, value, most_bytes) for name, value in header.items()}
    _check_coverage(entries, size - end)
    return Container(metadata, entries, memoryview(b""))


def _entry(name: str, value: Any, most_bytes: int) -> Entry:
    """Returns the header's entry for one tensor, its byte range checked against shape and type."""
    shown = reprlib.repr(name)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise EditHeaderError(f"tensor {shown}: expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise TensorDtypeError(f"tensor {shown}: found type {reprlib.repr(dtype)}, expected a safetensors type")
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise EditHeaderError(f"tensor {shown}: {key} is {reprlib.repr(numbers)}, expected integers from 0")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise EditLayoutError(f"tensor {shown}: data_offsets are {reprlib.repr(offsets)}, expected [begin, end]")
    # Zeros count as ones, because torch computes strides even for an empty tensor, and they may overflow.
    if len(shape) > 8 or math.prod(max(n, 1) for n in shape) > most_bytes:
        raise TensorShapeError(f"tensor {shown}: shape {reprlib.repr(shape)} is beyond any file of allowed size")
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise TensorShapeError(
            f"tensor {shown}: {dtype} of shape {shape} takes {expected} bytes, "
            f"its data_offsets span {offsets[1] - offsets[0]}"
        )
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _check_coverage(entries: Mapping[str, Entry], size: int) -> None:
    """Guarantees that the entries cover `size` bytes exactly once."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            problem = "overlaps the one before" if entry.begin < position else "leaves a hole before it"
            raise EditLayoutError(
                f"tensor {reprlib.repr(name)} {problem}: it begins at byte {entry.begin}, expected {position}"
            )
        position = entry.end
    if position > size:
        raise TruncatedEditError(f"the tensors need {position} bytes, the file ends after {size} of them")
    if position < size:
        raise EditLayoutError(f"{size - position} stray bytes follow the last tensor")
