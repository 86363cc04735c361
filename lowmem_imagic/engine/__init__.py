"""A frozen base on a device: what is on it when, and what to do when its memory runs out."""
