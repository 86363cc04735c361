"""Counts the bytes of live tensors while code runs, with or without real memory behind them.

On the meta device nothing is computed, yet every tensor is made and dropped as it would be, so a network's real code
tells its peak before a weight is read. The same counting on a CPU is what a prediction is checked against.
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
    """Within the ``with`` block, follows every storage that an operation makes, forward and backward.

    Kernels' own scratch memory is not seen, nor what was there before. Each storage counts once, however many
    views there are of it.

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
        # Whatever goes in was there before, or is known already.
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
    """Within the ``with`` block, counts operations that compute or copy: about a kernel each on a GPU.

    Attributes:
        count: operations so far, without those that only make a view or room.
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
    """Within the ``with`` block attention keeps what fused kernels keep: no matrix of all pairs.

    The meta device has no fused kernel of its own; every device that computes has one. Other threads, and tensors on
    other devices, have torch's attention as it is.

    Args:
        kind: "sdpa" for torch's kernels, which read heads where the projections left them; "xformers" for those of
            xformers as diffusers calls them, with copies of queries, keys, values and results in which a head lies
            together. A tensor of sums is of the same size in both: xformers rounds it up to 32 rows.
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


# A torch function mode would not reach what checkpointing computes again, and a dispatch mode sees only the parts that
# torch takes attention apart into.
_ON_META = torch.library.Library("aten", "IMPL")
_ON_META.impl("scaled_dot_product_attention", _attention, "AutogradMeta")


def peak_of(run: Callable[[], object]) -> int:
    """The most bytes that `run` holds at once beyond what was there before."""
    count = LiveBytes()
    with count:
        run()
    return count.peak
