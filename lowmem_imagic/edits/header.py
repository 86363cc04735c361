"""The header of an edit file, read strictly and without torch; the format is described in `edits.file`."""

import contextlib
import os
import re
import reprlib
import struct
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
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
from ..storage.first_bytes import START_BYTES
from ..storage.regular_files import open_regular
from ..storage.safetensors_reader import Container, head_bytes, parse, parse_head
from ..storage.strict_json import load_json
from . import checks
from .identity import MAX_STORED, BaseIdentity, SourcePicture
from .layouts import EXTRA, KOHYA, Layout, layout_of
from .meta import META_KEYS, check_alpha, check_factor_shapes, check_title, checked_meta
from .versions import (
    BASE_MEMBERS,
    ENTRIES,
    NEWEST,
    NOISE,
    SENTENCE_MEMBERS,
    SIDES,
    SOURCE_MEMBERS,
    base_of,
    place,
    sentences_of,
    source_of,
    stored_names,
)

_FLOATS = {"F16", "BF16", "F32"}
HASH_KEY = "modelspec.hash_sha256"
_FOREIGN = "sshs_"
"""Prefix of the keys that the tools of sd-scripts write and this package does not."""
_STORED_FLOATS = ("F16", "BF16")
MAX_SIDE = 2**23
"""Longest side of a tensor in the header."""
MAX_DATA = 2 * 8 * 2**20
"""Longest text of a tensor in the header; base64 makes bytes a third longer."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor beside the adapters, as a file holds it."""

    place: str
    """Its place in the file, for messages."""
    dtype: str
    """Name in the safetensors format."""
    shape: tuple[int, ...]
    data: str | None = None
    """Its values in base64, if they are in the header."""
    tensor: str = ""
    """Otherwise the name of the file's tensor."""


@dataclass(frozen=True)
class Header:
    """The contents of an edit file's header, checked."""

    container: Container
    """The parsed file; its tensors are not read yet."""
    layout: Layout
    """The names of the tensors."""
    layers: dict[str, list[str]]
    """By denoiser, the keys of the adapted layers, sorted."""
    stored: dict[str, StoredTensor]
    """The tensors beside the adapters: ``text.<part>``, ``coarse.<denoiser>`` and, if any, ``noise.<denoiser>``."""
    base: BaseIdentity
    source: SourcePicture
    meta: dict[str, Any]
    """``imagic.meta`` without ``source``, its values checked."""
    title: str
    created: str | None
    license: str | None


@contextlib.contextmanager
def naming_its_writer(container: Container) -> Iterator[None]:
    """Adds to errors that another program has rewritten the edit file, if its header shows that."""
    try:
        yield
    except (EditChangedError, NotAnEditFileError, UnsupportedEditVersionError):
        raise
    except EditFileError as error:
        if container.in_canonical_order:
            raise
        raise type(error)(f"{error}; another program has written this file anew, so use the original file") from error


def read_header(container: Container) -> Header:
    """Returns the header of a parsed file.

    Raises:
        EditFileError: The header is not valid; each kind of fault has its subclass, and no other error is raised.
    """
    version = check_version(container)
    metadata = container.metadata
    tensors = {"imagic.tensors"} if version > 1 else set(ENTRIES.values())
    known = {"imagic.spec", "imagic.meta", "imagic.base", *tensors}
    for key in sorted(name for name in metadata if name.startswith("imagic.") and name not in known):
        raise EditHeaderError(f"{reprlib.repr(key)}: not a key of format {version}")
    layout = layout_of(container.entries) if version > 1 else KOHYA
    layers = layer_names(container, layout)
    base = base_of(fields_of(metadata, "imagic.base", BASE_MEMBERS[version]), version, metadata)
    by_denoiser = _by_denoiser(layers, layout, base)
    stored = _first_stored(metadata) if version == 1 else _stored(container, layout, base)
    names = META_KEYS - SENTENCE_MEMBERS[NEWEST] | SENTENCE_MEMBERS[version] | {"source"}
    meta = fields_of(metadata, "imagic.meta", names)
    source = checks.exactly(meta.pop("source"), "imagic.meta source", SOURCE_MEMBERS[version])
    title = entry_of(metadata, "modelspec.title")
    created, license_name = metadata.get("modelspec.date"), metadata.get("modelspec.license")
    check_title(title, license_name, created)
    return Header(
        container=container,
        layout=layout,
        layers=by_denoiser,
        stored=stored,
        base=base,
        source=source_of(source, version),
        meta=checked_meta(meta | sentences_of(meta, version)),
        title=title,
        created=created,
        license=license_name,
    )


