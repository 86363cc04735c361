"""Starts modules of this package as processes of their own."""

import os
import sys
from pathlib import Path


def command_of(module: str) -> tuple[str, ...]:
    """The command that runs a module of this package, with the Python of this process.

    ``-P``: files of the current folder, which may hold anything, are no modules.
    """
    return sys.executable, "-P", "-m", module


def environment() -> dict[str, str]:
    """This process's environment, in which a child finds this package.

    In a clone without an installation only the current folder leads to it, which `command_of` leaves out.
    """
    folder = Path(__file__).resolve().parents[1]
    if any(place and Path(place).resolve() == folder for place in sys.path[1:]):
        return dict(os.environ)
    places = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
