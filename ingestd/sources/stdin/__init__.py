"""The source `stdin`: lines from standard input. Begin with `source.py`."""
