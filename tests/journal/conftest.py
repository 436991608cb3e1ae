from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ingestd.base.clock import SystemClock
from ingestd.journal.sqlite.journal import SqliteJournal
from tests.journal.on_nats import opener
from tests.nats import running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from ingestd.journal.interface import Chunk, Recovered
    from ingestd.journal.log import LogJournal
    from tests.nats import Cluster


class Opened:
    """A journal that is open, with what it announced."""

    def __init__(self, journal: SqliteJournal, recovered: Recovered, chunks: list[Chunk]) -> None:
        self.journal = journal
        self.recovered = recovered
        self.chunks = chunks


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Opened]]]:
    """Opens the journal of this test; what is still open at the end is closed."""
    live: list[SqliteJournal] = []

    async def open_(**options: int) -> Opened:
        journal = SqliteJournal(
            tmp_path / "journal.db",
            bytes_max=options.get("bytes_max", 1 << 30),
            clock=SystemClock(),
            on_commit=lambda *_: None,
        )
        chunks: list[Chunk] = []
        recovered = await journal.open(chunks.append)
        live.append(journal)
        return Opened(journal, recovered, chunks)

    yield open_
    for journal in live:
        if journal._reader._shutdown is False:
            await journal.close()


@pytest.fixture
async def open_(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[LogJournal]]]:
    """Opens a journal on servers of NATS, each in a folder of its own."""
    async with opener(tmp_path) as open_one:
        yield open_one


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A server of NATS for the tests of a file."""
    with running(tmp_path_factory.mktemp("nats")) as cluster:
        yield cluster
