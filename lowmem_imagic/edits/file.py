"""The file of an `Edit`: one small safetensors file, read strictly and written reproducibly.

A file is an ordinary LoRA to other programs: its tensors have the names of one of the two layouts in `edits.layouts`.
The rest is in the header:

=========================  ====================================================================================
``imagic.spec``            version of the format, ``1`` to ``3`` (see `edits.versions`); a reader refuses a higher one
``imagic.meta``            JSON: sentences, settings, seed, etas, source picture, base weights, versions, measurements
``imagic.base``            JSON: the base model the edit was made for
``modelspec.*``            title, date, licence, thumbnail, SHA-256 of the tensor data (verified); entries for others
``ss_*``                   entries that other programs show and filter by; the kind of base (`LABELS`) is read back
=========================  ====================================================================================

The tensors beside the adapters are, in version 1, header entries of their own:

=========================  ====================================================================================
``imagic.e_opt``           JSON: ``{"dtype": "F16", "shape": [T, D], "data": base64}``
``imagic.coarse_latents``  the same for the photo's low frequencies, ``[C, h, w]``
``imagic.inverted_noise``  the same for the photo's own noise, ``[C, H, W]``, where training was anchored to it
=========================  ====================================================================================

and from version 2 on the members ``text.<part>``, ``coarse.<denoiser>`` and ``noise.<denoiser>`` of ``imagic.tensors``:
each as above (``F16`` or ``BF16``) in kohya's layout, and ``{"tensor": "lora_imagic.<member>"}`` in peft's.

Every field has one home in the header; copies for other programs are ignored by the reader.
"""

import base64
import binascii
import math
import os
from typing import Any

import torch
from torch import Tensor

from ..errors import EditFileError, EditHeaderError, TensorShapeError
from ..storage.atomic import write_bytes
from ..storage.file_names import safe_stem
from ..storage.safetensors_reader import Container, parse
from ..storage.safetensors_writer import bytes_tensor, container_tensor, serialize, tensor_bytes
from ..storage.strict_json import dump_json
from .edit import MAX_THUMBNAIL_BYTES, Edit, LoraFactors, picture_kind
from .header import HASH_KEY, Header, StoredTensor, check_hash, naming_its_writer, read_bytes, read_header
from .layouts import EXTRA
from .meta import META_KEYS
from .versions import ENTRIES, SENTENCE_MEMBERS, base_entry, sentences_entry, source_entry

_OWN_ENTRIES = ("imagic.e_opt", "imagic.inverted_noise", "imagic.coarse_latents")
_MEMBERS = ("text.* of imagic.tensors", "noise.*", "coarse.*")
_USAGE_HINT = (
    "Imagic edit: needs more than its LoRA. The photo comes back (eta 0) with the LoRA, the embedding {} in "
    "place of the sentence's, {} plus {} as the start, and guidance 1; the edit "
    "(eta 1) with the sentence's embedding and the recorded guidance"
)
"""The usage hint that other programs show; see ``docs/other_programs.md``."""


def encode(edit: Edit) -> bytes:
    """Returns the edit's file; equal edits give identical bytes.

    Raises:
        EditTooLargeError: The file or its header would exceed what the reader accepts.
        EditHeaderError: The settings or measurements hold more values than the reader accepts.
    """
    tensors: dict[str, Tensor] = {}
    layout = edit.layout
    for adapter in edit.adapters.values():
        for layer, factors in adapter.items():
            # fp32, because every reader calls .item() on it and fp16 would round alphas such as 0.1 visibly.
            alpha = torch.tensor(factors.alpha, dtype=torch.float32)
            # A layout without alpha has one part fewer.
            parts = zip(layout.parts, (factors.down, factors.up, alpha), strict=False)
            tensors |= {f"{layer}.{part}": tensor for part, tensor in parts}
    if not layout.in_header:
        tensors |= {EXTRA + name: tensor for name, tensor in stored_tensors(edit).items()}
    return serialize(tensors, _header(edit), hash_key=HASH_KEY)


def stored_tensors(edit: Edit) -> dict[str, Tensor]:
    """Returns the tensors beside the adapters by the names that they have in a file of version 2."""
    groups = {"text": edit.conditioning, "coarse": edit.coarse, "noise": edit.noise}
    return {f"{group}.{name}": tensor for group, some in groups.items() for name, tensor in some.items()}


def decode(data: bytes) -> Edit:
    """Returns the edit in a file's bytes.

    Raises:
        EditFileError: The bytes are no valid edit; each kind of fault has its subclass, and no other error is raised.
    """
    container = parse(data)
    with naming_its_writer(container):
        return _decoded(container)


def _decoded(container: Container) -> Edit:
    """Returns the edit in a parsed file."""
    header = read_header(container)
    stored = {name: _tensor(container, tensor) for name, tensor in header.stored.items()}
    groups: dict[str, dict[str, Tensor]] = {"text": {}, "coarse": {}, "noise": {}}
    for name, tensor in stored.items():
        group, _, of = name.partition(".")
        groups[group][of] = tensor
    edit = Edit(
        adapters={
            denoiser: {layer: _factors(header, layer) for layer in layers} for denoiser, layers in header.layers.items()
        },
        conditioning=groups["text"],
        coarse=groups["coarse"],
        noise=groups["noise"],
        base=header.base,
        source=header.source,
        title=header.title,
        created=header.created,
        license=header.license,
        thumbnail=_thumbnail_bytes(container.metadata.get("modelspec.thumbnail")),
        **header.meta,
    )
    # Last: the other errors are more specific.
    check_hash(container)
    return edit


