"""What happens at the bounds: who is turned away, what it is told, and that it goes on after."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sqlite3
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd import Batch
from ingestd.admin.status import status_of
from ingestd.base.append import Append
from ingestd.base.errors import Overloaded
from ingestd.base.rate import LONGEST, SHORTEST, STALLED, Rate, wait_for_room
from ingestd.base.record import Layout, Records, Span
from ingestd.execution import key_order
from ingestd.http.settings import HttpSettings
from ingestd.journal.disk_space import CHECK_SECONDS, DiskSpaceGuard
from ingestd.journal.interface import Cursor, Seal, Sealed, Settle
from ingestd.journal.sqlite.journal import SqliteJournal
from ingestd.sources.http.source import HttpSource
from ingestd.sources.stdin import StdinSettings
from ingestd.sources.stdin.source import StdinSource
from tests.pipeline import recording
from tests.pipeline.test_pipeline import drained, numbers, until
from tests.sources.source_tools import Client, MemoryIntake, ask, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

HANDLER = "tests.pipeline.recording:"


class HandClock:
    """Time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> float:
        return self.at

    monotonic = now


# -- how long to wait ----------------------------------------------------------------------------


@given(
    st.floats(0, 1e15), st.floats(0, 1e15), st.floats(0, 1e12), st.floats(0, 1, exclude_max=True)
)
def test_a_wait_is_always_within_its_bounds(used, bound, rate, random) -> None:
    assert SHORTEST <= wait_for_room(used, bound, rate, lambda: random) <= LONGEST


def test_a_wait_is_what_the_rate_says() -> None:
    assert wait_for_room(1000, 1000, 10.0, lambda: 0.5) == pytest.approx(10.0)  # 100 too much
    assert wait_for_room(1000, 1000, 10.0, lambda: 0.0) == pytest.approx(7.5)
    assert wait_for_room(1000, 1000, 0.0, lambda: 0.5) == STALLED
    assert wait_for_room(0, 1000, 0.0, lambda: 0.5) == SHORTEST


@given(st.lists(st.tuples(st.floats(0.001, 60), st.floats(0, 1e9)), min_size=1))
def test_a_rate_is_never_negative_and_fades(steps) -> None:
    rate, now = Rate(0.0), 0.0
    for seconds, amount in steps:
        now += seconds
        rate.add(amount, now)
        assert 0 <= rate.per_second(now) < math.inf
    assert rate.per_second(now + 10_000) == pytest.approx(0.0, abs=1e-6)


def test_a_steady_rate_is_measured_from_the_start_on() -> None:
    rate = Rate(0.0)
    for second in range(1, 100):
        rate.add(500.0, float(second))
        assert rate.per_second(float(second)) == pytest.approx(500.0, rel=0.06)


# -- the journal's bound and its disk ------------------------------------------------------------


@contextlib.asynccontextmanager
async def journal_at(folder: Path, **options: Any) -> AsyncIterator[SqliteJournal]:
    options.setdefault("bytes_max", 1 << 30)
    options.setdefault("clock", HandClock())
    journal = SqliteJournal(folder / "journal.db", on_commit=lambda *_: None, **options)
    await journal.open(lambda _: None)
    try:
        yield journal
    finally:
        await journal.close()


def big(size: int) -> Records:
    return Records(Layout.LINES, 1, b"x" * (size - 1) + b"\n")


async def settle(journal: SqliteJournal, number: int, size: int) -> None:
    await journal.write(Seal(Sealed(number, (Span(number, 0, 1),), 1), Cursor(number + 1, 0)))
    await journal.write(Settle(number, 1, [], [], [number], size))


