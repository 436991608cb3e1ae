"""Libraries of Segment, RudderStack, PostHog and CloudEvents: every record, and each once.

The daemon refuses some requests and is restarted; some answers of requests that it accepted never
reach the client, which sends its records again in its own way: the same batch, or others.
"""

from __future__ import annotations

import json
import signal
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients.harness import COUNT, Client, Receiver, check, npm_client, python_client, report
from tests.clients.losing import LosingProxy

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow
KEY = "phc_key-of-the-tests-0123456789"


def deliver(folder: Path, endpoint: str, client: Client, path: str = "") -> list[Any]:
    on = (f"--http.endpoints.{endpoint}.pipeline", "default", "--http.tokens.shop.token", KEY)
    with Receiver(folder, *on) as receiver, LosingProxy(receiver.port) as proxy:
        records = receiver.deliver(client, KEY, address=proxy.url + path)
        assert proxy.lost
    for one in records:
        assert KEY not in str(one)
    return records


@pytest.mark.parametrize(
    ("find", "package", "program"),
    [
        (python_client, "segment-analytics-python", "segment_client.py"),
        (npm_client, "@segment/analytics-node", "segment_client.mjs"),
        (npm_client, "@rudderstack/rudder-sdk-node", "rudder_client.mjs"),
    ],
)
def test_segment(tmp_path: Path, find: Any, package: str, program: str) -> None:
    client = find(package, program)
    records = deliver(tmp_path, "segment", client)
    check([one["properties"]["n"] for one in records], once=True)
    assert {one["type"] for one in records} == {"track"}
    assert all(one["sentAt"] and one["messageId"] and one["context"] for one in records)
    report("segment", client, f"{COUNT:,} messages in batches of 20, answers lost; exactly once")


@pytest.mark.parametrize(
    ("find", "package", "program"),
    [
        (python_client, "posthog", "posthog_client.py"),
        (npm_client, "posthog-node", "posthog_client.mjs"),
    ],
)
def test_posthog(tmp_path: Path, find: Any, package: str, program: str) -> None:
    client = find(package, program)
    counted = [one for one in deliver(tmp_path, "posthog", client) if one["event"] == "counted"]
    check([one["properties"]["n"] for one in counted], once=True)
    assert all(one["uuid"] and one["sent_at"] for one in counted)
    report("posthog", client, f"{COUNT:,} events in batches of 20, answers lost; exactly once")


@pytest.mark.parametrize(
    ("find", "program"),
    [(python_client, "cloudevents_client.py"), (npm_client, "cloudevents_client.mjs")],
)
def test_cloudevents(tmp_path: Path, find: Any, program: str) -> None:
    client = find("cloudevents", program)
    records = deliver(tmp_path, "cloudevents", client, "/v1/cloudevents")
    check([one["data"]["n"] for one in records], once=True)
    assert Counter(one["id"] for one in records) == Counter(str(n) for n in range(COUNT))
    named = client._replace(name="cloudevents (npm)" if program.endswith("mjs") else "cloudevents")
    report(
        "cloudevents", named, f"{COUNT:,} events, binary and structured, answers lost; exactly once"
    )


def test_a_crash_forgets_no_id(tmp_path: Path) -> None:
    """Batches overlap as those of a client that lost its answers; the daemon is killed between."""
    on = ("--http.endpoints.segment.pipeline", "default")
    with Receiver(tmp_path, *on, flaky=False) as receiver:
        for start in range(0, 200, 20):
            messages = [
                {"messageId": str(n), "n": n} for n in range(max(0, start - 50), start + 20)
            ]
            body = json.dumps({"batch": messages}).encode()
            answer = receiver.daemon.request("POST", "/v1/batch", body)
            assert (answer[0], answer[2]) == (200, {"success": True})
            if start % 60 == 0:
                receiver.daemon.terminate(signal.SIGKILL)
                receiver.daemon.wait()
                receiver.daemon.__exit__()
                receiver.start()
        accepted = receiver.daemon.status()["pipelines"]["default"]["accepted"]
        records = receiver.finish()
    assert accepted == 200
    check([one["n"] for one in records], once=False, count=200)  # a kill amid the sink's write
    assert {one["messageId"] for one in records} == {str(n) for n in range(200)}
