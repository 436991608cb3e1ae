"""Sends with splunk-handler: ADDRESS COUNT TOKEN; see `harness.py`."""

import json
import logging
import sys
from urllib.parse import urlsplit

from splunk_handler import SplunkHandler

address, count = urlsplit(sys.argv[1]), int(sys.argv[2])
handler = SplunkHandler(
    host=address.hostname,
    port=address.port,
    protocol="http",
    token=sys.argv[3],
    index="main",
    sourcetype="shop",
    flush_interval=0.1,
    retry_count=30,
    retry_backoff=0.05,
    queue_size=0,
)
log = logging.getLogger("shop")
log.addHandler(handler)
log.setLevel(logging.INFO)
for n in range(count):
    log.info(json.dumps({"n": n}))
    if n == count // 2:
        print("half", flush=True)
    if n % 100 == 99:
        handler.force_flush()
handler.wait_until_empty()
handler.shutdown()
