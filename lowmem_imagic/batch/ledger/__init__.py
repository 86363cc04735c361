"""A batch's ledger: which items are done, and who is at work on which."""
