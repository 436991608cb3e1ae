"""The endpoint `loki` with clients that people run; real processes."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest

from tests.clients.harness import (
    PROGRAMS,
    Receiver,
    check,
    found_client,
    npm_client,
    python_client,
    report,
)

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


def test_fluent_bit(tmp_path: Path) -> None:
    program = str(PROGRAMS / "fluent_bit_client.py")
    client = found_client("fluent-bit", ["--version"], [sys.executable, program, "fluent-bit"])
    options = ("labels=app=shop", "line_format=json", "structured_metadata=n=$n", "compress=gzip")
    with Receiver(tmp_path, *ON) as receiver:
        records = receiver.deliver(client, "loki", *options)
    # What goes into labels or metadata, it takes out of the line.
    check([int(record["metadata"]["n"]) for record in records], once=True)
    assert {(one["labels"]["app"], json.loads(one["line"])["text"]) for one in records} == {
        ("shop", "an event")
    }
    report("loki", client, "1,000 lines with metadata, JSON, gzip, deduplicate; exactly once")
