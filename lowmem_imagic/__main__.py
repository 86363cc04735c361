"""``python -m lowmem_imagic``, and the entry point of the command line."""

import signal
import sys

from .cli.streams import end_output, steady_streams
from .cli.threads import wait_passively


def main() -> None:
    """Runs the command line; while it is being imported, Ctrl-C ends the process without a word."""
    steady_streams()
    wait_passively()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli.commands import main as run

    signal.signal(signal.SIGINT, before)
    try:
        run()
    except OSError as error:
        # From the help text, which the library prints itself.
        end_output()
        sys.stderr.write(f"lowmem-imagic: standard output cannot be written ({error.strerror})\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
