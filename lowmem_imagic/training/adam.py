"""Adam for a pack: one update for all edits; each has its own learning rate, step count and stop mask."""

import math

import torch
from torch import Tensor


class PackedAdam:
    """Adam (Kingma & Ba 2015, algorithm 1) on a flat (N, P) tensor whose rows are independent.

    A row with mask 0 is frozen: its weights, moments and step count do not change.
    The number of operations does not depend on N or on the number of layers.

    Args:
        weights: (N, P) fp32, updated in place.
        learning_rate: step size, one for all or (N,).

    **Memory**: 8 bytes a weight.
    """

    BETAS = (0.9, 0.999)
    EPSILON = 1e-8

    def __init__(self, weights: Tensor, *, learning_rate: float | Tensor) -> None:
        self.weights = weights
        rate = torch.as_tensor(learning_rate, dtype=torch.float32, device=weights.device)
        self.learning_rate = rate.expand(weights.shape[0]).unsqueeze(1).clone()
        self.steps = torch.zeros(weights.shape[0], 1, device=weights.device)
        self.first = torch.zeros_like(weights)
        self.second = torch.zeros_like(weights)

    @torch.no_grad()
    def restart(self, row: int, *, learning_rate: float) -> None:
        """Resets a row's moments and step count to zero, and sets its learning rate."""
        self.learning_rate[row] = learning_rate
        for state in (self.steps, self.first, self.second):
            state[row].zero_()

    @torch.no_grad()
    def step(self, grads: Tensor, active: Tensor, share: float | Tensor = 1.0) -> None:
        """Updates the rows where `active` (N,) is true with gradients (N, P), at `share` of the learning rate: one for
        all, or (N,)."""
        share = share.to(self.weights).unsqueeze(1) if isinstance(share, Tensor) else share
        rate = self.learning_rate * share
        mask = active.to(self.weights).unsqueeze(1)
        b1, b2 = self.BETAS
        self.steps += mask
        self.first.lerp_(grads, (1 - b1) * mask)
        self.second.lerp_(grads * grads, (1 - b2) * mask)
        count = self.steps.clamp(min=1)
        # 1 - beta ** count; computed directly in fp32, 1 - 0.999 would have four digits.
        bias1, bias2 = (-torch.expm1(count * math.log(beta)) for beta in self.BETAS)
        denominator = (self.second / bias2).sqrt_().add_(self.EPSILON)
        self.weights.addcdiv_(self.first * (mask * rate / bias1), denominator, value=-1)
