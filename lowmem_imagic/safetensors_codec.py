"""Canonical safetensors bytes, and a strict parser that trusts nothing it reads.

The safetensors library is not used here for two reasons: its header order is random, so two identical saves
differ, and it accepts duplicate keys. Files written here are ordinary safetensors files for everyone else.

Canonical form, which makes bytes reproducible:

- header: compact JSON, UTF-8 (no ``\\u`` escapes), keys sorted at every level, space-padded to 8 bytes;
- tensor data: widest element first, then dtype name, then tensor name, so that every tensor is aligned and
  the order is the one the library writes.

The parser goes outward in: length, bound, UTF-8, JSON, entries, coverage. Nothing is allocated from a claimed
size; tensors are made only from bytes that are there.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem_imagic.errors import (
    EditHeaderError,
    EditLayoutError,
    EditTooLargeError,
    NotAnEditFileError,
    TensorDtypeError,
    TensorShapeError,
    TruncatedEditError,
)

MAX_FILE_BYTES = 2**30
"""Largest file that is read or written."""
MAX_HEADER_BYTES = 16 * 2**20
"""Largest header; the library's own limit is 100 MB."""
MAX_JSON_DEPTH = 16
"""Deepest nesting of objects and arrays in one JSON text."""
MAX_JSON_TOKENS = 1_000_000
"""Most quotes, escapes, brackets and commas in one JSON text: bounds the time and memory of parsing it."""

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
_JSON_TOKEN = re.compile(r'["\[\]{},]|\\.', re.DOTALL)
# C0 and C1 controls except tab, line feed and carriage return, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Entry:
    """What a header says about one tensor; its byte range is known to match its shape."""

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
    """A parsed file whose header is consistent with its size; no tensor has been made yet."""

    metadata: Mapping[str, str]
    """The ``__metadata__`` entries."""
    entries: Mapping[str, Entry]
    """Tensor name to entry."""
    data: memoryview
    """The bytes after the header, covered by the entries without hole or overlap."""

    def tensor(self, name: str) -> Tensor:
        """Returns a copy of the named tensor, on the CPU, in the type and shape its entry says."""
        entry = self.entries[name]
        # A bytearray, because torch warns about (and never protects) read-only buffers.
        return bytes_tensor(bytearray(self.data[entry.begin : entry.end]), entry.dtype, entry.shape)

    def sha256(self) -> str:
        """Returns the lower-case hex digest of the tensor data."""
        return hashlib.sha256(self.data).hexdigest()


def serialize(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, hash_key: str | None = None
) -> bytes:
    """Returns the one canonical file for these tensors and this metadata.

    Args:
        tensors: CPU tensors of any layout and shape.
        metadata: Header strings.
        hash_key: Header key under which ``0x`` + SHA-256 of the tensor data is added.

    Raises:
        EditTooLargeError: The file or its header would be above the caps of the reader.
    """

    def rank(name: str) -> tuple[int, str, str]:
        dtype = tensors[name].dtype
        return (-dtype.itemsize, _DTYPE_NAMES[dtype], name)

    ordered = sorted(tensors, key=rank)
    total = sum(tensors[name].nbytes for name in ordered)
    if total > MAX_FILE_BYTES:
        raise EditTooLargeError(f"the tensors take {total} bytes, at most {MAX_FILE_BYTES} are allowed")
    chunks = [tensor_bytes(tensors[name]) for name in ordered]
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
    if len(text) > MAX_HEADER_BYTES or 8 + len(text) + total > MAX_FILE_BYTES:
        raise EditTooLargeError(
            f"a header of {len(text)} bytes and {total} bytes of tensors, "
            f"at most {MAX_HEADER_BYTES} and {MAX_FILE_BYTES} in all are allowed"
        )
    return b"".join((len(text).to_bytes(8, "little"), text, *chunks))


