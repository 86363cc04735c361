"""``python -m lowmem_imagic`` is the command line."""

from .cli import main

main()
