"""Counts the bytes of live tensors, and the arithmetic, of running code, with or without real memory behind it.

The meta device computes nothing, but code on it creates and drops the same tensors as on a real device. So a network's
real code shows its peak before any weight is read. Tests compare these predictions with the same count on a CPU.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper


def _of_attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _of_attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


# torch's registry lacks the operation that `fused_attention` calls.
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_of_attention),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _of_attention_backward,
}


class _Operation(NamedTuple):
    """What is counted of an operation."""

    view: bool
    """Whether its result has the storage of an argument."""
    writes: bool
    """Whether it writes into an argument."""
    kernel: bool
    """Whether it computes or copies."""
    flops: Callable[..., int] | None


@cache
def _operation(func: Any) -> _Operation:
    free = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view", "aten.lift_fresh")
    kernel = not func.is_view and not str(func).startswith(free)
    return _Operation(func.is_view, func._schema.is_mutable, kernel, _FLOPS.get(func.overloadpacket))


class _Layout(NamedTuple):
    """Shape, strides and type of a tensor on the meta device."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> "_Layout":
        return _Layout(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def new(self) -> Tensor:
        """A tensor of this layout."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class _HasMemory(Exception):
    """A tensor is not on the meta device."""


def _key(value: Any) -> Any:
    """A key that is equal for arguments of which an operation makes equal layouts on the meta device.

    Raises:
        _HasMemory: a tensor is elsewhere.
    """
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise _HasMemory
        return _Layout.of(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    # 1, 1.0 and True are equal, and make results of several types.
    return type(value), value


class Counts(TorchDispatchMode):
    """Within the ``with`` block, counts the bytes of live tensors, forward and backward, and operations.

    Every storage that an operation creates counts once, with any number of views. Kernels' own scratch memory and
    storages from before the block do not count.

    On the meta device torch works out a result's layout in Python, which is most of the time of a count. Networks
    repeat themselves, so each layout is worked out once.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at once.
        operations: operations so far that compute or copy, about one GPU kernel each.
        flops: floating-point operations of products, convolutions and attention so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.operations = self.flops = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        self._results: dict[Any, tuple[list[_Layout | None], bool, int]] = {}
        """Results on the meta device by operation and arguments: layouts, whether in a tuple, and FLOPs."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named, operation = kwargs or {}, _operation(func)
        if operation.view:
            return func(*args, **named)
        self.operations += operation.kernel
        key = None
        if not operation.writes:
            with suppress(_HasMemory):
                key = (func, _key(args), _key(tuple(named.items())))
        if key in self._results:
            layouts, several, flops = self._results[key]
            made = [None if layout is None else layout.new() for layout in layouts]
            for tensor in made:
                if tensor is not None:
                    self._follow(tensor.untyped_storage())
            self.flops += flops
            return tuple(made) if several else made[0]

        result = func(*args, **named)
        flops = 0 if operation.flops is None else operation.flops(*args, **named, out_val=result)
        self.flops += flops
        # A storage of an argument is from before the block, or known.
        before = {tensor.untyped_storage()._cdata for tensor in _tensors((*args, *named.values()))}
        new = True
        for tensor in _tensors((result,)):
            storage = tensor.untyped_storage()
            if storage._cdata in before or storage._cdata in self._known:
                new = False
                continue
            self._follow(storage)
            new &= tensor.is_meta and _Layout.of(tensor).new().untyped_storage().nbytes() == storage.nbytes()
        parts = result if isinstance(result, tuple) else (result,)
        if new and key is not None and all(part is None or isinstance(part, Tensor) for part in parts):
            layouts = [None if part is None else _Layout.of(part) for part in parts]
            self._results[key] = layouts, isinstance(result, tuple), flops
        return result

    def _follow(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operation, and in its lists of tensors."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


_FUSED: ContextVar[str] = ContextVar("fused", default="")
"""The fused attention that this thread counts, if any."""


@contextmanager
def fused_attention(kind: str = "sdpa") -> Iterator[None]:
    """Within the ``with`` block, attention on the meta device allocates like a fused kernel: no matrix of all pairs.

    The meta device has no fused kernel; every real device has one. Other threads, and tensors on other devices, use
    torch's own attention.

    Args:
        kind: "sdpa" for torch's kernels, which read heads as the projections left them; "xformers" for those of
            xformers as diffusers calls them, with copies of queries, keys, values and results, each head in one piece.
            A tensor of sums has the same size in both: xformers rounds it up to 32 rows.
    """
    token = _FUSED.set(kind)
    try:
        yield
    finally:
        _FUSED.reset(token)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention on the meta device: of a fused kernel within `fused_attention`, else torch's own."""
    aten, kind = torch.ops.aten, _FUSED.get()
    if not kind:
        own: Tensor = aten.scaled_dot_product_attention.default.decompose(query, key, value, *args, **kwargs)
        return own
    if kind == "xformers":
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    result: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
    return result.contiguous() if kind == "xformers" else result


# A torch function mode would not reach the passes that checkpointing recomputes, and a dispatch mode sees only the
# operations that torch decomposes attention into.
_ON_META = torch.library.Library("aten", "IMPL")
_ON_META.impl("scaled_dot_product_attention", _attention, "AutogradMeta")


@dataclass(frozen=True)
class Cost:
    """The cost of running some code."""

    peak: int
    """Most bytes allocated at once."""
    operations: int
    """Operations that compute or copy."""
    flops: int
    """Their floating-point operations."""


def cost_of(run: Callable[[], object]) -> Cost:
    """The cost of `run`."""
    with Counts() as counts:
        run()
    return Cost(counts.peak, counts.operations, counts.flops)


def peak_of(run: Callable[[], object]) -> int:
    """Most bytes that `run` allocates at once."""
    return cost_of(run).peak