async def test_a_full_journal_says_when_there_will_be_room(tmp_path) -> None:
    async with journal_at(tmp_path, bytes_max=50_000) as journal:
        clock = journal._clock
        for _ in range(50):
            await journal.append(Append(big(1000)))
        with pytest.raises(Overloaded) as refused:
            journal.append(Append(big(1000)))
        assert 0.75 * STALLED <= refused.value.retry_after <= 1.25 * STALLED
        for number in range(1, 31):  # 1,000 bytes in 2 seconds go out, and as many come in
            clock.at += 2.0
            await settle(journal, number, 1000)
            await journal.append(Append(big(1000)))
        with pytest.raises(Overloaded) as refused:
            journal.append(Append(big(1000)))
        # Down to 45,000 it is 6,000 bytes: 12 s, with 25 % of jitter and what a rate fluctuates.
        assert 8 <= refused.value.retry_after <= 16
        clock.at += 3600.0
        with pytest.raises(Overloaded) as refused:
            journal.append(Append(big(1000)))
        assert 0.75 * STALLED <= refused.value.retry_after <= 1.25 * STALLED


def test_free_space_is_asked_rarely_and_free_pages_count_for_half(tmp_path) -> None:
    asked: list[Path] = []
    free = 1000

    def ask_(folder: Path) -> int:
        asked.append(folder)
        return free

    space = DiskSpaceGuard(tmp_path, 600, ask=ask_)
    assert not any(space.low(1.0 + n / 1000) for n in range(100))
    assert asked == [tmp_path]
    free = 400
    assert not space.low(1.0)
    assert space.low(1.0 + CHECK_SECONDS)
    space.reusable = 200
    assert not space.low(1.0 + CHECK_SECONDS)
    free, space.reusable = 299, 10**9
    assert space.low(1.0 + 2 * CHECK_SECONDS)


async def test_a_disk_that_runs_full_refuses_and_goes_on_draining(tmp_path) -> None:
    free = 1 << 30
    clock = HandClock()
    space = DiskSpaceGuard(tmp_path, 1 << 20, ask=lambda _: free)
    async with journal_at(tmp_path, space=space, clock=clock) as journal:
        await journal.append(Append(big(1000)))
        free, clock.at = 1000, clock.at + 1
        with pytest.raises(
            Overloaded, match=r"the disk of the journal \(.*journal.free_min"
        ) as refused:
            journal.append(Append(big(1000)))
        assert 0.75 * STALLED <= refused.value.retry_after <= 1.25 * STALLED
        await settle(journal, 1, 1000)
        assert journal.ledger.processed == 1
        free, clock.at = 1 << 30, clock.at + 1
        await journal.append(Append(big(1000)))


async def test_with_too_little_free_space_requests_get_503_and_status_says_so(start) -> None:
    pipeline = await start("tests.pipeline.recording_typed:store", journal={"free_min": 1 << 49})
    source = HttpSource(
        HttpSettings(listen="127.0.0.1:0"), {"default": pipeline}, default="default"
    )
    await source.start()
    try:
        reply = await ask(source, b"1")
    finally:
        await source.close()
    assert (reply.status, reply.slug) == (503, "overloaded")
    assert "the disk of the journal" in reply.json["detail"]
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    status = status_of(pipeline)
    assert "journal.free_min" in status.bounds_near
    assert status.bounds_used["journal.free_min"] > 1
    assert status.refusing == {"journal.bytes_max": False, "journal.free_min": True}
    assert status.appends_refused["journal.bytes_max"] == 0
    assert status.appends_refused["journal.free_min"] >= 1
    assert status.journal.disk_free_min == 1 << 49
    assert pipeline.journal.ledger.accepted == 0


# -- a disk that is full -------------------------------------------------------------------------


@contextlib.contextmanager
def no_more_pages(journal: SqliteJournal) -> Any:
    store = journal._store
    (pages,) = store.connection.execute("PRAGMA page_count").fetchone()
    write = store.write

    def bounded(*commit: Any, **more: Any) -> Any:
        # On the thread that commits: a statement of another one may lock the tables for it.
        store.connection.execute(f"PRAGMA max_page_count={pages}").fetchone()
        return write(*commit, **more)

    store.write = bounded  # type: ignore[method-assign]
    yield
    pages = 1_000_000


