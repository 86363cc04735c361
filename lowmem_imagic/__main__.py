"""``python -m lowmem_imagic``, and the entry point of the command line."""

import signal


def main() -> None:
    """Runs the command line; while it is being imported, Ctrl-C ends the process without a word."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
