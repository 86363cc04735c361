"""A batch's ledger: the state of each item, and the processes at work."""
