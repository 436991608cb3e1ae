"""Journals in NATS JetStream, in the process of a test and in daemons."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
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
    """Opens journals on servers, each in a folder of its own."""
    live: list[LogJournal] = []

    async def open_one(cluster: Cluster, name: str, **own: Any) -> LogJournal:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        table = {"servers": cluster.urls, "name": name, "replicas": len(cluster.servers),
                 "timeout": "1s", "lease": "1s", **own}  # fmt: skip
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
    async with asyncio.timeout(40):
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
        out.write(json.dumps([batch.id, list(batch)]) + "\\n")
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


def batches(out: Path) -> dict[str, list[int]]:
    """What handlers got, by batch id; one id never means two things."""
    found: dict[str, list[int]] = {}
    for line in out.read_text().splitlines() if out.exists() else ():
        batch, numbers = json.loads(line)
        assert found.setdefault(batch, numbers) == numbers
    return found


async def refused(journal: LogJournal) -> None:
    """Waits until records are refused; that it is at once, and with a time to come again."""
    async with asyncio.timeout(20):
        while not journal._log.refusal:
            await asyncio.sleep(0.01)
    loop = asyncio.get_running_loop()
    before = loop.time()
    with pytest.raises(Overloaded) as one:
        journal.append(Append(lines(b"refused")))
    assert one.value.retry_after > 0
    assert loop.time() - before < 0.1
