"""Names of the files in a project's folder."""

EDIT = "edit.safetensors"
STATE = "training.state"
"""The state of a training that was stopped."""
PHOTO_VIEW = "photo.png"
"""The photo at the page's size."""
