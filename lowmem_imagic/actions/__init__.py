"""The work of each command, told by events."""
