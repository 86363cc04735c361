"""An edit as a value and as a file."""
