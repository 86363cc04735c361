"""Trains several edits at once in a fixed number of slots; a finished edit's slot goes to the next one.

A slot is an edit's row of every static buffer: embedding, adapter, their gradients and optimiser moments. Edits in
different stages share a pass: a row in stage 1 has an adapter of zeros and moves its embedding alone, a row in stage 2
moves its adapter.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean

import torch
from torch import Tensor

from ..engine.base import BaseModel
from ..engine.memory import clear_errors, peak_bytes, reset_peak
from ..errors import DivergenceError, NonFiniteModelError, TensorShapeError
from ..layers.adapter_pack import AdapterPack, Factors
from ..settings.stages import EditConfig
from . import embed, finetune
from .loop import TrainedTensor, Trainer
from .run import Run
from .stage import Slot, Stage
from .state import TrainingState

StageProgress = Callable[[str, int, int, str], None]
"""Called as ``progress(stage, step, steps, remark)``."""

log = logging.getLogger(__name__)

_EMBEDDING, _ADAPTER = 0, 1
"""Numbers of what is trained, for the trainer."""


def stages(config: EditConfig) -> tuple[Stage, ...]:
    """The stages of an edit, in their order."""
    return embed.stage(config), finetune.stage(config)


@dataclass(frozen=True)
class TrainingInput:
    """One edit to train."""

    latents: Tensor
    """The photo (C, H, W), fp32 on the CPU."""
    target_embedding: Tensor
    """e_tgt (T, D)."""
    generator: torch.Generator
    """What it draws from, on the CPU."""
    start_noise: Tensor
    """What sampling will start from (C, H, W); see `StageConfig.anchor`."""
    state: TrainingState | None = None
    """Where it goes on, if it was trained before."""


@dataclass
class TrainedEdit:
    """The result of training one edit."""

    number: int
    """Of its input."""
    optimized_embedding: Tensor
    """e_opt (T, D), fp32 on the CPU, in values that fp16 holds."""
    adapter: dict[str, Factors]
    """By kohya key, fp32 on the CPU."""
    losses: dict[str, list[float]]
    """Of each step, by stage."""
    measured: dict[str, dict[str, float | int | None]]
    """Seconds it spent in each stage, other edits beside it or not, and peak bytes of the pack."""
    error: DivergenceError | NonFiniteModelError | None = None
    """Set where its loss is no longer finite; the edit is of no use then."""


@dataclass
class _InTraining:
    """An edit in a slot."""

    task: TrainingInput
    made: TrainedEdit
    stage: Stage
    since: float = field(default_factory=time.perf_counter)
    """When its stage began, on this process's clock; for one that was resumed, earlier."""
    peak: int | None = None
    skipped: int = 0
    """Steps of its stage that overflowed in fp16."""

    def measured(self) -> dict[str, float | int | None]:
        """Seconds and peak bytes of its stage so far."""
        taken = {"seconds": round(time.perf_counter() - self.since, 3), "peak_bytes": self.peak}
        return {**taken, "skipped_steps": self.skipped} if self.skipped else taken


