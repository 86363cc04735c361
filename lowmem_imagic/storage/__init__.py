"""Bytes on disk: atomic writing, strict JSON, safetensors, file names. Independent of Imagic."""
