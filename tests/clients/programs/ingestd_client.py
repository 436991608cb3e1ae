"""Sends with `ingestd.client`: ADDRESS COUNT; see `tests/clients/harness.py`."""

import sys

from ingestd.client import Client

address, count = sys.argv[1], int(sys.argv[2])
with Client(address, batch_records=20, close_timeout=150) as client:
    for n in range(count):
        client.send({"n": n})
        if n == count // 2:
            print("half", flush=True)
assert client.counts.accepted == count, client.counts
