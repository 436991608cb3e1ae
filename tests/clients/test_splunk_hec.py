"""The endpoint `splunk_hec` with clients that people run; real processes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients.harness import Client, Receiver, check, npm_client, python_client, report
from tests.clients.losing import LosingProxy

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

ON = (
    "--http.endpoints.splunk_hec.pipeline", "default",
    "--http.endpoints.splunk_hec.deduplicate", "true",
)  # fmt: skip
TOKEN = "token-of-the-tests-0123456789-abcdef"


def deliver(folder: Path, client: Client) -> list[Any]:
    with (
        Receiver(folder, *ON, "--http.tokens.shop.token", TOKEN) as receiver,
        LosingProxy(receiver.port) as proxy,
    ):
        records = receiver.deliver(client, TOKEN, address=proxy.url)
        assert proxy.lost
    return records


def test_splunk_handler(tmp_path: Path) -> None:
    client = python_client("splunk-handler", "splunk_handler_client.py")
    records = deliver(tmp_path, client)
    check([json.loads(record["event"])["n"] for record in records], once=True)
    assert {record["sourcetype"] for record in records} == {"shop"}
    report("splunk_hec", client, "1,000 events, deduplicate, answers lost; exactly once")


def test_winston(tmp_path: Path) -> None:
    client = npm_client("winston-splunk-httplogger", "winston_splunk_client.mjs")
    records = deliver(tmp_path, client)
    check([record["event"]["message"]["meta"]["n"] for record in records], once=True)
    report("splunk_hec", client, "1,000 events, deduplicate, answers lost; exactly once")
