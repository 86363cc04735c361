"""A process of the studio that works: takes orders as lines of JSON, and tells events as lines of JSON.

The page's own process loads no model and decodes no picture. A crash of this process, for example by a damaged picture
or for lack of memory, is the end of one job; the page goes on and starts another. The process ends when its standard
input closes, also if the page was killed.
"""

import json
import os
import queue
import sys
import threading
from collections.abc import Mapping
from typing import Any

from ..batch.stopping import Stop
from ..errors import ConfigError, LowmemImagicError
from ..unexpected import quiet_libraries, unexpected
from .told import Told

PROGRAM = "lowmem_imagic.ui.worker"


def main() -> None:
    """Takes orders until standard input closes."""
    # Libraries print to standard output; events have a descriptor of their own.
    told = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    lock = threading.Lock()

    def send(event: Mapping[str, Any]) -> None:
        with lock:
            told.write((json.dumps(event) + "\n").encode())

    quiet_libraries()
    orders: queue.Queue[dict[str, Any]] = queue.Queue()
    stop = Stop()
    threading.Thread(target=_listen, args=(orders, stop), daemon=True).start()
    from .work import Work

    work = Work()
    send({"event": "ready"})
    while True:
        send(_answer(work, orders.get(), Told(send, stop)))


def _listen(orders: "queue.Queue[dict[str, Any]]", stop: Stop) -> None:
    """Reads orders, and requests to stop the one at work; ends the process when they end."""
    for line in sys.stdin.buffer:
        order = json.loads(line)
        if order["work"] == "stop":
            stop.asked = True
        else:
            # Here, and not when the order begins: a stop may come before that.
            stop.asked = False
            orders.put(order)
    os._exit(0)


def _answer(work: Any, order: dict[str, Any], told: Told) -> dict[str, Any]:
    """The last event of an order: its result, or the error in one line."""
    try:
        result = work.do(order, told)
    except KeyboardInterrupt:
        return {"event": "stopped"}
    except ConfigError as error:
        return {"event": "failed", "text": "; ".join(dict.fromkeys(error.problems))}
    except LowmemImagicError as error:
        return {"event": "failed", "text": str(error)}
    except Exception as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error):
            return {"event": "failed", "text": "out of memory; a smaller photo, or fewer etas, take less"}
        failure = unexpected(error)
        return {"event": "failed", "text": str(failure), "details": failure.details}
    return {"event": "done", "result": result}


if __name__ == "__main__":
    main()
