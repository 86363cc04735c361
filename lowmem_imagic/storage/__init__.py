"""Bytes on disk: atomic writing, strict JSON, safetensors, file names. Nothing here knows of Imagic."""
