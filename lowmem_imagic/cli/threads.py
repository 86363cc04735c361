"""How the threads of a computation wait for each other, chosen before the libraries that start them are loaded."""

import os

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables of OpenMP and its two common libraries that say so."""


def wait_passively() -> None:
    """Lets threads that wait sleep, here and in processes started from here, unless the user has chosen otherwise.

    By default they spin: on a machine with other work, a thread that has none keeps the core that another of its own
    program needs. On two cores shared with ten programs an edit of 43 s then takes 287 (``benchmarks/threads.py``).
    Without effect once torch is loaded, which reads it then.
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
