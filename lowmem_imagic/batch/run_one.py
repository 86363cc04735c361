"""One of several processes on a folder: ``python -m lowmem_imagic.batch.run_one``, started by `executors.processes`.

It reads its order as a line of JSON from standard input, and prints its result as a line of JSON. It stops in an
orderly way when standard input closes.
"""

import json
import sys
import threading
from pathlib import Path

from ..errors import ConfigError, LowmemImagicError
from ..unexpected import quiet_libraries, unexpected
from .paths import HIDDEN
from .request import Request
from .stopping import Stop


def main() -> None:
    """Runs the order from standard input."""
    # Before the imports: some libraries log while they are imported.
    quiet_libraries()
    from ..actions.console import Silent
    from .failures import keep_details
    from .run import run

    order = json.loads(sys.stdin.readline())
    stop = Stop()

    def listen() -> None:
        # The parent writes nothing more, so this returns when the pipe closes.
        sys.stdin.read()
        stop.asked = True

    threading.Thread(target=listen, daemon=True).start()
    try:
        summary = run(
            Request.of(order["request"]),
            Silent(),
            stop,
            retry=order["retry"],
            continues=order["continues"],
            alone=True,
        )
        print(json.dumps(summary.as_json()))
    except LowmemImagicError as error:
        print(json.dumps({"error": str(error), "usage": isinstance(error, ConfigError)}))
    except KeyboardInterrupt:
        print(json.dumps({"stopped": True}))
    except Exception as error:
        # Not an error of one item, which would fail alone. A restart would give the same error.
        failure = unexpected(error)
        keep_details(failure, "a process of the batch", Path(order["request"]["out"]) / HIDDEN / "errors.log")
        print(json.dumps({"error": str(failure), "usage": False}))


if __name__ == "__main__":
    main()
