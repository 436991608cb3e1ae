"""Compares the sink `objects` with a script that writes the same NDJSON as Parquet with pyarrow.

    python -m benchmarks.parquet [--records 100000] [--batches 10] [--rounds 5]

Both write files of the same records with the same compression into a folder, in interleaved rounds.
The script reads a file of NDJSON a batch and syncs nothing. Numbers are records a second of wall
time, and CPU seconds a round, which do not depend on what else runs.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ingestd.base.record import Layout, Records, Span
from ingestd.handlers.outcome import Job
from ingestd.handlers.runner import HandlerConfig, Runner

if TYPE_CHECKING:
    from collections.abc import Callable


def body(first: int, count: int) -> bytes:
    return b"".join(
        b'{"id":%d,"user":"user-%d","event":"page_view","url":"https://example.com/p/%d",'
        b'"ms":%d.25,"ok":true}\n' % (n, n % 5000, n % 700, n % 1000)
        for n in range(first, first + count)
    )


def script(folder: Path, bodies: list[bytes]) -> None:
    from pyarrow import json, parquet

    for i, content in enumerate(bodies):
        table = json.read_json(io.BytesIO(content))
        parquet.write_table(table, folder / f"{i}.parquet", compression="zstd")


def sink(folder: Path, bodies: list[bytes]) -> None:
    options = {"url": f"file://{folder}", "format": "parquet"}
    runner = Runner(HandlerConfig("objects", options, "json", "thread", "default", b"/x"))
    assert runner.prepare() == ""
    for i, content in enumerate(bodies):
        count = content.count(b"\n")
        records = Records(Layout.LINES, count, content)
        result = runner.run(Job(f"j-{i}", 1, records, [Span(1, 0, count)], "j"))
        assert result.failure is None, result.failure
    runner.close()


def measured(work: Callable[[Path, list[bytes]], None], bodies: list[bytes]) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        cpu, wall = os.times(), time.perf_counter()
        work(Path(folder), bodies)
        wall, now = time.perf_counter() - wall, os.times()
        return wall, now.user + now.system - cpu.user - cpu.system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    bodies = [body(n * given.records, given.records) for n in range(given.batches)]
    measured(script, bodies[:1]), measured(sink, bodies[:1])  # imports
    rounds = [(measured(script, bodies), measured(sink, bodies)) for _ in range(given.rounds)]
    total = given.records * given.batches
    for name, place in (("script", 0), ("sink", 1)):
        wall = statistics.median(one[place][0] for one in rounds)
        cpu = statistics.median(one[place][1] for one in rounds)
        print(f"{name:8} {total / wall:12,.0f} records/s   {cpu:.2f} CPU s")
    for kind, i in (("wall", 0), ("CPU", 1)):
        ratio = statistics.median(one[0][i] / one[1][i] for one in rounds)
        print(f"sink / script, by {kind}: {ratio:.2f}")


if __name__ == "__main__":
    main()
