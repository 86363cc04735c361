"""The studio's server: one process for the page, two that work, on this machine's own address."""

import contextlib
import getpass
import importlib.util
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import BackendUnavailableError, ConfigError
from ..storage.writable import check_writable

PASSWORD = "LOWMEM_IMAGIC_PASSWORD"
"""Environment variable with the password of `listen`."""
LEAST_PASSWORD = 8
LOOPBACK = "127.0.0.1"


def serve(
    models: Sequence[str],
    *,
    device: str,
    out: Path,
    port: int,
    listen: bool,
    announce: Callable[[str], None],
) -> None:
    """Serves the studio until Ctrl-C.

    Args:
        models: bases to offer beside the bundled one.
        device: device of the bases.
        out: parent of the batches' folders.
        port: port of the page; 0 for any free one.
        listen: serve other machines, too, with a password.
        announce: shows a line to the person who started the server.

    Raises:
        BackendUnavailableError: the page's library is not installed.
        ConfigError: the port is in use, or `listen` has no password.
        OutputUnwritableError: `out` cannot be written.
    """
    if importlib.util.find_spec("gradio") is None:
        raise BackendUnavailableError(
            "the studio needs gradio, which is not installed; install it with: pip install '.[ui]'"
        )
    check_writable(out)
    password = _password() if listen else None
    with contextlib.ExitStack() as open_things:
        server = open_things.enter_context(_listening("0.0.0.0" if listen else LOOPBACK, port))
        port = server.getsockname()[1]
        work = Path(open_things.enter_context(tempfile.TemporaryDirectory(prefix="lowmem-imagic-studio-")))
        # Before the library is imported, which reads them: no telemetry, and its uploads in our folder.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(work / "uploads")
        (work / "uploads").mkdir()
        (work / "visitors").mkdir()
        import uvicorn

        from .app import Running

        running = Running(
            models, device=device, folder=work / "visitors", out=out.absolute(), port=port, password=password
        )
        open_things.enter_context(running)
        announce(f"the studio is open at http://{LOOPBACK}:{port}/ (Ctrl-C ends it)")
        config = uvicorn.Config(
            running.app, log_level="error", access_log=False, server_header=False, timeout_graceful_shutdown=1
        )
        # The server ends in order, and then raises the signal again. Without a handler of ours, SIGTERM would end this
        # process before the visitors' files are deleted.
        with contextlib.suppress(KeyboardInterrupt):
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            uvicorn.Server(config).run(sockets=[server])


def _password() -> str:
    """The password of `listen`, from the environment or from the terminal.

    Raises:
        ConfigError: there is none, or it is too short.
    """
    word = os.environ.get(PASSWORD)
    if word is None and sys.stdin.isatty():
        word = getpass.getpass("password for the studio: ")
    if not word or len(word) < LEAST_PASSWORD:
        raise ConfigError(
            f"`listen` serves other machines and needs a password of at least {LEAST_PASSWORD} characters; "
            f"set it in the environment variable {PASSWORD}"
        )
    return word


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket on this address.

    Raises:
        ConfigError: the port is in use, or may not be used.
    """
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((host, port))
            # From here on a request waits instead of being refused: the address is told before the page is built.
            server.listen()
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"`port` is {port}, which cannot be used ({reason}); choose another, or 0") from None
        yield server
