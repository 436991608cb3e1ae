"""The endpoint `loki` with clients that people run; real processes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.clients.harness import Receiver, check, npm_client, python_client, report

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

ON = ("--http.endpoints.loki.pipeline", "default", "--http.endpoints.loki.deduplicate", "true")


def test_the_handler_for_logging(tmp_path: Path) -> None:
    client = python_client("python-logging-loki", "loki_handler_client.py")
    with Receiver(tmp_path, *ON) as receiver:
        records = receiver.deliver(client)
    check([int(record["labels"]["n"]) for record in records], once=True)
    assert {(one["labels"]["app"], one["labels"]["severity"]) for one in records} == {
        ("shop", "info")
    }
    report("loki", client, "1,000 lines, JSON, deduplicate; exactly once")


def test_pino(tmp_path: Path) -> None:
    client = npm_client("pino-loki", "pino_loki_client.mjs")
    with Receiver(tmp_path, *ON) as receiver:
        records = receiver.deliver(client)
    check([json.loads(record["line"])["n"] for record in records], once=True)
    assert all(one["metadata"]["trace"] == f"t{json.loads(one['line'])['n']}" for one in records)
    report("loki", client, "1,000 lines with metadata, JSON, deduplicate; exactly once")


@pytest.mark.parametrize("form", ["json", "protobuf"])
def test_winston(tmp_path: Path, form: str) -> None:
    client = npm_client("winston-loki", "winston_loki_client.mjs")
    with Receiver(tmp_path, *ON) as receiver:
        records = receiver.deliver(client, form)
    check([json.loads(record["line"])["n"] for record in records], once=True)
    assert {one["labels"]["app"] for one in records} == {"shop"}
    report("loki", client, "1,000 lines each, JSON and snappy protobuf, deduplicate; exactly once")
