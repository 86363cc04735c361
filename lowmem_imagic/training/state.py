"""Where an edit in training stands, as bytes: resumed from them it goes on as if it had never stopped.

The SHA-256 of the rest, then a safetensors file; written by this package for itself. What it was made under (photo,
sentence, settings, base) is named by a key that the reader must name, too.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import EditHeaderError, EditLayoutError
from ..storage.safetensors_reader import parse
from ..storage.safetensors_writer import container_tensor, serialize
from ..storage.strict_json import dump_json, load_json

_DIGEST_BYTES = 32
_META, _KEY = "imagic.training", "imagic.training_key"
_GENERATOR, _FINISHED, _TRAINED = "generator", "finished.", "trained."


@dataclass(frozen=True)
class TrainingState:
    """An edit between two steps."""

    stage: str
    """Name of the stage that it is in."""
    losses: dict[str, list[float]]
    """Of each step taken, by stage, the present one included."""
    generator: Tensor
    """State of its generator, bytes as torch gives them."""
    finished: dict[str, Tensor]
    """Rows of the tensors that earlier stages trained and this one does not."""
    trained: dict[str, Tensor]
    """The tensors that this stage trains, see `Trainer.save`."""
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Seconds and peak bytes of the stages behind it, and so far of the present one."""


def encode(state: TrainingState, key: str) -> bytes:
    """The state as bytes, for readers that name the same key."""
    tensors = {_GENERATOR: state.generator}
    tensors |= {_FINISHED + name: tensor for name, tensor in state.finished.items()}
    tensors |= {_TRAINED + name: tensor for name, tensor in state.trained.items()}
    meta = {"stage": state.stage, "losses": state.losses, "measured": state.measured}
    body = serialize(tensors, {_KEY: key, _META: dump_json(meta, _META)})
    return hashlib.sha256(body).digest() + body


def decode(data: bytes, key: str) -> TrainingState:
    """The state in some bytes.

    Raises:
        EditFileError: damaged, of another kind, or for another key.
    """
    digest, body = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise EditLayoutError("the training state is damaged: its hash is not that of its bytes")
    # From here on it is what `encode` gave, though perhaps that of another version.
    container = parse(body)
    if container.metadata.get(_KEY) != key:
        raise EditHeaderError("not the training state of this photo, sentence, settings and base")
    try:
        meta = load_json(container.metadata[_META], _META)
        found = {name: container_tensor(container, name) for name in container.entries}
        return TrainingState(
            stage=meta["stage"],
            losses=meta["losses"],
            measured=meta["measured"],
            generator=found.pop(_GENERATOR),
            finished=_with_prefix(found, _FINISHED),
            trained=_with_prefix(found, _TRAINED),
        )
    except (KeyError, TypeError) as error:
        raise EditHeaderError(f"the training state lacks {error}; expected one of this version") from error


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
