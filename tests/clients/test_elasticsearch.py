"""The endpoint `elasticsearch` with clients that people run; real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import ingestd
from tests.clients.harness import (
    COUNT,
    PROGRAMS,
    Client,
    Receiver,
    check,
    found_client,
    npm_client,
    python_client,
    report,
)
from tests.clients.losing import LosingProxy
from tests.daemon.harness import ROOT, daemon

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = pytest.mark.slow

ON = ("--http.endpoints.elasticsearch.pipeline", "default")
TOKEN = "token-of-the-tests-0123456789-abcdef"


def deliver(folder: Path, client: Client, *more: str, flags: Sequence[str] = ()) -> list[Any]:
    with (
        Receiver(folder, *ON, "--http.tokens.shop.token", TOKEN, *flags) as receiver,
        LosingProxy(receiver.port) as proxy,
    ):
        records = receiver.deliver(client, TOKEN, *more, address=proxy.url)
        assert proxy.lost
    return records


@pytest.mark.parametrize("library", ["elasticsearch", "async", "opensearch-py"])
def test_python_clients(tmp_path: Path, library: str) -> None:
    package = "opensearch-py" if library == "opensearch-py" else "elasticsearch"
    client = python_client(package, "elasticsearch_client.py")
    # The asynchronous one indexes its documents, the others create them.
    flags = ("--http.endpoints.elasticsearch.deduplicate", "true") if library == "async" else ()
    records = deliver(tmp_path, client, library, flags=flags)
    check([record["n"] for record in records], once=True)
    assert all(one["@metadata"] == {"_index": "logs", "_id": str(one["n"])} for one in records)
    if library != "async":
        told = "helpers.bulk" + (", async_streaming_bulk" if library == "elasticsearch" else "")
        report(
            "elasticsearch",
            client,
            f"1,000 documents with `_id`, {told}, answers lost; exactly once",
        )


def test_pino(tmp_path: Path) -> None:
    client = npm_client("pino-elasticsearch", "pino_elasticsearch_client.mjs")
    check([record["n"] for record in deliver(tmp_path, client)], once=False)
    report("elasticsearch", client, "1,000 logs of pino, answers lost")


def test_winston(tmp_path: Path) -> None:
    client = npm_client("winston-elasticsearch", "winston_elasticsearch_client.mjs")
    records = deliver(tmp_path, client)
    check([record["fields"]["n"] for record in records], once=False)
    report(
        "elasticsearch",
        client,
        "1,000 logs of winston, index template and health asked before, answers lost",
    )


def test_rsyslog(tmp_path: Path) -> None:
    found = found_client("rsyslogd", ["-v"], ["rsyslogd"])
    command = (sys.executable, str(PROGRAMS / "rsyslog_elasticsearch_client.py"))
    client = Client("rsyslog omelasticsearch", found.version, command, pinned=False)
    records = deliver(tmp_path, client, found.command[0])
    check([record["n"] for record in records], once=False)
    report("elasticsearch", client, "1,000 messages, bulkmode, answers lost")


def test_our_own_sink_in_another_daemon(tmp_path: Path) -> None:
    (tmp_path / "sender").mkdir()
    with Receiver(tmp_path, *ON) as receiver:
        options = {"url": f"{receiver.url}/elastic", "index": "logs"}
        flags = ("--handler.options", json.dumps(options), "--batch.records_max", "20")
        retry = ("--retry.backoff", "100ms", "--retry.backoff_max", "500ms")
        handler = ("--handler.target", "elasticsearch", *flags, *retry)
        checked = subprocess.run(
            [sys.executable, "-m", "ingestd", "check", *handler], cwd=ROOT, capture_output=True,
            text=True, timeout=120,
        )  # fmt: skip
        assert checked.returncode == 0, checked.stdout + checked.stderr
        with daemon(*handler, cwd=tmp_path / "sender") as sender:
            for start in range(0, COUNT, 100):
                body = b"".join(b'{"n":%d}\n' % n for n in range(start, start + 100))
                assert sender.post(body)[0] == 202
                if start == COUNT // 2:
                    receiver.restart()
            assert sender.until_settled()["processed"] == COUNT
        records = receiver.finish()
    check([record["n"] for record in records], once=True)
    client = Client("sink elasticsearch", ingestd.__version__, ())
    report("elasticsearch", client, "1,000 records of another daemon; exactly once")