async def test_a_commit_without_space_is_503_and_afterwards_it_goes_on(start, tmp_path) -> None:
    pipeline = await start(HANDLER + "Note", options={"folder": str(tmp_path)})
    source = HttpSource(
        HttpSettings(listen="127.0.0.1:0"), {"default": pipeline}, default="default"
    )
    await source.start()
    body = b"\n".join([b'"%b"' % (b"x" * 9000)] * 100)
    try:
        with no_more_pages(pipeline.journal):
            reply = await ask(source, body, Idempotency_Key="k")
            assert (reply.status, reply.slug) == (503, "overloaded")
            assert pipeline.journal.ledger.accepted == 0
        reply = await ask(source, body, Idempotency_Key="k")
        assert reply.status == 202
        assert "idempotent-replayed" not in reply.headers
    finally:
        await source.close()
    assert (await drained(pipeline)).ledger.processed == 100


async def test_appends_do_not_take_the_turn_of_what_makes_room(tmp_path) -> None:
    """While every commit with an append in it fails, a settlement gets through."""
    async with journal_at(tmp_path) as journal:
        await journal.append(Append(big(100_000)))
        await journal.write(Seal(Sealed(1, (Span(1, 0, 1),), 1), Cursor(2, 0)))
        with no_more_pages(journal):
            refused = 0
            settled = journal.write(Settle(1, 1, [], [], [1], 100_000))
            async with asyncio.timeout(60):
                while not settled.done():
                    tries = [journal.append(Append(big(2_000_000))) for _ in range(3)]
                    answers = await asyncio.gather(*tries, return_exceptions=True)
                    assert all(isinstance(one, Overloaded) for one in answers)
                    refused += 3
            assert settled.exception() is None
            assert refused
        assert journal.bytes == 0
        await journal.append(Append(big(1000)))
        assert journal.ledger.accepted == 2


async def test_what_waits_for_space_keeps_its_order(tmp_path) -> None:
    """Seals that were tried again come before those that came later, so the cursor is right."""
    async with journal_at(tmp_path) as journal:
        await journal.append(Append(numbers(0, 30)))
        wide = tuple(Span(1, 0, 1) for _ in range(20_000))  # needs pages that are not there
        with no_more_pages(journal):
            futures = [journal.write(Seal(Sealed(1, wide, 10), Cursor(1, 10)))]
            await asyncio.wait(futures, timeout=0.3)
            futures.append(journal.write(Seal(Sealed(2, (Span(1, 10, 10),), 10), Cursor(1, 20))))
            await asyncio.wait(futures, timeout=0.3)
            assert not any(future.done() for future in futures)
            with pytest.raises(Overloaded):  # at once, not when there is space again
                await asyncio.wait_for(journal.append(Append(numbers(0, 1))), 60)
            futures.append(journal.write(Seal(Sealed(3, (Span(1, 20, 5),), 5), Cursor(1, 25))))
        await asyncio.wait_for(asyncio.gather(*futures), 60)
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.db")) as db:
        assert db.execute("SELECT cursor_chunk, cursor_record FROM meta").fetchone() == (1, 25)
        rows = db.execute("SELECT number FROM batches ORDER BY number").fetchall()
    assert rows == [(1,), (2,), (3,)]


# -- clients -------------------------------------------------------------------------------------

ONE, OTHER = "127.0.0.1", "127.0.0.2"


