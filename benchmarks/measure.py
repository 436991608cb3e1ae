"""One measurement: one peer in one scenario, started for it and ended after it.

A measurement counts only if everything that was accepted was also processed in the end.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.load import send
from benchmarks.loop import RECORDS_MAX
from benchmarks.processes import Failed, finish, last_words, running
from benchmarks.records import write_bodies

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.peers import Counts, Peer, Service

START_SECONDS = 30.0
"""A peer takes records after this, or has failed."""
DRAIN_SECONDS = 180.0
"""A peer has processed what it accepted after this, or has failed."""
READ_SECONDS = 900.0
"""A command has read its standard input after this, or has failed."""
ASK_AGAIN_SECONDS = 0.02
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
    bodies = write_bodies(folder, scenario.records)
    service = peer.service(folder / "peer", plan.age)
    with running(service.command, folder / "peer") as child:
        _wait_ready(service, child, folder / "peer")
        warm_up = min(WARM_UP_SECONDS, plan.seconds)
        warm = send(plan.tool, service.port, bodies, warm_up, folder / "load")
        before = _wait_processed(peer, service, folder / "peer", open_batch=True)

        load = send(plan.tool, service.port, bodies, plan.seconds, folder / "load")
        load_ended = time.perf_counter()
        after = _wait_processed(peer, service, folder / "peer", open_batch=True)
        drain_seconds = time.perf_counter() - load_ended

        last = _wait_processed(peer, service, folder / "peer", open_batch=False)
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


def _wait_ready(service: Service, child: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise Failed(f"did not start: {last_words(folder)}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            if _get(service, service.ready)[0] == http.HTTPStatus.OK:
                return
        time.sleep(ASK_AGAIN_SECONDS)
    raise Failed(f"not ready after {START_SECONDS:.0f} s: {last_words(folder)}")


def _wait_processed(peer: Peer, service: Service, folder: Path, *, open_batch: bool) -> Counts:
    """Asks until everything that was accepted was processed.

    Args:
        peer: who.
        service: where.
        folder: in which it runs.
        open_batch: less than one batch may be left: it is not full and waits to be old enough,
            at every peer, and that wait says nothing about speed.
    """
    left = RECORDS_MAX - 1 if open_batch else 0
    deadline = time.monotonic() + DRAIN_SECONDS
    while time.monotonic() < deadline:
        try:
            counts = peer.counts(json.loads(_get(service, service.status)[1]))
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            raise Failed(f"stopped answering: {error!r}; {last_words(folder)}") from error
        if counts.accepted - counts.processed - counts.dead <= left:
            return counts
        time.sleep(ASK_AGAIN_SECONDS)
    raise Failed(f"backlog not processed after {DRAIN_SECONDS:.0f} s: {counts}")


def _get(service: Service, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", service.status_port, timeout=60.0)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()


# -- stdin -------------------------------------------------------------------------------------


def _measure_stdin(peer: Peer, scenario: Scenario, plan: Plan, folder: Path) -> Run:
    command = peer.reader(folder, plan.age)
    with _standard_input(plan.input, pipe=scenario.pipe) as stdin:
        began = time.perf_counter()
        with running(command, folder, stdin) as child:
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
