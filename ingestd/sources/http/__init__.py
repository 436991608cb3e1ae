"""The source `http` accepts records over HTTP. Begin with `source.py`."""
