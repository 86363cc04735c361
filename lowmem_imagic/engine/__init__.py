"""A frozen base on a device: loading and freeing of its parts, and fallbacks when memory runs out."""
