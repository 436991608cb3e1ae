"""What the journal reaches of what the disk does: `python -m benchmarks.journal FOLDER SECONDS`.

* The disk: the plainest durable program there is, one loop that appends a chunk of 1 MB to a file
  and calls fdatasync, over and over.
* The journal: ingestd's own class, without the server in front of it. Chunks of the same size and
  content go through their whole life in it: appended, sealed into a batch, settled, deleted, so
  that the file stays bounded, checkpoints are paid for, and the rate could go on for ever. As in
  the daemon several appends wait for a commit at once, because many clients do.

A chunk counts when its append is durable, and the journal's time goes on until it is closed, so
that nothing is left to do. Both take turns, so that a disk that changes its speed changes both.
Prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.loop import loop_factory
from benchmarks.records import records
from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.record import Layout, Records, Span
from ingestd.journal.interface import Chunk, Cursor, Seal, Sealed, Settle
from ingestd.journal.sqlite.journal import SqliteJournal

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK_BYTES = 1_000_000
IN_FLIGHT = 16
"""Chunks that wait for their commit or for their settlement at once."""
FILE_BYTES_MAX = 512 << 20
"""The plain loop begins its file again after so much: the disk is somebody's."""
TURNS = 3
JOURNAL_BYTES_MAX = 8 << 30
"""The default of `journal.bytes_max`."""


class Done(NamedTuple):
    """What went to the disk."""

    bytes: int
    seconds: float


def payload() -> Records:
    """Records of this benchmark, just short of a chunk's size."""
    lines, size = [], 0
    for line in records():
        if size + len(line) > CHUNK_BYTES:
            break
        lines.append(line)
        size += len(line)
    return Records(Layout.LINES, len(lines), b"".join(lines))


def plain_loop(path: Path, chunk: bytes, seconds: float) -> Done:
    """Appends and syncs for some seconds."""
    written, size = 0, 0
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    began = time.perf_counter()
    try:
        while time.perf_counter() < began + seconds:
            if size >= FILE_BYTES_MAX:
                os.ftruncate(descriptor, 0)
                size = 0
            count = os.write(descriptor, chunk)
            os.fdatasync(descriptor)
            size += count
            written += count
        return Done(written, time.perf_counter() - began)
    finally:
        os.close(descriptor)
        path.unlink()


async def journal_loop(path: Path, chunk: Records, seconds: float, numbers: Iterator[int]) -> Done:
    """Appends, seals and settles for some seconds."""
    arrived: asyncio.Queue[Chunk] = asyncio.Queue()
    journal = SqliteJournal(
        path, bytes_max=JOURNAL_BYTES_MAX, clock=SystemClock(), on_commit=lambda *_: None
    )
    await journal.open(arrived.put_nowait)
    began = time.perf_counter()
    written = 0

    async def append() -> None:
        """Appends, and processes to the end as many chunks as are there by then.

        Not necessarily its own: one append may become several chunks, or share one.
        """
        nonlocal written
        while time.perf_counter() < began + seconds:
            await journal.append(Append(chunk))
            written += len(chunk.payload)
            while not arrived.empty():
                await _process(journal, arrived.get_nowait(), next(numbers))

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(IN_FLIGHT):
                group.create_task(append(), name=f"client {number}")
    finally:
        closed = await journal.close()
    if not closed.gone or closed.counted or closed.ledger.pending:
        raise RuntimeError(f"the journal did not get to its end: {closed}")
    return Done(written, time.perf_counter() - began)


async def _process(journal: SqliteJournal, chunk: Chunk, number: int) -> None:
    """A batch of the whole chunk: sealed, processed, settled."""
    count, size = chunk.records.count, len(chunk.records.payload)
    batch = Sealed(number, (Span(chunk.id, 0, count),), count, accepted_at=chunk.accepted_at)
    sealed = journal.write(Seal(batch, Cursor(chunk.id + 1, 0)))
    settled = journal.write(Settle(number, count, (), (), (chunk.id,), size))
    await asyncio.gather(sealed, settled)


def measure(folder: Path, seconds: float) -> Iterator[tuple[str, Done]]:
    """The disk and the journal in turns, each for so many seconds in all."""
    chunk = payload()
    numbers = itertools.count(1)
    turn = seconds / TURNS
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        for _ in range(TURNS):
            yield "plain", plain_loop(folder / "plain", chunk.payload, turn)
            loop = journal_loop(folder / "journal.db", chunk, turn, numbers)
            yield "journal", runner.run(loop)


if __name__ == "__main__":
    totals = {"plain": Done(0, 0.0), "journal": Done(0, 0.0)}
    for name, done in measure(Path(sys.argv[1]), float(sys.argv[2])):
        both = totals[name]
        totals[name] = Done(both.bytes + done.bytes, both.seconds + done.seconds)
    print(json.dumps({name: done.bytes / done.seconds for name, done in totals.items()}))
