"""The `Edit`: one photo's adapter and optimised embedding, as a value.

The checks sit in the constructors, so an edit that exists can be written to a file, and one that was read
is as good as a new one. Messages name a value as the file does (see `edits.file`).
"""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ..errors import (
    EditHeaderError,
    MissingTensorError,
    NonFiniteTensorError,
    TensorDtypeError,
    TensorShapeError,
    TensorValueError,
    UnknownTensorError,
)
from ..storage.strict_json import canonical_json
from . import checks
from .identity import BaseIdentity, SourcePicture
from .meta import META_KEYS, check_alpha, check_factor_shapes, check_title, checked_meta

MAX_LAYERS = 4096
"""Most adapted layers."""
MAX_EMBEDDING_BYTES = 8 * 2**20
"""Largest optimised embedding; base64 makes it a third longer in the file's header."""
MAX_COARSE_SIDE = 16
"""Most cells each way of the photo's low frequencies: more would show the photo."""
MAX_THUMBNAIL_BYTES = 20_000
"""Largest thumbnail; programs that list LoRA files keep every header in memory."""

MAX_FACTOR = 1024
"""Largest number in a factor; trained ones stay below 1, and below 100 times that where alpha is moved into them."""

_LAYER = re.compile(r"lora_unet_[a-z0-9_]{1,200}")
_MAGIC = {"jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n"}
MAX_NOISE_SIDE = 256
"""Longest side of the photo's own noise."""
_BINARY = ("adapter", "optimized_embedding", "coarse_latents", "inverted_noise", "thumbnail")


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The low-rank update of one layer: ``alpha / r * up @ down`` is added to its weight."""

    down: Tensor
    """``(r, in)`` or, for a convolution, ``(r, in, kh, kw)``."""
    up: Tensor
    """``(out, r)`` or ``(out, r, 1, 1)``."""
    alpha: float
    """Scale before division by the rank; above 0."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LoraFactors):
            return NotImplemented
        same = self.alpha == other.alpha and _same_bits(self.down, other.down)
        return same and _same_bits(self.up, other.up)

    @property
    def rank(self) -> int:
        """Returns r."""
        return self.down.shape[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """One finished edit, valid by construction; treat its mappings and tensors as read-only.

    Construction copies what it is given into the form the file holds: factors, embedding, coarse latents and noise
    become fp16 on the CPU, alpha is rounded to fp32, tuples inside `settings` and `measured` become lists. Two edits
    are equal exactly if their files are, byte for byte.

    Raises:
        EditHeaderError: A field of the wrong type or out of range; named as in the file.
        MissingTensorError: No layers.
        UnknownTensorError, TensorDtypeError, TensorShapeError, NonFiniteTensorError, TensorValueError: A bad layer or
            e_opt.
    """

    adapter: Mapping[str, LoraFactors] = field(repr=False)
    """Kohya module key without suffix, as ``lora_unet_mid_block_attentions_0_proj_in``, to its factors."""
    optimized_embedding: Tensor = field(repr=False)
    """e_opt, ``(T, D)``: what stage 1 found, in the space of the text encoder's output."""
    coarse_latents: Tensor = field(repr=False)
    """The photo's latents averaged over a few large cells, ``(C, h, w)``: its overall brightness and colours, which
    sampling may start from (`settings.stages.SampleConfig.start`)."""
    inverted_noise: Tensor | None = field(default=None, repr=False)
    """The photo's own noise, ``(C, H, W)`` as its latents; None unless training was anchored to it."""
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
        checks.require(isinstance(self.base, BaseIdentity), "imagic.base", self.base, "a BaseIdentity")
        is_source = isinstance(self.source, SourcePicture)
        checks.require(is_source, "imagic.meta source", self.source, "a SourcePicture")
        check_title(self.title, self.license, self.created)
        if self.thumbnail is not None:
            picture_kind(self.thumbnail)
        checked = checked_meta({name: getattr(self, name) for name in META_KEYS}) | {
            "adapter": _check_adapter(self.adapter),
            "optimized_embedding": _check_embedding(self.optimized_embedding, self.base),
            "coarse_latents": _check_coarse(self.coarse_latents),
            "inverted_noise": _check_noise(self.inverted_noise, self.coarse_latents),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Edit):
            return NotImplemented
        # Through JSON, because the numbers 1, 1.0 and True differ in the file and compare equal here.
        return (
            canonical_json(self._facts()) == canonical_json(other._facts())
            and self.thumbnail == other.thumbnail
            and _same_bits(self.optimized_embedding, other.optimized_embedding)
            and _same_bits(self.coarse_latents, other.coarse_latents)
            and _same_bits(self.inverted_noise, other.inverted_noise)
            and self.adapter == other.adapter
        )

    def _facts(self) -> dict[str, Any]:
        """Returns the fields that are neither tensors nor pictures, as JSON-able values."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _BINARY}
        return facts | {"base": asdict(self.base), "source": asdict(self.source)}

    @property
    def rank(self) -> int:
        """Returns the largest rank among the layers."""
        return max(factors.rank for factors in self.adapter.values())


def _check_adapter(adapter: object) -> dict[str, LoraFactors]:
    """Returns a copy of the adapter in the form of the file, sorted by layer."""
    factors_by_layer = dict(checks.mapping(adapter, "adapter"))
    if not factors_by_layer:
        raise MissingTensorError("the adapter has no layers, expected at least one")
    checks.require(
        len(factors_by_layer) <= MAX_LAYERS, "adapter", len(factors_by_layer), f"at most {MAX_LAYERS} layers"
    )
    checked = {}
    for layer, factors in sorted(factors_by_layer.items()):
        if not isinstance(layer, str) or not _LAYER.fullmatch(layer):
            raise UnknownTensorError(f"layer {reprlib.repr(layer)}: expected a key of the form lora_unet_*")
        checks.require(isinstance(factors, LoraFactors), layer, factors, "LoraFactors")
        down = _half(factors.down, f"{layer}.lora_down.weight")
        up = _half(factors.up, f"{layer}.lora_up.weight")
        check_factor_shapes(layer, tuple(down.shape), tuple(up.shape))
        _check_factor_values(down, f"{layer}.lora_down.weight")
        _check_factor_values(up, f"{layer}.lora_up.weight")
        checked[layer] = LoraFactors(down, up, _check_alpha(factors.alpha, f"{layer}.alpha"))
    return checked


def _check_factor_values(factor: Tensor, name: str) -> None:
    """Guarantees numbers that a training may give, so that products of them are finite."""
    low, high = (float(extreme) for extreme in factor.aminmax())
    if max(-low, high) > MAX_FACTOR:
        raise TensorValueError(f"tensor {name}: found values from {low:g} to {high:g}, expected at most {MAX_FACTOR}")


def _check_alpha(alpha: object, name: str) -> float:
    """Returns alpha rounded to fp32, known to be above 0 and at most `MAX_ALPHA`."""
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise checks.wrong(f"tensor {name}", alpha, "a number")
    rounded = float(torch.tensor(float(alpha), dtype=torch.float32))
    check_alpha(rounded, name)
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


def _check_coarse(latents: object) -> Tensor:
    """Returns an fp16 copy of the low frequencies, known to be few."""
    checked = _half(latents, "imagic.coarse_latents")
    shape, most = tuple(checked.shape), MAX_COARSE_SIDE
    if len(shape) != 3 or not 1 <= shape[0] <= 64 or not all(1 <= side <= most for side in shape[1:]):
        raise TensorShapeError(f"imagic.coarse_latents: found shape {shape}, expected (C, h, w), h and w up to {most}")
    return checked


def _check_noise(noise: object, coarse: Tensor) -> Tensor | None:
    """Returns an fp16 copy of the photo's own noise, known to have as many channels as its low frequencies."""
    if noise is None:
        return None
    checked = _half(noise, "imagic.inverted_noise")
    shape, most = tuple(checked.shape), MAX_NOISE_SIDE
    if len(shape) != 3 or shape[0] != coarse.shape[0] or not all(1 <= side <= most for side in shape[1:]):
        raise TensorShapeError(
            f"imagic.inverted_noise: found shape {shape}, expected ({coarse.shape[0]}, H, W), H and W up to {most}"
        )
    return checked


def picture_kind(picture: object) -> str:
    """Returns ``jpeg`` or ``pictures.png``, by the picture's first bytes."""
    if isinstance(picture, bytes) and len(picture) <= MAX_THUMBNAIL_BYTES:
        for kind, magic in _MAGIC.items():
            if picture.startswith(magic):
                return kind
    raise EditHeaderError(f"modelspec.thumbnail: expected a JPEG or PNG of at most {MAX_THUMBNAIL_BYTES} bytes")


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    """Returns whether two tensors are stored alike, or both missing; by value, -0 and 0 would be."""
    if one is None or other is None:
        return one is other
    bits = one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    return one.dtype == other.dtype and torch.equal(*bits)


def _half(tensor: object, name: str) -> Tensor:
    """Returns a contiguous fp16 copy on the CPU; its values are finite."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TensorDtypeError(f"tensor {name}: found {found}, expected floating point")
    copied = tensor.detach().to("cpu", torch.float16, copy=True).contiguous()
    if not bool(torch.isfinite(copied).all()):
        raise NonFiniteTensorError(f"tensor {name}: found NaN, infinity or values beyond fp16, expected finite ones")
    return copied
