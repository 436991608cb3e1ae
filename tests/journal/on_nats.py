"""Journals in NATS JetStream, in the process of a test and in daemons."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.errors import Overloaded
from ingestd.base.record import Records
from ingestd.journal.build import build_journal
from ingestd.journal.settings import DeadSettings
from ingestd.pipeline_settings import JournalTables
from tests.daemon.harness import Daemon

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from ingestd.journal.log import LogJournal
    from tests.nats import Cluster


@contextlib.asynccontextmanager
async def opener(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[LogJournal]]]:
    """Opens journals on servers, each in a folder of its own.

    A lease lapses soon: a test waits for those of journals that it has crash. One that needs a
    lease to stay sets a longer one, in a bucket of its own.
    """
    live: list[LogJournal] = []

    async def open_one(cluster: Cluster, name: str, **own: Any) -> LogJournal:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        table = {"servers": cluster.urls, "name": name, "replicas": len(cluster.servers),
                 "timeout": "4s", "lease": "1s", **own}  # fmt: skip
        settings = JournalTables(kind="jetstream", jetstream=table)
        journal: Any = build_journal(settings, DeadSettings(), folder=folder, clock=SystemClock())
        journal.recovered = await journal.open(lambda _: None)
        journal.failed.add_done_callback(lambda failed: failed.exception())
        live.append(journal)
        return journal

    yield open_one
    for journal in live:
        if not journal._reader._shutdown:
            await journal.close(asyncio.get_running_loop().time() + 3)


def lines(*records: bytes) -> Records:
    return Records.lines(records)


async def crash(journal: LogJournal) -> None:
    """As after a SIGKILL: nothing of it reaches the servers any more."""
    journal._renewing.cancel()
    await journal._log.close()


async def accept(journal: LogJournal, record: bytes) -> None:
    """As a client that comes again after a 503."""
    async with asyncio.timeout(90):
        while True:
            try:
                await journal.append(Append(lines(record)))
            except Overloaded:
                await asyncio.sleep(0.05)
            else:
                return


async def records(journal: LogJournal) -> list[bytes]:
    """All that is pending."""
    chunks = await journal.read(1, 1 << 30)
    return [item for chunk in chunks for item in chunk.records.items()]


HANDLER = """
import json, time
from ingestd import Batch

def keep(batch: Batch[int]) -> None:
    with open({out!r}, "a") as out:
        out.write("\\n" + json.dumps([batch.id, list(batch)]) + "\\n")
    if {seconds}:
        time.sleep({seconds})
"""


def start(
    folder: Path, cluster: Cluster, out: Path, seconds: float, *more: str, **how: Any
) -> Daemon:
    """A daemon on a machine of its own: nothing is shared but the servers."""
    folder.mkdir()
    (folder / "h.py").write_text(HANDLER.format(out=str(out), seconds=seconds))
    return Daemon(
        "h:keep", "--data-dir", str(folder / "data"), "--batch.records_max", "100",
        "--journal.kind", "jetstream", "--journal.jetstream.name", "shop",
        "--journal.jetstream.servers", ",".join(cluster.urls),
        "--journal.jetstream.replicas", str(len(cluster.servers)),
        "--journal.jetstream.lease", "2s", "--executor.workers", "2", *more, cwd=folder, **how,
    )  # fmt: skip


async def tries(journal: LogJournal, count: int) -> None:
    """Waits until the log has tried in vain to connect, so often more."""
    log: Any = journal._log
    async with asyncio.timeout(60):
        for _ in range(count):
            log._unreached = ""
            while not log._unreached:
                await asyncio.sleep(0.01)


def accepted(daemon: Daemon, body: bytes) -> None:
    """Sends records as a client that comes again after a 503."""
    deadline = time.monotonic() + 90
    while True:
        status, headers, answer = daemon.request("POST", "/v1/records", body)
        if status == 202:
            return
        assert status == 503, (status, answer)
        assert int(headers["retry-after"]) > 0
        assert time.monotonic() < deadline, answer
        time.sleep(0.05)


def takes_nothing(daemon: Daemon) -> None:
    """Waits until a daemon knows that the servers do not answer it."""
    deadline = time.monotonic() + 60
    while daemon.request("GET", "/readyz", admin=True)[0] != 503:
        assert time.monotonic() < deadline, daemon.events[-5:]
        time.sleep(0.02)


def leaves(daemon: Daemon, record: bytes) -> None:
    """Sends a record until a daemon that lost its log has left; it is not accepted."""
    deadline = time.monotonic() + 60
    while daemon.process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):  # it may leave meanwhile
            assert daemon.post(record)[0] >= 500
        assert time.monotonic() < deadline, daemon.events[-5:]
        time.sleep(0.02)
    assert daemon.wait() == 75


def drain(daemon: Daemon) -> None:
    """Ends a daemon, whose numbers have to agree as it leaves."""
    daemon.terminate()
    assert daemon.wait() == 0
    assert daemon.event("drained")["balanced"]


def calls(out: Path) -> list[tuple[str, list[int]]]:
    """Batch and records of each call; not one whose line a kill has cut at the end of a page."""
    lines = out.read_text().splitlines() if out.exists() else []
    return [tuple(json.loads(line)) for line in lines if line.endswith("]]")]


def batches(out: Path) -> dict[str, list[int]]:
    """What handlers got, by batch id; one id never means two things."""
    found: dict[str, list[int]] = {}
    for batch, numbers in calls(out):
        assert found.setdefault(batch, numbers) == numbers
    return found


async def refused(journal: LogJournal, why: str = "") -> None:
    """Waits until records are refused; that it is at once, and with a time to come again.

    Args:
        journal: the one that refuses.
        why: is in the reason.
    """
    async with asyncio.timeout(60):
        while not (refusal := journal._log.refusal) or why not in refusal:
            await asyncio.sleep(0.01)
    loop = asyncio.get_running_loop()
    before = loop.time()
    with pytest.raises(Overloaded) as one:
        journal.append(Append(lines(b"refused")))  # by the call: there is nothing to wait for
    assert one.value.retry_after > 0
    assert loop.time() - before < 10
