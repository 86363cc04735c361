"""The loop that every training of the bundled model is: Muon and AdamW, resumable, the weights averaged."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DECAY = 0.3
"""Share of the time, the last one, in which the rate falls to zero."""
_WARM_UP = 100


class Trainer:
    """Trains modules for a length of time, averages their weights, and writes checkpoints.

    Matrices and convolution kernels are trained with Muon (Jordan et al. 2024), vectors and embeddings with AdamW.
    On the autoencoder, 220 steps with Muon gave photographs back at 20.7 dB, as many seconds of AdamW (250 steps) at
    17.7. The time of a training is kept in its checkpoint: stopped and started again, it has the rest. Until the last
    `DECAY` of the time the rate is constant, so more time can be given to a training that has not come there yet.

    Args:
        modules: modules by name; exact weights of those in bfloat16 are kept here.
        path: the checkpoint.
        seconds: time in all.
        learning_rate: Muon's at its highest.
        adam_rate: AdamW's.
        clock: seconds of some clock.
        save_every: seconds between checkpoints.
        averaging: share of the average that a step keeps after many steps.
    """

    def __init__(
        self,
        modules: dict[str, torch.nn.Module],
        *,
        path: Path,
        seconds: float,
        learning_rate: float,
        adam_rate: float,
        clock: Callable[[], float] = time.monotonic,
        save_every: float = 60.0,
        averaging: float = 0.999,
    ) -> None:
        self.path, self.seconds, self.step = path, seconds, 0
        self.after_save: Callable[[], None] = lambda: None
        """Called after every checkpoint."""
        self.clock, self.save_every, self.averaging = clock, save_every, averaging
        self._spent, self._started, self._saved = 0.0, clock(), clock()
        self.parameters = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        # Small steps would be lost in the rounding of bfloat16. Muon takes kernels as matrices.
        self.exact = {name: _matrix(p.detach()).float().clone() for name, p in self.parameters.items()}
        self.average = {name: p.clone() for name, p in self.exact.items()}
        matrices = [t for name, t in self.exact.items() if _by_muon(name, t)]
        others = [t for name, t in self.exact.items() if not _by_muon(name, t)]
        fused = others[0].is_cuda
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                others, lr=adam_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=fused or None, foreach=not fused
            )
        ]
        if matrices:
            self.optimizers.append(torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.02))
        self.highest_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self._known = self._copies()
        if path.exists():
            self._load()

    @property
    def spent(self) -> float:
        """Seconds that this training has had."""
        return self._spent + self.clock() - self._started

    def rate(self) -> float:
        """Share of the highest learning rates: a warm-up, a constant, and a line to zero at the end of the time."""
        left = 1 - min(1.0, self.spent / max(self.seconds, 1e-9))
        return min(1.0, (self.step + 1) / _WARM_UP, left / DECAY)

    def _load(self) -> None:
        state = load_file(self.path)
        self.step, self._spent = int(state["step"]), float(state["spent"])
        with torch.no_grad():
            for name, exact in self.exact.items():
                exact.copy_(state[f"weight/{name}"])
                self.average[name].copy_(state[f"average/{name}"])
                optimizer = self._optimizer_of(name)
                optimizer.state[exact] = {
                    key: value if value.ndim == 0 else torch.empty_like(exact).copy_(value)
                    for key, value in _under(state, f"state/{name}/")
                }
        self._write_back()
        self._known = self._copies()

    def _optimizer_of(self, name: str) -> torch.optim.Optimizer:
        return self.optimizers[_by_muon(name, self.exact[name])]

    def save(self) -> None:
        """Writes the checkpoint; an interrupted write leaves the old one."""
        state: dict[str, Tensor] = {
            "step": torch.tensor(self.step),
            "spent": torch.tensor(self.spent, dtype=torch.float64),
        }
        for name, exact in self.exact.items():
            state[f"weight/{name}"] = exact
            state[f"average/{name}"] = self.average[name]
            for key, value in self._optimizer_of(name).state[exact].items():
                state[f"state/{name}/{key}"] = value.contiguous()
        partial = self.path.with_suffix(".partial")
        save_file(state, partial)
        os.replace(partial, self.path)
        self.after_save()
        self._saved = self.clock()

    def __iter__(self) -> Iterator[int]:
        """Steps until the time is over, at least one; saves now and then and at the end."""
        self._started = self.clock()
        while self.step == 0 or self.spent < self.seconds:
            yield self.step
            self.step += 1
            if self.clock() - self._saved >= self.save_every:
                self.save()
        self.save()

    def update(self, loss: Tensor) -> None:
        """One optimiser step on `loss`; the average follows."""
        share = self.rate()
        for optimizer, highest in zip(self.optimizers, self.highest_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = highest * share
        loss.backward()
        with torch.no_grad():
            exact = list(self.exact.values())
            for tensor, parameter in zip(exact, self.parameters.values(), strict=True):
                assert parameter.grad is not None
                if tensor.grad is None:
                    tensor.grad = torch.empty_like(tensor)
            own: list[Any] = [tensor.grad for tensor in exact]
            torch._foreach_copy_(own, [_matrix(p.grad) for p in self.parameters.values() if p.grad is not None])
            torch.nn.utils.clip_grad_norm_(exact, 1.0, foreach=True)
            for optimizer in self.optimizers:
                optimizer.step()
            self._write_back()
            decay = min(self.averaging, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(list(self.average.values()), exact, 1 - decay)
        for parameter in self.parameters.values():
            parameter.grad = None

    def check(self, loss: float) -> bool:
        """Whether a loss is finite; where it is not, the training is back at the last check, at half its rates."""
        if math.isfinite(loss):
            self._known = self._copies()
            return True
        with torch.no_grad():
            for part, known in zip((self.exact, self.average), self._known, strict=True):
                torch._foreach_copy_(list(part.values()), known)
        self._write_back()
        for optimizer in self.optimizers:
            optimizer.state.clear()
        self.highest_rates = [rate / 2 for rate in self.highest_rates]
        return False

    def _copies(self) -> list[list[Tensor]]:
        return [[t.clone() for t in part.values()] for part in (self.exact, self.average)]

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(self.exact[name].view(parameter.shape))


@torch.no_grad()
def load_averaged(path: Path, modules: Mapping[str, nn.Module]) -> bool:
    """Gives modules the averaged weights of a checkpoint; returns whether there is one.

    Args:
        path: the checkpoint.
        modules: modules by the names that they were trained under.
    """
    if not path.exists():
        return False
    # Kernels of convolutions are matrices there.
    weights = dict(_under(load_file(path), "average/"))
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[f"{prefix}.{name}"].view(parameter.shape))
    return True


def exact_attention(device: torch.device) -> AbstractContextManager[Any]:
    """A context that computes attention in fp32 on CPUs: in bfloat16 its backward pass has no fast path there."""
    return nullcontext() if device.type == "cuda" else _Fp32Attention()


class _Fp32Attention(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **named)

        def exact(value: Any) -> Any:
            return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

        # By position in transformers, by name in diffusers' transformers.
        query = args[0] if args else named["query"]
        return func(*map(exact, args), **{name: exact(value) for name, value in named.items()}).to(query.dtype)


def _under(state: dict[str, Tensor], prefix: str) -> list[tuple[str, Tensor]]:
    return [(key.removeprefix(prefix), value) for key, value in state.items() if key.startswith(prefix)]


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def _by_muon(name: str, tensor: Tensor) -> bool:
    """Whether a weight is a map from many numbers to many; an embedding is a table."""
    return tensor.ndim == 2 and min(tensor.shape) > 4 and "embedding." not in name.replace("time_embedding", "")