def tensor_bytes(tensor: Tensor) -> bytearray:
    """Returns the values of a CPU tensor, row by row, little-endian as the machine."""
    buffer = bytearray(tensor.nbytes)
    if buffer:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        torch.frombuffer(buffer, dtype=torch.uint8).copy_(raw)
    return buffer


def bytes_tensor(buffer: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Returns a tensor that lives in `buffer`, which has exactly the bytes that type and shape need."""
    if not buffer:
        return torch.empty(shape, dtype=_DTYPES[dtype])
    return torch.frombuffer(buffer, dtype=_DTYPES[dtype]).reshape(shape)


def parse(data: bytes | bytearray | memoryview) -> Container:
    """Returns the parsed file, its header checked against its size and every byte accounted for.

    **Memory**: the result refers to `data`; beyond it, what the header's JSON takes.

    Raises:
        EditTooLargeError: The file or the header is above the caps.
        TruncatedEditError: The file ends before its header or its tensors do.
        NotAnEditFileError: The bytes are not safetensors.
        EditHeaderError: The header is not a JSON object of the right form.
        TensorDtypeError, TensorShapeError: A tensor of unknown type, or whose size contradicts its shape.
        EditLayoutError: Tensors overlap, leave holes, or are followed by bytes.
    """
    view = memoryview(data).cast("B")
    if len(view) > MAX_FILE_BYTES:
        raise EditTooLargeError(f"the file has {len(view)} bytes, at most {MAX_FILE_BYTES} are allowed")
    if len(view) < 10:
        raise TruncatedEditError(f"the file has {len(view)} bytes, expected a length of 8 bytes and a header")
    length = int.from_bytes(view[:8], "little")
    if bytes(view[8:10]) != b'{"':
        raise NotAnEditFileError("not a safetensors file: the ninth byte does not begin a JSON header")
    if length > MAX_HEADER_BYTES:
        raise EditTooLargeError(f"the header claims {length} bytes, at most {MAX_HEADER_BYTES} are allowed")
    if length > len(view) - 8:
        raise TruncatedEditError(f"the header claims {length} bytes, the file ends after {len(view) - 8}")
    try:
        text = str(view[8 : 8 + length], "utf-8")
    except UnicodeDecodeError as error:
        raise EditHeaderError(f"the header is not UTF-8 at its byte {error.start}") from error
    header = load_json(text, "the header")
    if not isinstance(header, dict):
        raise EditHeaderError("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise EditHeaderError("__metadata__: expected an object whose values are all strings")
    entries = {name: _entry(name, value) for name, value in header.items()}
    body = view[8 + length :]
    _check_coverage(entries, len(body))
    return Container(metadata, entries, body)


def _entry(name: str, value: Any) -> Entry:
    """Returns the header's entry for one tensor, its byte range checked against shape and type."""
    shown = reprlib.repr(name)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise EditHeaderError(f"tensor {shown}: expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise TensorDtypeError(
            f"tensor {shown}: found type {reprlib.repr(dtype)}, expected a safetensors type"
        )
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise EditHeaderError(
                f"tensor {shown}: {key} is {reprlib.repr(numbers)}, expected integers from 0"
            )
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise EditLayoutError(
            f"tensor {shown}: data_offsets are {reprlib.repr(offsets)}, expected [begin, end]"
        )
    # Counting zeros as ones, because torch computes strides, which may overflow, even for an empty tensor.
    if len(shape) > 8 or math.prod(max(n, 1) for n in shape) > MAX_FILE_BYTES:
        raise TensorShapeError(
            f"tensor {shown}: shape {reprlib.repr(shape)} is beyond any file of allowed size"
        )
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
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
            what = "overlaps the one before" if entry.begin < position else "leaves a hole before it"
            raise EditLayoutError(
                f"tensor {reprlib.repr(name)} {what}: it begins at byte {entry.begin}, expected {position}"
            )
        position = entry.end
    if position > size:
        raise TruncatedEditError(f"the tensors need {position} bytes, the file ends after {size} of them")
    if position < size:
        raise EditLayoutError(f"{size - position} stray bytes follow the last tensor")


def dump_json(value: object, where: str) -> str:
    """Returns compact JSON with sorted keys that :func:`load_json` is certain to accept.

    Raises:
        EditHeaderError: `value` is too deep or too long; `where` names it in the message.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))
    _check_extent(text, where)
    return text


def load_json(text: str, where: str) -> Any:
    """Returns the value of a JSON text without duplicate keys, non-finite numbers or integers above 64 bits.

    Raises:
        EditHeaderError: Anything else; `where` names the text in the message.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise EditHeaderError(f"{where}: key {reprlib.repr(twice)} occurs twice")
        return found

    def finite(digits: str) -> float:
        if math.isinf(number := float(digits)):
            raise EditHeaderError(f"{where}: number {reprlib.repr(digits)} is too large")
        return number

    def bounded(digits: str) -> int:
        if len(digits) > 20 or abs(number := int(digits)) >= 2**64:
            raise EditHeaderError(f"{where}: integer {reprlib.repr(digits)} is too large")
        return number

    def refuse(name: str) -> None:
        raise EditHeaderError(f"{where}: found {name}, expected finite numbers")

    _check_extent(text, where)
    try:
        return json.loads(
            text, object_pairs_hook=unique, parse_float=finite, parse_int=bounded, parse_constant=refuse
        )
    except ValueError as error:
        raise EditHeaderError(f"{where}: not valid JSON ({error})") from error


def plain_json(value: object, where: str, depth: int = 1) -> Any:
    """Returns a deep copy of `value` made only of dict, list, str, int, float, bool and None.

    Args:
        value: Nested mappings, lists and tuples of JSON-able scalars.
        where: Names the value in messages; parts are appended to it.
        depth: Nesting level that `value` itself has in the final JSON text.

    Raises:
        EditHeaderError: A part is none of these, not finite, not printable, or nested too deeply.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if _UNPRINTABLE.search(value):
            raise EditHeaderError(f"{where}: found control characters in {reprlib.repr(str.__str__(value))}")
        return str.__str__(value)  # the text itself, also for string enumerations
    if isinstance(value, int | float):
        if not abs(value) <= (2**64 - 1 if isinstance(value, int) else sys.float_info.max):
            raise EditHeaderError(f"{where}: found a number that is not finite or too large")
        return int(value) if isinstance(value, int) else float(value)
    if depth > MAX_JSON_DEPTH:
        raise EditHeaderError(f"{where}: nested more than {MAX_JSON_DEPTH} levels deep")
    if isinstance(value, list | tuple):
        return [plain_json(part, f"{where}[{i}]", depth + 1) for i, part in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or len(key) > 200 or _UNPRINTABLE.search(key):
                raise EditHeaderError(
                    f"{where}: key {reprlib.repr(key)} is not printable text of up to 200 characters"
                )
        return {
            str.__str__(key): plain_json(part, f"{where}.{key}", depth + 1) for key, part in value.items()
        }
    raise EditHeaderError(
        f"{where}: found a {type(value).__name__}, expected numbers, text, lists or mappings"
    )


def _check_extent(text: str, where: str) -> None:
    """Guarantees bounded depth and size before the JSON parser, which recurses and allocates, runs."""
    depth = 0
    inside_string = False
    for count, match in enumerate(_JSON_TOKEN.finditer(text)):
        token = match.group()
        if token == '"':
            inside_string = not inside_string
        elif not inside_string and token in "[{":
            depth += 1
        elif not inside_string and token in "]}":
            depth -= 1
        if depth > MAX_JSON_DEPTH:
            raise EditHeaderError(f"{where}: nested more than {MAX_JSON_DEPTH} levels deep")
        if count >= MAX_JSON_TOKENS:
            raise EditHeaderError(f"{where}: more than {MAX_JSON_TOKENS} JSON tokens")
