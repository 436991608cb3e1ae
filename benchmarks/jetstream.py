"""A journal in NATS JetStream beside the file: `python -m benchmarks.jetstream --rounds 3`.

One and three servers run on this machine with `sync_interval: always`, so all nodes and the daemon
share its processors and its disk: three machines of their own are faster, and their network is not.

The first table has the log alone: one message after the other, each when the last one was
acknowledged, as commits are. Two sizes give what a commit costs and what a byte costs. The second
one has whole daemons over HTTP, another journal first in each round. The third one has how long
they take for a 202 at half of the highest rate.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cells import measure_all
from benchmarks.load import wrk_fits
from benchmarks.measure import Plan, Scenario
from benchmarks.peers.ours import Ingestd
from benchmarks.probes import latency_probe
from benchmarks.processes import ROOT
from benchmarks.report import probe_table, table
from benchmarks.results import Spread, problems, rates, ratio, spread
from ingestd.journal.jetstream import JetStreamLog, JetStreamSettings
from tests.nats import running

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.peers.base import Command
    from benchmarks.results import Result
    from tests.nats import Cluster

NODES = (1, 3)
MESSAGE_BYTES = (128, 10_000, 100_000, 900_000)
SIZES = (1, 100, 1000)
"""Records of a body."""
LATENCY = latency_probe(SIZES[-1])


async def _appends(cluster: Cluster, size: int, seconds: float) -> float:
    """Messages a second that a log of its own took."""
    settings = JetStreamSettings(
        servers=cluster.urls, name=f"log-{time.monotonic_ns()}", replicas=len(cluster.servers)
    )
    log = JetStreamLog(settings, "default")
    await log.open()
    try:
        data, last, count = bytes(size), 0, 0
        for _ in range(20):  # the first ones make the files
            last = await log.append(data, after=last)
        started = time.perf_counter()
        while (taken := time.perf_counter() - started) < seconds:
            last = await log.append(data, after=last)
            count += 1
        await log.trim(last)
        return count / taken
    finally:
        await log.close()


def measure_log(cluster: Cluster, rounds: int, seconds: float) -> list[list[str]]:
    """The rows of the first table."""
    found: dict[int, list[float]] = {size: [] for size in MESSAGE_BYTES}
    for _ in range(rounds):
        for size in MESSAGE_BYTES:
            found[size].append(asyncio.run(_appends(cluster, size, seconds)))
    rows = []
    for size, all_rates in found.items():
        rate = Spread.of(all_rates)
        rows.append(
            [
                str(len(cluster.servers)),
                f"{size:,}",
                rate.text(),
                f"{1000 / rate.median:.2f}",
                f"{rate.median * size / 1e6:.1f}",
            ]
        )
    return rows


class WithLog(Ingestd):
    """The daemon with its journal on servers.

    Args:
        cluster: the servers; `None` for the file.
    """

    def __init__(self, cluster: Cluster | None) -> None:
        self.name = f"jetstream, {len(cluster.servers)}" if cluster else "sqlite"
        self._cluster = cluster

    def _command(self, folder: Path, age: float, *more: str) -> Command:
        if self._cluster is not None:
            more = (
                *more,
                *("--journal.kind", "jetstream"),
                *("--journal.jetstream.servers", ",".join(self._cluster.urls)),
                *("--journal.jetstream.name", f"d-{time.monotonic_ns()}"),
                *("--journal.jetstream.replicas", str(len(self._cluster.servers))),
            )
        return super()._command(folder, age, *more)


def report(results: Sequence[Result], scenarios: Sequence[Scenario], names: Sequence[str]) -> str:
    """The second table, in Markdown; pure."""
    rows = []
    for scenario in scenarios:
        first = rates(results, scenario.name, names[0])
        for name in names:
            runs = rates(results, scenario.name, name)
            speed, share = spread(runs, lambda run: run.rate), ratio(runs, first)
            rows.append(
                [
                    str(scenario.records),
                    name,
                    speed.text() if speed else "",
                    share.text(2) if share else "",
                ]
            )
    return table(["records a body", "journal", "records/s", f"÷ {names[0]}"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; the exit code says whether every run counted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jetstream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of load a run [3]")
    parser.add_argument("--directory", type=Path, default=ROOT / "build", help="[build/]")
    arguments = parser.parse_args(argv)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir=arguments.directory))
    log_rows: list[list[str]] = []
    results: list[Result] = []
    scenarios = [Scenario(f"jetstream-{size}", "http", size) for size in SIZES]
    tool = "wrk" if wrk_fits(arguments.seconds) else "python"
    plan = Plan(arguments.rounds, arguments.seconds, 0, 1.0, tool, folder)
    peers = [WithLog(None)]
    try:
        for nodes in NODES:
            own = folder / f"servers-{nodes}"
            own.mkdir()
            with running(own, nodes, payload_max=8 << 20, file_max="8GiB") as cluster:
                log_rows += measure_log(cluster, arguments.rounds, arguments.seconds / 2)
                # The file is measured beside each number of servers: idle, they cost little.
                peers = [WithLog(None), WithLog(cluster)]
                cells = [(one, peer) for one in (*scenarios, LATENCY) for peer in peers]
                results += measure_all(cells, plan, folder)
    finally:
        shutil.rmtree(folder)
    print(table(["nodes", "bytes", "messages/s", "ms a message", "MB/s"], log_rows))
    names = ["sqlite", *(f"jetstream, {nodes}" for nodes in NODES)]
    print(report(results, scenarios, names))
    print(probe_table(results, LATENCY))
    for problem in problems(results):
        print(f"- does not count: {problem}")
    return 1 if problems(results) else 0


if __name__ == "__main__":
    sys.exit(main())
