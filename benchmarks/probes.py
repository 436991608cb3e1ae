"""What is measured beside records a second; each is one peer in one probe, like a scenario."""

from __future__ import annotations

import functools
import json
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.latency import pace
from benchmarks.load import send
from benchmarks.measure import WARM_UP_SECONDS
from benchmarks.memory import MB, descendants, is_worker, memory_of
from benchmarks.processes import Failed, output_of
from benchmarks.records import write_bodies
from benchmarks.service import serving, wait_processed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from benchmarks.measure import Plan
    from benchmarks.peers.base import Peer

IDLE_SECONDS = 1.0
"""A daemon that is ready has settled after this."""
MEMORY_RECORDS = 1000
JOURNAL_SECONDS_MAX = 3.0
JOURNAL_SECONDS_LIMIT = 120.0


@dataclass(frozen=True)
class Figure:
    """A number of a probe.

    Attributes:
        title: in the table.
        unit: likewise.
        digits: behind the point.
    """

    title: str
    unit: str
    digits: int = 0

    def say(self, value: float) -> str:
        """Its value, in words."""
        return f"{self.title} {value:,.{self.digits}f} {self.unit}".rstrip()


@dataclass(frozen=True, eq=False)
class Probe:
    """Something to measure.

    Attributes:
        name: as `--only` and the report know it.
        about: what it measures, for the report.
        figures: what comes out, by name.
        measure: measures one peer once, in an empty folder on the disk that is measured.
    """

    name: str
    about: str
    figures: Mapping[str, Figure]
    measure: Callable[[Peer, Plan, Path], dict[str, float]]


def probe(one: Probe, peer: Peer, plan: Plan, folder: Path) -> dict[str, float]:
    """Measures.

    Raises:
        Failed: this run does not count.
    """
    (folder / "peer").mkdir()
    (folder / "load").mkdir()
    numbers = one.measure(peer, plan, folder)
    if numbers.keys() != one.figures.keys():
        raise Failed(f"{one.name} measured {', '.join(numbers)}")
    return numbers


def _start(peer: Peer, plan: Plan, folder: Path) -> dict[str, float]:
    service = peer.starter(folder / "peer", plan.age)
    began = time.perf_counter()
    with serving(service):
        return {"ready": time.perf_counter() - began}


def _memory(peer: Peer, plan: Plan, folder: Path) -> dict[str, float]:
    bodies = write_bodies(folder, MEMORY_RECORDS)
    service = peer.service(folder / "peer", plan.age)
    with serving(service) as (daemon,):
        time.sleep(IDLE_SECONDS)
        idle = memory_of(daemon.pid)
        everybody = [memory_of(pid) for pid in (daemon.pid, *descendants(daemon.pid))]
        warm_up = min(WARM_UP_SECONDS, plan.seconds)
        send(plan.tool, service, bodies, warm_up, folder / "load")
        send(plan.tool, service, bodies, plan.seconds, folder / "load")
        wait_processed(peer, service, open_batch=True)
        # The kernel keeps the peak; the workers are those that the load was processed by.
        peak = memory_of(daemon.pid).peak
        workers = [memory_of(pid).peak for pid in descendants(daemon.pid) if is_worker(pid)]
    if not workers:
        raise Failed("no worker found")
    return {
        "idle_rss": idle.rss / MB,
        "idle_pss": idle.pss / MB,
        "idle_all_pss": sum(each.pss for each in everybody) / MB,
        "load_daemon": peak / MB,
        "load_worker": max(workers) / MB,
    }


def _latency(records: int, peer: Peer, plan: Plan, folder: Path) -> dict[str, float]:
    bodies = write_bodies(folder, records)
    service = peer.service(folder / "peer", plan.age)
    with serving(service):
        warm_up = min(WARM_UP_SECONDS, plan.seconds)
        send(plan.tool, service, bodies, warm_up, folder / "load")
        wait_processed(peer, service, open_batch=True)
        highest = send(plan.tool, service, bodies, plan.seconds, folder / "load")
        wait_processed(peer, service, open_batch=True)
        rate = (highest.answers - highest.refused) / highest.seconds / 2
        if not rate:
            raise Failed("nothing was accepted")
        seen = pace(service, bodies, rate, plan.seconds, folder / "load")
        wait_processed(peer, service, open_batch=True)
    if seen.refused:
        raise Failed(f"{seen.refused} of {seen.sent} requests were refused at half the rate")
    return {
        "rate": rate * records,
        "p50": seen.p50 * 1e3,
        "p99": seen.p99 * 1e3,
        "max": seen.max * 1e3,
        "late_p99": seen.late_p99 * 1e3,
    }


def _journal(peer: Peer, plan: Plan, folder: Path) -> dict[str, float]:  # noqa: ARG001
    seconds = min(plan.seconds, JOURNAL_SECONDS_MAX)
    command = [sys.executable, "-m", "benchmarks.journal", str(folder / "peer"), str(seconds)]
    reached = json.loads(output_of(command, folder / "load", JOURNAL_SECONDS_LIMIT))
    journal, plain = reached["journal"], reached["plain"]
    return {"journal": journal / MB, "plain": plain / MB, "share": journal / plain}


def latency_probe(records: int) -> Probe:
    """Makes the probe of latencies for bodies of so many records."""
    return Probe(
        f"latency-{records}",
        f"of the 2xx, bodies of {records}, an open loop at half of what a closed loop got accepted "
        "just before; each request is measured from when it was due. `sender late` is in it, and "
        "is what the load itself added",
        {
            "rate": Figure("sent at", "records/s"),
            "p50": Figure("p50", "ms", 1),
            "p99": Figure("p99", "ms", 1),
            "max": Figure("max", "ms", 1),
            "late_p99": Figure("sender late, p99", "ms", 1),
        },
        functools.partial(_latency, records),
    )


PROBES = (
    Probe(
        "start",
        "from exec until the page that says so answers that records are taken; ingestd with a "
        "thread for the handler",
        {"ready": Figure("exec to ready", "s", 2)},
        _start,
    ),
    Probe(
        "memory",
        "idle: one second after it was ready, nothing sent yet; load: the highest resident set of "
        "a process's life (VmHWM), after http-1000 and until its backlog was gone. RSS is judged",
        {
            "idle_rss": Figure("idle daemon, RSS", "MB"),
            "idle_pss": Figure("idle daemon, PSS", "MB"),
            "idle_all_pss": Figure("idle with its children, PSS", "MB"),
            "load_daemon": Figure("load, daemon", "MB"),
            "load_worker": Figure("load, worker", "MB"),
        },
        _memory,
    ),
    latency_probe(1),
    latency_probe(100),
    Probe(
        "journal",
        "chunks of 1 MB through ingestd's journal (appended, sealed, settled, deleted) beside a "
        "loop of write and fdatasync on the same disk",
        {
            "journal": Figure("journal", "MB/s"),
            "plain": Figure("plain loop", "MB/s"),
            "share": Figure("journal ÷ plain loop", "", 2),
        },
        _journal,
    ),
)
