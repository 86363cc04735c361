"""The loop that all training stages share: draw rows, predict, step, for a whole pack at once.

A batch row is (edit, position, noise). Each edit draws from its own generator in its own order, so its draws do not
depend on the pack. An edit occupies one slot of the pack, and enters and leaves it independently.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..diffusion.schedules import loss_per_edit
from ..engine.base import BaseModel
from ..engine.cuda_graphs import Replay
from ..engine.memory import ran_out, with_fallbacks
from ..errors import TensorShapeError
from ..families.conditioning import Conditioning
from ..families.family import Denoiser, Schedule
from ..layers.adapter_pack import AdapterPack
from ..unexpected import first_line
from .adam import PackedAdam
from .run import Run

log = logging.getLogger(__name__)

FIRST_SCALE, MOST_SCALE = 2.0**16, 2.0**24
"""Scale of an edit's loss in fp16, at first and at most."""
GROW_AFTER = 50
"""Steps without an overflow after which an edit's scale doubles."""


@dataclass(frozen=True)
class TrainedTensor:
    """A tensor that training changes in place."""

    weights: Tensor
    """(N, P): one row per edit."""
    grads: Tensor
    """(N, P), the gradient of `weights`, filled by backward passes."""
    learning_rate: float
    """Default for edits without a rate of their own."""


