"""The header of an edit file, read strictly and without torch; the format is described in `edits.file`."""

import contextlib
import os
import re
import reprlib
import struct
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from ..errors import (
    EditChangedError,
    EditFileError,
    EditHeaderError,
    EditNotFoundError,
    MissingTensorError,
    NotAnEditFileError,
    TensorDtypeError,
    TensorShapeError,
    UnknownTensorError,
    UnsupportedEditVersionError,
)
from ..plain_text import shown
from ..storage.regular_files import open_regular
from ..storage.safetensors_reader import PREFIX_BYTES, Container, head_bytes, parse, parse_head
from ..storage.strict_json import load_json
from . import checks
from .identity import BaseIdentity, SourcePicture
from .meta import META_KEYS, check_alpha, check_factor_shapes, check_title, checked_meta

SPEC_VERSION = 1
"""Version of the format written here; any change that an older reader would misread or drop raises it."""

_TENSOR = re.compile(r"(lora_unet_[a-z0-9_]{1,200})\.(lora_down\.weight|lora_up\.weight|alpha)")
PARTS = ("lora_down.weight", "lora_up.weight", "alpha")
_FLOATS = {"F16", "BF16", "F32"}
HASH_KEY = "modelspec.hash_sha256"
_FOREIGN = "sshs_"
"""What keys begin with that sd-scripts' tools write, and this package does not."""
NOISE_KEY = "imagic.inverted_noise"
"""The only key of this format that may be missing."""
MAX_SIDE = 2**23
"""Longest side of a tensor in the header."""


@dataclass(frozen=True)
class Header:
    """What the header of an edit file says, its own structure checked."""

    container: Container
    """The parsed file; no tensor has been made yet."""
    layers: list[str]
    """Adapted layers, sorted."""
    base: BaseIdentity
    source: SourcePicture
    meta: dict[str, Any]
    """``imagic.meta`` without ``source``, its values checked."""
    title: str
    created: str | None
    license: str | None


@contextlib.contextmanager
def naming_its_writer(container: Container) -> Iterator[None]:
    """Adds to errors on an edit file that another program has written it, where its header shows that."""
    try:
        yield
    except (EditChangedError, NotAnEditFileError, UnsupportedEditVersionError):
        raise
    except EditFileError as error:
        if container.in_canonical_order:
            raise
        raise type(error)(f"{error}; another program has written this file anew, so use the original file") from error


def read_header(container: Container) -> Header:
    """Returns the header of a parsed file, or refuses it with an error that names what is wrong.

    Raises:
        EditFileError: One subclass per way to be wrong; nothing else is raised for any bytes.
    """
    check_version(container)
    metadata = container.metadata
    known = {"imagic.spec", "imagic.meta", "imagic.base", "imagic.e_opt", "imagic.coarse_latents", NOISE_KEY}
    for key in sorted(name for name in metadata if name.startswith("imagic.") and name not in known):
        raise EditHeaderError(f"{reprlib.repr(key)}: not a key of format {SPEC_VERSION}")
    layers = layer_names(container)
    base = BaseIdentity(**fields_of(metadata, "imagic.base", BaseIdentity.__dataclass_fields__.keys()))
    meta = fields_of(metadata, "imagic.meta", META_KEYS | {"source"})
    source = exactly(meta.pop("source"), "imagic.meta source", SourcePicture.__dataclass_fields__.keys())
    title = entry_of(metadata, "modelspec.title")
    created, license_name = metadata.get("modelspec.date"), metadata.get("modelspec.license")
    check_title(title, license_name, created)
    return Header(container, layers, base, SourcePicture(**source), checked_meta(meta), title, created, license_name)


