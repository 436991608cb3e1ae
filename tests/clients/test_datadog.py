"""The endpoint `datadog` with clients that people run; real processes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.clients.harness import Receiver, check, npm_client, python_client, report

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
