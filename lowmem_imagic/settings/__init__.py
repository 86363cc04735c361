"""What can be chosen: the stages' settings and named presets. Nothing here imports torch."""
