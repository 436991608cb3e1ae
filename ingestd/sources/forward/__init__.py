"""The source `forward`: Fluentd's protocol over TCP and TLS. Begin with `codec.py`."""