def check_hash(container: Container) -> None:
    """Guarantees that the tensor data are those the file was written with.

    Raises:
        EditChangedError: They are not; the message says whether another program wrote them.
    """
    if entry_of(container.metadata, HASH_KEY) == "0x" + container.sha256():
        return
    found = f"{HASH_KEY}: does not match the tensor data"
    if not container.in_canonical_order or any(key.startswith(_FOREIGN) for key in container.metadata):
        raise EditChangedError(
            f"{found}; another program has written this file anew, as tools that resize, merge or convert a LoRA do; "
            "its adapter is no longer that of the edit, so use the original file (as a LoRA elsewhere, this one works)"
        )
    raise EditChangedError(f"{found}; the file is damaged, fetch it again")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Returns the bytes of an edit file.

    Raises:
        EditNotFoundError: No such file, not a regular file (a pipe is refused, not waited for), not readable.
        EditTooLargeError: Above the cap, by its size, before anything is read.
        EditFileError: The header is not one of an edit file; then the tensors are not read.
    """
    try:
        with open_regular(path) as (file, size):
            head = _read_head(file, path, size)
            # One byte more, to notice a file that grows meanwhile.
            return head + file.read(size - len(head) + 1)
    except OSError as error:
        raise EditNotFoundError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a NUL character in the path
        raise EditNotFoundError(f"{str(path)!r}: {error}") from error


def _read_head(file: BinaryIO, path: str | os.PathLike[str], size: int) -> bytes:
    """Returns the file's bytes before its tensors, checked to be an edit's: a gigabyte of anything else is not read.

    Raises:
        EditFileError: They are not; messages begin with the path.
    """
    try:
        head = file.read(PREFIX_BYTES + 2)
        head += file.read(head_bytes(head, size) - len(head))
        container = parse_head(head, size)
        with naming_its_writer(container):
            check_version(container)
            layer_names(container)
        return head
    except EditFileError as error:
        raise type(error)(f"{path}: {error}") from error


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns what an edit file says, see `contents`.

    Raises:
        EditFileError: See :func:`read_bytes` and :func:`read_header`; messages begin with the path.
    """
    data = read_bytes(path)
    try:
        return contents(data)
    except EditFileError as error:
        raise type(error)(f"{path}: {error}") from error


def contents(data: bytes) -> dict[str, Any]:
    """Returns what a whole file says, as plain values; names, values and hash are checked, no tensor is made.

    Raises:
        EditFileError: See :func:`read_header`.
    """
    container = parse(data)
    with naming_its_writer(container):
        header = read_header(container)
        check_hash(container)
        embedding = fields_of(container.metadata, "imagic.e_opt", {"dtype", "shape", "data"})
        shape = shape_of(embedding["shape"], "imagic.e_opt", ("T", "D"))
        checks.text(embedding["dtype"], "imagic.e_opt dtype", 10)
    entries = header.container.entries
    ranks = sorted({entries[f"{layer}.lora_down.weight"].shape[0] for layer in header.layers})
    return {
        "sentence": header.meta["target_prompt"],
        "base": asdict(header.base),
        "base_weights": header.meta["base_weights"],
        "adapter": {
            "layers": len(header.layers),
            "ranks": ranks,
            "alphas": sorted({_alpha(header.container, layer) for layer in header.layers}),
            "bytes": len(header.container.data),
        },
        "embedding": {"shape": shape, "dtype": embedding["dtype"]},
        "seed": header.meta["seed"],
        "etas": list(header.meta["etas"]),
        "eta_default": header.meta["eta_default"],
        "source": asdict(header.source),
        "settings": header.meta["settings"],
        "measured": header.meta["measured"],
        "versions": header.meta["versions"],
        "title": header.title,
        "created": header.created,
        "license": header.license,
        "format": int(header.container.metadata["imagic.spec"]),
        "file_bytes": len(data),
    }


def summary(contents: Mapping[str, Any]) -> str:
    """Returns the lines that show :func:`describe`'s result to a person: no value can forge a line (see `shown`)."""
    base, source, adapter = contents["base"], contents["source"], contents["adapter"]
    revision = f" at {base['revision']}" if base["revision"] else ""
    lines = {
        "sentence": contents["sentence"],
        "photo": f"{source['width_px']} x {source['height_px']} px, sha256 {source['sha256'][:12]}...",
        "base": f"{base['source']}{revision} ({base['family']}, {base['prediction_type']}), "
        f"{contents['base_weights']} while training",
        "adapter": f"rank {', '.join(map(str, adapter['ranks']))} on {adapter['layers']} layers{_scaled(adapter)}",
        "embedding": " x ".join(str(n) for n in contents["embedding"]["shape"]),
        "etas": ", ".join(f"{eta:g}" for eta in contents["etas"]),
        "seed": contents["seed"],
        "format": f"{contents['format']}, {contents['file_bytes']} bytes",
    }
    settings = contents["settings"]
    for stage in ("embed", "finetune"):
        if isinstance(settings.get(stage), dict):
            names = ("steps", "draws", "learning_rate", "adapt")
            values = [f"{name} {settings[stage][name]}" for name in names if name in settings[stage]]
            lines[stage] = ", ".join(values)
    return "\n".join(f"{name + ':':<11}{shown(str(value))}" for name, value in lines.items())


