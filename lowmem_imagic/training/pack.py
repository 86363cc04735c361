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
from ..errors import DivergenceError, EditTooLargeError, NonFiniteModelError, TensorShapeError
from ..families.conditioning import Conditioning, Part
from ..families.family import Denoiser
from ..layers.adapter_pack import AdapterPack, Factors
from ..layers.flat_pack import FlatPack, kept_gradient
from ..settings.stages import EditConfig, FinetuneConfig
from ..storage.safetensors_reader import MAX_FILE_BYTES, MAX_HEADER_BYTES
from . import embed, finetune
from .loop import TrainedTensor, Trainer
from .run import Run
from .stage import Slot, Stage
from .state import TrainingState

StageProgress = Callable[[str, int, int, str], None]
"""Called as ``progress(stage, step, steps, remark)``."""

log = logging.getLogger(__name__)

MANY_SKIPPED = 0.25
"""Share of a stage's steps that overflow in fp16 from which on a warning is logged. A few overflow in any training: the
loss scale starts high, and later tries a higher one now and then."""

_TEXT = "text"
"""Name of the text among the trained tensors; adapters have their denoiser's name."""


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
    """The start sentence's conditioning, one row; e_tgt for an edit with one sentence."""
    generator: torch.Generator
    """Source of all random draws, on the CPU."""
    start_noise: Mapping[str, Tensor]
    """The starting noise (C, H, W) of sampling, by denoiser; see `StageConfig.anchor`."""
    extra: Mapping[str, Conditioning] = field(default_factory=dict)
    """The conditioning beside the text, one row, by denoiser, see `Family.make_extra`."""
    state: TrainingState | None = None
    """The saved state to resume from; None trains from the start."""
    number: int | None = None
    """Number of its result; None takes its place among the inputs."""
    start_sentence: str = ""
    """The sentence of `target`, kept in states."""


@dataclass
class TrainedEdit:
    """The result of training one edit."""

    number: int
    """Number of its input."""
    conditioning: dict[str, Tensor]
    """The stored parts of e_opt, fp32 on the CPU, rounded to values of their type in the edit file."""
    adapters: dict[str, dict[str, Factors]]
    """Factors by denoiser and key, fp32 on the CPU."""
    losses: dict[str, list[float]]
    """The loss of each step, by stage."""
    measured: dict[str, dict[str, float | int | None]]
    """Seconds in each stage, alone or beside other edits, and the pack's peak bytes."""
    error: DivergenceError | NonFiniteModelError | None = None
    """Set if the loss is no longer finite, or a stage trained nothing; the edit is unusable then."""


@dataclass
class _InTraining:
    """An edit in a slot."""

    task: TrainingInput
    result: TrainedEdit
    stage: Stage
    since: float = field(default_factory=time.perf_counter)
    """Start of its stage on this process's clock, moved back by the earlier time of a resumed edit."""
    peak: int | None = None
    skipped: int = 0
    """Steps of its stage that overflowed in fp16 so far."""

    def measured(self) -> dict[str, float | int | None]:
        """Seconds and peak bytes of its stage so far."""
        figures = {"seconds": round(time.perf_counter() - self.since, 3), "peak_bytes": self.peak}
        return {**figures, "skipped_steps": self.skipped} if self.skipped else figures


