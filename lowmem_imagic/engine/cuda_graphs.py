"""Passes that a GPU replays: thousands of kernels, recorded once and started by one call (CUDA graphs)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 3
"""Calls before recording, in which libraries choose their kernels and take their scratch memory."""


class Replay:
    """A function of tensors, recorded on a GPU for their shapes and replayed from then on.

    On other devices, where there is nothing to record, it is called every time, over the same buffers.

    Args:
        run: what is recorded. It may change tensors that stay where they are, returns a tensor that it makes, reads
            nothing back to the CPU, and does not depend on anything else that changes.
        inputs: such as every call has, on any device.
        device: where it runs.
        changed: tensors that `run` changes in place; recording leaves them as they were, also where it fails.
        beside: another, of which a call never comes between a call of this and the use of what it gives, nor the
            other way round: they have their memory in common.

    Raises:
        RuntimeError: it cannot be recorded; among them `torch.OutOfMemoryError`.

    **Memory**: what `run` holds at its peak stays taken for as long as this is there; a copy of `changed` while it is
    recorded.
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        *,
        device: torch.device,
        changed: Sequence[Tensor] = (),
        beside: "Replay | None" = None,
    ) -> None:
        self._run = run
        self._inputs = [given.to(device, copy=True) for given in inputs]
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._record(changed, beside)

    def _record(self, changed: Sequence[Tensor], beside: "Replay | None") -> None:
        before = [tensor.clone() for tensor in changed]
        # On a stream of its own, as what the default one waits for could not be recorded; memory in common is of one.
        self._stream: Any = torch.cuda.Stream() if beside is None else beside._stream
        pool = None if beside is None or beside._graph is None else beside._graph.pool()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    self._run(*self._inputs)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                self._output = self._run(*self._inputs)
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
        self._graph = graph

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What `run` gives for inputs of the same shapes; on a GPU good until the next call."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        if self._graph is None:
            return self._run(*self._inputs)
        self._graph.replay()
        return self._output
