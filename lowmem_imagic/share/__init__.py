"""Edits in other programs, and on the Hugging Face Hub."""
