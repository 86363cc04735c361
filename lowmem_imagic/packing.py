"""Edits trained side by side in the slots of a pack: who is finished makes room for the next, and nobody waits.

A slot is an edit's row of every static buffer: embedding, adapter, their gradients and optimiser moments. Stage 1 of
one edit and stage 2 of another share a pass: a row in stage 1 has an adapter of zeros and moves its embedding alone, a
row in stage 2 moves its adapter.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from .adapters import AdapterPack, Factors
from .base_model import BaseModel
from .config import EditConfig
from .errors import DivergenceError
from .memory import clear_errors, peak_bytes, reset_peak
from .training import Run, Trained, Trainer

StageProgress = Callable[[str, int, int, str], None]
"""Called as ``progress(stage, step, steps, remark)``."""

HINTS = {
    "embed": "--checkpointing, or fewer draws a step",
    "finetune": "--checkpointing, fewer draws a step, or --adapt attn",
}
"""What takes less memory in each training stage."""
_EMBEDDING, _ADAPTER = 0, 1
"""Numbers of what is trained, for the trainer."""


@dataclass(frozen=True)
class Task:
    """One edit to train."""

    latents: Tensor
    """The photo (C, H, W), fp32 on the CPU."""
    target_embedding: Tensor
    """e_tgt (T, D)."""
    generator: torch.Generator
    """What it draws from, on the CPU."""
    start_noise: Tensor
    """What sampling will start from (C, H, W); see `StageConfig.anchor`."""


@dataclass
class TrainedEdit:
    """What an edit came to."""

    number: int
    """Of its task."""
    optimized_embedding: Tensor
    """e_opt (T, D), fp32 on the CPU, in values that fp16 holds unless stage 2 trained it on."""
    adapter: dict[str, Factors]
    """By kohya key, fp32 on the CPU."""
    losses: dict[str, list[float]]
    """Of each step of stages "embed" and "finetune"."""
    measured: dict[str, dict[str, float | int | None]]
    """Seconds it spent in each stage, whoever it shared them with, and peak bytes of the pack."""
    error: DivergenceError | None = None
    """Its loss is no longer finite: there is nothing to be had from it."""


class Pack:
    """Trains tasks in a fixed number of slots.

    Every edit is what it would have been alone: same draws, same gradients to rounding. With one slot a CPU gives the
    same bits every time, those of `embed.embed` and `finetune.finetune` one after the other.

    Args:
        base: the frozen base.
        tasks: what to train, in this order.
        config: settings of both stages, for all.
        slots: N, how many edits train at once.
        max_rows: most rows of a pass, see `Trainer`; None is no limit.
        progress: called after every step: with one task as its stages go, else as edits go ("train").

    **Memory**: 16 bytes a weight of N adapters and N embeddings, 4 more with averaging, and a pass's activations.
    """

    def __init__(
        self,
        base: BaseModel,
        tasks: Sequence[Task],
        config: EditConfig,
        *,
        slots: int,
        max_rows: int | None = None,
        progress: StageProgress | None = None,
    ) -> None:
        self._base, self._tasks, self._config, self._progress = base, tasks, config, progress
        self._waiting = deque(range(len(tasks)))
        self._free = list(range(slots))
        self._made: dict[int, TrainedEdit] = {}
        self._since: dict[int, float] = {}
        self._peaks: dict[int, int | None] = {}
        embeddings = torch.zeros(slots, *tasks[0].target_embedding.shape, device=base.device, requires_grad=True)
        embeddings.grad = torch.zeros_like(embeddings)
        self._embeddings = embeddings
        tuned = config.finetune
        self._adapters = AdapterPack(
            base.unet,
            edits=slots,
            adapt=tuned.adapt,
            blocks=tuned.blocks,
            rank=tuned.lora_rank,
            alpha=tuned.lora_alpha,
            device=base.device,
        )
        trained = [
            Trained(embeddings.detach().flatten(1), embeddings.grad.flatten(1), config.embed.learning_rate),
            Trained(self._adapters.weights, self._adapters.enable_gradients(), tuned.learning_rate, tuned.weight_decay),
        ]
        self._trainer = Trainer(base, trained, self._text, pack=self._adapters, max_rows=max_rows)

    def run(self) -> Iterator[list[TrainedEdit]]:
        """The edits as they finish, those of one step together; in between the base is as it was.

        Raises:
            MemoryLimitError: a pass does not fit.
        """
        while self._waiting or self._made:
            # The adapters are attached for as long as nobody else uses the base.
            with contextlib.ExitStack() as attached:
                adapting = False
                while not (finished := self._fill()):
                    if not adapting and self._trainer.trains(_ADAPTER):
                        attached.enter_context(self._adapters.attached(self._base.unet))
                        adapting = True
                    if finished := self._step():
                        break
            yield finished

    def _text(self) -> Tensor:
        """The conditioning (N, T, D); with a gradient only where an edit is in need of it."""
        return self._embeddings if self._trainer.trains(_EMBEDDING) else self._embeddings.detach()

    def _fill(self) -> list[TrainedEdit]:
        """Gives free slots to waiting tasks; returns those that have nothing to train."""
        finished = []
        while self._waiting and self._free:
            slot, number = self._free.pop(0), self._waiting.popleft()
            task = self._tasks[number]
            self._made[slot] = TrainedEdit(number, task.target_embedding, {}, {}, {})
            with torch.no_grad():
                self._embeddings[slot].copy_(task.target_embedding)
                # B of zeros: the adapter changes nothing until stage 2.
                self._adapters.weights[slot].zero_()
            if self._begin(slot, "embed"):
                finished.append(self._leave(slot))
        return finished

    def _begin(self, slot: int, stage: str) -> bool:
        """Puts a slot's edit into a stage, and into the next where it has no steps; whether that was the last."""
        made = self._made[slot]
        task, first = self._tasks[made.number], stage == "embed"
        config = self._config.embed if first else self._config.finetune
        rates = (
            (config.learning_rate, 0.0)
            if first
            else (self._config.finetune.embedding_learning_rate, config.learning_rate)
        )
        if not first:
            with torch.no_grad():
                # Rounded as the file stores it, so that an edit and its file give the same pictures.
                self._embeddings[slot].copy_(self._embeddings[slot].half())
            self._adapters.initialize_edit(slot, task.generator)
        run = Run(task.latents, config, task.generator, task.start_noise)
        made.losses[stage] = run.losses
        self._since[slot], self._peaks[slot] = time.perf_counter(), None
        if config.steps:
            self._trainer.begin(slot, run, rates)
            return False
        return self._end(slot, stage)

    def _end(self, slot: int, stage: str) -> bool:
        """Ends a stage of a slot's edit and begins the next; whether that was the last."""
        seconds = round(time.perf_counter() - self._since[slot], 3)
        self._made[slot].measured[stage] = {"seconds": seconds, "peak_bytes": self._peaks[slot]}
        return stage == "finetune" or self._begin(slot, "finetune")

    def _step(self) -> list[TrainedEdit]:
        """One step of everybody; returns those that are finished with everything."""
        before = {slot: (self._stage_of(slot), run) for slot, run in self._trainer.runs.items()}
        late = "finetune" if self._trainer.trains(_ADAPTER) else "embed"
        # Of each step by itself: in between, finished edits are rendered.
        reset_peak(self._base.device)
        with clear_errors(late, HINTS[late]):
            ended = self._trainer.step()
        if (peak := peak_bytes(self._base.device)) is not None:
            self._peaks |= {slot: max(peak, self._peaks[slot] or 0) for slot in before}
        finished = []
        for slot, run in ended.items():
            self._made[slot].error = run.diverged
            if run.diverged or self._end(slot, before[slot][0]):
                finished.append(self._leave(slot))
        self._report(list(before.values()))
        return finished

    def _stage_of(self, slot: int) -> str:
        """The stage a slot's edit is in."""
        return "finetune" if "finetune" in self._made[slot].losses else "embed"

    def _leave(self, slot: int) -> TrainedEdit:
        """Takes an edit out of its slot."""
        made = self._made.pop(slot)
        made.optimized_embedding = self._embeddings[slot].detach().cpu().clone()
        if made.error is None:
            made.adapter = self._adapters.export(slot)
        self._free.append(slot)
        self._free.sort()
        return made

    def _report(self, stepped: Sequence[tuple[str, Run]]) -> None:
        """Says how far things are."""
        if self._progress is None:
            return
        loss = f"loss {fmean(run.losses[-1] for _, run in stepped):.4f}"
        if len(self._tasks) == 1:
            [(stage, run)] = stepped
            self._progress(stage, len(run.losses), run.config.steps, loss)
            return
        each = self._config.embed.steps + self._config.finetune.steps
        waiting, training = len(self._waiting), len(self._made)
        done = len(self._tasks) - waiting - training
        # Whoever stopped early has taken the rest of its steps, too.
        steps = each * done + sum(len(losses) for made in self._made.values() for losses in made.losses.values())
        remark = f"{done} of {len(self._tasks)} edits trained, {training} in slots, {waiting} waiting, {loss}"
        self._progress("train", steps, each * len(self._tasks), remark)