def write(edit: Edit, path: str | os.PathLike[str], *, overwrite: bool = False) -> int:
    """Returns the number of bytes written; the file appears whole or not at all.

    Args:
        edit: The edit.
        path: The file, whose folder must exist.
        overwrite: Whether a file at `path` is replaced.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is False.
        OutputUnwritableError: No space, no permission, no such folder.
        EditTooLargeError: See :func:`encode`.
    """
    data = encode(edit)
    write_bytes(path, data, overwrite=overwrite)
    return len(data)


def read(path: str | os.PathLike[str]) -> Edit:
    """Returns the edit in the file at `path`; messages begin with the path.

    **Memory**: the file's bytes and the tensors made from them, both at most `MAX_FILE_BYTES`.

    Raises:
        EditNotFoundError: No such file, not a regular file (a pipe is refused, not waited for), not readable.
        EditTooLargeError: Above the cap, by its size, before anything is read.
        EditFileError: Any other fault of the contents.
    """
    data = read_bytes(path)
    try:
        return decode(data)
    except EditFileError as error:
        raise type(error)(f"{path}: {error}") from error


def _header(edit: Edit) -> dict[str, str]:
    """Returns the header strings, without the hash of the tensor data."""
    base, (width, height), version = edit.base, edit.source.size, edit.version
    prediction = min(base.interface.denoisers.values())
    adapted = [factors for adapter in edit.adapters.values() for factors in adapter.values()]
    ranks, alphas = ({getattr(factors, name) for factors in adapted} for name in ("rank", "alpha"))
    meta = {name: getattr(edit, name) for name in META_KEYS - SENTENCE_MEMBERS[3]}
    meta |= sentences_entry(edit.sentences, edit.start_sentence, version)
    meta |= {"source": source_entry(edit.source, version)}
    header = {
        "format": "pt",
        "imagic.spec": str(version),
        "imagic.base": dump_json(base_entry(base, version), "imagic.base"),
        "imagic.meta": dump_json(meta, "imagic.meta"),
        **_tensor_entries(edit),
        **base.labels,
        "modelspec.description": ": ".join(filter(None, ("Imagic edit of one photo", "; ".join(edit.sentences)))),
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.tags": "imagic,edit",
        "modelspec.title": edit.title,
        "modelspec.usage_hint": _USAGE_HINT.format(*(_OWN_ENTRIES if version == 1 else _MEMBERS)),
        # "Dynamic" is sd-scripts' word for layers that differ.
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_module": "networks.lora",
        "ss_output_name": safe_stem(edit.title),
        "ss_resolution": f"({width}, {height})",
        "ss_sd_model_name": base.source,
        "ss_seed": str(edit.seed),
    }
    if edit.sentences:
        header["modelspec.trigger_phrase"] = edit.sentences[0]
    if edit.created is not None:
        header["modelspec.date"] = edit.created
    if edit.license is not None:
        header["modelspec.license"] = edit.license
    if edit.thumbnail is not None:
        kind, picture = picture_kind(edit.thumbnail), base64.b64encode(edit.thumbnail).decode()
        header["modelspec.thumbnail"] = f"data:image/{kind};base64,{picture}"
        # For the galleries of A1111 and ComfyUI, which do not read modelspec.thumbnail.
        header["ssmd_cover_images"] = dump_json([picture], "ssmd_cover_images")
    return header


def _tensor_entries(edit: Edit) -> dict[str, str]:
    """Returns the header strings of the tensors beside the adapters."""
    stored = stored_tensors(edit)
    if edit.version == 1:
        return {ENTRIES[name]: dump_json(_values(tensor), ENTRIES[name]) for name, tensor in stored.items()}
    in_header = edit.layout.in_header
    members = {name: _values(tensor) if in_header else {"tensor": EXTRA + name} for name, tensor in stored.items()}
    return {"imagic.tensors": dump_json(members, "imagic.tensors")}


def _values(tensor: Tensor) -> dict[str, Any]:
    """Returns a tensor as JSON values; `_tensor` reads them."""
    data = base64.b64encode(tensor_bytes(tensor)).decode()
    return {"dtype": "BF16" if tensor.dtype == torch.bfloat16 else "F16", "shape": list(tensor.shape), "data": data}


def _factors(header: Header, layer: str) -> LoraFactors:
    """Returns the stored factors of a layer; alpha is the rank if the file has none."""
    down, up, *alpha = (container_tensor(header.container, f"{layer}.{part}") for part in header.layout.parts)
    return LoraFactors(down, up, float(alpha[0]) if alpha else float(down.shape[0]))


def _tensor(container: Container, stored: StoredTensor) -> Tensor:
    """Returns a tensor beside the adapters."""
    if stored.data is None:
        return container_tensor(container, stored.tensor)
    try:
        raw = base64.b64decode(stored.data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise EditHeaderError(f"{stored.place} data: not base64 ({error})") from error
    if len(raw) != 2 * math.prod(stored.shape):
        raise TensorShapeError(
            f"{stored.place}: shape {list(stored.shape)} takes {2 * math.prod(stored.shape)} bytes, found {len(raw)}"
        )
    return bytes_tensor(bytearray(raw), stored.dtype, stored.shape)


def _thumbnail_bytes(uri: str | None) -> bytes | None:
    """Returns the picture in a data URI."""
    if uri is None:
        return None
    kind, separator, data = uri.partition(";base64,")
    if not separator or kind not in ("data:image/jpeg", "data:image/png") or len(data) > 2 * MAX_THUMBNAIL_BYTES:
        raise EditHeaderError("modelspec.thumbnail: expected a small data URI of a JPEG or PNG")
    try:
        picture = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise EditHeaderError(f"modelspec.thumbnail: not base64 ({error})") from error
    if kind != f"data:image/{picture_kind(picture)}":
        raise EditHeaderError(f"modelspec.thumbnail: the picture is not of the kind {kind}")
    return picture
