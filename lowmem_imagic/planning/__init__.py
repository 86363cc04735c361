"""Bytes that a run will take, predicted before a weight is read."""
