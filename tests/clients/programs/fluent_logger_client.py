"""Sends with fluent-logger: ADDRESS COUNT; see `tests/clients/harness.py`."""

import sys
import time

from fluent.sender import FluentSender

host, _, port = sys.argv[1].rpartition(":")
count = int(sys.argv[2])
sender = FluentSender("app", host=host, port=int(port), nanosecond_precision=True)
for n in range(count):
    sender.emit("web", {"n": n})  # what cannot be sent now goes before the next one
    time.sleep(0.002)
    if n == count // 2:
        print("half", flush=True)
deadline = time.monotonic() + 150
while not sender.emit("web", {}):
    assert time.monotonic() < deadline, sender.last_error
    time.sleep(0.1)
sender.close()