class Crowd:
    """Clients at different addresses, each request on a connection of its own."""

    def __init__(self, source: HttpSource, intake: MemoryIntake) -> None:
        self.port = int(source.addresses[0].rpartition(":")[2])
        self.room = source._handler.ingestion.admission
        self.intake = intake
        self.writers: list[asyncio.StreamWriter] = []

    async def send(self, address: str, body: bytes = b"1") -> Client:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, local_addr=(address, 0)
        )
        self.writers.append(writer)
        client = Client(reader, writer)
        client.post(body)
        return client

    async def hold(self, address: str, body: bytes = b"1") -> Client:
        """A request that is in progress when this returns."""
        before = self.room.requests
        client = await self.send(address, body)
        await until(lambda: self.room.requests > before)
        return client

    async def refused(self, address: str, body: bytes = b"1") -> tuple[int, str]:
        reply = await (await self.send(address, body)).reply()
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        return reply.status, reply.slug

    async def close(self) -> None:
        self.intake.gate.set()
        for writer in self.writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@contextlib.asynccontextmanager
async def crowd(**settings: Any) -> AsyncIterator[Crowd]:
    intake = MemoryIntake()
    intake.gate.clear()
    async with serving(intake, **settings) as source:
        clients = Crowd(source, intake)
        try:
            yield clients
        finally:
            await clients.close()


async def test_requests_in_progress_are_bounded_and_one_client_alone_may_have_them_all() -> None:
    async with crowd(requests_max=4) as clients:
        held = [await clients.hold(ONE) for _ in range(4)]
        assert await clients.refused(ONE) == (503, "busy")
        clients.intake.gate.set()
        assert [(await one.reply()).status for one in held] == [202] * 4
        assert clients.room.requests == 0
        assert not clients.room._clients


async def test_who_was_turned_away_finds_room_when_it_comes_again() -> None:
    async with crowd(requests_max=4) as clients:
        held = [await clients.hold(ONE) for _ in range(4)]
        assert await clients.refused(OTHER) == (503, "busy")
        assert await clients.refused(ONE) == (429, "over-share")
        clients.intake.gate.set()
        assert [(await one.reply()).status for one in held] == [202] * 4
        clients.intake.gate.clear()
        held = [await clients.hold(ONE) for _ in range(2)]
        assert await clients.refused(ONE) == (429, "over-share")  # though nobody else is here
        held += [await clients.hold(OTHER) for _ in range(2)]
        assert await clients.refused(OTHER) == (429, "over-share")
        clients.intake.gate.set()
        assert [(await one.reply()).status for one in held] == [202] * 4


async def test_a_share_of_bytes() -> None:
    body = b'"%b"' % (b"x" * 298)
    async with crowd(inflight_bytes_max=1000) as clients:
        held = [await clients.hold(ONE, body) for _ in range(3)]  # alone: 900 of 1,000
        assert await clients.refused(ONE, body) == (503, "busy")
        held.append(await clients.hold(OTHER, b"1"))
        assert await clients.refused(ONE, b"1") == (429, "over-share")
        clients.intake.gate.set()
        assert [(await one.reply()).status for one in held] == [202] * 4
        clients.intake.gate.clear()
        held = [await clients.hold(OTHER, b"1")]
        # Its only request is never refused for its share.
        held.append(await clients.hold(ONE, b'"%b"' % (b"x" * 698)))
        assert await clients.refused(ONE, b"1") == (429, "over-share")
        clients.intake.gate.set()
        assert [(await one.reply()).status for one in held] == [202] * 2
        assert clients.room.bytes == 0


async def test_a_share_of_one_is_no_share() -> None:
    async with crowd(requests_max=3, client_share=1) as clients:
        await clients.hold(OTHER)
        await clients.hold(ONE)
        await clients.hold(ONE)
        assert await clients.refused(ONE) == (503, "busy")


