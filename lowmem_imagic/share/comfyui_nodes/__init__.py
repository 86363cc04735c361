"""ComfyUI nodes for edits of lowmem-imagic; this folder goes into ComfyUI's ``custom_nodes`` as it is.

Imports nothing of the package that it comes with.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
