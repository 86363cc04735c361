"""Makes OpenMP's waiting threads sleep; set before the libraries that start them are loaded."""

import os

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables for waiting threads, of OpenMP and its two common libraries."""


def wait_passively() -> None:
    """Makes waiting threads sleep, in this process and its children, unless the user has set one of `SETTINGS`.

    By default they spin: on a busy machine, a waiting thread keeps a core that another thread of its own program needs.
    On two cores shared with ten programs an edit of 43 s then takes 287 s (``benchmarks/threads.py``). Call it before
    torch is imported, which reads the variable.
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