class Pack:
    """Trains edits in a fixed number of slots, which they enter as slots become free.

    Every edit is what it would have been alone: same draws, same gradients to rounding. With one slot a CPU gives the
    same bits every time, those of its stages one after the other.

    Args:
        base: the frozen base.
        inputs: what to train, in this order; one at least.
        config: settings of all stages, for all edits.
        slots: N, how many edits train at once.
        count: how many inputs there are, None where that is not known; only for progress.
        max_rows: most rows of a pass, see `Trainer`; None is no limit.
        progress: called after every step: with one task as its stages go, else as edits go ("train").
        between: called before every step, when `states` may be asked for; what it raises ends the run there.

    **Memory**: 16 bytes a weight of N adapters and N embeddings, and a pass's activations.
    """

    def __init__(
        self,
        base: BaseModel,
        inputs: Iterable[TrainingInput],
        config: EditConfig,
        *,
        slots: int,
        count: int | None = None,
        max_rows: int | None = None,
        progress: StageProgress | None = None,
        between: Callable[["Pack"], None] | None = None,
    ) -> None:
        self._base, self._progress, self._between = base, progress, between
        self._stages = stages(config)
        waiting = iter(inputs)
        first = next(waiting)
        self._waiting, self._count = chain([first], waiting), count
        self._free = list(range(slots))
        self._taken = self._done = 0
        self._held: dict[int, _InTraining] = {}
        self._broken: dict[int, tuple[Tensor, Tensor]] = {}
        embeddings = torch.zeros(slots, *first.target_embedding.shape, device=base.device, requires_grad=True)
        embeddings.grad = torch.zeros_like(embeddings)
        self._embeddings = embeddings
        tuned = config.finetune
        self._adapters = AdapterPack(
            base.unet,
            count=slots,
            adapt=tuned.adapt,
            blocks=tuned.blocks,
            rank=tuned.lora_rank,
            alpha=tuned.lora_alpha,
            device=base.device,
        )
        trained = [
            TrainedTensor(embeddings.detach().flatten(1), embeddings.grad.flatten(1), config.embed.learning_rate),
            TrainedTensor(self._adapters.weights, self._adapters.enable_gradients(), tuned.learning_rate),
        ]

        def text(trainer: Trainer) -> Tensor:
            """The conditioning (N, T, D); with a gradient only where an edit is in need of it."""
            return embeddings if trainer.trains(_EMBEDDING) else embeddings.detach()

        # Nothing that the trainer holds leads back here: what a pack holds is free as soon as the pack is.
        self._trainer = Trainer(base, trained, text, pack=self._adapters, max_rows=max_rows)

    def run(self) -> Iterator[list[TrainedEdit]]:
        """The edits as they finish, those of one step together; in between the base is as it was.

        Raises:
            MemoryLimitError: a pass does not fit.
        """
        while True:
            # The adapters are attached for as long as nobody else uses the base, nor the memory.
            with contextlib.ExitStack() as attached:
                attached.enter_context(self._base.used())
                attached.callback(self._trainer.release)
                adapting = False
                while not (finished := self._fill()):
                    if not self._held:
                        return
                    if not adapting and self._trainer.trains(_ADAPTER):
                        attached.enter_context(self._adapters.attached(self._base.unet))
                        adapting = True
                    if self._between is not None:
                        self._between(self)
                    if finished := self._step():
                        break
            # Here, where the base is as it was.
            for made in finished:
                if isinstance(made.error, DivergenceError):
                    latents, embedding = self._broken.pop(made.number)
                    made.error = self._base.fault(made.error, latents, embedding)
            yield finished

    @property
    def in_slots(self) -> list[int]:
        """For every edit in training, the steps it has taken."""
        return [sum(map(len, held.made.losses.values())) for held in self._held.values()]

    def states(self) -> Iterator[tuple[int, TrainingState]]:
        """Where every edit in training stands, by the number of its task; resumed from there in any pack, it goes on
        with the same draws, and alone with the same bits."""
        for slot, held in sorted(self._held.items()):
            stage = held.stage.name
            yield (
                held.made.number,
                TrainingState(
                    stage=stage,
                    losses={name: list(losses) for name, losses in held.made.losses.items()},
                    generator=held.task.generator.get_state(),
                    embedding=self._embeddings[slot].detach().to("cpu", copy=True),
                    trained=self._trainer.save(slot),
                    measured={**held.made.measured, stage: held.measured()},
                ),
            )

    def _fill(self) -> list[TrainedEdit]:
        """Gives free slots to waiting tasks; returns those that have nothing to train."""
        finished = []
        while self._free and (task := next(self._waiting, None)) is not None:
            slot = self._free.pop(0)
            self._held[slot] = _InTraining(
                task, TrainedEdit(self._taken, task.target_embedding, {}, {}, {}), self._stages[0]
            )
            self._taken += 1
            with torch.no_grad():
                self._embeddings[slot].copy_(task.target_embedding)
                # B of zeros: the adapter changes nothing until stage 2.
                self._adapters.weights[slot].zero_()
            if task.state is not None and self._resumed(slot, task.state):
                continue
            if self._begin(slot, self._stages[0]):
                finished.append(self._leave(slot))
        return finished

    def _slot(self, slot: int) -> Slot:
        """The rows of an edit, for its stages."""
        task = self._held[slot].task
        return Slot(self._embeddings[slot], self._adapters, slot, task.target_embedding, task.generator)

    def _begin(self, slot: int, stage: Stage) -> bool:
        """Puts a slot's edit into a stage, and into the next where it has no steps; whether that was the last."""
        with torch.no_grad():
            stage.start(self._slot(slot))
        if self._enter(slot, stage, []):
            return False
        return self._end(slot)

    def _enter(self, slot: int, stage: Stage, losses: list[float]) -> bool:
        """Gives the trainer a slot's edit in a stage, after the steps with these losses; whether it has any left."""
        held = self._held[slot]
        run = Run(held.task.latents, stage.config, held.task.generator, held.task.start_noise, losses)
        held.made.losses[stage.name] = run.losses
        held.stage, held.since, held.peak, held.skipped = stage, time.perf_counter(), None, 0
        if len(losses) < stage.config.steps:
            self._trainer.begin(slot, run, (stage.rate("text"), stage.rate("adapter")))
            return True
        return False

    def _resumed(self, slot: int, state: TrainingState) -> bool:
        """Puts a slot's edit where it was when it was saved; False, and nothing changed, where the state does not fit
        (that of another version)."""
        held = self._held[slot]
        before = held.task.generator.get_state()
        try:
            self._resume(slot, state)
            return True
        except (TensorShapeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            log.warning("a saved training state is of another version (%s); the edit begins anew", error)
        self._trainer.forget(slot)
        held.task.generator.set_state(before)
        held.made.losses.clear()
        held.made.measured.clear()
        with torch.no_grad():
            self._embeddings[slot].copy_(held.task.target_embedding)
            self._adapters.weights[slot].zero_()
        return False

    def _resume(self, slot: int, state: TrainingState) -> None:
        """Puts a slot's edit where it was when it was saved, between two steps of a stage.

        Raises:
            TensorShapeError: the state is of another training.
        """
        held = self._held[slot]
        if state.embedding.shape != self._embeddings[slot].shape:
            raise TensorShapeError("the saved state is of another base; expected one of the same")
        held.task.generator.set_state(state.generator)
        with torch.no_grad():
            self._embeddings[slot].copy_(state.embedding)
        held.made.losses |= {stage: list(losses) for stage, losses in state.losses.items()}
        held.made.measured |= {stage: dict(values) for stage, values in state.measured.items() if stage != state.stage}
        [stage] = [stage for stage in self._stages if stage.name == state.stage]
        self._enter(slot, stage, held.made.losses[stage.name])
        before = state.measured[state.stage]
        held.since -= before["seconds"] or 0.0
        held.peak = before["peak_bytes"]
        self._trainer.restore(slot, state.trained)

    def _end(self, slot: int) -> bool:
        """Ends the stage of a slot's edit and begins the next; whether that was the last."""
        held = self._held[slot]
        held.made.measured[held.stage.name] = held.measured()
        with torch.no_grad():
            held.stage.end(self._slot(slot))
        following = self._stages[self._stages.index(held.stage) + 1 :]
        return not following or self._begin(slot, following[0])

    def _step(self) -> list[TrainedEdit]:
        """One step of every edit in a slot; returns those that have taken their last."""
        before = {slot: (self._held[slot].stage, run) for slot, run in self._trainer.runs.items()}
        latest = max((stage for stage, _ in before.values()), key=self._stages.index)
        # Of each step by itself: in between, finished edits are rendered.
        reset_peak(self._base.device)
        with clear_errors(latest.name, latest.cheaper):
            ended = self._trainer.step()
        if (peak := peak_bytes(self._base.device)) is not None:
            for slot in before:
                self._held[slot].peak = max(peak, self._held[slot].peak or 0)
        finished = []
        for slot, run in ended.items():
            held = self._held[slot]
            held.skipped = run.skipped
            if run.diverged:
                held.made.error = run.diverged
                self._broken[held.made.number] = (held.task.latents, held.task.target_embedding)
            if run.diverged or self._end(slot):
                finished.append(self._leave(slot))
        self._report(list(before.values()))
        return finished

    def _leave(self, slot: int) -> TrainedEdit:
        """Takes an edit out of its slot."""
        made = self._held.pop(slot).made
        made.optimized_embedding = self._embeddings[slot].detach().cpu().clone()
        if made.error is None:
            made.adapter = self._adapters.export(slot)
        self._free.append(slot)
        self._free.sort()
        self._done += 1
        return made

    def _report(self, stepped: Sequence[tuple[Stage, Run]]) -> None:
        """Says how far things are."""
        if self._progress is None:
            return
        loss = f"loss {fmean(run.losses[-1] for _, run in stepped):.4f}"
        if self._count == 1:
            [(stage, run)] = stepped
            self._progress(stage.name, len(run.losses), run.config.steps, loss)
            return
        each = sum(stage.config.steps for stage in self._stages)
        count, training = max(self._count or 0, self._taken), len(self._held)
        # An edit that broke counts as one that has taken all its steps.
        taken = sum(self.in_slots)
        waiting = f"{count - self._taken} waiting, {loss}"
        remark = f"{self._done} of {count} edits trained, {training} in slots, {waiting}"
        self._progress("train", each * self._done + taken, each * count, remark)
