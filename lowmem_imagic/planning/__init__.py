"""Predicts the memory of a run before any weight is read."""
