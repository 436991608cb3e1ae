"""The endpoint `splunk_hec` with clients that people run; real processes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.clients.harness import Receiver, check, npm_client, python_client, report

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

ON = (
    "--http.endpoints.splunk_hec.pipeline", "default",
    "--http.endpoints.splunk_hec.deduplicate", "true",
)  # fmt: skip


def test_splunk_handler(tmp_path: Path) -> None:
    client = python_client("splunk-handler", "splunk_handler_client.py")
    with Receiver(tmp_path, *ON) as receiver:
        records = receiver.deliver(client)
    check([json.loads(record["event"])["n"] for record in records], once=True)
    assert {record["sourcetype"] for record in records} == {"shop"}
    report("splunk_hec", client, "1,000 events, deduplicate; exactly once")


def test_winston(tmp_path: Path) -> None:
    client = npm_client("winston-splunk-httplogger", "winston_splunk_client.mjs")
    with Receiver(tmp_path, *ON) as receiver:
        records = receiver.deliver(client)
    check([record["event"]["message"]["meta"]["n"] for record in records], once=True)
    report("splunk_hec", client, "1,000 events, deduplicate; exactly once")
