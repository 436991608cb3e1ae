"""Sends with cloudevents: ADDRESS COUNT TOKEN; see `tests/clients/harness.py`."""

import sys
import time

import requests
from cloudevents.core.bindings.http import to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent

address, count, token = sys.argv[1], int(sys.argv[2]), sys.argv[3]
session = requests.Session()


def send(event, encode):
    """Sends an event until it is accepted; the library leaves that to its user."""
    message = encode(event)
    headers = {**message.headers, "Authorization": f"Bearer {token}"}
    for _ in range(300):
        try:
            answer = session.post(address, data=message.body, headers=headers, timeout=60)
        except requests.ConnectionError:
            time.sleep(0.2)
            continue
        if answer.status_code == 202:
            return
        assert answer.status_code in (429, 503), answer.text
        time.sleep(0.2)
    raise AssertionError("not accepted")


for n in range(count):
    attributes = {"type": "counted", "source": "/tests/client", "id": str(n)}
    send(CloudEvent(attributes, {"n": n}), (to_binary_event, to_structured_event)[n % 2])
    if n == count // 2:
        print("half", flush=True)
