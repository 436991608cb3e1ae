"""The command line, one file a command; each has `HELP`, `DESCRIPTION` and `execute`."""
