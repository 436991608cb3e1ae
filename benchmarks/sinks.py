"""CPU of the sinks without their other sides: `python -m benchmarks.sinks --rounds 10`.

A sink gets batches of 20,000 JSON lines, as the daemon's worker calls it; what answers it takes
everything and stores nothing (an HTTP server of the tests, librdkafka's mock brokers). Prints one
line of JSON: the median of microseconds of the worker's own thread a record, by sink and options.
librdkafka's threads are not in it. Needs the extra `kafka`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from typing import Any

from ingestd.base.record import Records, Span
from ingestd.handlers.call import call, close
from ingestd.handlers.load import load
from ingestd.handlers.outcome import Job
from tests.sinks.clickhouse_server import FakeClickHouse
from tests.sinks.http_server import Answer, Asked, FakeServer
from tests.sinks.kafka_cluster import Cluster

BATCH = 20_000


class FakeBulk(FakeServer):
    """Answers `_bulk` as if each document were created."""

    def answer(self, asked: Asked) -> Answer:
        """One request."""
        items = [b'{"create":{"status":201}}'] * (asked.body.count(b"\n") // 2)
        return Answer(200, b'{"items":[%b]}' % b",".join(items))


def measure(records: Records, target: str, options: dict[str, Any], rounds: int) -> float:
    """Microseconds of the calling thread's CPU a record, the median of the rounds."""
    spec, taken = load(target, record_format="json", executor="thread"), []
    with tempfile.TemporaryDirectory() as folder:
        sink = spec.create(options, data_dir=folder)
        for turn in range(rounds + 1):
            job = Job(f"j-{turn}", 1, records, [Span(turn, 0, records.count)], "j", time.time())
            started = time.thread_time()
            result = call(spec, sink, job)
            taken.append(time.thread_time() - started)
            assert result.failure is None, result.failure
        close(spec, sink)
    return round(statistics.median(taken[1:]) / records.count * 1e6, 2)  # the first one connects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    line = '{"n":%d,"user":"u%d","text":"%s","at":"2026-01-31T09:00:00Z"}'
    items = [(line % (n, n % 997, "x" * 60)).encode() for n in range(BATCH)]
    records, found = Records.lines(items), {"bytes": len(items[0])}
    bulk, clickhouse, brokers = FakeBulk(), FakeClickHouse(), Cluster()
    brokers.make("t", 4)
    brokers.make("ledger")
    kafka = {"brokers": brokers.bootstrap, "topic": "t", "ledger_topic": "ledger"}
    for name, target, options in (
        ("elasticsearch", "elasticsearch", {"url": bulk.url}),
        ("elasticsearch gzip", "elasticsearch", {"url": bulk.url, "compress": "gzip"}),
        ("clickhouse with _id", "clickhouse", {"url": clickhouse.url}),
        ("kafka", "kafka", kafka),
        ("kafka key, exactly_once", "kafka", {**kafka, "key": "{user}", "exactly_once": True}),
    ):
        found[name] = measure(records, target, options, rounds)
    sys.stdout.write(json.dumps(found) + "\n")
    bulk.stop()
    clickhouse.stop()
    brokers.close()


if __name__ == "__main__":
    main()
