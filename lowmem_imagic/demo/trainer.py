"""The loop that every training of the bundled model is: resumable steps of AdamW, and an average of the weights."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm


class Trainer:
    """AdamW with warm-up and cosine decay, an exponential average of the weights, and checkpoints on disk."""

    def __init__(self, modules: dict[str, torch.nn.Module], *, path: Path, steps: int, learning_rate: float) -> None:
        self.path, self.steps, self.step = path, steps, 0
        self.parameters = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
        }
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, foreach=True
        )
        warmup = max(1, min(300, steps // 10))

        def rate(step: int) -> float:
            progress = max(0.0, (step / steps - 0.25) / 0.75)
            return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

        self.rate, self.base_rate = rate, learning_rate
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        if path.exists():
            self._load()

    def _load(self) -> None:
        state = load_file(self.path)
        self.step = int(state["step"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[f"weight/{name}"])
                self.average[name].copy_(state[f"average/{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": state[f"m/{name}"].to(parameter.device),
                    "exp_avg_sq": state[f"v/{name}"].to(parameter.device),
                }

    def save(self) -> None:
        """Writes the checkpoint; an interrupted write leaves the old one."""
        state: dict[str, Tensor] = {"step": torch.tensor(self.step)}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            state[f"weight/{name}"] = parameter.detach().contiguous()
            state[f"average/{name}"] = self.average[name].contiguous()
            state[f"m/{name}"] = moments["exp_avg"].contiguous()
            state[f"v/{name}"] = moments["exp_avg_sq"].contiguous()
        partial = self.path.with_suffix(".partial")
        save_file(state, partial)
        os.replace(partial, self.path)

    def __iter__(self) -> Iterator[int]:
        """The steps still to do; saves every 250 and at the end."""
        bar = tqdm(
            range(self.step, self.steps),
            initial=self.step,
            total=self.steps,
            desc=self.path.stem,
            mininterval=5,
        )
        for step in bar:
            yield step
            self.step = step + 1
            if self.step % 250 == 0 or self.step == self.steps:
                self.save()

    def update(self, loss: Tensor) -> None:
        """One optimiser step on `loss`, and the average follows."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.base_rate * self.rate(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0, foreach=True)
        self.optimizer.step()
        decay = min(0.999, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    def use_average(self) -> None:
        """Puts the averaged weights into the modules."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.average[name])
