"""Executors make a batch's items: in this process, in other processes, or on a Ray cluster."""
