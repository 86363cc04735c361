"""Processes of the command line that start warm: forked from a server that has imported torch and diffusers.

A cold process spends six seconds on these imports. A warm one is a real process in all other respects: a child of the
process that starts it, with its own number, streams, environment, folder and signals. It imports this package itself,
so the package reads the environment again.

``python -m tests.processes`` is the server: it reads orders from standard input, one JSON object a line, and answers
each with a process number.
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE = "lowmem_imagic"
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.02


class Process:
    """``python -m MODULE WORDS``, or a script instead of the module, started warm; used as a `subprocess.Popen`.

    Args:
        program: a module's name, or a script's path.
        words: its arguments.
        environment: all of its environment, this process's by default.
        folder: where it runs, this process's folder by default.
    """

    def __init__(
        self,
        program: str,
        *words: str,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.returncode: int | None = None
        # Files: a pipe would fill up, as it is not read while the process works.
        self._streams = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._said: list[str] = []
        order = {
            "program": program,
            "words": words,
            "environment": dict(os.environ if environment is None else environment),
            "folder": str(folder or Path.cwd()),
            "streams": [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in self._streams],
        }
        self.pid = int(_ask(json.dumps(order)))

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, when it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not, after `timeout` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self._wait(0 if end is None else os.WNOHANG)) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            time.sleep(_POLL_S)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and standard error, when it has ended; raises as `wait`."""
        self.wait(timeout)
        for file in self._streams:
            with contextlib.suppress(ValueError), file:
                file.seek(0)
                self._said.append(file.read().decode())
        return self._said[0], self._said[1]

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The server of this process."""
    # A process whose parent has ended becomes a child of this one, which can then wait for it.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no child subreaper")
    server = subprocess.Popen(
        (sys.executable, "-m", __name__),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"},
    )
    atexit.register(server.communicate)
    return server


def _ask(order: str) -> str:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    print(order, file=server.stdin, flush=True)
    return server.stdout.readline()


def _import_libraries() -> None:
    """Imports everything that the command line's modules import, and forgets the package."""
    root = Path(__file__).parents[1] / PACKAGE
    # The web page starts threads, and ComfyUI's nodes import ComfyUI.
    left_out = {"ui", "comfyui_nodes"}
    for path in sorted(root.rglob("*.py")):
        if path.stem != "__main__" and not left_out & set(path.relative_to(root).parts):
            importlib.import_module(".".join(path.relative_to(root.parent).with_suffix("").parts))
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]
    # Threads do not outlive a fork, and a lock that one has taken stays taken.
    assert len(os.listdir("/proc/self/task")) == 1, "the server has threads"
    gc.collect()
    gc.freeze()


def _orphan() -> int:
    """Forks a process whose parent ends, and returns its number; 0 in that process."""
    read, write = os.pipe()
    if between := os.fork():
        os.waitpid(between, 0)
        number = int(os.read(read, 20))
    elif number := os.fork():
        os.write(write, str(number).encode())
        os._exit(0)
    os.close(read)
    os.close(write)
    return number


def _serve() -> dict[str, Any] | None:
    """Forks a process for each order; returns its order in each of them, and None in the server at its end."""
    for line in sys.stdin:
        if not (number := _orphan()):
            order: dict[str, Any] = json.loads(line)
            return order
        print(number, flush=True)
    return None


def _become(order: dict[str, Any]) -> None:
    """Makes this process the one that was ordered."""
    for number, path in enumerate([os.devnull, *order["streams"]]):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ |= order["environment"]
    os.chdir(order["folder"])
    # A shell that runs the tests in the background has them ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if threads := os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    sys.argv = [order["program"], *order["words"]]
    run = runpy.run_path if order["program"].endswith(".py") else runpy.run_module
    run(order["program"], run_name="__main__")


if __name__ == "__main__":
    _import_libraries()
    if asked := _serve():
        _become(asked)
