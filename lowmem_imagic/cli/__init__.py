"""The command line: words to calls, and exit codes."""
