"""The state of an edit in training, as bytes: an edit resumed from it goes on as if it had never stopped.

The bytes are a safetensors file after its SHA-256; only this package reads them. A key identifies photo, sentence,
settings and base; the reader must give the same key.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import EditFileError, EditHeaderError, EditLayoutError
from ..storage.regular_files import read_regular
from ..storage.safetensors_reader import parse
from ..storage.safetensors_writer import chunks_of, container_tensor
from ..storage.strict_json import dump_json, load_json

MAX_BYTES = 4 * 2**30
"""Size limit of a state, which is in main memory while it is saved. A state takes 12 bytes for each weight of the
adapter: 2.2 GiB for all layers of Stable Diffusion XL at rank 64."""
_DIGEST_BYTES = 32
_META, _KEY = "imagic.training", "imagic.training_key"
_GENERATOR, _FINISHED, _TRAINED = "generator", "finished.", "trained."


@dataclass(frozen=True)
class TrainingState:
    """An edit between two steps."""

    stage: str
    """Name of its stage."""
    losses: dict[str, list[float]]
    """The loss of each step so far, by stage, the present one included."""
    generator: Tensor
    """State of its random generator, as bytes from torch."""
    finished: dict[str, Tensor]
    """Rows of the tensors that earlier stages trained and this one does not."""
    trained: dict[str, Tensor]
    """The tensors that this stage trains, see `Trainer.save`."""
    shapes: dict[str, list[int]]
    """Shape (C, H, W) of the photo as each denoiser sees it, by denoiser."""
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Seconds and peak bytes of the finished stages, and of the present one so far."""
    start_sentence: str = ""
    """The sentence that stage 1 started from."""


def encode(state: TrainingState, key: str) -> bytes:
    """The state as bytes, for readers that give the same key.

    Raises:
        EditTooLargeError: it is above `MAX_BYTES`; go on without it, as a state only saves the time of its steps.
    """
    tensors = {_GENERATOR: state.generator}
    tensors |= {_FINISHED + name: tensor for name, tensor in state.finished.items()}
    tensors |= {_TRAINED + name: tensor for name, tensor in state.trained.items()}
    meta = {
        "stage": state.stage,
        "losses": state.losses,
        "shapes": state.shapes,
        "measured": state.measured,
        "start_sentence": state.start_sentence,
    }
    body = chunks_of(tensors, {_KEY: key, _META: dump_json(meta, _META)}, most_bytes=MAX_BYTES - _DIGEST_BYTES)
    digest = hashlib.sha256()
    for chunk in body:
        digest.update(chunk)
    return b"".join((digest.digest(), *body))


def saved(path: Path, key: str) -> TrainingState | None:
    """The state in a file; None if there is no usable one for this key."""
    try:
        return decode(read_regular(path, MAX_BYTES), key)
    except (OSError, EditFileError):
        return None


def decode(data: bytes, key: str) -> TrainingState:
    """The state from the bytes of `encode`.

    Raises:
        EditFileError: the bytes are damaged, of another kind, or for another key.
    """
    # Views: a state may take a large part of main memory.
    digest, body = data[:_DIGEST_BYTES], memoryview(data)[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise EditLayoutError("the training state is damaged: its hash is not that of its bytes")
    # The hash is right, so `encode` made these bytes, though perhaps in another version.
    container = parse(body, most_bytes=MAX_BYTES - _DIGEST_BYTES)
    if container.metadata.get(_KEY) != key:
        raise EditHeaderError("not the training state of this photo, sentence, settings and base")
    try:
        meta = load_json(container.metadata[_META], _META)
        tensors = {name: container_tensor(container, name) for name in container.entries}
        return TrainingState(
            stage=meta["stage"],
            losses=meta["losses"],
            shapes=meta["shapes"],
            measured=meta["measured"],
            # States of earlier versions have none.
            start_sentence=meta.get("start_sentence", ""),
            generator=tensors.pop(_GENERATOR),
            finished=_with_prefix(tensors, _FINISHED),
            trained=_with_prefix(tensors, _TRAINED),
        )
    except (KeyError, TypeError) as error:
        raise EditHeaderError(f"the training state lacks {error}; expected one of this version") from error


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names have a prefix, by their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
