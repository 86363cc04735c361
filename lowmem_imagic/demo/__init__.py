"""The bundled world: scenes as values, their renderer, and a small model trained on them."""
