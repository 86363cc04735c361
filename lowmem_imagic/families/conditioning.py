"""Conditioning: a network's named input tensors beside the picture and the time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TensorShapeError

Path = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A path between two embeddings: (target, optimized, eta) to the embedding at eta."""


@dataclass(frozen=True)
class Part:
    """One tensor of a conditioning, without its batch axis."""

    shape: tuple[int, ...]
    trained: bool = False
    """Whether stage 1 optimises it."""
    mixed: bool = True
    """Whether eta mixes it between e_opt and e_tgt; otherwise the sentence's own is used (masks, ids)."""
    stored: torch.dtype | None = torch.float16
    """Its type in the edit file; None if it is recomputed (ids, sizes, the low-resolution picture)."""
    dtype: torch.dtype = torch.float32
    own_rows: str = ""
    """Name of the part (T,) that marks the rows which are the sentence's own, the first ones; the rest is padding that
    a network attends to. An edit file holds the own rows alone, and the others are the start sentence's. "" for a
    tensor that is all the sentence's own."""


class Conditioning(Mapping[str, Tensor]):
    """Named tensors (B, *shape); every operation acts on all of them."""

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        self._parts = dict(parts)

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def count(self) -> int:
        """B, the number of rows."""
        return len(next(iter(self._parts.values())))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        return Conditioning({name: change(part) for name, part in self._parts.items()})

    def rows(self, index: Tensor | slice | Sequence[int]) -> "Conditioning":
        """The rows at these indices."""
        return self._each(lambda part: part[index])

    def repeat(self, each: int) -> "Conditioning":
        """Every row repeated `each` times, copies of a row side by side."""
        return self._each(lambda part: part.repeat_interleave(each, 0, output_size=each * len(part)))

    def expand(self, count: int) -> "Conditioning":
        """The single row repeated `count` times, without a copy."""
        return self._each(lambda part: part.expand(count, *part.shape[1:]))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Conditioning":
        """The conditioning on a device; floats in `dtype`, ids and masks in their own type."""
        return self._each(lambda part: part.to(device, dtype if part.is_floating_point() else None))

    @property
    def finite(self) -> bool:
        """Whether all numbers are finite."""
        return all(bool(part.isfinite().all()) for part in self._parts.values())

    def mix(self, target: "Conditioning", eta: Tensor, path: Path, parts: Mapping[str, Part]) -> "Conditioning":
        """The conditioning between this one (e_opt) and `target` (e_tgt).

        Args:
            target: the sentence's conditioning.
            eta: (B,), 0 for this one and 1 for the target.
            path: the path between them.
            parts: the family's parts; a part that is not mixed, or missing here, is the target's.
        """
        mixed = {}
        for name, goal in target.items():
            if parts[name].mixed and name in self:
                mixed[name] = path(goal, self[name], eta.view(-1, *[1] * (goal.dim() - 1)))
            else:
                mixed[name] = goal
        return Conditioning(mixed)

    def stored(self, tensor: Tensor, part: Part) -> Tensor:
        """The rows of a trained tensor (*shape) that an edit file holds; this is the start sentence's, one row."""
        return tensor[: int(self[part.own_rows].sum())] if part.own_rows else tensor

    def completed(self, stored: Mapping[str, Tensor], parts: Mapping[str, Part]) -> "Conditioning":
        """This conditioning, the start sentence's, one row, with the tensors (*shape) of an edit file in place of its
        own; rows that the file does not hold stay.

        Raises:
            TensorShapeError: a tensor does not fit.
        """
        own = dict(self._parts)
        for name, tensor in stored.items():
            row = tensor.float()
            expected = tuple(self[name].shape[1:]) if name in self else ()
            if name in self and parts[name].own_rows and row.dim() and len(row) < expected[0]:
                own_rows = len(self.stored(self[name][0], parts[name]))
                if len(row) != own_rows:
                    raise TensorShapeError(
                        f"the edit's embedding has {len(row)} rows of its first sentence, for which the base's "
                        f"tokenizer has {own_rows}; use the base and the tokenizer that the edit was made for"
                    )
                row = torch.cat([row, self[name][0, len(row) :].to(row)]) if row.shape[1:] == expected[1:] else row
            if tuple(row.shape) != expected:
                raise TensorShapeError(
                    f"the edit's embedding has shape {tuple(row.shape)}, the base's text encoder gives {expected}; use "
                    "the base the edit was made for"
                )
            own[name] = row[None]
        return Conditioning(own)

    def __or__(self, extra: Mapping[str, Tensor]) -> "Conditioning":
        return Conditioning({**self._parts, **extra})

    @staticmethod
    def cat(several: Sequence["Conditioning"]) -> "Conditioning":
        """The rows of several conditionings, one after the other."""
        return Conditioning({name: torch.cat([one[name] for one in several]) for name in several[0]})
