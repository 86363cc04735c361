"""Torch layers for any model: frozen in 8 bit, lean in memory, adapted by packed LoRA."""