def draw_rows(
    latents: Tensor,
    draws: int,
    schedule: Schedule,
    generators: Sequence[torch.Generator],
    span: tuple[float, float] = (0.0, 1.0),
    anchor: Tensor | None = None,
    anchored: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The noisy latents (R, C, H, W), positions (R,) and targets (R, C, H, W) of one step, edit by edit.

    Args:
        latents: (N, C, H, W) on the CPU.
        draws: rows per edit; R = N * draws.
        schedule: noise schedule of the predicting network.
        generators: one CPU generator per edit; it draws the positions, then the noise, then the rows that get
            `anchor` as their noise.
        span: part of the schedule that positions come from; 0 is the clean end.
        anchor: noise (C, H, W) for some rows.
        anchored: number of these rows per edit.
    """
    positions, noise = [], []
    for generator in generators:
        positions.append(schedule.positions(draws, generator, span))
        noise.append(torch.randn((draws, *latents.shape[1:]), generator=generator))
        if anchor is not None and anchored:
            noise[-1][torch.randperm(draws, generator=generator)[:anchored]] = anchor
    at, epsilon = torch.cat(positions), torch.cat(noise)
    x = latents.repeat_interleave(draws, 0)
    return schedule.noised(x, epsilon, at), at, schedule.target(x, epsilon, at)


class Trainer:
    """Takes steps of the denoising loss (paper eq. 2) for the edits in the slots of a pack.

    Args:
        base: the frozen base, with the adapters attached.
        trained: the trained tensors, N rows each, one row per slot.
        conditioning: returns the text's conditioning for a pass, a row for each slot, for the trainer and a denoiser.
        packs: the adapters by denoiser; each pass tells them the edits of its rows.
        max_rows: most rows of a pass; a larger step takes several passes, and their gradients add up. None is no
            limit. Running out of memory halves the limit until `BaseModel.restored` ends; at 1 row, checkpointing is
            switched on.

    **Memory**: the activations of one pass, freed before the optimiser steps; replayed passes keep them until
    `release`.
    """

    def __init__(
        self,
        base: BaseModel,
        trained: Sequence[TrainedTensor],
        conditioning: Callable[["Trainer", Denoiser], Conditioning],
        *,
        packs: Mapping[str, AdapterPack] | None = None,
        max_rows: int | None = None,
    ) -> None:
        self._base, self._trained, self._conditioning = base, trained, conditioning
        self._packs, self._max_rows = packs or {}, max_rows
        self._slots = len(trained[0].weights)
        self._optimizers = [PackedAdam(part.weights, learning_rate=part.learning_rate) for part in trained]
        # Gradients below 6e-8 are zero in fp16. So each edit's loss is scaled up by a power of two (which changes no
        # digit), and its gradients are scaled down again (Micikevicius et al. 2018, section 3.2).
        self._scaled = base.dtype == torch.float16
        self._scales = torch.full((self._slots, 1), FIRST_SCALE if self._scaled else 1.0, device=base.device)
        self._good = torch.zeros(self._slots, 1, device=base.device)
        self._recorded: dict[Any, Replay] = {}
        self._rates: dict[int, Sequence[float]] = {}
        self.runs: dict[int, Run] = {}
        """The edits in the slots, by the slots' numbers."""

    @torch.no_grad()
    def begin(self, slot: int, run: Run, rates: Sequence[float] | None = None) -> None:
        """Puts an edit into a free slot; the slot's rows of the trained tensors are its starting values.

        Args:
            slot: number of the slot.
            run: the edit.
            rates: learning rate of each trained tensor, 0 for a fixed one; by default as in `trained`.
        """
        self.runs[slot] = run
        self._scales[slot], self._good[slot] = FIRST_SCALE if self._scaled else 1.0, 0
        self._rates[slot] = [part.learning_rate for part in self._trained] if rates is None else rates
        for optimizer, rate in zip(self._optimizers, self._rates[slot], strict=True):
            optimizer.restart(slot, learning_rate=rate)

    def forget(self, slot: int) -> None:
        """Removes an edit from its slot; does nothing for a free slot."""
        self.runs.pop(slot, None)

    @torch.no_grad()
    def save(self, slot: int) -> dict[str, Tensor]:
        """Copies of a slot's training state on the CPU: row, moments and step count of each trained tensor with a rate
        above 0."""
        return {name: row.detach().to("cpu", copy=True) for name, row in self._state(slot)}

    @torch.no_grad()
    def restore(self, slot: int, saved: Mapping[str, Tensor]) -> None:
        """Restores the state returned by `save`, after `begin` with the same run and rates.

        Raises:
            TensorShapeError: the state is of another training.
        """
        rows = dict(self._state(slot))
        if {name: row.shape for name, row in rows.items()} != {name: value.shape for name, value in saved.items()}:
            raise TensorShapeError("the saved state is of another training; expected one of the same settings")
        for name, row in rows.items():
            row.copy_(saved[name])

    def _state(self, slot: int) -> Iterator[tuple[str, Tensor]]:
        """The slot's rows of all tensors that training changes, by name."""
        for number, (part, optimizer) in enumerate(zip(self._trained, self._optimizers, strict=True)):
            if not self._rates[slot][number]:
                continue
            yield f"{number}.weights", part.weights[slot]
            yield f"{number}.first", optimizer.first[slot]
            yield f"{number}.second", optimizer.second[slot]
            yield f"{number}.steps", optimizer.steps[slot]
        if self._scaled:
            yield "scale", self._scales[slot]
            yield "steps_without_overflow", self._good[slot]

    def trains(self, part: int) -> bool:
        """Whether any edit in a slot trains the tensor of this number."""
        return any(self._rates[slot][part] for slot in self.runs)

    def _active(self, part: int) -> Tensor:
        """Which slots (N,) train the tensor of this number; bool, on the CPU."""
        return torch.tensor([slot in self.runs and self._rates[slot][part] > 0 for slot in range(self._slots)])

    def step(self) -> dict[int, Run]:
        """Takes one step of every edit in a slot; returns the edits that finished with it, which leave their slots.

        All draws come before any large allocation, so a step repeated after running out of memory has the same draws.
        """
        rows = {slot: self._draw(run) for slot, run in self.runs.items()}
        losses = with_fallbacks(lambda: self._gradients(rows), self._cheaper)
        self._update()
        for slot, loss in enumerate(losses.tolist()):
            if slot in self.runs:
                self.runs[slot].losses.append(loss)
        return {slot: self.runs.pop(slot) for slot in sorted(self.runs) if self.runs[slot].finished}

    def _gradients(self, rows: Mapping[int, tuple[Tensor, ...]]) -> Tensor:
        """Computes the gradients of a step's rows, pass by pass; returns each slot's loss (N,)."""
        for part in self._trained:
            part.grads.zero_()
        losses = torch.zeros(self._slots, device=self._base.device)
        for slots, draws in self._passes():
            denoiser, share = self.runs[slots[0]].denoiser, len(draws) / self.runs[slots[0]].config.draws
            chosen = [[values[draws.start : draws.stop] for values in rows[slot]] for slot in slots]
            noisy, positions, target, *extra = (torch.cat(parts) for parts in zip(*chosen, strict=True))
            index = torch.tensor(slots, device=self._base.device)
            whole = slots == list(range(self._slots))
            inputs = (noisy, positions, target.to(self._base.device), index, *extra)
            losses[index] += self._recorded_pass(denoiser, (whole, share), inputs)
        return losses

    def _recorded_pass(self, denoiser: Denoiser, kind: tuple[bool, float], rows: Sequence[Tensor]) -> Tensor:
        """`run_pass`, recorded and replayed if the base replays passes."""
        run = partial(self.run_pass, denoiser, *kind)
        # Checkpointing saves the state of the random number generator, which CUDA graphs cannot record.
        if not self._base.replays or self._base.checkpointing:
            return run(*rows)
        trains = tuple(map(self.trains, range(len(self._trained))))
        key = (trains, denoiser.name, *kind, *(values.shape for values in rows))
        if key not in self._recorded:
            if any(recorded[0] != trains for recorded in self._recorded):
                # Recordings of another stage, which will not be needed again soon.
                self.release()
            changed, beside = [part.grads for part in self._trained], next(iter(self._recorded.values()), None)
            try:
                self._recorded[key] = Replay(run, rows, device=self._base.device, changed=changed, beside=beside)
            except Exception as error:
                if ran_out(error):
                    raise
                # A driver or a kernel that cannot be recorded: unrecorded passes are slower and give the same results.
                log.warning("training passes are not recorded: %s", first_line(error))
                self.release()
                self._base.replays = False
                return run(*rows)
        return self._recorded[key](*rows)

    def run_pass(
        self,
        denoiser: Denoiser,
        whole: bool,
        share: float,
        noisy: Tensor,
        positions: Tensor,
        target: Tensor,
        index: Tensor,
        *extra: Tensor,
    ) -> Tensor:
        """Adds a pass's gradients to the gradients of its step; returns its share of each slot's loss (n,).

        Args:
            denoiser: the predicting network.
            whole: whether the pass has all slots in their order.
            share: share of a slot's rows of the step that are in this pass.
            noisy: (R, C, H, W), slot by slot.
            positions: (R,).
            target: (R, C, H, W).
            index: (n,) numbers of the slots.
            extra: the conditioning beside the text, R rows of each of the denoiser's parts.
        """
        if denoiser.name in self._packs:
            self._packs[denoiser.name].set_rows(None if whole else index)
        text = self._conditioning(self, denoiser).rows(index).repeat(len(noisy) // len(index))
        conditioning = text | dict(zip(denoiser.extra, extra, strict=True))
        prediction = self._base.predict(denoiser, noisy, positions, conditioning)
        losses = share * loss_per_edit(prediction, target, len(index))
        scaled = losses * self._scales[index, 0] if self._scaled else losses
        scaled.sum().backward()
        return losses.detach()

    def release(self) -> None:
        """Frees the recorded passes; later steps record again."""
        self._recorded.clear()

    def _cheaper(self) -> bool:
        """Steps down to unrecorded passes, fewer rows a pass, or checkpointing; returns False if none is left."""
        if self._base.replays:
            self.release()
            self._base.replays = False
            self._base.fall_back("passes that are not recorded")
            return True
        widest = max(len(slots) * len(draws) for slots, draws in self._passes())
        if widest > 1:
            self._base.most_rows = widest // 2
            self._base.fall_back(f"{widest // 2} rows a training pass")
        elif not self._base.checkpointing:
            self._base.recompute()
            self._base.fall_back("checkpointing")
        else:
            return False
        return True

    def _draw(self, run: Run) -> tuple[Tensor, ...]:
        """Noisy latents, positions, targets and conditioning beside the text of an edit's next step, a row a draw."""
        config = run.config
        rows = draw_rows(
            run.latents[None],
            config.draws,
            run.denoiser.schedule,
            [run.generator],
            config.timesteps,
            run.start_noise,
            run.anchored,
        )
        extra = run.extra.expand(config.draws)
        drawn = run.denoiser.drawn(extra, [run.generator] * config.draws, training=True)
        return *rows, *(drawn[name] for name in run.denoiser.extra)

    def _passes(self) -> Iterator[tuple[list[int], range]]:
        """Yields the passes of a step: slots, and the range of their draws.

        All slots of a pass have the same denoiser, the same number of draws and photos of one size.
        """
        kinds = {
            slot: (run.denoiser.name, run.config.draws, tuple(run.latents.shape)) for slot, run in self.runs.items()
        }
        for kind in sorted(set(kinds.values())):
            slots, draws = [slot for slot in sorted(kinds) if kinds[slot] == kind], kind[1]
            limits = [limit for limit in (self._max_rows, self._base.most_rows) if limit is not None]
            most = min([len(slots) * draws, *limits])
            at_once = max(1, min(draws, most // len(slots)))
            for first in range(0, draws, at_once):
                for start in range(0, len(slots), most):
                    yield slots[start : start + most], range(first, min(draws, first + at_once))

    @torch.no_grad()
    def _update(self) -> None:
        """Takes the optimiser steps, each edit at its own rate."""
        shares = torch.zeros(self._slots)
        for slot, run in self.runs.items():
            shares[slot] = run.rate_share
        sound = self._unscale() if self._scaled else None
        for number, part in enumerate(self._trained):
            if not self.trains(number):
                continue
            active = self._active(number)
            if sound is not None:
                active &= sound
            self._optimizers[number].step(part.grads, active, shares)

    def _unscale(self) -> Tensor:
        """Divides the gradients by their scales; returns which slots (N,) have finite gradients.

        An overflow in a tensor that an edit trains halves its scale and skips its step; other edits of the pack may
        train other tensors. The loss itself is fp32 and stays finite.
        """
        finite = torch.ones(self._slots, dtype=torch.bool, device=self._base.device)
        trained = [(number, part.grads) for number, part in enumerate(self._trained) if self.trains(number)]
        of_part = [grads.isfinite().all(1) for _, grads in trained]
        for (number, _), rows in zip(trained, of_part, strict=True):
            finite &= rows | ~self._active(number).to(finite.device)
        for (_, grads), rows in zip(trained, of_part, strict=True):
            grads.div_(self._scales).masked_fill_(~(finite & rows).unsqueeze(1), 0)
        kept = finite.unsqueeze(1)
        self._good = torch.where(kept, self._good + 1, 0)
        grown = kept & (self._good >= GROW_AFTER)
        self._good[grown] = 0
        factors = torch.where(kept, torch.where(grown, 2.0, 1.0), 0.5)
        # In place: recorded passes read this tensor.
        self._scales.mul_(factors).clamp_(1.0, MOST_SCALE)
        sound = finite.cpu()
        for slot, run in self.runs.items():
            run.skipped += not sound[slot]
        return sound
