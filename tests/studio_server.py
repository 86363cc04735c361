"""The studio's server as a process of the command line."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_PATIENCE_S = 400
"""Only a hang fails."""


@contextlib.contextmanager
def served(folder: Path, *words: str, **environment: str) -> Iterator[str]:
    """The address of a studio, in a process of the command line that runs in `folder`."""
    command = [sys.executable, "-m", "lowmem_imagic", "ui", "--port", "0", "--device", "cpu", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **environment}
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            address = re.search(r"http://\S+/", line)
            assert address is not None, line
            yield address[0]
        finally:
            process.send_signal(signal.SIGINT)
            # It waits for its processes, which a busy machine may still be starting.
            process.wait(_PATIENCE_S)
