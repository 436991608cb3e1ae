"""Sends with segment-analytics-python: ADDRESS COUNT KEY; see `tests/clients/harness.py`."""

import sys
import time

from segment.analytics.client import Client

address, count, key = sys.argv[1], int(sys.argv[2]), sys.argv[3]
failed = []


def on_error(error, messages):
    failed.append(f"{len(messages)}: {error}")


client = Client(
    key, host=address, gzip=True, on_error=on_error, upload_size=20, upload_interval=0.1
)
for n in range(count):
    client.track("user-1", "Counted", {"n": n})
    if n % 20 == 0:
        time.sleep(0.02)
    if n == count // 2:
        print("half", flush=True)
client.flush()
assert not failed, failed
