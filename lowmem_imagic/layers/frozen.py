"""Frozen layers of 8 or 4 bits, and the conversion of a network to them.

In ``int8`` every linear layer and every convolution has 8 bits. In ``nf4`` linear layers have 4 bits (QLoRA, arXiv
2305.14314, section 3: 9 % of a layer's output for Gaussian weights) and convolutions 8.

Weights are int8 with one fp32 absmax per output channel and are expanded to the input's
type for each product: the same algorithm on CPU and GPU, rows never influence each other, and the
error is that of rounding the weights (0.7-0.9 % of a layer's output for Gaussian weights).

**Memory**: for the backward pass a layer keeps only its int8 weight and scale, which exist anyway; never
its input. Stock bitsandbytes keeps every input on the autograd context, where gradient checkpointing
cannot free it.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTION_PART, _LINEAR_PART = 2**18, 2**21
"""Most weights of a layer that are quantised at a time. The copies of a convolution's part take 1 MB. bitsandbytes
returns a linear layer's part in a tensor of its own: with small parts, these tensors leave holes between the layers
that stay, 0.15 GB in SDXL's UNet."""


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        # Not saved for backward: these tensors are frozen and belong to the layer. Gradient checkpointing recomputes a
        # block up to its last saved tensor, so saving here would make it recompute this product.
        ctx.weight, ctx.scale = weight, scale
        return F.linear(x, _expand(weight, scale), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ _expand(ctx.weight, ctx.scale), None, None, None


class _FrozenConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        groups: int,
    ) -> Tensor:
        ctx.weight, ctx.scale = weight, scale
        ctx.geometry, ctx.input_shape = (list(stride), list(padding), groups), x.shape
        return F.conv2d(x, _expand(weight, scale), bias, stride, padding, 1, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stride, padding, groups = ctx.geometry
        grad = grads[0]
        # The gradient needs only the input's shape, so an expanded scalar stands in for the input.
        stand_in = grad.new_empty(1).expand(ctx.input_shape)
        grad_input = torch.ops.aten.convolution_backward(
            grad,
            stand_in,
            _expand(ctx.weight, ctx.scale),
            None,
            stride,
            padding,
            [1, 1],
            False,
            [0, 0],
            groups,
            [True, False, False],
        )[0]
        return grad_input, None, None, None, None, None, None


def _expand(weight: Tensor, scale: Tensor) -> Tensor:
    """The weight in the type of `scale`: int8 values times their output channel's scale."""
    factors = scale.view((-1,) + (1,) * (weight.dim() - 1))
    if weight.device.type == "cpu":
        # On this device a product of two types would first copy one of them.
        return weight.to(scale.dtype).mul_(factors)
    return weight * factors


def _parts(weight: Tensor, values: int) -> Iterator[slice]:
    """Yields the output channels of a weight in parts of at most so many values."""
    channels = max(1, values * len(weight) // max(1, weight.numel()))
    for first in range(0, len(weight), channels):
        yield slice(first, first + channels)


class _Scale:
    """A layer's scale in the type of the arithmetic, cached: computing it in every pass would add about 10 % more
    kernel launches."""

    def __init__(self) -> None:
        self._absmax: Tensor | None = None
        self._key: Any = None
        self._value = torch.empty(0)

    def of(self, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """``absmax / 127`` in `dtype`; computed again for another type, and once `absmax` has changed or moved."""
        key = (absmax.data_ptr(), absmax._version, absmax.device, dtype)
        # The tensor itself, too: another one may have its address.
        if self._absmax is not absmax or self._key != key:
            self._absmax, self._key, self._value = absmax, key, (absmax / 127).to(dtype)
        return self._value


def _own(bias: Tensor, device: torch.device) -> nn.Parameter:
    """A frozen copy: a tensor read from a safetensors file keeps the mapping of the whole file alive."""
    return nn.Parameter(bias.to(device, copy=True), requires_grad=False)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


class _FrozenLinear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "FrozenLinear4bit", bias: Tensor | None) -> Tensor:
        # The layer is no tensor, so nothing is saved.
        ctx.layer = layer
        return F.linear(x, layer.expanded(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ ctx.layer.expanded(grads[0].dtype), None, None


class FrozenLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]
    """A frozen linear layer in bitsandbytes' nf4 storage with weight-only arithmetic.

    Input (..., in), output (..., out). The weight is stored as one row: bitsandbytes 0.50 expands blocks that reach
    over the end of a row wrongly on CPUs.
    """

    @staticmethod
    def from_weights(weight: Tensor, bias: Tensor | None, device: torch.device) -> "FrozenLinear4bit":
        """The layer for a weight (out, in), quantised on `device`."""
        outputs, inputs = weight.shape
        layer = FrozenLinear4bit(inputs, outputs, bias is not None, quant_type="nf4", device="meta")
        if device.type == "meta":
            packed, state = _packed_on_meta(weight.numel())
        else:
            # A type of the file that bitsandbytes does not read becomes half precision's nearest.
            readable = weight if weight.dtype in (torch.float16, torch.bfloat16, torch.float32) else weight.float()
            packed, state = bnb.functional.quantize_4bit(
                readable.to(device).flatten(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
            )
        layer.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, blocksize=_BLOCK, quant_type="nf4", bnb_quantized=True
        )
        if bias is not None:
            layer.bias = _own(bias, device)
        return layer

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in a type."""
        if self.weight.is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")
        state = self.weight.quant_state
        state.dtype = dtype
        weight: Tensor = bnb.functional.dequantize_4bit(self.weight.data, state)
        return weight.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = _FrozenLinear4bit.apply(rows, self, _cast(self.bias, x.dtype))  # type: ignore[no-untyped-call]
        # The view is made outside the Function, so that callers may add to the result in place.
        return y.view(*x.shape[:-1], y.shape[-1])


_BLOCK, _BLOCK_OF_SCALES = 64, 256
"""Weights with one scale in nf4, and scales that are quantised with one number."""


def _packed_on_meta(count: int) -> tuple[Tensor, Any]:
    """The storage of `count` weights in nf4, on the meta device."""

    def empty(size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    scales = -(-count // _BLOCK)
    second = bnb.functional.QuantState(
        absmax=empty(-(-scales // _BLOCK_OF_SCALES), torch.float32), code=empty(256, torch.float32)
    )
    state = bnb.functional.QuantState(
        absmax=empty(scales, torch.uint8), code=empty(16, torch.float32), offset=empty(1, torch.float32), state2=second
    )
    return empty(-(-count // 2), torch.uint8)[:, None], state


class FrozenLinear8bit(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """A frozen linear layer in bitsandbytes' int8 storage with weight-only arithmetic.

    peft's bitsandbytes dispatch handles it as a `Linear8bitLt`. Input (..., in), output (..., out).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scale = _Scale()

    @staticmethod
    def from_weights(weight: Tensor, bias: Tensor | None, device: torch.device) -> "FrozenLinear8bit":
        """The layer for a weight (out, in), quantised on `device`."""
        return _in_bnb_storage(FrozenLinear8bit, weight, bias, device)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.CB is not None:
            self.init_8bit_state()
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = _FrozenLinear.apply(  # type: ignore[no-untyped-call]
            rows, self.weight.data, self._scale.of(self.state.SCB, x.dtype), _cast(self.bias, x.dtype)
        )
        # The view is made outside the Function, so that callers may add to the result in place.
        return y.view(*x.shape[:-1], y.shape[-1])


class Int8Conv2d(nn.Conv2d):
    """A frozen convolution with int8 weights; input (R, C, H, W).

    A plain float `Conv2d` until `quantize_` is called: peft builds its own small convolutions with the
    class of the layer it adapts.
    """

    absmax: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scale = _Scale()

    @staticmethod
    def from_weights(like: nn.Conv2d, weight: Tensor, bias: Tensor | None, device: torch.device) -> "Int8Conv2d":
        """The layer with the geometry of `like` and the given weights, quantised on `device`."""
        layer = Int8Conv2d(
            like.in_channels,
            like.out_channels,
            like.kernel_size,  # type: ignore[arg-type]
            like.stride,  # type: ignore[arg-type]
            like.padding,  # type: ignore[arg-type]
            groups=like.groups,
            bias=bias is not None,
            device="meta",
        )
        layer.weight = nn.Parameter(weight.to(device), requires_grad=False)
        if bias is not None:
            layer.bias = _own(bias, device)
        return layer.quantize_()

    def quantize_(self) -> "Int8Conv2d":
        """Replaces the float weight by int8 values and one absmax per output channel; returns itself."""
        weight = self.weight.data
        absmax = weight.new_empty(len(weight), dtype=torch.float32)
        # Tensor cores and oneDNN compute in channels-last layout.
        rounded = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.channels_last)
        # In parts: an fp32 copy of the largest layer would set the peak of loading.
        for rows in _parts(weight, _CONVOLUTION_PART):
            part = weight[rows].to(torch.float32, copy=True)
            absmax[rows] = torch.linalg.vector_norm(part, math.inf, dim=(1, 2, 3)).clamp_min_(1e-12)
            rounded[rows] = part.mul_((127 / absmax[rows]).view(-1, 1, 1, 1)).round_()
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.register_buffer("absmax", absmax)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if "absmax" not in self._buffers:
            return super().forward(x)
        result: Tensor = _FrozenConv2d.apply(  # type: ignore[no-untyped-call]
            x,
            self.weight,
            self._scale.of(self.absmax, x.dtype),
            _cast(self.bias, x.dtype),
            self.stride,
            self.padding,
            self.groups,
        )
        return result


def _in_bnb_storage(kind: Any, weight: Tensor, bias: Tensor | None, device: torch.device) -> Any:
    """A layer of `kind` (`Linear8bitLt` or a subclass) with the weight (out, in) quantised by bitsandbytes."""
    outputs, inputs = weight.shape
    layer = kind(inputs, outputs, bias is not None, has_fp16_weights=False, threshold=0.0, device="meta")
    if device.type == "meta":
        # bitsandbytes quantises while it moves weights to a device; the meta device has no values to quantise.
        stored = {
            "CB": torch.empty_like(weight, dtype=torch.int8),
            "SCB": weight.new_empty(outputs, dtype=torch.float32),
        }
        layer.weight = bnb.nn.Int8Params(stored["CB"], requires_grad=False, has_fp16_weights=False, **stored)
    elif device.type == "cpu":
        # bitsandbytes makes several fp32 copies there, so it is given a part at a time.
        stored = {"CB": torch.empty(outputs, inputs, dtype=torch.int8), "SCB": torch.empty(outputs)}
        for rows in _parts(weight, _LINEAR_PART):
            part, scale, _ = bnb.functional.int8_vectorwise_quant(weight[rows].to(device, torch.float16))
            stored["CB"][rows], stored["SCB"][rows] = part, scale
        layer.weight = bnb.nn.Int8Params(stored["CB"], requires_grad=False, has_fp16_weights=False, **stored)
    else:
        layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    if bias is not None:
        layer.bias = _own(bias, device)
    return layer


def _quantized(
    module: nn.Module, state: dict[str, Tensor], weights: str | None, device: torch.device, dtype: torch.dtype
) -> nn.Module | None:
    """The layer of few bits for `module` with this state, or None if the layer stays in float."""
    weight = state.get("weight")
    if weight is None:
        return None
    # Stored in the compute type: otherwise every product would begin with a cast.
    bias = _cast(state.get("bias"), dtype)
    if type(module) is nn.Linear:
        if weights == "int8":
            return FrozenLinear8bit.from_weights(weight, bias, device)
        if weights == "nf4":
            return FrozenLinear4bit.from_weights(weight, bias, device)
        if weights == "bnb-int8":
            return _in_bnb_storage(bnb.nn.Linear8bitLt, weight, bias, device)  # type: ignore[no-any-return]
    elif type(module) is nn.Conv2d and weights in ("int8", "nf4"):
        plain = module.padding_mode == "zeros" and module.dilation == (1, 1) and not isinstance(module.padding, str)
        return Int8Conv2d.from_weights(module, weight, bias, device) if plain else None
    return None


def _fill(
    modules: dict[str, nn.Module],
    path: str,
    state: dict[str, Tensor],
    weights: str | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Gives the module at `path` its weights, and replaces it by a layer of few bits if there is one for it."""
    layer = _quantized(modules[path], state, weights, device, dtype)
    if layer is not None:
        parent, _, child = path.rpartition(".")
        setattr(modules[parent], child, layer)
        modules[path] = layer
        return
    for leaf, value in state.items():
        value = value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
        if value.dim() == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        setattr(modules[path], leaf, nn.Parameter(value, requires_grad=False))


def load_frozen(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    weights: str,
    device: torch.device,
    dtype: torch.dtype,
    in_float: Collection[str] = (),
    in_bf16: Collection[str] = (),
) -> None:
    """Fills `model`, whose parameters are on the meta device, with frozen weights, layer by layer.

    Args:
        model: a network on the meta device; linear layers and convolutions are replaced in place.
        tensors: (name, tensor) pairs in any order; reading may be lazy.
        weights: one of `settings.stages.WEIGHT_FORMATS`.
        device: device of the weights.
        dtype: type of the weights that are not quantised.
        in_float: names of layers that stay in float: those at the picture or the latents are the most sensitive, and
            take a few kB.
        in_bf16: names of layers that are in bfloat16 whatever `dtype` is: tables of a vocabulary, which take more than
            all scales and biases together.

    Raises:
        ValueError: names in `tensors` that the model lacks, the reverse, or shapes that differ.

    **Memory**: one layer in full precision at a time, if `tensors` reads lazily.
    """
    modules = dict(model.named_modules())
    computed = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    expected = {name: tuple(t.shape) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    expected = {name: shape for name, shape in expected.items() if name not in computed}
    missing = set(expected)
    pending: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        if name not in expected:
            raise ValueError(f"weights have {name}, which the configured network lacks")
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the configured network {expected[name]}")
        missing.discard(name)
        path, _, leaf = name.rpartition(".")
        pending.setdefault(path, {})[leaf] = tensor
        # Free this tensor before the next one is read.
        del tensor
        if len(pending[path]) >= sum(1 for _ in modules[path].parameters(recurse=False)):
            kind = None if path in in_float else weights
            _fill(modules, path, pending.pop(path), kind, device, torch.bfloat16 if path in in_bf16 else dtype)
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise ValueError(f"weights lack {len(missing)} tensors of the configured network, such as {some}")
    for name in computed:
        # Made by the classes themselves, such as the frequencies of rotary positions.
        path, _, leaf = name.rpartition(".")
        modules[path]._buffers[leaf] = modules[path].get_buffer(leaf).to(device)
    model.requires_grad_(False)
    # peft picks its bitsandbytes layers by these flags.
    model.is_loaded_in_8bit = weights in ("int8", "bnb-int8")  # type: ignore[assignment]
    model.is_loaded_in_4bit = weights == "nf4"  # type: ignore[assignment]
    model.eval()


def move_weights(model: nn.Module, device: torch.device) -> None:
    """Moves a frozen network's weights and buffers to a device, those in few bits in their storage."""
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            weight.data = weight.data.to(device)
            if isinstance(weight, bnb.nn.Int8Params) and weight.CB is not None:
                weight.CB, weight.SCB = weight.data, weight.SCB.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
        if isinstance(module, bnb.nn.Linear8bitLt) and module.state.CB is not None:
            # Since the first pass, bitsandbytes has them here.
            module.state.CB, module.state.SCB = module.weight.data, module.state.SCB.to(device)
        if isinstance(module, FrozenLinear4bit):
            module.weight.quant_state.to(device)


def drop_weights(model: nn.Module) -> None:
    """Frees the weights and buffers of a network, which stays as a shell on the meta device."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(weight.data, device="meta"), False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="meta")
        if isinstance(module, bnb.nn.Linear8bitLt):
            module.state = bnb.MatmulLtState()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, scales included."""
    total = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            total += 0 if scale is None else scale.numel() * scale.element_size()
        elif isinstance(module, FrozenLinear4bit) and (state := getattr(module.weight, "quant_state", None)):
            tensors = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            total += sum(t.numel() * t.element_size() for t in tensors)
    return total
