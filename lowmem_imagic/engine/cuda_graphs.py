"""Recorded passes: thousands of kernels, recorded once and started by one call (CUDA graphs)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UPS = 3
"""Calls before recording, in which libraries choose their kernels and allocate scratch memory."""


def can_record(device: torch.device) -> bool:
    """Whether passes on this device can be recorded."""
    return device.type == "cuda"


class Replay:
    """A function of tensors, recorded once on a GPU for fixed shapes, then replayed.

    Other devices cannot record: there every call runs the function, on the same buffers.

    Args:
        run: the function. It returns a new tensor, may change tensors in place, reads nothing back to the CPU, and
            depends only on its inputs and on tensors that stay at their addresses.
        inputs: example inputs with the shapes of all calls, on any device.
        device: device to run on.
        changed: tensors that `run` changes in place; recording restores them, even if it fails.
        beside: a `Replay` to share a memory pool with. Use the output of one before calling the other.

    Raises:
        RuntimeError: `run` cannot be recorded; `torch.OutOfMemoryError` is one of these errors.

    **Memory**: the peak of `run` stays allocated as long as this object exists; a copy of `changed` while recording.
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
        self._inputs = [example.to(device, copy=True) for example in inputs]
        self._graph: torch.cuda.CUDAGraph | None = None
        if can_record(device):
            with torch.cuda.device(device):
                self._record(changed, beside)

    def _record(self, changed: Sequence[Tensor], beside: "Replay | None") -> None:
        before = [tensor.clone() for tensor in changed]
        # A separate stream: work that the default stream waits for cannot be recorded. A shared pool needs one stream.
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
        """The result of `run` for inputs of the same shapes; on a GPU valid until the next call."""
        for buffer, value in zip(self._inputs, inputs, strict=True):
            buffer.copy_(value)
        if self._graph is None:
            return self._run(*self._inputs)
        self._graph.replay()
        return self._output
