"""The `Edit`: one photo's adapter and optimised embedding, as a value and as a small safetensors file.

Physical layout: the tensors are exactly a kohya LoRA (``lora_unet_*.lora_down.weight``,
``.lora_up.weight``, ``.alpha``), because only these keys load in diffusers, ComfyUI, A1111/Forge and InvokeAI
alike, and any tensor beside them makes diffusers load nothing without saying so. The rest is in the header:

==================  ====================================================================================
``imagic.spec``     version of this format, ``1``; a reader refuses a higher one
``imagic.meta``     JSON: sentence, settings, seed, etas, source picture, base weights, versions, measurements
``imagic.base``     JSON: the base model the edit was made for
``imagic.e_opt``    JSON: ``{"dtype": "F16", "shape": [T, D], "data": base64}``
``modelspec.*``     title, date, licence, thumbnail, SHA-256 of the tensor data (verified); rest for others
``ss_*``            what other programs show and filter by; never read back
==================  ====================================================================================

Every field has one home in the header; copies for other programs are ignored by the reader. The checks sit
in the constructors, so an edit that exists can be written, and one that was read is as good as a new one.
"""

from __future__ import annotations

import base64
import binascii
import math
import os
import re
import reprlib
import stat
import sys
import unicodedata
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem_imagic.atomic import write_bytes
from lowmem_imagic.errors import (
    EditFileError,
    EditHeaderError,
    EditNotFoundError,
    EditTooLargeError,
    MissingTensorError,
    NonFiniteTensorError,
    NotAnEditFileError,
    TensorDtypeError,
    TensorShapeError,
    UnknownTensorError,
    UnsupportedEditVersionError,
)
from lowmem_imagic.safetensors_codec import (
    MAX_FILE_BYTES,
    Container,
    bytes_tensor,
    dump_json,
    load_json,
    parse,
    plain_json,
    serialize,
    tensor_bytes,
)

SPEC_VERSION = 1
"""Version of the format written here; any change that an older reader would misread or drop raises it."""
MAX_RANK = 256
"""Largest LoRA rank."""
MAX_LAYERS = 4096
"""Most adapted layers."""
MAX_PROMPT_CHARS = 4096
"""Longest target sentence."""
MAX_EMBEDDING_BYTES = 8 * 2**20
"""Largest optimised embedding; base64 makes it a third longer in the header."""
MAX_THUMBNAIL_BYTES = 20_000
"""Largest thumbnail; programs that list LoRA files keep every header in memory."""