class Pack:
    """Trains edits in a fixed number of slots; an edit enters as soon as a slot is free.

    An edit's result does not depend on its pack: same draws, same gradients to rounding. With one slot, a CPU gives
    the same bits every time, equal to running the stages one after the other.

    Args:
        base: the frozen base.
        inputs: edits to train, in this order; at least one.
        config: settings of all stages, for all edits.
        slots: N, the number of edits that train at once.
        count: number of inputs, for progress only; None if unknown.
        max_rows: most rows of a pass, see `Trainer`; None is no limit.
        progress: called after every step: by stage for one input, else for all edits together ("train").
        between: called before every step; it may call `states`. An exception from it ends the run.

    Raises:
        EditTooLargeError: no edit file can hold the adapters.

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
        self._started_count = self._finished_count = 0
        self._edits: dict[int, _InTraining] = {}
        """The edits in training, by slot."""
        self._broken: dict[int, tuple[Denoiser, Tensor, Conditioning]] = {}
        parts = base.family.text
        self._text = FlatPack(
            slots, {name: part.shape for name, part in parts.items() if part.trained}, device=base.device
        )
        # The start sentence's own: masks and ids, and all of it for denoisers that do not follow eta.
        whole = not all(denoiser.follows_eta for denoiser in base.denoisers)
        own = {name: part for name, part in parts.items() if whole or not part.trained}
        self._sentence = _buffers(own, slots, base.device)
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
        _check_size(self._adapters.values(), tuned)
        trained = {_TEXT: TrainedTensor(self._text.weights, self._text.enable_gradients(), config.embed.learning_rate)}
        trained |= {
            name: TrainedTensor(pack.weights, pack.enable_gradients(), tuned.learning_rate)
            for name, pack in self._adapters.items()
        }
        self._trained = trained
        text, sentence = self._text, self._sentence

        def conditioning(trainer: Trainer, denoiser: Denoiser) -> Conditioning:
            """The text's conditioning, a row for each slot; with a gradient only if an edit trains the text."""
            if not denoiser.follows_eta:
                return Conditioning(sentence)
            trains = trainer.trains(0)
            optimized = {
                name: kept_gradient(part, part.dtype) if trains else part.detach()
                for name, part in text.parameters.items()
            }
            return Conditioning({**sentence, **optimized})

        # The trainer holds no reference to the pack, so a pack's memory is freed together with the pack.
        self._trainer = Trainer(base, list(trained.values()), conditioning, packs=self._adapters, max_rows=max_rows)

    def run(self) -> Iterator[list[TrainedEdit]]:
        """Yields the edits as they finish, all of one step together; at each yield the base is without adapters.

        Raises:
            MemoryLimitError: a pass does not fit.
        """
        while True:
            # The caller may use the base and its memory between two yields: attach the adapters in here only.
            with contextlib.ExitStack() as attached:
                attached.enter_context(self._base.used())
                attached.callback(self._trainer.release)
                adapting: dict[str, contextlib.ExitStack] = {}
                while not (finished := self._fill()):
                    if not self._edits:
                        return
                    for number, denoiser in enumerate(self._base.denoisers, start=1):
                        name, trains = denoiser.name, self._trainer.trains(number)
                        if name in adapting and not trains:
                            # A network that may have to wait for its turn has no adapters.
                            adapting.pop(name).close()
                        elif trains and name not in adapting:
                            adapting[name] = attached.enter_context(contextlib.ExitStack())
                            network = self._base.network(denoiser)
                            adapting[name].enter_context(self._adapters[name].attached(network))
                    if self._between is not None:
                        self._between(self)
                    if finished := self._step():
                        break
            # Here, where no adapter is attached.
            for result in finished:
                if isinstance(result.error, DivergenceError):
                    result.error = self._base.fault(result.error, *self._broken.pop(result.number))
            yield finished

    @property
    def in_slots(self) -> list[int]:
        """The number of steps taken by every edit in training."""
        return [sum(map(len, edit.result.losses.values())) for edit in self._edits.values()]

    def states(self) -> Iterator[tuple[int, TrainingState]]:
        """The state of every edit in training, with the number of its input.

        An edit resumed from its state goes on with the same draws in any pack, and with the same bits if alone.
        """
        for slot, edit in sorted(self._edits.items()):
            stage = edit.stage.name
            yield (
                edit.result.number,
                TrainingState(
                    stage=stage,
                    losses={name: list(losses) for name, losses in edit.result.losses.items()},
                    generator=edit.task.generator.get_state(),
                    finished={name: row.to("cpu", copy=True) for name, row in self._finished(slot, edit.stage)},
                    trained=self._trainer.save(slot),
                    shapes=_shapes(edit.task),
                    measured={**edit.result.measured, stage: edit.measured()},
                    start_sentence=edit.task.start_sentence,
                ),
            )

    def _fill(self) -> list[TrainedEdit]:
        """Gives free slots to waiting inputs; returns the edits without a step to train."""
        finished = []
        while self._free and (task := next(self._waiting, None)) is not None:
            slot = self._free.pop(0)
            number = self._started_count if task.number is None else task.number
            self._edits[slot] = _InTraining(task, TrainedEdit(number, {}, {}, {}, {}), self._stages[0])
            self._started_count += 1
            self._clear(slot)
            if task.state is not None and self._resumed(slot, task.state):
                continue
            if self._begin(slot, self._stages[0]):
                finished.append(self._leave(slot))
        return finished

    @torch.no_grad()
    def _clear(self, slot: int) -> None:
        """Fills a slot with its edit's rows before training."""
        task = self._edits[slot].task
        for name, part in self._sentence.items():
            part[slot].copy_(task.target[name][0])
        for denoiser in self._base.denoisers:
            # B of zeros: the adapter changes nothing until stage 2.
            self._adapters[denoiser.name].weights[slot].zero_()
        for name, parameter in self._text.parameters.items():
            parameter[slot].copy_(task.target[name][0])

    def _finished(self, slot: int, stage: Stage) -> Iterator[tuple[str, Tensor]]:
        """An edit's rows that earlier stages trained and this one does not, by name."""
        before = self._stages[: self._stages.index(stage)]
        for name, part in self._trained.items():
            if any(self._rate(one, name) for one in before) and not self._rate(stage, name):
                yield name, part.weights[slot]

    @staticmethod
    def _rate(stage: Stage, name: str) -> float:
        """A stage's learning rate for the tensor of this name; 0 if the stage does not train it."""
        if name == _TEXT:
            return stage.rate("text")
        return stage.rate("adapter") if name == stage.denoiser.name else 0.0

    def _slot(self, slot: int, stage: Stage) -> Slot:
        """The rows of an edit, for a stage."""
        task = self._edits[slot].task
        text = {name: parameter[slot] for name, parameter in self._text.parameters.items()}
        parts = self._base.family.text
        return Slot(text, parts, self._adapters[stage.denoiser.name], slot, task.target, task.generator)

    def _begin(self, slot: int, stage: Stage) -> bool:
        """Puts a slot's edit into a stage, or into the next one that has steps; returns whether none is left."""
        with torch.no_grad():
            stage.start(self._slot(slot, stage))
        if self._enter(slot, stage, []):
            return False
        return self._end(slot)

    def _enter(self, slot: int, stage: Stage, losses: list[float], skipped: int = 0) -> bool:
        """Gives the trainer a slot's edit in a stage, after the steps of `losses`, `skipped` of which overflowed;
        returns whether any step is left."""
        edit = self._edits[slot]
        task, name = edit.task, stage.denoiser.name
        run = Run(
            stage.denoiser,
            task.latents[name],
            stage.config,
            task.generator,
            task.start_noise.get(name),
            task.extra.get(name, Conditioning({})),
            losses,
            skipped,
        )
        edit.result.losses[stage.name] = run.losses
        edit.stage, edit.since, edit.peak, edit.skipped = stage, time.perf_counter(), None, skipped
        if len(losses) < stage.config.steps:
            self._trainer.begin(slot, run, [self._rate(stage, name) for name in self._trained])
            return True
        return False

    def _resumed(self, slot: int, state: TrainingState) -> bool:
        """Resumes a slot's edit; returns False, with nothing changed, if the state does not fit (another version)."""
        edit = self._edits[slot]
        before = edit.task.generator.get_state()
        try:
            self._resume(slot, state)
            return True
        except (TensorShapeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            log.warning("a saved training state is of another version (%s); the edit begins anew", error)
        self._trainer.forget(slot)
        edit.task.generator.set_state(before)
        edit.result.losses.clear()
        edit.result.measured.clear()
        self._clear(slot)
        return False

    def _resume(self, slot: int, state: TrainingState) -> None:
        """Restores a slot's edit to its saved state, between two steps of a stage.

        Raises:
            TensorShapeError: the state is of another training.
        """
        edit = self._edits[slot]
        if state.shapes != _shapes(edit.task):
            raise TensorShapeError("the saved state is of a photo in another size; expected the same size")
        [stage] = [stage for stage in self._stages if stage.name == state.stage]
        rows = dict(self._finished(slot, stage))
        if {name: row.shape for name, row in rows.items()} != {name: x.shape for name, x in state.finished.items()}:
            raise TensorShapeError("the saved state is of another base; expected one of the same")
        edit.task.generator.set_state(state.generator)
        with torch.no_grad():
            for name, row in rows.items():
                row.copy_(state.finished[name])
        result = edit.result
        result.losses |= {stage: list(losses) for stage, losses in state.losses.items()}
        result.measured |= {stage: dict(values) for stage, values in state.measured.items() if stage != state.stage}
        before = state.measured[state.stage]
        self._enter(slot, stage, result.losses[stage.name], before.get("skipped_steps", 0))
        edit.since -= before["seconds"] or 0.0
        edit.peak = before["peak_bytes"]
        self._trainer.restore(slot, state.trained)

    def _end(self, slot: int) -> bool:
        """Ends the stage of a slot's edit and begins the next; returns whether none is left."""
        edit = self._edits[slot]
        edit.result.measured[edit.stage.name] = edit.measured()
        with torch.no_grad():
            edit.stage.end(self._slot(slot, edit.stage))
        following = self._stages[self._stages.index(edit.stage) + 1 :]
        return not following or self._begin(slot, following[0])

    def _step(self) -> list[TrainedEdit]:
        """Takes one step of every edit in a slot; returns the edits that finished with it."""
        before = {slot: (self._edits[slot].stage, run) for slot, run in self._trainer.runs.items()}
        latest = max((stage for stage, _ in before.values()), key=self._stages.index)
        # Measure each step by itself: finished edits are rendered between two steps.
        reset_peak(self._base.device)
        with clear_errors(latest.name, latest.cheaper):
            ended = self._trainer.step()
        if (peak := peak_bytes(self._base.device)) is not None:
            for slot in before:
                self._edits[slot].peak = max(peak, self._edits[slot].peak or 0)
        for slot, (_, run) in before.items():
            self._edits[slot].skipped = run.skipped
        finished = []
        for slot, run in ended.items():
            edit = self._edits[slot]
            edit.result.error = run.failed
            if edit.result.error is not None:
                task, denoiser = edit.task, before[slot][0].denoiser
                row = task.target | task.extra.get(denoiser.name, {})
                self._broken[edit.result.number] = (denoiser, task.latents[denoiser.name], row)
            elif run.skipped >= MANY_SKIPPED * len(run.losses):
                log.warning(
                    "%d of %d steps of %s for %r overflowed in fp16 and changed nothing; another type of the "
                    "arithmetic, or more steps, would train more",
                    run.skipped,
                    len(run.losses),
                    edit.stage.name,
                    edit.task.start_sentence,
                )
            if edit.result.error is not None or self._end(slot):
                finished.append(self._leave(slot))
        self._report(list(before.values()))
        return finished

    def _leave(self, slot: int) -> TrainedEdit:
        """Frees an edit's slot; returns its result."""
        edit = self._edits.pop(slot)
        result = edit.result
        for name, part in self._base.family.text.items():
            if part.stored:
                row = (
                    self._text.parameters[name][slot].detach().cpu().clone()
                    if part.trained
                    else edit.task.target[name][0]
                )
                result.conditioning[name] = edit.task.target.stored(row, part)
        if result.error is None:
            result.adapters = {name: pack.export(slot) for name, pack in self._adapters.items()}
        self._free.append(slot)
        self._free.sort()
        self._finished_count += 1
        return result

    def _report(self, stepped: Sequence[tuple[Stage, Run]]) -> None:
        """Reports progress."""
        if self._progress is None:
            return
        loss = f"loss {fmean(run.losses[-1] for _, run in stepped):.4f}"
        if self._count == 1:
            [(stage, run)] = stepped
            self._progress(stage.name, len(run.losses), run.config.steps, loss)
            return
        each = sum(stage.config.steps for stage in self._stages)
        count, training = max(self._count or 0, self._started_count), len(self._edits)
        # A diverged edit counts as complete.
        steps = each * self._finished_count + sum(self.in_slots)
        waiting = f"{count - self._started_count} waiting, {loss}"
        remark = f"{self._finished_count} of {count} edits trained, {training} in slots, {waiting}"
        self._progress("train", steps, each * count, remark)


def _check_size(adapters: Iterable[AdapterPack], config: FinetuneConfig) -> None:
    """Checks before any training that an edit file can hold the adapters of one edit.

    Raises:
        EditTooLargeError: it cannot.
    """
    # Files have them in fp16.
    size = int(2 * config.keep * sum(adapter.weights[0].numel() for adapter in adapters))
    if size > MAX_FILE_BYTES - MAX_HEADER_BYTES:
        raise EditTooLargeError(
            f"an edit of `rank` {config.lora_rank} with `keep` {config.keep:g} would take {size / 2**30:.2f} GiB, "
            f"expected at most {MAX_FILE_BYTES / 2**30:g} GiB; take a lower `rank` or `keep`"
        )


def _shapes(task: TrainingInput) -> dict[str, list[int]]:
    """The shape (C, H, W) of an edit's photo as each denoiser sees it."""
    return {name: list(latents.shape) for name, latents in task.latents.items()}


def _buffers(parts: Mapping[str, Part], slots: int, device: torch.device) -> dict[str, Tensor]:
    """A buffer (N, *shape) for each part."""
    return {name: torch.zeros(slots, *part.shape, dtype=part.dtype, device=device) for name, part in parts.items()}
