"""Where a batch keeps what is its own."""

HIDDEN = ".lowmem-imagic"
"""Folder in a batch's folder: ledgers, which hold local paths and are not for sharing, and training states."""