_LAYER = re.compile(r"lora_unet_[a-z0-9_]{1,200}")
_TENSOR = re.compile(r"(lora_unet_[a-z0-9_]{1,200})\.(lora_down\.weight|lora_up\.weight|alpha)")
_PARTS = ("lora_down.weight", "lora_up.weight", "alpha")
_FLOATS = {"F16", "BF16", "F32"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9]{2}:[0-9]{2}:[0-9]{2}(Z|[+-][0-9]{2}:[0-9]{2})?)?")
# A hub id or a bare name: at most one slash, no part that a path could begin with, no drive or scheme.
_SOURCE = re.compile(r"[^/\\:~.\s-][^/\\:]*(/[^/\\:~.\s-][^/\\:]*)?")
_MAGIC = {"jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n"}
_HASH_KEY = "modelspec.hash_sha256"
_META_KEYS = frozenset(
    (
        "base_weights",
        "eta_default",
        "etas",
        "measured",
        "seed",
        "settings",
        "source",
        "target_prompt",
        "versions",
    )
)


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The low-rank update of one layer: ``alpha / r * up @ down`` is added to its weight."""

    down: Tensor
    """``(r, in)`` or, for a convolution, ``(r, in, kh, kw)``."""
    up: Tensor
    """``(out, r)`` or ``(out, r, 1, 1)``."""
    alpha: float
    """Scale before division by the rank; above 0."""

    @property
    def rank(self) -> int:
        """Returns r."""
        return self.down.shape[0]


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """Which base model an edit belongs to, precisely enough to recognise it elsewhere."""

    source: str
    """Hub id, ``demo``, or the own name of a local folder; never a path."""
    revision: str | None
    """Commit or tag at the source, if it has one."""
    family: str
    """Short token of the model family, as ``sd1``."""
    prediction_type: str
    """What the UNet predicts, in diffusers' words, as ``epsilon`` or ``v_prediction``."""
    cross_attention_dim: int
    """Width D of the text conditioning."""
    files: Mapping[str, str]
    """Component (``unet``, ``text_encoder``, ``vae``, ``tokenizer``) to the SHA-256 of its file, hex."""

    def __post_init__(self) -> None:
        key = "imagic.base"
        source = _text(self.source, f"{key} source", 200)
        _require(_SOURCE.fullmatch(source), f"{key} source", source, "a hub id or a name, not a path")
        if self.revision is not None:
            _text(self.revision, f"{key} revision", 200)
        _matches(self.family, _TOKEN, f"{key} family", "a short lower-case token")
        _matches(self.prediction_type, _TOKEN, f"{key} prediction_type", "a short lower-case token")
        _integer(self.cross_attention_dim, f"{key} cross_attention_dim", 1, 2**20)
        files = dict(_mapping(self.files, f"{key} files"))
        _require(files, f"{key} files", files, "at least one component")
        for component, digest in files.items():
            _matches(component, _TOKEN, f"{key} files", "component names of lower-case letters")
            _matches(digest, _SHA256, f"{key} files.{component}", "64 lower-case hex digits")
        object.__setattr__(self, "files", files)

    def match(self, other: BaseIdentity) -> Literal["exact", "revision", "architecture", "none"]:
        """Returns how closely two bases agree.

        ``exact``: the same files. ``revision``: the same source and known revision, though not the same files
        (another variant or precision). ``architecture``: adapters fit, results differ. ``none``: unusable.
        """
        if self.files == other.files:
            return "exact"
        if self.revision is not None and (self.source, self.revision) == (other.source, other.revision):
            return "revision"
        mine = (self.family, self.prediction_type, self.cross_attention_dim)
        if mine == (other.family, other.prediction_type, other.cross_attention_dim):
            return "architecture"
        return "none"


