"""The endpoint `datadog` with clients that people run; real processes."""

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

ON = ("--http.endpoints.datadog.pipeline", "default")
KEY = ("--http.tokens.shop.token", "0123456789abcdef0123456789abcdef")


def test_the_api_client(tmp_path: Path) -> None:
    client = python_client("datadog-api-client", "datadog_client.py")
    with Receiver(tmp_path, *ON, *KEY) as receiver:
        records = receiver.deliver(client)
    check([json.loads(record["message"])["n"] for record in records], once=False)
    assert all(one["ddsource"] == "shop" for one in records)
    report("datadog", client, "1,000 logs in bodies of 20, gzip and deflate, with a key")


def test_pino(tmp_path: Path) -> None:
    client = npm_client("pino-datadog-transport", "pino_datadog_client.mjs")
    with Receiver(tmp_path, *ON, *KEY) as receiver:
        records = receiver.deliver(client)
    check([json.loads(record["message"])["n"] for record in records], once=False)
    assert all(one["service"] == "shop" for one in records)
    report("datadog", client, "1,000 logs of pino, gzip, with a key")


def test_fluent_bit(tmp_path: Path) -> None:
    program = str(PROGRAMS / "fluent_bit_client.py")
    client = found_client("fluent-bit", ["--version"], [sys.executable, program, "fluent-bit"])
    options = (f"apikey={KEY[1]}", "tls=off", "dd_service=shop", "compress=gzip")
    with Receiver(tmp_path, *ON, *KEY) as receiver:
        records = receiver.deliver(client, "datadog", *options)
    check([record["n"] for record in records], once=False)
    assert {one["service"] for one in records} == {"shop"}
    report("datadog", client, "1,000 logs, gzip, with a key")