# -- standard input ------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_pipe_is_not_read_while_the_journal_is_full(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "Gate",
        options={"folder": str(tmp_path)},
        journal={"bytes_max": "2MiB"},
        queue={"bytes_max": "64KiB"},
        batch={"bytes_max": "64KiB", "records_max": 1000},
        executor={"workers": 1},
    )
    lines = [b'"%06d %b"' % (n, b"x" * 990) for n in range(8000)]
    data = b"".join(line + b"\n" for line in lines)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    source = StdinSource(StdinSettings(inflight_bytes_max="64KiB"), pipeline, fd=reading)
    await source.start()
    try:
        sent = 0
        # It blocks: what fits is the journal, what is in flight, and the pipe; 8 MB do not.
        async with asyncio.timeout(60):
            while not (source._refused and source._inflight > 60_000):
                with contextlib.suppress(BlockingIOError):
                    sent += os.write(writing, data[sent : sent + 65536])
                await asyncio.sleep(0.002)
        with contextlib.suppress(BlockingIOError):
            while sent < len(data):
                sent += os.write(writing, data[sent : sent + 65536])
        assert sent < len(data)
        with pytest.raises(BlockingIOError):
            os.write(writing, b"\n" * 65536)
        (tmp_path / "open").touch()
        os.set_blocking(writing, True)

        def write_the_rest() -> None:
            left = memoryview(data)[sent:]
            while left:
                left = left[os.write(writing, left) :]
            os.close(writing)

        await asyncio.wait_for(asyncio.to_thread(write_the_rest), 60)
        await asyncio.wait_for(source.wait_finished(), 60)
    finally:
        await source.close()
        os.close(reading)
    report = await drained(pipeline)
    assert report.ledger.accepted == report.ledger.processed == len(lines)
    got = [record for call in recording.calls(tmp_path) for record in call["records"]]
    assert got == [line.strip(b'"').decode() for line in lines]  # in their order


def test_what_waits_takes_as_many_bytes_after_a_restart_as_before(ingestd_harness) -> None:
    def store(batch: Batch[dict[str, Any]]) -> None:
        for i, record in enumerate(batch):
            if record["n"] == 0:
                batch.retry(i, after=3600)

    bounds = {"batch.records_max": 100, "retry.waiting_bytes_max": "1MiB"}
    harness = ingestd_harness(store, **bounds)
    for _ in range(20):  # 100 kB, of which 1 kB waits
        harness.send([{"n": n, "text": "x" * 1000} for n in range(100)])
        harness.run(10)
    harness.restart()
    harness.send([{"n": 1}])
    harness.run(60)
    assert harness.pending == 20


async def test_tries_wait_for_the_commit_of_the_one_before(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "NotNow",
        batch={"age_max": "1ms"},
        executor={"kind": "thread"},
        options={"folder": str(tmp_path)},
    )
    await pipeline.accept(Append(numbers(0, 2)))
    await until(lambda: len(recording.calls(tmp_path)) > 2)
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")  # as a disk that hangs
        before = len(recording.calls(tmp_path))
        await asyncio.sleep(0.3)
        assert len(recording.calls(tmp_path)) <= before + 2
        db.execute("ROLLBACK")
    await until(lambda: len(recording.calls(tmp_path)) > before + 4)


@pytest.mark.parametrize("key", ["", "/key"])
async def test_a_drain_does_not_wait_where_too_much_waits_for_a_retry(
    start, tmp_path, monkeypatch, key
) -> None:
    monkeypatch.setattr(key_order, "LOOK_AHEAD", 4)
    pipeline = await start(
        HANDLER + "InAnHour",
        batch={"records_max": 2, "age_max": "1ms", "key": key},
        executor={"kind": "thread", "workers": 1},
        retry={"waiting_records_max": 5 if key else 1},
        options={"folder": str(tmp_path)},
    )
    for _ in range(2):  # the second chunk has no place any more
        await pipeline.accept(Append(Records.lines([b'{"key":1}'] * 400)))
    await until(lambda: recording.calls(tmp_path) and not pipeline.dispatcher.running)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await pipeline.drain(began + 600)
    assert loop.time() - began < 60
    report = await pipeline.close()
    assert report.balanced
    assert report.ledger.pending == 800 - report.ledger.processed > 0
