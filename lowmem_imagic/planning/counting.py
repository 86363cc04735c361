"""Counts the bytes of live tensors while code runs, with or without real memory behind them.

The meta device computes nothing, but code on it creates and drops the same tensors as on a real device. So a network's
real code shows its peak before any weight is read. Tests compare these predictions with the same count on a CPU.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class Kernels(TorchDispatchMode):
    """Within the ``with`` block, counts operations that compute or copy: about one GPU kernel each.

    Attributes:
        count: operations so far, without views and allocations.
    """

    _FREE = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view", "aten.lift_fresh")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view and not str(func).startswith(self._FREE)
        return func(*args, **(kwargs or {}))


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


def peak_of(run: Callable[[], object]) -> int:
    """Most bytes that `run` allocates at once."""
    count = LiveBytes()
    with count:
        run()
    return count.peak
