"""Stages 1 and 2: the text embedding, then the adapter."""
