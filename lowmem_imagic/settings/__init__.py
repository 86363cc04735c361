"""The settings of all stages, named presets, and the table of options. Nothing here imports torch."""