@dataclass(frozen=True, kw_only=True)
class SourcePicture:
    """What is kept of the edited photo: enough to recognise it and to paste back, never the picture."""

    sha256: str
    """SHA-256 of the picture file, hex."""
    width_px: int
    """Width of the upright picture."""
    height_px: int
    """Height of the upright picture."""
    size_px: int
    """Side of the training square."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom of the rectangle that relates picture and training square, in pixels."""

    def __post_init__(self) -> None:
        key = "imagic.meta source"
        _matches(self.sha256, _SHA256, f"{key}.sha256", "64 lower-case hex digits")
        for name in ("width_px", "height_px", "size_px"):
            _integer(getattr(self, name), f"{key}.{name}", 1, 2**20)
        _require(
            isinstance(self.box, list | tuple) and len(self.box) == 4, f"{key}.box", self.box, "4 integers"
        )
        left, top, right, bottom = (_integer(side, f"{key}.box", 0, 2**20) for side in self.box)
        _require(left < right and top < bottom, f"{key}.box", self.box, "left < right and top < bottom")
        object.__setattr__(self, "box", (left, top, right, bottom))


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """One finished edit, valid by construction; treat its mappings and tensors as read-only.

    Construction copies what it is given into the form the file holds: factors and embedding become fp16 on
    the CPU, alpha is rounded to fp32, tuples inside `settings` and `measured` become lists. Two edits are
    equal exactly if their files are, byte for byte.

    Raises:
        EditHeaderError: A field of the wrong type or out of range; named as in the file.
        MissingTensorError: No layers.
        UnknownTensorError, TensorDtypeError, TensorShapeError, NonFiniteTensorError: A bad layer or e_opt.
    """

    adapter: Mapping[str, LoraFactors] = field(repr=False)
    """Kohya module key without suffix, as ``lora_unet_mid_block_attentions_0_proj_in``, to its factors."""
    optimized_embedding: Tensor = field(repr=False)
    """e_opt, ``(T, D)``: what stage 1 found, in the space of the text encoder's output."""
    target_prompt: str
    """The sentence the photo is edited towards."""
    base: BaseIdentity
    """The base model the edit was made for."""
    settings: Mapping[str, Any]
    """Settings per stage (``embed``, ``finetune``, ``sample``, ``adapter``), JSON-able."""
    seed: int
    """Seed of the edit's generator, 0 to 2**63 - 1."""
    etas: tuple[float, ...]
    """Interpolation factors that were tried: 0 is the photo, 1 the target sentence."""
    eta_default: float
    """The factor to render with unless told otherwise."""
    source: SourcePicture
    """The photo, by hash and geometry."""
    base_weights: str
    """How the base was stored while training: ``int8``, ``bnb-int8``, ``bf16``, ``fp32``."""
    versions: Mapping[str, str]
    """Package name to version."""
    measured: Mapping[str, Any]
    """Seconds and peak bytes per stage, JSON-able."""
    title: str
    """One line for people."""
    created: str | None = None
    """ISO 8601 date or date and time; None keeps the bytes of a repeated run the same."""
    license: str | None = None
    """Licence, inherited from the base."""
    thumbnail: bytes | None = field(default=None, repr=False)
    """Small JPEG or PNG, before and after."""

    def __post_init__(self) -> None:
        _require(isinstance(self.base, BaseIdentity), "imagic.base", self.base, "a BaseIdentity")
        _require(isinstance(self.source, SourcePicture), "imagic.meta source", self.source, "a SourcePicture")
        _text(self.target_prompt, "imagic.meta target_prompt", MAX_PROMPT_CHARS, lines=True)
        _text(self.title, "modelspec.title", 200)
        _matches(self.base_weights, _TOKEN, "imagic.meta base_weights", "a short lower-case token")
        if self.license is not None:
            _text(self.license, "modelspec.license", 200)
        if self.created is not None:
            _check_date(self.created)
        if self.thumbnail is not None:
            _thumbnail_kind(self.thumbnail)
        versions = dict(_mapping(self.versions, "imagic.meta versions"))
        for name, version in versions.items():
            _text(name, "imagic.meta versions", 100)
            _text(version, f"imagic.meta versions.{name}", 100)
        _require(
            isinstance(self.etas, list | tuple) and len(self.etas) <= 256,
            "imagic.meta etas",
            self.etas,
            "a list",
        )
        checked = {
            "adapter": _check_adapter(self.adapter),
            "optimized_embedding": _check_embedding(self.optimized_embedding, self.base),
            "settings": plain_json(
                _mapping(self.settings, "imagic.meta settings"), "imagic.meta settings", 2
            ),
            "measured": plain_json(
                _mapping(self.measured, "imagic.meta measured"), "imagic.meta measured", 2
            ),
            "seed": _integer(self.seed, "imagic.meta seed", 0, 2**63 - 1),
            "etas": tuple(_number(eta, "imagic.meta etas") for eta in self.etas),
            "eta_default": _number(self.eta_default, "imagic.meta eta_default"),
            "versions": versions,
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Edit):
            return NotImplemented
        return encode(self) == encode(other)

    @property
    def rank(self) -> int:
        """Returns the largest rank among the layers."""
        return max(factors.rank for factors in self.adapter.values())


def encode(edit: Edit) -> bytes:
    """Returns the edit's file; equal edits give identical bytes.

    Raises:
        EditTooLargeError: The file or its header would exceed what the reader accepts.
        EditHeaderError: The settings or measurements hold more values than the reader accepts.
    """
    tensors: dict[str, Tensor] = {}
    for layer, factors in edit.adapter.items():
        # fp32, because every reader calls .item() on it and fp16 would round alphas such as 0.1 visibly.
        alpha = torch.tensor(factors.alpha, dtype=torch.float32)
        tensors |= {
            f"{layer}.{part}": t for part, t in zip(_PARTS, (factors.down, factors.up, alpha), strict=True)
        }
    return serialize(tensors, _header(edit), hash_key=_HASH_KEY)