def _by_denoiser(layers: list[str], layout: Layout, base: BaseIdentity) -> dict[str, list[str]]:
    """Returns the layers of each of the base's denoisers."""
    by_denoiser: dict[str, list[str]] = {denoiser: [] for denoiser in base.interface.denoisers}
    for layer in layers:
        denoiser = layout.denoiser_of(layer, by_denoiser)
        if denoiser is None:
            raise UnknownTensorError(f"layer {reprlib.repr(layer)}: belongs to none of the base's denoisers")
        by_denoiser[denoiser].append(layer)
    return by_denoiser


def _first_stored(metadata: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Returns the tensors beside the adapter in a file of version 1, each from its own header string."""
    return {
        name: _in_header(fields_of(metadata, key, _VALUES), key, SIDES[name])
        for name, key in ENTRIES.items()
        if name != NOISE or key in metadata
    }


def _stored(container: Container, layout: Layout, base: BaseIdentity) -> dict[str, StoredTensor]:
    """Returns the tensors beside the adapters: from the header's ``imagic.tensors``, or from tensors that it names.

    They are exactly the `stored_names`, with the noise of all denoisers or of none.
    """
    key = "imagic.tensors"
    members = load_json(entry_of(container.metadata, key), key)
    checks.require(isinstance(members, dict), key, members, "a JSON object")
    denoisers = base.interface.denoisers
    has_noise = any(name.startswith("noise.") for name in members)
    checks.exactly(members, key, set(stored_names(base.interface, noise=denoisers if has_noise else ())))
    if layout.in_header:
        return {
            name: _in_header(checks.exactly(value, place(name, NEWEST), _VALUES), place(name, NEWEST), None)
            for name, value in members.items()
        }
    stored = {}
    for name, value in members.items():
        where = place(name, NEWEST)
        tensor = checks.exactly(value, where, {"tensor"})["tensor"]
        checks.require(tensor == EXTRA + name, where, tensor, f"the tensor {EXTRA + name}")
        if tensor not in container.entries:
            raise MissingTensorError(f"tensor {tensor} is missing")
        entry = container.entries[tensor]
        stored[name] = StoredTensor(where, _stored_type(entry.dtype, where), entry.shape, tensor=tensor)
    if unnamed := sorted(
        name for name in container.entries if name.startswith(EXTRA) and name[len(EXTRA) :] not in stored
    ):
        raise UnknownTensorError(f"tensor {reprlib.repr(EXTRA + unnamed[0])}: not named by {key}")
    return stored


_VALUES = {"dtype", "shape", "data"}


def _in_header(values: Mapping[str, Any], where: str, sides: tuple[str, ...] | None) -> StoredTensor:
    """Returns a tensor of the header, with one dimension for each of `sides`; None allows any."""
    shape = tuple(shape_of(values["shape"], where, sides))
    dtype = _stored_type(values["dtype"], where, _STORED_FLOATS[:1] if sides else _STORED_FLOATS)
    return StoredTensor(where, dtype, shape, checks.text(values["data"], f"{where} data", MAX_DATA))


def _stored_type(dtype: object, where: str, allowed: tuple[str, ...] = _STORED_FLOATS) -> str:
    """Returns the type of a tensor beside the adapters."""
    if dtype not in allowed:
        raise TensorDtypeError(f"{where}: found type {reprlib.repr(dtype)}, expected {' or '.join(allowed)}")
    return str(dtype)


def check_hash(container: Container) -> None:
    """Checks the hash of the tensor data.

    Raises:
        EditChangedError: The data have changed; the message says whether another program wrote them.
    """
    if entry_of(container.metadata, HASH_KEY) == "0x" + container.sha256():
        return
    fault = f"{HASH_KEY}: does not match the tensor data"
    if not container.in_canonical_order or any(key.startswith(_FOREIGN) for key in container.metadata):
        raise EditChangedError(
            f"{fault}; another program has written this file anew, as tools that resize, merge or convert a LoRA do; "
            "its adapter may differ from the edit's, so use the original file (this one still works as a plain LoRA)"
        )
    raise EditChangedError(f"{fault}; the file is damaged, fetch it again")


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
    except IsADirectoryError:
        raise EditNotFoundError(f"{path}: is a folder, expected an edit file; {_inside(path)}") from None
    except OSError as error:
        raise EditNotFoundError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a NUL character in the path
        raise EditNotFoundError(f"{str(path)!r}: {error}") from error


def _inside(folder: str | os.PathLike[str]) -> str:
    """Returns what to do about a folder that was given in place of an edit file."""
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    except OSError:
        names = []
    if len(names) == 1:
        return f"give its only .safetensors file, {os.path.join(folder, names[0])}"
    return f"give one of its {len(names)} .safetensors files" if names else "there is no .safetensors file inside it"


def _read_head(file: BinaryIO, path: str | os.PathLike[str], size: int) -> bytes:
    """Returns the bytes before the tensors, checked: so a gigabyte that is no edit is not read.

    Raises:
        EditFileError: The file is no edit; messages begin with the path.
    """
    try:
        head = file.read(START_BYTES)
        head += file.read(max(0, head_bytes(head, size) - len(head)))
        container = parse_head(head, size)
        with naming_its_writer(container):
            version = check_version(container)
            layer_names(container, layout_of(container.entries) if version > 1 else KOHYA)
        return head
    except EditFileError as error:
        raise type(error)(f"{path}: {error}") from error


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the contents of an edit file as plain values, see `contents`.

    Raises:
        EditFileError: See :func:`read_bytes` and :func:`read_header`; messages begin with the path.
    """
    data = read_bytes(path)
    try:
        return contents(data)
    except EditFileError as error:
        raise type(error)(f"{path}: {error}") from error


def contents(data: bytes) -> dict[str, Any]:
    """Returns the contents of a file's bytes as plain values; checks names, values and hash, and creates no tensors.

    Raises:
        EditFileError: See :func:`read_header`.
    """
    container = parse(data)
    with naming_its_writer(container):
        header = read_header(container)
        check_hash(container)
    entries, layers = container.entries, [layer for some in header.layers.values() for layer in some]
    ranks = {entries[f"{layer}.{header.layout.parts[0]}"].shape[0] for layer in layers}
    text = [tensor for name, tensor in header.stored.items() if name.startswith("text.")]
    factors = [entry for name, entry in entries.items() if header.layout.split(name)]
    return {
        "sentence": sentences[0] if len(sentences := list(header.meta["sentences"])) == 1 else None,
        "sentences": sentences,
        "start_sentence": header.meta["start_sentence"],
        # With the names of the file's own version.
        "base": load_json(container.metadata["imagic.base"], "imagic.base"),
        "base_weights": header.meta["base_weights"],
        "adapter": {
            "layers": len(layers),
            "ranks": sorted(ranks),
            "alphas": sorted({_alpha(container, layer) for layer in layers}) if header.layout is KOHYA else [],
            "bytes": sum(entry.end - entry.begin for entry in factors),
        },
        "embedding": {"shape": list(text[0].shape), "dtype": text[0].dtype},
        "tensors": {name: {"shape": list(t.shape), "dtype": t.dtype} for name, t in sorted(header.stored.items())},
        "seed": header.meta["seed"],
        "etas": list(header.meta["etas"]),
        "eta_default": header.meta["eta_default"],
        "source": load_json(container.metadata["imagic.meta"], "imagic.meta")["source"],
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
    """Returns :func:`describe`'s result as lines for people; values are escaped, so none can forge a line."""
    base, source, adapter = contents["base"], contents["source"], contents["adapter"]
    revision = f" at {base['revision']}" if base["revision"] else ""
    sentences, start = contents["sentences"], contents["start_sentence"]
    lines = {
        "sentence" if len(sentences) < 2 else "sentences": "; ".join(sentences) or "none, to be asked later",
        **({} if sentences == [start] else {"start": start}),
        "photo": f"{source['width_px']} x {source['height_px']} px, sha256 {source['sha256'][:12]}...",
        "base": f"{base['source']}{revision} ({base['family']}, {_prediction(base)}), "
        f"{contents['base_weights']} while training",
        "adapter": f"rank {', '.join(map(str, adapter['ranks']))} on {adapter['layers']} layers{_scaled(adapter)}"
        f"{_energy(contents['settings'])}",
        "embedding": ", ".join(
            " x ".join(map(str, tensor["shape"]))
            for name, tensor in contents["tensors"].items()
            if name.startswith("text.")
        ),
        "etas": ", ".join(f"{eta:g}" for eta in contents["etas"]),
        **_source_prompt(contents["settings"]),
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


def _source_prompt(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the line of the recorded source prompt, if there is one."""
    sample = settings.get("sample")
    prompt = sample.get("source_prompt") if isinstance(sample, dict) else None
    return {"source": prompt} if prompt else {}


def _prediction(base: Mapping[str, Any]) -> str:
    """Returns the predictions of a base's denoisers."""
    if "interface" not in base:
        return str(base["prediction_type"])
    return ", ".join(sorted(set(base["interface"]["denoisers"].values())))


def _energy(settings: Mapping[str, Any]) -> str:
    """Returns a remark on the share of the trained adapter that the file keeps, if it is recorded."""
    result = settings.get("result")
    share = result.get("energy_kept") if isinstance(result, dict) else None
    return f", {share:.1%} of the trained adapter's energy" if isinstance(share, float) and 0 <= share <= 1 else ""


def _scaled(adapter: Mapping[str, Any]) -> str:
    """Returns a remark if other programs misread the adapter, otherwise ""."""
    if len(adapter["alphas"]) <= 1:
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


def check_version(container: Container) -> int:
    """Returns the format's version of an edit file, from 1 to `NEWEST`."""
    metadata = container.metadata
    if not any(key.startswith("imagic.") for key in metadata):
        kind = "a LoRA" if any("lora" in name for name in container.entries) else "a safetensors file"
        raise NotAnEditFileError(f"this is {kind} but not an edit: its header has no imagic.* entries")
    spec = entry_of(metadata, "imagic.spec")
    checks.require(re.fullmatch("[1-9][0-9]{0,5}", spec), "imagic.spec", spec, "a version number")
    if int(spec) > NEWEST:
        raise UnsupportedEditVersionError(
            f"imagic.spec: written in format {spec}, expected at most {NEWEST}; upgrade lowmem-imagic"
        )
    return int(spec)


def layer_names(container: Container, layout: Layout) -> list[str]:
    """Returns the layers of the adapters, after a check of their tensors' names, types and shapes.

    Tensors that belong to no layer are allowed only in a layout that has them.
    """
    layers, extra = set(), 0
    for name, entry in container.entries.items():
        tensor = layout.split(name)
        if tensor is None and name.startswith(EXTRA) and not layout.in_header:
            extra += 1
            continue
        if tensor is None:
            raise UnknownTensorError(f"tensor {reprlib.repr(name)}: not part of an edit file")
        if entry.dtype not in _FLOATS:
            raise TensorDtypeError(f"tensor {name}: found type {entry.dtype}, expected one of F16, BF16, F32")
        layers.add(tensor[0])
    if extra > MAX_STORED:
        raise UnknownTensorError(f"{extra} tensors are named {EXTRA}*, expected at most {MAX_STORED}")
    for layer in sorted(layers):
        for part in layout.parts:
            if f"{layer}.{part}" not in container.entries:
                raise MissingTensorError(f"tensor {layer}.{part} is missing")
        down, up, *alpha = (container.entries[f"{layer}.{part}"].shape for part in layout.parts)
        check_factor_shapes(layer, down, up)
        if alpha not in ([()], []):
            raise TensorShapeError(f"tensor {layer}.alpha: found shape {alpha[0]}, expected a scalar")
    return sorted(layers)


def entry_of(metadata: Mapping[str, str], key: str) -> str:
    """Returns a header string; its absence is an error."""
    if key not in metadata:
        raise EditHeaderError(f"{key}: missing from the header")
    return metadata[key]


def fields_of(metadata: Mapping[str, str], key: str, names: Set[str]) -> dict[str, Any]:
    """Returns the JSON object in a header string, which has exactly the named members."""
    return checks.exactly(load_json(entry_of(metadata, key), key), key, names)


def shape_of(shape: object, key: str, sides: tuple[str, ...] | None) -> list[int]:
    """Returns the shape that a header states for a tensor, one number for each of `sides`; None allows 1 to 4."""
    counts = range(1, 5) if sides is None else (len(sides),)
    if isinstance(shape, list) and len(shape) in counts and all(type(n) is int for n in shape):
        numbers = [int(n) for n in shape]
        if all(1 <= n <= MAX_SIDE for n in numbers):
            return numbers
    raise TensorShapeError(
        f"{key}: found shape {reprlib.repr(shape)}, expected [{', '.join(sides or ('1 to 4 sides',))}]"
    )
