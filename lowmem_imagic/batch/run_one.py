"""One of several processes on a folder: ``python -m lowmem_imagic.batch.run_one``, started by `executors.processes`.

It reads its order as a line of JSON from standard input. It prints lines of JSON: the name of each item that it made,
each warning and important remark, and last its result. It stops in an orderly way when standard input closes, or at
SIGTERM.
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any

from ..errors import ConfigError, LowmemImagicError
from ..unexpected import quiet_libraries, unexpected
from .paths import HIDDEN
from .request import Request
from .stopping import Stop, stop_at_sigterm


def main() -> None:
    """Runs the order from standard input."""
    # Before the imports: some libraries log while they are imported.
    quiet_libraries()
    from ..actions.console import Console
    from .failures import keep_details
    from .run import run

    class Lines(Console):
        """A console for the process that started this one."""

        def say(self, text: str, *, always: bool = False) -> None:
            if always:
                _tell(remark=text)

        def warn(self, text: str) -> None:
            if text:
                self.warnings.append(text)
                _tell(warning=text)

        def progress(self, stage: str, step: int, steps: int, remark: str) -> None:
            """The ledger has the progress."""

    stop = Stop()
    stop_at_sigterm(stop)
    order = json.loads(sys.stdin.readline())

    def listen() -> None:
        # The parent writes nothing more, so this returns when the pipe closes.
        sys.stdin.read()
        stop.asked = True

    threading.Thread(target=listen, daemon=True).start()
    try:
        summary = run(
            Request.of(order["request"]),
            Lines(),
            stop,
            retry=order["retry"],
            continues=order["continues"],
            own=order["own"],
            on_made=lambda name: _tell(made=name),
        )
        _tell(**summary.as_json())
    except LowmemImagicError as error:
        _tell(error=str(error), usage=isinstance(error, ConfigError))
    except KeyboardInterrupt:
        _tell(stopped=True)
    except Exception as error:
        # Not an error of one item, which would fail alone. A restart would give the same error.
        failure = unexpected(error)
        keep_details(failure, "a process of the batch", Path(order["request"]["out"]) / HIDDEN / "errors.log")
        _tell(error=str(failure), usage=False)


def _tell(**event: Any) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    main()