def decode(data: bytes) -> Edit:
    """Returns the edit held by a whole file, or refuses it with an error that names what is wrong.

    Raises:
        EditFileError: One subclass per way to be wrong; nothing else is raised for any bytes.
    """
    container = parse(data)
    _check_version(container)
    metadata = container.metadata
    known = {"imagic.spec", "imagic.meta", "imagic.base", "imagic.e_opt"}
    for key in sorted(name for name in metadata if name.startswith("imagic.") and name not in known):
        raise EditHeaderError(f"{reprlib.repr(key)}: not a key of format {SPEC_VERSION}")
    layers = _check_names(container)
    base = BaseIdentity(**_fields(metadata, "imagic.base", BaseIdentity.__dataclass_fields__.keys()))
    meta = _fields(metadata, "imagic.meta", _META_KEYS)
    source = _exactly(meta.pop("source"), "imagic.meta source", SourcePicture.__dataclass_fields__.keys())
    edit = Edit(
        adapter={layer: _factors(container, layer) for layer in layers},
        optimized_embedding=_embedding(_fields(metadata, "imagic.e_opt", {"dtype", "shape", "data"})),
        base=base,
        source=SourcePicture(**source),
        title=_entry(metadata, "modelspec.title"),
        created=metadata.get("modelspec.date"),
        license=metadata.get("modelspec.license"),
        thumbnail=_thumbnail_bytes(metadata.get("modelspec.thumbnail")),
        **meta,
    )
    # Last, so that a file that is wrong in a nameable way is refused by that name.
    if _entry(metadata, _HASH_KEY) != "0x" + container.sha256():
        raise EditHeaderError(
            f"{_HASH_KEY}: does not match the tensor data; the file is damaged, fetch it again"
        )
    return edit


def write(edit: Edit, path: str | os.PathLike[str], *, overwrite: bool = False) -> int:
    """Returns the number of bytes written; the file appears whole or not at all.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is False.
        OutputUnwritableError: No space, no permission, no such folder.
        EditTooLargeError: See :func:`encode`.
    """
    data = encode(edit)
    write_bytes(path, data, overwrite=overwrite)
    return len(data)


def read(path: str | os.PathLike[str]) -> Edit:
    """Returns the edit in a file; messages begin with its path.

    **Memory**: the file's bytes and the tensors made from them, both at most `MAX_FILE_BYTES`.

    Raises:
        EditNotFoundError: No such file, not a regular file (a pipe is refused, not waited for), not readable.
        EditTooLargeError: Above the cap, by its size, before anything is read.
        EditFileError: Anything else that is wrong with the content.
    """
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
    flags = (
        os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    )
    try:
        descriptor = os.open(path, flags)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise EditNotFoundError(f"{path}: not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise EditTooLargeError(
                    f"{path}: {status.st_size} bytes, at most {MAX_FILE_BYTES} are allowed"
                )
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(status.st_size + 1)  # one more, to notice a file that grows meanwhile
        finally:
            os.close(descriptor)
    except OSError as error:
        raise EditNotFoundError(
            f"{path}: cannot be read ({error.strerror or type(error).__name__})"
        ) from error
    except ValueError as error:  # a NUL character in the path
        raise EditNotFoundError(f"{str(path)!r}: {error}") from error
    try:
        return decode(data)
    except EditFileError as error:
        raise type(error)(f"{path}: {error}") from error


def safe_stem(text: str) -> str:
    """Returns a file name without extension made from any text: ``[a-z0-9-]``, 1 to 60 characters, portable.

    Different texts may give the same stem; text without any Latin letter or digit gives ``edit``.
    """
    plain = unicodedata.normalize("NFKD", text[:1000]).encode("ascii", "ignore").decode().lower()
    stem = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-") or "edit"
    # Windows opens devices under these names, whatever the folder and extension.
    return f"edit-{stem}" if re.fullmatch(r"con|prn|aux|nul|(com|lpt)[0-9]", stem) else stem


