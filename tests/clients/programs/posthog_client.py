"""Sends with posthog: ADDRESS COUNT KEY; see `tests/clients/harness.py`."""

import sys
import time

from posthog import Posthog

address, count, key = sys.argv[1], int(sys.argv[2]), sys.argv[3]
failed = []
client = Posthog(
    key, host=address, gzip=True, flush_at=20, flush_interval=0.1, max_retries=10,
    on_error=lambda error, events: failed.append(f"{len(events)}: {error}"),
)  # fmt: skip
assert client.get_feature_flag("new-page", "user-1") is None
for n in range(count):
    client.capture("counted", distinct_id="user-1", properties={"n": n})
    if n % 20 == 0:
        time.sleep(0.02)
    if n == count // 2:
        print("half", flush=True)
client.shutdown()
assert not failed, failed
