"""The command line: one file a command. Each has `HELP`, `DESCRIPTION` and `execute`."""
