"""Builds the base models and the local executor for a request."""

from dataclasses import replace
from pathlib import Path

from ...actions.console import Console
from ...actions.edit import fit_memory, open_base
from ...engine.base import BaseModel
from ...planning.plan import Budget
from ...settings.text import BaseOptions
from ..request import Request
from ..states import States
from ..stopping import Stop
from .local import LocalExecutor


class OpenBases:
    """Base models by their options, each opened once; see `executor.Bases`."""

    def __init__(self, request: Request, console: Console) -> None:
        self._request, self._console = request, console
        self._opened: dict[BaseOptions, BaseModel] = {}

    def __call__(self, model: str | None) -> BaseModel:
        """The base of that name, or the request's own for None."""
        options = self._request.base
        if model is not None:
            # The request's revision, configuration and folders are those of its own model.
            options = replace(options, model=model, revision=None, config_folder=None, vae=None, text_from=None)
        if options not in self._opened:
            self._opened[options] = open_base(options, self._console, ["a photo"], self._request.settings({}).sample)
        return self._opened[options]


def local_executor(
    request: Request,
    bases: OpenBases,
    out: Path,
    console: Console,
    stop: Stop,
    *,
    save_every: int,
) -> LocalExecutor:
    """An executor that makes items in this process, into `out`.

    Args:
        request: the options.
        bases: the base models by name.
        out: the parent of the items' folders.
        console: shows plans.
        stop: ends the run when asked.
        save_every: steps between two saved training states; 0 saves only when stopped.
    """
    # Measure the budget before weights are loaded: otherwise they would count twice.
    budget = Budget.of(bases(None).device, request["vram"])
    return LocalExecutor(
        bases,
        lambda base, config, jobs: fit_memory(base, config, budget, console, jobs=jobs, beside=True),
        out,
        background=request["background"],
        states=States(save_every),
        stop=stop,
        slots=request["slots"],
        budget=budget,
    )
