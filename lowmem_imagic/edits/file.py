"""The file of an `Edit`: one small safetensors file, read strictly and written reproducibly.

Physical layout: the tensors are exactly a kohya LoRA (``lora_unet_*.lora_down.weight``,
``.lora_up.weight``, ``.alpha``), because only these keys load in diffusers, ComfyUI, A1111/Forge and InvokeAI
alike, and any tensor beside them makes diffusers load nothing without saying so. The rest is in the header:

=========================  ====================================================================================
``imagic.spec``            version of this format, ``1``; a reader refuses a higher one
``imagic.meta``            JSON: sentence, settings, seed, etas, source picture, base weights, versions, measurements
``imagic.base``            JSON: the base model the edit was made for
``imagic.e_opt``           JSON: ``{"dtype": "F16", "shape": [T, D], "data": base64}``
``imagic.coarse_latents``  the same for the photo's low frequencies, ``[C, h, w]``
``imagic.inverted_noise``  the same for the photo's own noise, ``[C, H, W]``, where training was anchored to it
``modelspec.*``            title, date, licence, thumbnail, SHA-256 of the tensor data (verified); rest for others
``ss_*``                   what other programs show and filter by; never read back
=========================  ====================================================================================

Every field has one home in the header; copies for other programs are ignored by the reader.
"""

import base64
import binascii
import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from ..errors import EditFileError, EditHeaderError, TensorDtypeError, TensorShapeError
from ..storage.atomic import write_bytes
from ..storage.file_names import safe_stem
from ..storage.safetensors_reader import Container, parse
from ..storage.safetensors_writer import bytes_tensor, container_tensor, serialize, tensor_bytes
from ..storage.strict_json import dump_json
from . import checks
from .edit import MAX_EMBEDDING_BYTES, MAX_THUMBNAIL_BYTES, Edit, LoraFactors, picture_kind
from .header import (
    HASH_KEY,
    NOISE_KEY,
    PARTS,
    SPEC_VERSION,
    check_hash,
    fields_of,
    naming_its_writer,
    read_bytes,
    read_header,
    shape_of,
)
from .meta import META_KEYS

_USAGE_HINT = (
    "Imagic edit: needs more than its LoRA. The photo comes back (eta 0) with the LoRA, the embedding imagic.e_opt in "
    "place of the sentence's, imagic.inverted_noise plus imagic.coarse_latents as the start, and guidance 1; the edit "
    "(eta 1) with the sentence's embedding and the recorded guidance"
)
"""What other programs show; see ``docs/other_programs.md``."""


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
        tensors |= {f"{layer}.{part}": t for part, t in zip(PARTS, (factors.down, factors.up, alpha), strict=True)}
    return serialize(tensors, _header(edit), hash_key=HASH_KEY)


def decode(data: bytes) -> Edit:
    """Returns the edit held by a whole file, or refuses it with an error that names what is wrong.

    Raises:
        EditFileError: One subclass per way to be wrong; nothing else is raised for any bytes.
    """
    container = parse(data)
    with naming_its_writer(container):
        return _decoded(container)


def _decoded(container: Container) -> Edit:
    """Returns the edit that a parsed file holds."""
    header, metadata = read_header(container), container.metadata
    edit = Edit(
        adapter={layer: _factors(container, layer) for layer in header.layers},
        optimized_embedding=_stored(metadata, "imagic.e_opt", ("T", "D")),
        coarse_latents=_stored(metadata, "imagic.coarse_latents", ("C", "h", "w")),
        inverted_noise=_stored(metadata, NOISE_KEY, ("C", "H", "W")) if NOISE_KEY in metadata else None,
        base=header.base,
        source=header.source,
        title=header.title,
        created=header.created,
        license=header.license,
        thumbnail=_thumbnail_bytes(metadata.get("modelspec.thumbnail")),
        **header.meta,
    )
    # Last, so that a file that is wrong in a nameable way is refused by that name.
    check_hash(container)
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
    data = read_bytes(path)
    try:
        return decode(data)
    except EditFileError as error:
        raise type(error)(f"{path}: {error}") from error


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
    ranks, alphas = ({getattr(f, name) for f in edit.adapter.values()} for name in ("rank", "alpha"))
    meta = {name: getattr(edit, name) for name in META_KEYS} | {"source": asdict(edit.source)}
    header = {
        "format": "pt",
        "imagic.spec": str(SPEC_VERSION),
        "imagic.base": dump_json(asdict(base), "imagic.base"),
        "imagic.coarse_latents": _storable(edit.coarse_latents, "imagic.coarse_latents"),
        "imagic.e_opt": _storable(edit.optimized_embedding, "imagic.e_opt"),
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
        "modelspec.usage_hint": _USAGE_HINT,
        "ss_base_model_version": version,
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        # "Dynamic" is sd-scripts' word where layers differ.
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_module": "networks.lora",
        "ss_output_name": safe_stem(edit.title),
        "ss_resolution": f"({size}, {size})",
        "ss_sd_model_name": base.source,
        "ss_seed": str(edit.seed),
        "ss_v2": str(is_sd2),
    }
    if edit.inverted_noise is not None:
        header[NOISE_KEY] = _storable(edit.inverted_noise, NOISE_KEY)
    if edit.created is not None:
        header["modelspec.date"] = edit.created
    if edit.license is not None:
        header["modelspec.license"] = edit.license
    if edit.thumbnail is not None:
        kind, picture = picture_kind(edit.thumbnail), base64.b64encode(edit.thumbnail).decode()
        header["modelspec.thumbnail"] = f"data:image/{kind};base64,{picture}"
        # The same for A1111's and ComfyUI's galleries, which do not read the other.
        header["ssmd_cover_images"] = dump_json([picture], "ssmd_cover_images")
    return header


def _factors(container: Container, layer: str) -> LoraFactors:
    """Returns the stored factors of a layer."""
    down, up, alpha = (container_tensor(container, f"{layer}.{part}") for part in PARTS)
    return LoraFactors(down, up, float(alpha))


def _storable(tensor: Tensor, key: str) -> str:
    """Returns the header string of an fp16 tensor; see `_stored`."""
    data = base64.b64encode(tensor_bytes(tensor)).decode()
    return dump_json({"dtype": "F16", "shape": list(tensor.shape), "data": data}, key)


def _stored(metadata: Mapping[str, str], key: str, sides: tuple[str, ...]) -> Tensor:
    """Returns the fp16 tensor that a header string describes, with one dimension for each of `sides`."""
    stored = fields_of(metadata, key, {"dtype", "shape", "data"})
    dtype, data = stored["dtype"], stored["data"]
    if dtype != "F16":
        raise TensorDtypeError(f"{key}: found type {reprlib.repr(dtype)}, expected F16")
    shape = shape_of(stored["shape"], key, sides)
    try:
        raw = base64.b64decode(checks.text(data, f"{key} data", 2 * MAX_EMBEDDING_BYTES), validate=True)
    except (binascii.Error, ValueError) as error:
        raise EditHeaderError(f"{key} data: not base64 ({error})") from error
    if len(raw) != 2 * math.prod(shape):
        raise TensorShapeError(f"{key}: shape {shape} takes {2 * math.prod(shape)} bytes, found {len(raw)}")
    return bytes_tensor(bytearray(raw), "F16", tuple(shape))


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
    if kind != f"data:image/{picture_kind(picture)}":
        raise EditHeaderError(f"modelspec.thumbnail: the picture is not what {kind} says")
    return picture
