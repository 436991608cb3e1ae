"""One measurement: one peer in one scenario, started for it and ended after it.

A measurement counts only if everything that was accepted was also processed in the end.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.load import send
from benchmarks.processes import Failed, finish, running
from benchmarks.service import serving, wait_processed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.peers.base import Counts, Peer

READ_SECONDS = 900.0
"""A command has read its standard input after this, or has failed."""
WARM_UP_SECONDS = 1.0


@dataclass(frozen=True)
class Scenario:
    """What is sent, and how.

    Attributes:
        name: in the table.
        source: `http` or `stdin`.
        records: of one body; 0 where there are none.
        pipe: standard input is a pipe, not a file.
    """

    name: str
    source: str
    records: int = 0
    pipe: bool = False


SCENARIOS = (
    Scenario("http-1", "http", records=1),
    Scenario("http-100", "http", records=100),
    Scenario("http-1000", "http", records=1000),
    Scenario("stdin-file", "stdin"),
    Scenario("stdin-pipe", "stdin", pipe=True),
)


@dataclass(frozen=True)
class Plan:
    """How everything is measured.

    Attributes:
        rounds: how often.
        seconds: of load a run (http).
        lines: a run (stdin).
        age: seconds after which a batch goes as it is, at every peer.
        tool: what makes the load: `wrk` or `python`.
        input: the file with the lines.
    """

    rounds: int
    seconds: float
    lines: int
    age: float
    tool: str
    input: Path


@dataclass(frozen=True)
class Run:
    """What was measured.

    Attributes:
        accepted: records a second that the client got a yes for, while the load lasted.
        processed: records a second that the handler was done with, until no backlog was left.
        seconds: of load; of the whole command (stdin).
        drain_seconds: from the load's end until no backlog was left.
        refused: requests that got another answer than 2xx.
    """

    accepted: float
    processed: float
    seconds: float
    drain_seconds: float = 0.0
    refused: int = 0

    @property
    def rate(self) -> float:
        """Records a second, the lower of both: nobody may hide a backlog."""
        return min(self.accepted, self.processed)


def measure(peer: Peer, scenario: Scenario, plan: Plan, folder: Path) -> Run:
    """Starts a peer, measures it, ends it.

    Args:
        peer: who.
        scenario: what.
        plan: how.
        folder: an empty one, on the disk that is to be measured.

    Raises:
        Failed: this run does not count.
    """
    (folder / "peer").mkdir()
    (folder / "load").mkdir()
    if scenario.source == "http":
        return _measure_http(peer, scenario, plan, folder)
    return _measure_stdin(peer, scenario, plan, folder / "peer")


# -- http --------------------------------------------------------------------------------------


def _measure_http(peer: Peer, scenario: Scenario, plan: Plan, folder: Path) -> Run:
    bodies = peer.bodies(folder, scenario.records)
    service = peer.service(folder / "peer", plan.age)
    with serving(service):
        warm_up = min(WARM_UP_SECONDS, plan.seconds)
        warm = send(plan.tool, service, bodies, warm_up, folder / "load")
        before = wait_processed(peer, service, open_batch=True)

        load = send(plan.tool, service, bodies, plan.seconds, folder / "load")
        load_ended = time.perf_counter()
        after = wait_processed(peer, service, open_batch=True)
        drain_seconds = time.perf_counter() - load_ended

        last = wait_processed(peer, service, open_batch=False)
    accepted = (load.answers - load.refused) * scenario.records
    check(last, accepted + (warm.answers - warm.refused) * scenario.records)
    if load.broken:
        raise Failed(f"{load.broken} connections broke")
    return Run(
        accepted=accepted / load.seconds,
        processed=(after.processed - before.processed) / (load.seconds + drain_seconds),
        seconds=load.seconds,
        drain_seconds=drain_seconds,
        refused=load.refused,
    )


# -- stdin -------------------------------------------------------------------------------------


def _measure_stdin(peer: Peer, scenario: Scenario, plan: Plan, folder: Path) -> Run:
    command = peer.reader(folder, plan.age)
    with _standard_input(plan.input, pipe=scenario.pipe) as stdin:
        began = time.perf_counter()
        with running(command.argv, folder, stdin, command.environment) as child:
            finish(child, folder, READ_SECONDS)
        seconds = time.perf_counter() - began
    check(peer.counted(folder), plan.lines)
    return Run(plan.lines / seconds, plan.lines / seconds, seconds)


@contextlib.contextmanager
def _standard_input(path: Path, *, pipe: bool) -> Iterator[int]:
    """`< path`, or `cat path |`."""
    if not pipe:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
        return
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        try:
            yield cat.stdout.fileno()
        finally:
            cat.kill()


def check(counts: Counts, at_least: int) -> None:
    """Everything was processed that a client got a yes for.

    Args:
        counts: what the peer says, of its whole life.
        at_least: records that a client got a yes for; more may have been on their way.

    Raises:
        Failed: it was not.
    """
    if counts.dead:
        raise Failed(f"{counts.dead} records given up")
    if counts.processed != counts.accepted or counts.accepted < at_least:
        raise Failed(f"{at_least} records sent and accepted, but {counts}")
