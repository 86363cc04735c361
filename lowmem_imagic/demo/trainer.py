"""The loop that every training of the bundled model is: AdamW for a length of time, resumable, its weights averaged."""

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Trainer:
    """AdamW whose rate follows a cosine to zero at the end of its time, an average of the weights, and checkpoints.

    The time that a training has had is kept in its checkpoint: stopped and started again, it has what is left.

    Args:
        modules: modules by name; where their weights are not fp32, exact ones are kept here.
        path: the checkpoint.
        seconds: time in all.
        learning_rate: at its highest.
        clock: seconds of some clock.
        save_every: seconds between checkpoints.
        averaging: share of the average that a step keeps, once there were many.
    """

    def __init__(
        self,
        modules: dict[str, torch.nn.Module],
        *,
        path: Path,
        seconds: float,
        learning_rate: float,
        clock: Callable[[], float] = time.monotonic,
        save_every: float = 60.0,
        averaging: float = 0.999,
    ) -> None:
        self.path, self.seconds, self.step = path, seconds, 0
        self.after_save: Callable[[Trainer], None] = lambda _: None
        """Called after every checkpoint."""
        self.clock, self.save_every, self.averaging = clock, save_every, averaging
        self._spent, self._started, self._saved = 0.0, clock(), clock()
        self.parameters = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
        }
        # Small steps would be lost in the rounding of bfloat16.
        self.exact = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.average = {name: p.clone() for name, p in self.exact.items()}
        cuda = next(iter(self.exact.values())).is_cuda
        self.optimizer = torch.optim.AdamW(
            self.exact.values(),
            lr=learning_rate,
            betas=(0.9, 0.99),
            weight_decay=1e-3,
            fused=True if cuda else None,
            foreach=None if cuda else True,
        )
        self.base_rate = learning_rate
        self._known = [[t.clone() for t in part.values()] for part in (self.exact, self.average)]
        if path.exists():
            self._load()

    @property
    def spent(self) -> float:
        """Seconds that this training has had."""
        return self._spent + self.clock() - self._started

    def rate(self) -> float:
        """Share of the highest learning rate: a warm-up of 200 steps, from a fifth of the time a cosine to zero."""
        progress = min(1.0, self.spent / max(self.seconds, 1e-9))
        return min(1.0, (self.step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - 0.2) / 0.8)))

    def _load(self) -> None:
        state = load_file(self.path)
        self.step, self._spent = int(state["step"]), float(state["spent"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                exact = self.exact[name]
                exact.copy_(state[f"weight/{name}"])
                parameter.copy_(exact)
                self.average[name].copy_(state[f"average/{name}"])
                self.optimizer.state[exact] = {
                    "step": torch.tensor(float(self.step), device=exact.device if exact.is_cuda else "cpu"),
                    "exp_avg": torch.empty_like(exact).copy_(state[f"m/{name}"]),
                    "exp_avg_sq": torch.empty_like(exact).copy_(state[f"v/{name}"]),
                }

    def save(self) -> None:
        """Writes the checkpoint; an interrupted write leaves the old one."""
        state: dict[str, Tensor] = {
            "step": torch.tensor(self.step),
            "spent": torch.tensor(self.spent, dtype=torch.float64),
        }
        for name, exact in self.exact.items():
            moments = self.optimizer.state[exact]
            state[f"weight/{name}"] = exact.contiguous()
            state[f"average/{name}"] = self.average[name].contiguous()
            state[f"m/{name}"] = moments["exp_avg"].contiguous()
            state[f"v/{name}"] = moments["exp_avg_sq"].contiguous()
        partial = self.path.with_suffix(".partial")
        save_file(state, partial)
        os.replace(partial, self.path)
        self.after_save(self)
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
        """One optimiser step on `loss`, and the average follows."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_rate * self.rate()
        loss.backward()
        with torch.no_grad():
            exact = list(self.exact.values())
            for tensor, parameter in zip(exact, self.parameters.values(), strict=True):
                if tensor.grad is None:
                    tensor.grad = torch.empty_like(tensor)
                assert parameter.grad is not None
            gradients: list[Any] = [parameter.grad for parameter in self.parameters.values()]
            own: list[Any] = [tensor.grad for tensor in exact]
            torch._foreach_copy_(own, gradients)
            torch.nn.utils.clip_grad_norm_(exact, 1.0, foreach=True)
            self.optimizer.step()
            torch._foreach_copy_(list(self.parameters.values()), exact)
            decay = min(self.averaging, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(list(self.average.values()), exact, 1 - decay)
        for parameter in self.parameters.values():
            parameter.grad = None

    def check(self, loss: float) -> bool:
        """Whether a loss is finite; where it is not, the training is back at the last check, at half its rate."""
        if math.isfinite(loss):
            self._known = [[t.clone() for t in part.values()] for part in (self.exact, self.average)]
            return True
        with torch.no_grad():
            for part, known in zip((self.exact, self.average), self._known, strict=True):
                torch._foreach_copy_(list(part.values()), known)
            torch._foreach_copy_(list(self.parameters.values()), list(self.exact.values()))
        self.optimizer.state.clear()
        self.base_rate /= 2
        return False

    def use_average(self) -> None:
        """Puts the averaged weights into the modules."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])
