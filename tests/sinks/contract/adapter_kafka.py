"""The sink `kafka` with transactions, and brokers that librdkafka brings for tests."""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ingestd.handlers.runner import HandlerConfig
from tests.sinks.contract.adapter import SinkAdapter, Slow, Worker
from tests.sinks.kafka_cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOT_ALLOWED = 29


class Adapter(SinkAdapter):
    target = "kafka"
    secret = "password-of-the-brokers"
    bad = b'{"n":5,"text":"%b"}' % (b"x" * 20_000)
    is_slow = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cluster = Cluster()
        self.cluster.make("t", 2)
        self.cluster.make("ledger")

    def options(self) -> dict[str, Any]:
        return {
            "brokers": self.cluster.bootstrap, "topic": "t", "ledger_topic": "ledger",
            "exactly_once": True, "timeout": self.timeout, "message_bytes_max": "16KiB",
            "username": "ingestd", "password": self.secret,
            "headers": {"id": "{_id}", "batch": "{_batch}"},
        }  # fmt: skip

    def worker(self) -> Worker:
        data_dir = os.fsencode(self.folder)
        return Worker(
            HandlerConfig(self.target, self.options(), "json", "thread", "default", data_dir)
        )

    def stored(self) -> list[int]:
        """The brokers show what an aborted transaction wrote; it has no row in the ledger.

        Of a record that was written several times under a batch, as many count as the batch has
        rows: two transactions that are both committed have two.
        """
        rows = Counter(one.key for one in self.cluster.read("ledger"))
        written = Counter((dict(one.headers)["batch"], one.value) for one in self.cluster.read("t"))
        return [
            json.loads(value)["n"]
            for (batch, value), times in written.items()
            for _ in range(min(times, rows[batch]))
        ]

    @contextmanager
    def down(self) -> Iterator[None]:
        self.cluster.set_up(False)
        try:
            yield
        finally:
            self.cluster.set_up(True)

    @contextmanager
    def unusable(self) -> Iterator[None]:
        self.cluster.set_error("t", NOT_ALLOWED)
        try:
            yield
        finally:
            self.cluster.set_error("t", 0)

    @contextmanager
    def slow(self) -> Iterator[Slow]:
        self.cluster.delay(60_000)
        slow = Slow(lambda: self.cluster.delay(0))
        try:
            yield slow
        finally:
            slow.end()

    def close(self) -> None:
        self.cluster.close()
