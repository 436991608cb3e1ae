"""Sends with python-logging-loki: ADDRESS COUNT; see `harness.py`."""

import logging
import sys

import logging_loki
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

address, count = sys.argv[1], int(sys.argv[2])


# The handler sends each line once; with this session it tries again.
class Session(requests.Session):
    def __init__(self) -> None:
        super().__init__()
        again = Retry(
            total=30,
            status_forcelist=(429, 503),
            allowed_methods=None,
            backoff_factor=0.2,
            backoff_max=2,
            respect_retry_after_header=False,
        )
        self.mount("http://", HTTPAdapter(max_retries=again))


handler = logging_loki.LokiHandler(
    url=f"{address}/loki/api/v1/push", tags={"app": "shop"}, auth=("shop", "a token"), version="1"
)
handler.emitter.session_class = Session

logger = logging.getLogger("shop")
logger.setLevel(logging.INFO)
logger.addHandler(handler)

logging.raiseExceptions = False
lost = []
failed = handler.handleError
handler.handleError = lambda record: (lost.append(record), failed(record))
for n in range(count):
    logger.info("order %d", n, extra={"tags": {"n": n}})
    if n == count // 2:
        print("half", flush=True)
assert not lost, len(lost)
