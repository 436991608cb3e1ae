"""The source `fetch`: lines and events from URLs. Begin with `source.py`."""