def _header(edit: Edit) -> dict[str, str]:
    """Returns the header strings, without the hash of the tensor data."""
    base, size = edit.base, edit.source.size_px
    is_v, is_sd2 = base.prediction_type == "v_prediction", base.family == "sd2"
    architecture = f"lowmem-imagic-{base.family}"
    version = f"lowmem_imagic_{base.family}"
    if base.family in ("sd1", "sd2"):
        sd2 = "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"
        architecture = sd2 if is_sd2 else "stable-diffusion-v1"
        version = ("sd_v2" if is_sd2 else "sd_v1") + ("_v" if is_v else "")
    widest = max(edit.adapter.values(), key=lambda factors: factors.rank)
    data = base64.b64encode(tensor_bytes(edit.optimized_embedding)).decode()
    meta = {name: getattr(edit, name) for name in _META_KEYS} | {"source": asdict(edit.source)}
    header = {
        "format": "pt",
        "imagic.spec": str(SPEC_VERSION),
        "imagic.base": dump_json(asdict(base), "imagic.base"),
        "imagic.e_opt": dump_json(
            {"dtype": "F16", "shape": list(edit.optimized_embedding.shape), "data": data}, "imagic.e_opt"
        ),
        "imagic.meta": dump_json(meta, "imagic.meta"),
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.description": f"Imagic edit of one photo: {edit.target_prompt}",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "v" if is_v else base.prediction_type,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.tags": "imagic,edit",
        "modelspec.title": edit.title,
        "modelspec.trigger_phrase": edit.target_prompt,
        "modelspec.usage_hint": "use with Imagic e_opt; LoRA alone reconstructs the photo",
        "ss_base_model_version": version,
        "ss_network_alpha": str(widest.alpha),
        "ss_network_dim": str(widest.rank),
        "ss_network_module": "networks.lora",
        "ss_output_name": safe_stem(edit.title),
        "ss_resolution": f"({size}, {size})",
        "ss_sd_model_name": base.source,
        "ss_seed": str(edit.seed),
        "ss_v2": str(is_sd2),
    }
    if edit.created is not None:
        header["modelspec.date"] = edit.created
    if edit.license is not None:
        header["modelspec.license"] = edit.license
    if edit.thumbnail is not None:
        kind, picture = _thumbnail_kind(edit.thumbnail), base64.b64encode(edit.thumbnail).decode()
        header["modelspec.thumbnail"] = f"data:image/{kind};base64,{picture}"
    return header


def _check_version(container: Container) -> None:
    """Guarantees that the file is an edit of this version of the format."""
    metadata = container.metadata
    if not any(key.startswith("imagic.") for key in metadata):
        what = "a LoRA" if any("lora" in name for name in container.entries) else "a safetensors file"
        raise NotAnEditFileError(f"this is {what} but not an edit: its header has no imagic.* entries")
    spec = _entry(metadata, "imagic.spec")
    _require(re.fullmatch("[1-9][0-9]{0,5}", spec), "imagic.spec", spec, "a version number")
    if int(spec) > SPEC_VERSION:
        raise UnsupportedEditVersionError(
            f"imagic.spec: written in format {spec}, expected at most {SPEC_VERSION}; upgrade lowmem-imagic"
        )


def _check_names(container: Container) -> list[str]:
    """Returns the layers of the adapter, each known to have its three tensors in an allowed type."""
    layers = set()
    for name, entry in container.entries.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise UnknownTensorError(f"tensor {reprlib.repr(name)}: not part of an edit file")
        if entry.dtype not in _FLOATS:
            raise TensorDtypeError(f"tensor {name}: found type {entry.dtype}, expected one of F16, BF16, F32")
        layers.add(match[1])
    for layer in sorted(layers):
        for part in _PARTS:
            if f"{layer}.{part}" not in container.entries:
                raise MissingTensorError(f"tensor {layer}.{part} is missing")
    return sorted(layers)


def _check_adapter(adapter: object) -> dict[str, LoraFactors]:
    """Returns a copy of the adapter in the form of the file, sorted by layer."""
    factors_by_layer = dict(_mapping(adapter, "adapter"))
    if not factors_by_layer:
        raise MissingTensorError("the adapter has no layers, expected at least one")
    _require(
        len(factors_by_layer) <= MAX_LAYERS, "adapter", len(factors_by_layer), f"at most {MAX_LAYERS} layers"
    )
    checked = {}
    for layer, factors in sorted(factors_by_layer.items()):
        if not isinstance(layer, str) or not _LAYER.fullmatch(layer):
            raise UnknownTensorError(f"layer {reprlib.repr(layer)}: expected a key of the form lora_unet_*")
        _require(isinstance(factors, LoraFactors), layer, factors, "LoraFactors")
        down = _half(factors.down, f"{layer}.lora_down.weight")
        up = _half(factors.up, f"{layer}.lora_up.weight")
        shapes = f"{layer}: lora_down is {tuple(down.shape)} and lora_up is {tuple(up.shape)}"
        if down.dim() not in (2, 4) or up.dim() != down.dim() or tuple(up.shape[2:]) not in ((), (1, 1)):
            raise TensorShapeError(
                f"{shapes}, expected (r, in) and (out, r), or (r, in, kh, kw) and (out, r, 1, 1)"
            )
        if up.shape[1] != down.shape[0] or min(*down.shape, *up.shape) < 1:
            raise TensorShapeError(f"{shapes}, expected the same rank and no empty side")
        if down.shape[0] > MAX_RANK:
            raise TensorShapeError(f"{shapes}: rank {down.shape[0]}, at most {MAX_RANK} is allowed")
        checked[layer] = LoraFactors(down, up, _check_alpha(factors.alpha, f"{layer}.alpha"))
    return checked


