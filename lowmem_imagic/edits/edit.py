"""The `Edit`: one photo's adapters and optimised conditioning, as a value.

The constructors check every value, so any `Edit` can be written to a file. Messages name a value as the file does (see
`edits.file`).
"""

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

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
from .layouts import KOHYA, PEFT, Layout, layout_of
from .meta import META_KEYS, check_alpha, check_factor_shapes, check_title, checked_meta
from .versions import MAPPED, NEWEST, SIDES, place, version_of_base

MAX_LAYERS = 4096
"""Most adapted layers of a denoiser."""
MAX_EMBEDDING_BYTES = 8 * 2**20
"""Largest tensor of the optimised conditioning; base64 makes it a third longer in the file's header."""
MAX_COARSE_SIDE = 16
"""Most cells each way of the photo's low frequencies: more would show the photo."""
MAX_CHANNELS = 256
"""Most channels of a denoiser's input."""
MAX_TEXT_SIDES = 3
"""Most sides of a tensor of text."""
MAX_THUMBNAIL_BYTES = 20_000
"""Largest thumbnail; programs that list LoRA files keep every header in memory."""

MAX_FACTOR = 1024
"""Largest number in a factor; trained factors stay below 1, or below 100 if they include alpha."""

_MAGIC = {"jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n"}
MAX_NOISE_SIDE = 512
"""Longest side of the photo's own noise: that of a very wide photo in a cascade's last stage, whose latents are
pixels."""
_TENSORS = ("conditioning", "coarse", "noise")
_BINARY = ("adapters", *_TENSORS, "thumbnail")


