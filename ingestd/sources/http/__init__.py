"""The source `http`: the door for records. Begin with `source.py`."""