def _check_alpha(alpha: object, name: str) -> float:
    """Returns alpha rounded to fp32, known to be finite and above 0."""
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise _wrong(f"tensor {name}", alpha, "a number")
    rounded = float(torch.tensor(float(alpha), dtype=torch.float32))
    if not math.isfinite(rounded):
        raise NonFiniteTensorError(f"tensor {name}: found {rounded}, expected a finite number")
    if rounded <= 0:
        raise _wrong(f"tensor {name}", rounded, "a number above 0")
    return rounded


def _check_embedding(embedding: object, base: BaseIdentity) -> Tensor:
    """Returns an fp16 copy of the embedding, of the width that the base has."""
    checked = _half(embedding, "imagic.e_opt")
    shape = tuple(checked.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] != base.cross_attention_dim:
        raise TensorShapeError(f"imagic.e_opt: found shape {shape}, expected (T, {base.cross_attention_dim})")
    if checked.nbytes > MAX_EMBEDDING_BYTES:
        raise TensorShapeError(f"imagic.e_opt: shape {shape} is above {MAX_EMBEDDING_BYTES} bytes")
    return checked


def _half(tensor: object, name: str) -> Tensor:
    """Returns a contiguous fp16 copy on the CPU; its values are finite."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TensorDtypeError(f"tensor {name}: found {found}, expected floating point")
    half = tensor.detach().to("cpu", torch.float16, copy=True).contiguous()
    if not bool(torch.isfinite(half).all()):
        raise NonFiniteTensorError(
            f"tensor {name}: found NaN, infinity or values beyond fp16, expected finite ones"
        )
    return half


def _factors(container: Container, layer: str) -> LoraFactors:
    """Returns the stored factors of a layer."""
    shape = container.entries[f"{layer}.alpha"].shape
    if shape != ():
        raise TensorShapeError(f"tensor {layer}.alpha: found shape {shape}, expected a scalar")
    down, up, alpha = (container.tensor(f"{layer}.{part}") for part in _PARTS)
    return LoraFactors(down, up, float(alpha))


def _embedding(stored: Mapping[str, Any]) -> Tensor:
    """Returns the tensor that ``imagic.e_opt`` describes."""
    dtype, shape, data = stored["dtype"], stored["shape"], stored["data"]
    if dtype != "F16":
        raise TensorDtypeError(f"imagic.e_opt: found type {reprlib.repr(dtype)}, expected F16")
    limit = MAX_EMBEDDING_BYTES
    if not (
        isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 1 <= n <= limit for n in shape)
    ):
        raise TensorShapeError(f"imagic.e_opt: found shape {reprlib.repr(shape)}, expected [T, D]")
    try:
        raw = base64.b64decode(_text(data, "imagic.e_opt data", 2 * limit), validate=True)
    except (binascii.Error, ValueError) as error:
        raise EditHeaderError(f"imagic.e_opt data: not base64 ({error})") from error
    if len(raw) != 2 * math.prod(shape):
        raise TensorShapeError(
            f"imagic.e_opt: shape {shape} takes {2 * math.prod(shape)} bytes, found {len(raw)}"
        )
    return bytes_tensor(bytearray(raw), "F16", tuple(shape))


def _thumbnail_kind(picture: object) -> str:
    """Returns ``jpeg`` or ``png``, by the picture's first bytes."""
    if isinstance(picture, bytes) and len(picture) <= MAX_THUMBNAIL_BYTES:
        for kind, magic in _MAGIC.items():
            if picture.startswith(magic):
                return kind
    raise EditHeaderError(
        f"modelspec.thumbnail: expected a JPEG or PNG of at most {MAX_THUMBNAIL_BYTES} bytes"
    )


