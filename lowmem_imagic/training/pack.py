"""Trains several edits at once in a fixed number of slots; a finished edit's slot goes to the next one.

A slot is an edit's row of every static buffer: embedding, adapter, their gradients and optimiser moments. Edits in
different stages share a pass: a row in stage 1 has an adapter of zeros and moves its embedding alone, a row in stage 2
moves its adapter.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean

import torch
from torch import Tensor

from ..engine.base import BaseModel
from ..engine.memory import clear_errors, peak_bytes, reset_peak
from ..errors import DivergenceError, NonFiniteModelError, TensorShapeError
from ..families.conditioning import Conditioning, Part
from ..families.family import Denoiser
from ..layers.adapter_pack import AdapterPack, Factors
from ..layers.flat_pack import FlatPack, kept_gradient
from ..settings.stages import EditConfig
from . import embed, finetune
from .loop import TrainedTensor, Trainer
from .run import Run
from .stage import Slot, Stage
from .state import TrainingState

StageProgress = Callable[[str, int, int, str], None]
"""Called as ``progress(stage, step, steps, remark)``."""

log = logging.getLogger(__name__)

_TEXT = "text"
"""Name of the text among the trained tensors; the others have their denoiser's."""


def stages(config: EditConfig, denoisers: Sequence[Denoiser]) -> tuple[Stage, ...]:
    """The stages of an edit, in their order: the text with the first denoiser, then the adapter of each."""
    first = denoisers[0]
    return embed.stage(config, first), *(finetune.stage(config, one, first=one is first) for one in denoisers)


@dataclass(frozen=True)
class TrainingInput:
    """One edit to train."""

    latents: Mapping[str, Tensor]
    """The photo (C, H, W) as each denoiser sees it, by the denoiser's name; fp32 on the CPU."""
    target: Conditioning
    """e_tgt, one row."""
    generator: torch.Generator
    """Draws everything random, on the CPU."""
    start_noise: Mapping[str, Tensor]
    """The noise (C, H, W) that sampling will start from, by denoiser; see `StageConfig.anchor`."""
    extra: Mapping[str, Conditioning] = field(default_factory=dict)
    """One row of what a denoiser takes beside the text, by denoiser."""
    state: TrainingState | None = None
    """Where it goes on, if it was trained before."""


