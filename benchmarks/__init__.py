"""Measurements: each module is one benchmark, run as ``python -m benchmarks.NAME``.

A full run writes ``benchmarks/results/NAME.json`` (`benchmarks.results`), the source of the tables in the docs.
"""