class LoraFactors(NamedTuple):
    """The low-rank update of one layer: ``alpha / r * up @ down`` is added to its weight.

    A named form of the tuples that adapters are trained as, and are loaded from (`layers.adapter_pack.Factors`).
    """

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

    def __ne__(self, other: object) -> bool:
        # A tuple's own would compare the tensors' values.
        return not self == other

    @property
    def rank(self) -> int:
        """Returns r."""
        return self.down.shape[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """One finished edit, valid by construction; treat its mappings and tensors as read-only.

    Construction copies the tensors into the form that the file holds: they become fp16 on the CPU (bf16 stays, but in
    adapters), alpha is rounded to fp32, tuples inside `settings` and `measured` become lists. Two edits are equal
    exactly if their files are, byte for byte.

    Raises:
        EditHeaderError: A field of the wrong type or out of range; named as in the file.
        MissingTensorError: A denoiser without layers, or a tensor that the base's interface names.
        UnknownTensorError, TensorDtypeError, TensorShapeError, NonFiniteTensorError, TensorValueError: A bad tensor.
    """

    adapters: Mapping[str, Mapping[str, LoraFactors]] = field(repr=False)
    """Factors by denoiser, and by the layer's key without the factor's ending (see `edits.layouts`)."""
    conditioning: Mapping[str, Tensor] = field(repr=False)
    """e_opt: the stored tensors of the conditioning after stage 1, by name, without the batch axis."""
    coarse: Mapping[str, Tensor] = field(repr=False)
    """The photo's low frequencies ``(C, h, w)`` by denoiser: averages of a few large cells, so brightness and colours,
    from which sampling may start (`settings.stages.SampleConfig.start`)."""
    noise: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """The photo's own noise ``(C, H, W)`` by denoiser; empty unless training was anchored to it."""
    sentences: tuple[str, ...]
    """The sentences the photo is edited towards: one, several, or none if they are asked later."""
    start_sentence: str = ""
    """The sentence whose embedding stage 1 started from; "" takes the only one of `sentences`."""
    base: BaseIdentity
    """The base model the edit was made for."""
    settings: Mapping[str, Any]
    """Settings per stage (``embed``, ``finetune``, ``sample``, ``adapter``), JSON-able."""
    seed: int
    """Seed of the edit's generator, 0 to 2**63 - 1."""
    etas: tuple[float, ...]
    """Interpolation factors that were tried: 0 is the photo, 1 the target sentence."""
    eta_default: float
    """The factor to render with by default."""
    source: SourcePicture
    """The photo, by hash and geometry."""
    base_weights: str
    """How the base was stored while training: ``int8``, ``nf4``, ``bnb-int8``, ``bf16``, ``fp32``."""
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
        interface = self.base.interface
        adapters = _named(self.adapters, interface.denoisers, "adapter")
        conditioning = _named(self.conditioning, interface.text, "conditioning")
        coarse = _named(self.coarse, interface.denoisers, "coarse latents")
        noise = _named(self.noise, interface.denoisers, "noise") if self.noise else {}
        if not self.start_sentence and isinstance(self.sentences, list | tuple) and len(self.sentences) == 1:
            object.__setattr__(self, "start_sentence", self.sentences[0])
        checked = checked_meta({name: getattr(self, name) for name in META_KEYS})
        one = checked["sentences"] == (checked["start_sentence"],)
        version = _version(self.base, self.source, one, layout_of_keys(adapters), conditioning, coarse, noise)
        checked |= {
            "adapters": {name: _check_adapter(adapters[name], name, interface.denoisers) for name in sorted(adapters)},
            "conditioning": {
                name: _check_text(conditioning[name], interface.text[name], f"text.{name}", version)
                for name in sorted(conditioning)
            },
            "coarse": {name: _check_coarse(coarse[name], place(f"coarse.{name}", version)) for name in sorted(coarse)},
            "noise": {
                name: _check_noise(noise[name], coarse[name], place(f"noise.{name}", version)) for name in sorted(noise)
            },
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
            and all(_same_tensors(getattr(self, name), getattr(other, name)) for name in _TENSORS)
            and self.adapters == other.adapters
        )

    def _facts(self) -> dict[str, Any]:
        """Returns the fields that are neither tensors nor pictures, as JSON-able values."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _BINARY}
        return facts | {"base": asdict(self.base), "source": asdict(self.source)}

    @property
    def rank(self) -> int:
        """Returns the largest rank among the layers."""
        return max(factors.rank for adapter in self.adapters.values() for factors in adapter.values())

    @property
    def layout(self) -> Layout:
        """Returns the names that the adapters' tensors have in the file."""
        return layout_of_keys(self.adapters)

    @property
    def version(self) -> int:
        """Returns the version of the format that the file is written in: the first one that can say everything."""
        one = self.sentences == (self.start_sentence,)
        return _version(self.base, self.source, one, self.layout, self.conditioning, self.coarse, self.noise)

    @property
    def target_prompt(self) -> str | None:
        """Returns the sentence of an edit with one, the first of several, None without any."""
        return self.sentences[0] if self.sentences else None


def _version(
    base: BaseIdentity, source: SourcePicture, one: bool, layout: Layout, *stored: Mapping[str, object]
) -> int:
    """Returns the first version of the format that can hold an edit with these tensors beside the adapters.

    `one` says whether it has one sentence, which its training started from.
    """
    if not one:
        return NEWEST
    square = source.size[0] == source.size[1]
    tensors = (tensor for tensors in stored for tensor in tensors.values())
    half = not any(isinstance(tensor, Tensor) and tensor.dtype == torch.bfloat16 for tensor in tensors)
    return version_of_base(base) if square and half and layout is KOHYA else MAPPED


def layout_of_keys(adapters: Mapping[str, Mapping[str, Any]]) -> Layout:
    """Returns the layout of the layers' keys; `KOHYA` if they fit neither."""
    keys = (key for adapter in adapters.values() if isinstance(adapter, Mapping) for key in adapter)
    return layout_of(f"{key}.{PEFT.parts[0]}" for key in keys)


def _named(value: object, names: Mapping[str, object], kind: str) -> dict[str, Any]:
    """Returns a mapping that has exactly the named members."""
    members = dict(checks.mapping(value, kind))
    if missing := sorted(names.keys() - members.keys()):
        raise MissingTensorError(f"the {kind} of {reprlib.repr(missing[0])} is missing")
    if unknown := sorted(map(str, members.keys() - names.keys())):
        raise UnknownTensorError(f"the {kind} of {reprlib.repr(unknown[0])} fits no part of the base")
    return members


def _check_adapter(adapter: object, denoiser: str, denoisers: Mapping[str, str]) -> dict[str, LoraFactors]:
    """Returns a copy of a denoiser's adapter in the form of the file, sorted by layer."""
    factors_by_layer = dict(checks.mapping(adapter, "adapter"))
    if not factors_by_layer:
        raise MissingTensorError("the adapter has no layers, expected at least one")
    checks.require(
        len(factors_by_layer) <= MAX_LAYERS, "adapter", len(factors_by_layer), f"at most {MAX_LAYERS} layers"
    )
    layout = layout_of_keys({denoiser: factors_by_layer})
    checked = {}
    for layer, factors in sorted(factors_by_layer.items(), key=lambda item: str(item[0])):
        named = isinstance(layer, str) and layout.layer.fullmatch(layer)
        if not named or layout.denoiser_of(layer, denoisers) != denoiser:
            raise UnknownTensorError(
                f"layer {reprlib.repr(layer)}: expected a key of the form {layout.form} for {denoiser}"
            )
        checks.require(isinstance(factors, LoraFactors), layer, factors, "LoraFactors")
        down_name, up_name = (f"{layer}.{part}" for part in layout.parts[:2])
        down, up = _half(factors.down, down_name), _half(factors.up, up_name)
        check_factor_shapes(layer, tuple(down.shape), tuple(up.shape))
        _check_factor_values(down, down_name)
        _check_factor_values(up, up_name)
        alpha = _check_alpha(factors.alpha, f"{layer}.alpha")
        if layout is PEFT and alpha != down.shape[0]:
            raise TensorValueError(f"layer {layer}: found alpha {alpha:g}, expected its rank, {down.shape[0]}")
        checked[layer] = LoraFactors(down, up, alpha)
    return checked


def _check_factor_values(factor: Tensor, name: str) -> None:
    """Guarantees numbers in the range of training, whose products are finite."""
    low, high = (float(extreme) for extreme in factor.aminmax())
    if max(-low, high) > MAX_FACTOR:
        raise TensorValueError(f"tensor {name}: found values from {low:g} to {high:g}, expected at most {MAX_FACTOR}")


def _check_alpha(alpha: object, name: str) -> float:
    """Returns alpha rounded to fp32, above 0 and at most `MAX_ALPHA`."""
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise checks.wrong(f"tensor {name}", alpha, "a number")
    rounded = float(torch.tensor(float(alpha), dtype=torch.float32))
    check_alpha(rounded, name)
    return rounded


def _check_text(tensor: object, width: int, member: str, version: int) -> Tensor:
    """Returns a copy of a tensor of the conditioning, of the base's width."""
    name = place(member, version)
    checked = _stored_copy(tensor, name)
    shape = tuple(checked.shape)
    sides = (len(SIDES[member]),) if version == 1 else range(1, MAX_TEXT_SIDES + 1)
    if len(shape) not in sides or min(shape) < 1 or shape[-1] != width:
        raise TensorShapeError(f"{name}: found shape {shape}, expected (T, {width})")
    if checked.nbytes > MAX_EMBEDDING_BYTES:
        raise TensorShapeError(f"{name}: shape {shape} is above {MAX_EMBEDDING_BYTES} bytes")
    return checked


def _check_coarse(latents: object, name: str) -> Tensor:
    """Returns a copy of the low frequencies, of at most `MAX_COARSE_SIDE` cells a side."""
    checked = _stored_copy(latents, name)
    shape, most = tuple(checked.shape), MAX_COARSE_SIDE
    if len(shape) != 3 or not 1 <= shape[0] <= MAX_CHANNELS or not all(1 <= side <= most for side in shape[1:]):
        raise TensorShapeError(f"{name}: found shape {shape}, expected (C, h, w), h and w up to {most}")
    return checked


def _check_noise(noise: object, coarse: Tensor, name: str) -> Tensor:
    """Returns a copy of the photo's own noise, with as many channels as its low frequencies."""
    checked = _stored_copy(noise, name)
    shape, most = tuple(checked.shape), MAX_NOISE_SIDE
    if len(shape) != 3 or shape[0] != coarse.shape[0] or not all(1 <= side <= most for side in shape[1:]):
        raise TensorShapeError(f"{name}: found shape {shape}, expected ({coarse.shape[0]}, H, W), H and W up to {most}")
    return checked


def picture_kind(picture: object) -> str:
    """Returns ``jpeg`` or ``png``, by the picture's first bytes."""
    if isinstance(picture, bytes) and len(picture) <= MAX_THUMBNAIL_BYTES:
        for kind, magic in _MAGIC.items():
            if picture.startswith(magic):
                return kind
    raise EditHeaderError(f"modelspec.thumbnail: expected a JPEG or PNG of at most {MAX_THUMBNAIL_BYTES} bytes")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors have the same bits; their values would not tell -0 from 0."""
    bits = one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def _same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Returns whether two mappings have the same tensors under the same names."""
    return one.keys() == other.keys() and all(_same_bits(tensor, other[name]) for name, tensor in one.items())


def _stored_copy(tensor: object, name: str) -> Tensor:
    """Returns a contiguous copy on the CPU with finite values: in bf16 if the tensor is in bf16, otherwise in fp16."""
    is_bf16 = isinstance(tensor, Tensor) and tensor.dtype == torch.bfloat16
    return _half(tensor, name, torch.bfloat16 if is_bf16 else torch.float16)


def _half(tensor: object, name: str, dtype: torch.dtype = torch.float16) -> Tensor:
    """Returns a contiguous copy on the CPU with finite values, in a type of 16 bits."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TensorDtypeError(f"tensor {name}: found {kind}, expected floating point")
    copied = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    if not bool(torch.isfinite(copied).all()):
        raise NonFiniteTensorError(f"tensor {name}: found NaN, infinity or values beyond fp16, expected finite ones")
    return copied