@dataclass
class TrainedEdit:
    """The result of training one edit."""

    number: int
    """Of its input."""
    conditioning: dict[str, Tensor]
    """The stored parts of e_opt, fp32 on the CPU, in values that fp16 holds."""
    adapters: dict[str, dict[str, Factors]]
    """By denoiser and key, fp32 on the CPU."""
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
        self._stages = stages(config, base.denoisers)
        waiting = iter(inputs)
        first = next(waiting)
        self._waiting, self._count = chain([first], waiting), count
        self._free = list(range(slots))
        self._taken = self._done = 0
        self._held: dict[int, _InTraining] = {}
        self._broken: dict[int, tuple[Denoiser, Tensor, Conditioning]] = {}
        parts = base.family.text
        self._text = FlatPack(
            slots, {name: part.shape for name, part in parts.items() if part.trained}, device=base.device
        )
        # Masks and ids, which stay as they are for a sentence, and what a denoiser takes beside the text.
        fixed = {name: part for name, part in parts.items() if not part.trained}
        self._fixed = {"": _buffers(fixed, slots, base.device)}
        self._fixed |= {denoiser.name: _buffers(denoiser.extra, slots, base.device) for denoiser in base.denoisers}
        tuned = config.finetune
        self._adapters = {
            denoiser.name: AdapterPack(
                base.network(denoiser),
                denoiser.names,
                count=slots,
                adapt=tuned.adapt,
                blocks=tuned.blocks,
                rank=tuned.lora_rank,
                alpha=tuned.lora_alpha,
                device=base.device,
            )
            for denoiser in base.denoisers
        }
        trained = {_TEXT: TrainedTensor(self._text.weights, self._text.enable_gradients(), config.embed.learning_rate)}
        trained |= {
            name: TrainedTensor(pack.weights, pack.enable_gradients(), tuned.learning_rate)
            for name, pack in self._adapters.items()
        }
        self._trained = trained
        text, buffers = self._text, self._fixed

        def given(trainer: Trainer, denoiser: Denoiser) -> Conditioning:
            """The conditioning, a row for each slot; with a gradient only where an edit trains it."""
            trains = trainer.trains(0)
            own = {
                name: kept_gradient(part, part.dtype) if trains else part.detach()
                for name, part in text.parameters.items()
            }
            return Conditioning({**own, **buffers[""], **buffers[denoiser.name]})

        # The trainer holds no reference to the pack: a pack's memory is free as soon as the pack is.
        self._trainer = Trainer(base, list(trained.values()), given, packs=self._adapters, max_rows=max_rows)

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
                adapting: set[str] = set()
                while not (finished := self._fill()):
                    if not self._held:
                        return
                    for number, denoiser in enumerate(self._base.denoisers, start=1):
                        if denoiser.name not in adapting and self._trainer.trains(number):
                            network = self._base.network(denoiser)
                            attached.enter_context(self._adapters[denoiser.name].attached(network))
                            adapting.add(denoiser.name)
                    if self._between is not None:
                        self._between(self)
                    if finished := self._step():
                        break
            # Here, where the base is as it was.
            for made in finished:
                if isinstance(made.error, DivergenceError):
                    made.error = self._base.fault(made.error, *self._broken.pop(made.number))
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
                    finished={name: row.to("cpu", copy=True) for name, row in self._finished(slot, held.stage)},
                    trained=self._trainer.save(slot),
                    measured={**held.made.measured, stage: held.measured()},
                ),
            )

    def _fill(self) -> list[TrainedEdit]:
        """Gives free slots to waiting tasks; returns those that have nothing to train."""
        finished = []
        while self._free and (task := next(self._waiting, None)) is not None:
            slot = self._free.pop(0)
            self._held[slot] = _InTraining(task, TrainedEdit(self._taken, {}, {}, {}, {}), self._stages[0])
            self._taken += 1
            self._clear(slot)
            if task.state is not None and self._resumed(slot, task.state):
                continue
            if self._begin(slot, self._stages[0]):
                finished.append(self._leave(slot))
        return finished

    @torch.no_grad()
    def _clear(self, slot: int) -> None:
        """Gives a slot the rows of its edit before any training."""
        task = self._held[slot].task
        for name, part in self._fixed[""].items():
            part[slot].copy_(task.target[name][0])
        for denoiser in self._base.denoisers:
            for name, part in self._fixed[denoiser.name].items():
                part[slot].copy_(task.extra[denoiser.name][name][0])
            # B of zeros: the adapter changes nothing until stage 2.
            self._adapters[denoiser.name].weights[slot].zero_()
        for name, parameter in self._text.parameters.items():
            parameter[slot].copy_(task.target[name][0])

    def _finished(self, slot: int, stage: Stage) -> Iterator[tuple[str, Tensor]]:
        """The rows of an edit that stages before this one trained, and that it does not, by name."""
        before = self._stages[: self._stages.index(stage)]
        for name, part in self._trained.items():
            if any(self._rate(one, name) for one in before) and not self._rate(stage, name):
                yield name, part.weights[slot]

    @staticmethod
    def _rate(stage: Stage, name: str) -> float:
        """The rate at which a stage trains the tensor of this name, 0 for one that it does not."""
        if name == _TEXT:
            return stage.rate("text")
        return stage.rate("adapter") if name == stage.denoiser.name else 0.0

    def _slot(self, slot: int, stage: Stage) -> Slot:
        """The rows of an edit, for a stage."""
        task = self._held[slot].task
        text = {name: parameter[slot] for name, parameter in self._text.parameters.items()}
        return Slot(text, self._adapters[stage.denoiser.name], slot, task.target, task.generator)

    def _begin(self, slot: int, stage: Stage) -> bool:
        """Puts a slot's edit into a stage, and into the next where it has no steps; whether that was the last."""
        with torch.no_grad():
            stage.start(self._slot(slot, stage))
        if self._enter(slot, stage, []):
            return False
        return self._end(slot)

    def _enter(self, slot: int, stage: Stage, losses: list[float]) -> bool:
        """Gives the trainer a slot's edit in a stage, after the steps with these losses; whether it has any left."""
        held = self._held[slot]
        task, name = held.task, stage.denoiser.name
        run = Run(stage.denoiser, task.latents[name], stage.config, task.generator, task.start_noise.get(name), losses)
        held.made.losses[stage.name] = run.losses
        held.stage, held.since, held.peak, held.skipped = stage, time.perf_counter(), None, 0
        if len(losses) < stage.config.steps:
            self._trainer.begin(slot, run, [self._rate(stage, name) for name in self._trained])
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
        self._clear(slot)
        return False

    def _resume(self, slot: int, state: TrainingState) -> None:
        """Puts a slot's edit where it was when it was saved, between two steps of a stage.

        Raises:
            TensorShapeError: the state is of another training.
        """
        held = self._held[slot]
        [stage] = [stage for stage in self._stages if stage.name == state.stage]
        rows = dict(self._finished(slot, stage))
        if {name: row.shape for name, row in rows.items()} != {name: x.shape for name, x in state.finished.items()}:
            raise TensorShapeError("the saved state is of another base; expected one of the same")
        held.task.generator.set_state(state.generator)
        with torch.no_grad():
            for name, row in rows.items():
                row.copy_(state.finished[name])
        held.made.losses |= {stage: list(losses) for stage, losses in state.losses.items()}
        held.made.measured |= {stage: dict(values) for stage, values in state.measured.items() if stage != state.stage}
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
            held.stage.end(self._slot(slot, held.stage))
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
                task, broke = held.task, before[slot][0].denoiser
                row = task.target | task.extra.get(broke.name, {})
                self._broken[held.made.number] = (broke, task.latents[broke.name], row)
            if run.diverged or self._end(slot):
                finished.append(self._leave(slot))
        self._report(list(before.values()))
        return finished

    def _leave(self, slot: int) -> TrainedEdit:
        """Takes an edit out of its slot."""
        held = self._held.pop(slot)
        made = held.made
        for name, part in self._base.family.text.items():
            if part.stored:
                row = (
                    self._text.parameters[name][slot].detach().cpu().clone()
                    if part.trained
                    else held.task.target[name][0]
                )
                made.conditioning[name] = row
        if made.error is None:
            made.adapters = {name: pack.export(slot) for name, pack in self._adapters.items()}
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


def _buffers(parts: Mapping[str, Part], slots: int, device: torch.device) -> dict[str, Tensor]:
    """A buffer (N, *shape) for each part."""
    return {name: torch.zeros(slots, *part.shape, dtype=part.dtype, device=device) for name, part in parts.items()}
