"""A `batch run` as plain values: what its words said, kept in the ledger so that its folder can be run again."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..actions.console import Console
from ..actions.edit import fit_memory, open_base
from ..actions.render import BaseOptions
from ..cli.frame import Words
from ..engine.base import BaseModel, pick_device
from ..errors import ConfigError, OutputExistsError
from ..planning.plan import Budget
from ..settings.stages import EditConfig
from ..storage.writable import check_writable
from .attempts import Attempts
from .executors.executor import Bases, Crew
from .executors.local import LocalCrew
from .executors.processes import cpu_environments, gpu_environments, run_in_processes
from .executors.ray import RayCrew, check_executor, driving
from .failures import RETRIED
from .manifest import BadItem, Item, read_manifest
from .paths import Part
from .publishing import publish_files
from .runner import Batch
from .states import States
from .stopping import Stop
from .tally import Tally


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `batch run` was asked for; fields are its options."""

    manifest: str
    out: str
    prompt: str | None
    model: str | None
    etas: str | None
    seeds: str | None
    preset: str
    seed: int
    steps_embed: int | None
    steps_finetune: int | None
    learning_rate: float | None
    draws: int | None
    adapt: str | None
    rank: int | None
    keep: float | None
    small: bool
    steps_sample: int | None
    guidance: float | None
    negative: str | None
    scheduler: str | None
    background: str
    device: str
    base_weights: str
    attention: str
    checkpointing: bool
    vram: str | None
    slots: int | None
    model_config: str | None
    revision: str | None
    shard: str | None
    executor: str
    address: str | None
    workers: int | None
    save_every: int
    force: bool

    @staticmethod
    def of(note: Any) -> "Request":
        """The request that a ledger has kept.

        Raises:
            ConfigError: another version's.
        """
        try:
            return Request(**note)
        except TypeError as error:
            raise ConfigError("the ledger is of another version; run `batch run` with its options again") from error

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def settings(self, own: Mapping[str, Any]) -> EditConfig:
        """The settings of an item with these of its own.

        Raises:
            ConfigError: out of range.
        """
        words = Words(device=self.device, weights=self.base_weights, attention=self.attention)
        sampling = words.sampling(
            etas=_listed(own.get("etas", self.etas)),
            seeds=_listed(own.get("seeds", self.seeds)),
            num_inference_steps=self.steps_sample,
            guidance_scale=self.guidance,
            negative_prompt=self.negative,
            scheduler=self.scheduler,
        )
        return words.edit(
            own.get("preset", self.preset),
            seed=own.get("seed", self.seed),
            steps_embed=self.steps_embed,
            steps_finetune=self.steps_finetune,
            learning_rate=self.learning_rate,
            draws=self.draws,
            adapt=self.adapt,
            rank=self.rank,
            keep=self.keep,
            small=self.small,
            sampling=sampling,
        )

    def items(self) -> tuple[list[Item], list[BadItem]]:
        """The manifest's items, of the shard if one was asked for; and those that are none.

        Raises:
            ConfigError: no manifest, or no such shard.
        """
        items, bad = read_manifest(Path(self.manifest), self.prompt)
        mine = slice(self._part.number - 1, None, self._part.count)
        return items[mine], bad[mine]

    @property
    def _part(self) -> Part:
        return Part.of(self.shard)

    def _processes(self) -> int:
        """How many processes there are to be: by default one for each GPU, and one on a CPU or a GPU named."""
        if self.workers is not None:
            return self.workers
        everything = self.device in ("auto", "cuda") and pick_device(self.device).type == "cuda"
        return torch.cuda.device_count() if everything else 1

    def _environments(self, places: contextlib.ExitStack) -> list[dict[str, str]]:
        """Those of the processes that are to run it; none where this one does."""
        if self.executor == "ray":
            return [places.enter_context(driving(self.address))]
        if (count := self._processes()) == 1:
            return []
        return list(cpu_environments(count) if pick_device(self.device).type == "cpu" else gpu_environments(count))

    def run(self, console: Console, stop: Stop, *, retry: Sequence[str] = RETRIED, alone: bool = False) -> Tally:
        """Runs it, `alone` in this process whatever `workers` says; see `Batch.run`."""
        out = Path(self.out)
        self.settings({})
        check_executor(self.executor, self.address)
        items, bad = self.items()
        check_writable(out)
        if out.exists() and not out.is_dir():
            raise OutputExistsError(f"{out} is no folder; name a folder with --out")
        if not alone:
            with contextlib.ExitStack() as places:
                environments = self._environments(places)
                if environments:
                    ledger = self._part.ledger(out)
                    return run_in_processes(self.as_json(), environments, ledger, console, stop, retry=retry)
        bases = _Bases(self, console)
        own = bases(None)
        # Before any weight is there: later, what is loaded would count twice.
        budget = Budget.of(own.device, self.vram)
        attempts = Attempts(self._part.attempts(out))
        with contextlib.ExitStack() as hired:
            crew: Crew
            if self.executor == "ray":
                crew = hired.enter_context(
                    RayCrew(self, lambda one, files: publish_files(one.attempt, files, out / one.name, one.job), stop)
                )
            else:
                crew = self._local_crew(bases, budget, out, console, stop, States(self.save_every))
            return self._run(bases, crew, attempts, console, stop, items, bad, retry)

    def crew(self, out: Path, console: Console, stop: Stop) -> LocalCrew:
        """Who makes items for somebody else: into `out`, without training states."""
        bases = _Bases(self, console)
        budget = Budget.of(bases(None).device, self.vram)
        return self._local_crew(bases, budget, out, console, stop, States(0))

    def _local_crew(
        self, bases: Bases, budget: Budget | None, out: Path, console: Console, stop: Stop, states: States
    ) -> LocalCrew:
        return LocalCrew(
            bases,
            lambda base, config, jobs: fit_memory(base, config, budget, console, jobs=jobs, beside=True),
            out,
            background=self.background,
            states=states,
            stop=stop,
            slots=self.slots,
            budget=budget,
        )

    def _run(
        self,
        bases: Bases,
        crew: Crew,
        attempts: Attempts,
        console: Console,
        stop: Stop,
        items: Sequence[Item],
        bad: Sequence[BadItem],
        retry: Sequence[str],
    ) -> Tally:
        batch = Batch(
            bases,
            crew,
            items,
            bad,
            Path(self.out),
            settings=self.settings,
            background=self.background,
            attempts=attempts,
            console=console,
            force=self.force,
            stop=stop,
            part=self._part,
            retry=retry,
            command=self.as_json(),
        )
        try:
            return batch.run()
        except KeyboardInterrupt:
            done, left = len(batch.tally.done), batch.tally.left
            console.say(f"{done} done, {left} left; the same command goes on", always=True)
            raise


class _Bases:
    """Base models by name, each opened once; see `crew.Bases`."""

    def __init__(self, request: Request, console: Console) -> None:
        self._request, self._console = request, console
        self._opened: dict[str | None, BaseModel] = {}

    def __call__(self, model: str | None) -> BaseModel:
        name = self._request.model if model is None else model
        if name not in self._opened:
            asked = self._request
            options = BaseOptions(
                name,
                asked.revision if model is None else None,
                asked.device,
                asked.base_weights,
                asked.attention,
                asked.checkpointing,
                asked.model_config if model is None else None,
            )
            self._opened[name] = open_base(options, self._console, ["a photo", asked.negative or ""])
        return self._opened[name]


def _listed(values: Any) -> str | None:
    """Numbers as an option has them."""
    return ",".join(map(str, values)) if isinstance(values, list) else values