def _scaled(adapter: Mapping[str, Any]) -> str:
    """Returns a remark on adapters that other programs misread, "" for those that they do not."""
    if len(adapter["alphas"]) == 1:
        return ""
    return " (alphas differ by layer: diffusers 0.33 to 0.42 scales some of them wrongly, this program does not)"


def _alpha(container: Container, layer: str) -> float:
    """Returns a layer's alpha, checked."""
    name = f"{layer}.alpha"
    raw, dtype = bytes(container.raw(name)), container.entries[name].dtype
    if dtype == "BF16":  # the upper half of an F32
        raw, dtype = b"\0\0" + raw, "F32"
    [value] = struct.unpack("<f" if dtype == "F32" else "<e", raw)
    check_alpha(value, name)
    return float(value)


def check_version(container: Container) -> None:
    """Guarantees that the file is an edit of this version of the format."""
    metadata = container.metadata
    if not any(key.startswith("imagic.") for key in metadata):
        what = "a LoRA" if any("lora" in name for name in container.entries) else "a safetensors file"
        raise NotAnEditFileError(f"this is {what} but not an edit: its header has no imagic.* entries")
    spec = entry_of(metadata, "imagic.spec")
    checks.require(re.fullmatch("[1-9][0-9]{0,5}", spec), "imagic.spec", spec, "a version number")
    if int(spec) > SPEC_VERSION:
        raise UnsupportedEditVersionError(
            f"imagic.spec: written in format {spec}, expected at most {SPEC_VERSION}; upgrade lowmem-imagic"
        )


def layer_names(container: Container) -> list[str]:
    """Returns the layers of the adapter, each known to have its three tensors in allowed types and shapes."""
    layers = set()
    for name, entry in container.entries.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise UnknownTensorError(f"tensor {reprlib.repr(name)}: not part of an edit file")
        if entry.dtype not in _FLOATS:
            raise TensorDtypeError(f"tensor {name}: found type {entry.dtype}, expected one of F16, BF16, F32")
        layers.add(match[1])
    for layer in sorted(layers):
        for part in PARTS:
            if f"{layer}.{part}" not in container.entries:
                raise MissingTensorError(f"tensor {layer}.{part} is missing")
        down, up, alpha = (container.entries[f"{layer}.{part}"].shape for part in PARTS)
        check_factor_shapes(layer, down, up)
        if alpha != ():
            raise TensorShapeError(f"tensor {layer}.alpha: found shape {alpha}, expected a scalar")
    return sorted(layers)


def entry_of(metadata: Mapping[str, str], key: str) -> str:
    """Returns a header string that must be there."""
    if key not in metadata:
        raise EditHeaderError(f"{key}: missing from the header")
    return metadata[key]


def fields_of(metadata: Mapping[str, str], key: str, names: Set[str]) -> dict[str, Any]:
    """Returns the JSON object in a header string, which has exactly the named members."""
    return exactly(load_json(entry_of(metadata, key), key), key, names)


def shape_of(shape: object, key: str, sides: tuple[str, ...]) -> list[int]:
    """Returns the shape that a header states for a tensor, one number for each of `sides`."""
    if isinstance(shape, list) and len(shape) == len(sides) and all(type(n) is int for n in shape):
        numbers = [int(n) for n in shape]
        if all(1 <= n <= MAX_SIDE for n in numbers):
            return numbers
    raise TensorShapeError(f"{key}: found shape {reprlib.repr(shape)}, expected [{', '.join(sides)}]")


def exactly(value: object, key: str, names: Set[str]) -> dict[str, Any]:
    """Returns `value`, known to be a JSON object with exactly the named members."""
    if not isinstance(value, dict):
        raise EditHeaderError(f"{key}: expected a JSON object")
    if wrong := sorted(set(value) ^ names):
        what = "missing" if wrong[0] in names else "not a member of this format"
        raise EditHeaderError(f"{key}: {reprlib.repr(wrong[0])} is {what}")
    return value