def _thumbnail_bytes(uri: str | None) -> bytes | None:
    """Returns the picture in a data URI."""
    if uri is None:
        return None
    kind, found, data = uri.partition(";base64,")
    if not found or kind not in ("data:image/jpeg", "data:image/png") or len(data) > 2 * MAX_THUMBNAIL_BYTES:
        raise EditHeaderError("modelspec.thumbnail: expected a small data URI of a JPEG or PNG")
    try:
        picture = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise EditHeaderError(f"modelspec.thumbnail: not base64 ({error})") from error
    if kind != f"data:image/{_thumbnail_kind(picture)}":
        raise EditHeaderError(f"modelspec.thumbnail: the picture is not what {kind} says")
    return picture


def _check_date(created: object) -> None:
    """Guarantees an existing date in ISO 8601."""
    try:
        valid = isinstance(created, str) and _DATE.fullmatch(created)
        if valid and datetime.fromisoformat(str(created).replace("Z", "+00:00")):
            return
    except ValueError:  # well formed, but no such day
        pass
    raise EditHeaderError(f"modelspec.date: found {reprlib.repr(created)}, expected a date as 2025-12-31")


def _entry(metadata: Mapping[str, str], key: str) -> str:
    """Returns a header string that must be there."""
    if key not in metadata:
        raise EditHeaderError(f"{key}: missing from the header")
    return metadata[key]


def _fields(metadata: Mapping[str, str], key: str, names: Set[str]) -> dict[str, Any]:
    """Returns the JSON object in a header string, which has exactly the named members."""
    return _exactly(load_json(_entry(metadata, key), key), key, names)


def _exactly(value: object, key: str, names: Set[str]) -> dict[str, Any]:
    """Returns `value`, known to be a JSON object with exactly the named members."""
    if not isinstance(value, dict):
        raise EditHeaderError(f"{key}: expected a JSON object")
    if wrong := sorted(set(value) ^ names):
        what = "missing" if wrong[0] in names else "not a member of this format"
        raise EditHeaderError(f"{key}: {reprlib.repr(wrong[0])} is {what}")
    return value


def _wrong(key: str, found: object, expected: str) -> EditHeaderError:
    """Returns the error for an unusable value, in one line of bounded length."""
    return EditHeaderError(f"{key}: found {reprlib.repr(found)}, expected {expected}")


def _require(ok: object, key: str, found: object, expected: str) -> None:
    """Guarantees that `ok` holds."""
    if not ok:
        raise _wrong(key, found, expected)


def _text(value: object, key: str, limit: int, *, lines: bool = False) -> str:
    """Returns `value`, known to be printable, not blank, not too long, and one line unless `lines`."""
    ok = isinstance(value, str) and 1 <= len(value) <= limit and not value.isspace()
    ok = ok and (lines or not set("\t\n\r") & set(str(value)))
    _require(ok, key, value, f"{'text' if lines else 'one line'} of 1 to {limit} characters")
    return str(plain_json(value, key))


def _matches(value: object, pattern: re.Pattern[str], key: str, expected: str) -> None:
    """Guarantees text of the given form."""
    _require(isinstance(value, str) and pattern.fullmatch(value), key, value, expected)


def _integer(value: object, key: str, low: int, high: int) -> int:
    """Returns `value`, known to be an integer in the closed range."""
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return int(value)
    raise _wrong(key, value, f"an integer from {low} to {high}")


def _number(value: object, key: str) -> float:
    """Returns `value` as a float, known to be finite."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    raise _wrong(key, value, "a finite number")


def _mapping(value: object, key: str) -> Mapping[str, Any]:
    """Returns `value`, known to be a mapping."""
    if not isinstance(value, Mapping):
        raise EditHeaderError(f"{key}: found a {type(value).__name__}, expected a mapping")
    return value
