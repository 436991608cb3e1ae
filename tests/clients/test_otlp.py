"""The endpoint `otlp` with OpenTelemetry's SDKs and an agent; real processes."""

from __future__ import annotations

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

    from tests.clients.harness import Client

pytestmark = pytest.mark.slow
ON = ("--http.endpoints.otlp.pipeline", "default")


def run(tmp_path: Path, client: Client, signal: str, *more: str) -> None:
    with Receiver(tmp_path, *ON) as receiver:
        records = receiver.deliver(client, *more)
    assert {record["signal"] for record in records} == {signal}
    check([record["attributes"]["n"] for record in records], once=False)


def test_the_python_sdk(tmp_path: Path) -> None:
    client = python_client("opentelemetry-exporter-otlp-proto-http", "otlp_client.py")
    for signal in ("logs", "traces", "metrics"):
        folder = tmp_path / signal
        folder.mkdir()
        run(folder, client, signal, signal)
    report("otlp", client, "1,000 logs, spans and data points in bodies of 20, protobuf, gzip")


def test_the_javascript_sdk_sends_logs_in_json(tmp_path: Path) -> None:
    client = npm_client("@opentelemetry/exporter-logs-otlp-http", "otlp_logs_client.mjs")
    run(tmp_path, client, "logs")
    report("otlp", client, "1,000 logs in bodies of 20, JSON")


def test_the_javascript_sdk_sends_traces_in_protobuf(tmp_path: Path) -> None:
    client = npm_client("@opentelemetry/exporter-trace-otlp-proto", "otlp_traces_client.mjs")
    run(tmp_path, client, "traces")
    report("otlp", client, "1,000 spans in bodies of 20, protobuf")


def test_rotel_sends_logs_on(tmp_path: Path) -> None:
    client = python_client("rotel", "otlp_rotel_client.py")
    run(tmp_path, client, "logs")
    report("otlp", client, "1,000 logs that the agent got over OTLP, protobuf, gzip")


def test_fluent_bit(tmp_path: Path) -> None:
    program = str(PROGRAMS / "fluent_bit_client.py")
    client = found_client("fluent-bit", ["--version"], [sys.executable, program, "fluent-bit"])
    options = ("logs_uri=/v1/logs", "logs_body_key=$text", "logs_body_key_attributes=true")
    with Receiver(tmp_path, *ON) as receiver:
        records = receiver.deliver(client, "opentelemetry", *options, "compress=gzip")
    check([record["attributes"]["n"] for record in records], once=False)
    assert {record["body"] for record in records} == {"an event"}
    report("otlp", client, "1,000 logs, protobuf, gzip")
