"""Counts the bytes of live tensors, and the arithmetic, of running code, with or without real memory behind it.

The meta device computes nothing, but code on it creates and drops the same tensors as on a real device. So a network's
real code shows its peak before any weight is read. Tests compare these predictions with the same count on a CPU.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper


class LiveBytes(TorchDispatchMode):
    """Within the ``with`` block, tracks every storage that an operation creates, forward and backward.

    Kernels' own scratch memory and storages from before the block are not counted. Each storage counts once, with any
    number of views.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Storages of the inputs existed before the block or are tracked already.
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self._known:
                    self._follow(storage)
        return result

    def _follow(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


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


class Kernels(TorchDispatchMode):
    """Within the ``with`` block, counts operations that compute or copy: about one GPU kernel each.

    Attributes:
        count: operations so far, without views and allocations.
        flops: floating-point operations of products, convolutions and attention so far.
    """

    _FREE = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view", "aten.lift_fresh")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view and not str(func).startswith(self._FREE)
        result = func(*args, **(kwargs or {}))
        if (flops := _FLOPS.get(func.overloadpacket)) is not None:
            self.flops += flops(*args, **(kwargs or {}), out_val=result)
        return result


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
    live, kernels = LiveBytes(), Kernels()
    with live, kernels:
        run()
    return Cost(live.peak, kernels.count, kernels.flops)


def peak_of(run: Callable[[], object]) -> int:
    """Most bytes that `run` allocates at once."""
    live = LiveBytes()
    with live:
        run()
    return live.peak
