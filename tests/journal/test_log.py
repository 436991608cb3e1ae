"""The journal over a replicated log against its invariants (docs/ENGINE.md)."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.append import Append, HeldIds, IdempotencyClaim, SourceOffset
from ingestd.base.clock import SystemClock
from ingestd.base.errors import (
    JournalFailed,
    KeyInFlight,
    KeyReused,
    KeyTaken,
    NeverFits,
    Overloaded,
)
from ingestd.base.record import InvalidRecord, Records, Span
from ingestd.journal import log as log_journal
from ingestd.journal.dead_letters import DeadLetter, LetterFilter
from ingestd.journal.disk_space import DiskSpaceGuard
from ingestd.journal.idempotency import KeyRule
from ingestd.journal.interface import (
    Cursor,
    Failing,
    Ledger,
    Place,
    Postpone,
    Seal,
    Sealed,
    Settle,
)
from ingestd.journal.log import LogJournal
from ingestd.journal.log.cache import CacheFile
from ingestd.journal.log.interface import (
    LogFenced,
    LogKey,
    LogMessage,
    LogUnreachable,
    Snapshot,
)
from ingestd.journal.log.messages import DRAINED, RETIRED, end_entry, ending, packed, pieces
from ingestd.journal.sqlite import writer
from tests.daemon.harness import ROOT
from tests.faults.tools import mounted, needs
from tests.journal.memory_log import DOWN, FULL, LATE, LOST, Engine, MemoryLog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from ingestd.journal.interface import Chunk


class Life:
    """A daemon's journal, open on an engine."""

    def __init__(self, engine: Engine, folder: Path, **options: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.log = MemoryLog(engine)
        self.journal = LogJournal(
            self.log, folder / "cache.db", bytes_max=1 << 30,
            on_commit=lambda *_: None, ttl=0.05, **{"clock": SystemClock(), **options},
        )  # fmt: skip
        self.chunks: list[Chunk] = []

    async def open(self) -> Life:
        self.recovered = await self.journal.open(self.chunks.append)
        self.recovered.failed.add_done_callback(lambda failed: failed.exception())
        return self

    async def close(self) -> None:
        if hasattr(self, "recovered") and not self.journal._reader._shutdown:
            await self.journal.close(asyncio.get_running_loop().time() + 20)


@pytest.fixture
async def live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Life]]:
    """Begins lives, each in a folder of its own, as on machines of their own."""
    monkeypatch.setattr(log_journal, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(writer, "FULL_PAUSE", 0.01)
    lives: list[Life] = []

    def begin(engine: Engine, **options: Any) -> Life:
        lives.append(Life(engine, tmp_path / f"life{len(lives)}", **options))
        return lives[-1]

    yield begin
    for one in lives:
        one.log.engine.down = False
        await one.close()


def lines(*records: bytes) -> Records:
    return Records.lines(records)


def settle(batch: int, processed: int, **more: object) -> Settle:
    facts = {"dead": [], "successors": [], "finished": [], "finished_bytes": 0, **more}
    return Settle(batch, processed, **facts)  # type: ignore[arg-type]


def letter(record: str, payload: bytes) -> DeadLetter:
    return DeadLetter(record, "rejected", "no", "", payload, 1, 1.0, 2.0)


def everything(life: Life) -> dict[str, list[tuple[object, ...]]]:
    """All rows of a cache but marks."""
    db = life.journal._store.connection
    tables = ("chunks", "batches", "failing", "keys", "bookmarks", "meta", "identity",
              "dead_totals", "invalid")  # fmt: skip
    found = {table: db.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in tables}
    found["letters"] = sorted(
        (one.id, *one.letter)
        for one in life.journal.dead_letters.select(LetterFilter(), whole=True)
    )  # fmt: skip
    found["ids"] = [
        (who, bytes(sorted(ids)))
        for who, ids in db.execute("SELECT principal, ids FROM sender_ids ORDER BY number")
    ]
    return found


async def use_all(life: Life) -> None:
    """Everything that an entry can say."""
    journal = life.journal
    assert journal.idempotency is not None
    claim = await journal.idempotency.begin("token shop K", b"print")
    assert not isinstance(claim, bytes)
    claim.answer = b"{}"
    ids = HeldIds("token shop", frozenset(), frozenset([b"a" * 16, b"b" * 16]), 100)
    bad = [InvalidRecord(1, "malformed", "x", b"{")] * 3
    await journal.append(Append(lines(*[b"%d" % n for n in range(10)]), bad, claim=claim, ids=ids))
    await journal.append(Append(Records.sized([b"x\n" * 100_000]), offset=SourceOffset("f", b"5")))
    await journal.write(Seal(Sealed(1, (Span(1, 0, 4),), 4, accepted_at=5.0), Cursor(1, 4)))
    await journal.write(Seal(Sealed(2, (Span(1, 4, 3),), 3, lineage=(7,)), Cursor(1, 7)))
    await journal.write(Postpone(Sealed(2, (Span(1, 4, 3),), 3, 1, 9e9, 0.0, Failing(1.5, 1))))
    dead = [letter(f"j.1.{n}", b"%d" % n) for n in range(3)]
    await journal.write(settle(1, 0, dead=dead, successors=[Sealed(3, (Span(1, 3, 1),), 1, 1)]))


async def test_another_daemon_finds_everything(live) -> None:
    engine = Engine()
    first = await live(engine).open()
    await use_all(first)
    before, ledger = everything(first), first.journal.ledger
    first.log.gone = True  # as after a SIGKILL: it does nothing any more

    second = await live(engine).open()
    assert everything(second) == before
    assert second.journal.ledger == ledger == Ledger(accepted=11, dead=3, invalid=3)
    assert second.journal.bytes == first.journal.bytes
    assert second.recovered.journal == first.recovered.journal
    assert [batch.number for batch in second.recovered.batches] == [2, 3]
    assert second.recovered.cursor == Cursor(1, 7)
    assert await second.journal.idempotency.begin("token shop K", b"print") == b"{}"
    assert await second.journal.offsets.find("f") == SourceOffset("f", b"5")
    closed = await second.journal.close()
    assert closed.counted == ledger.pending == 8


async def test_dead_letters_are_requeued_and_purged_through_the_log(live) -> None:
    engine = Engine()
    first = await live(engine).open()
    await use_all(first)
    letters, store = CacheFile(first.journal.path).dead_letters, first.journal.dead_letters
    numbers = [one.id for one in letters.select(LetterFilter(), whole=False) if one.letter.record]
    letters.mark(LetterFilter(ids=(numbers[1],)), numbers[-1], lambda _: "")
    assert letters.purge(LetterFilter(ids=(numbers[0],)), numbers[-1]) == 1
    assert await store.poll_marked()
    moved = await store.requeue()
    assert moved.requeued == 1
    await first.journal.append(Append(lines()))
    assert first.journal.ledger == Ledger(accepted=11, dead=2, invalid=3)
    assert first.journal.dead_totals.purged == 1
    before = everything(first)
    first.log.gone = True
    second = await live(engine).open()
    assert everything(second) == before
    (kept,) = [one for one in second.journal.dead_letters.select(LetterFilter(), whole=True)
               if one.letter.record]  # fmt: skip
    assert (kept.id, kept.letter.payload) == (numbers[2], b"2")


@pytest.mark.parametrize("faults", [[LOST], [LATE], [LATE, LATE, LOST], [LOST, DOWN], [LATE, FULL]])
async def test_a_publish_without_an_answer_counts_once(live, faults) -> None:
    engine = Engine()
    life = await live(engine).open()
    engine.faults = list(faults)
    await life.journal.append(Append(lines(b"1")))
    engine.deliver()
    await life.journal.append(Append(lines(b"2")))
    assert life.journal.ledger.accepted == 2
    before = everything(life)
    life.log.gone = True
    assert everything(await live(engine).open()) == before


@pytest.mark.parametrize("fault", [DOWN, FULL])
async def test_an_engine_that_takes_nothing_refuses_appends_and_keeps_the_rest(live, fault) -> None:
    engine = Engine()
    life = await live(engine).open()
    await life.journal.append(Append(lines(b"1")))
    engine.faults = [fault] * 3
    with pytest.raises(Overloaded) as refused:
        await life.journal.append(Append(lines(b"2")))
    assert refused.value.retry_after > 0
    seal = life.journal.write(Seal(Sealed(1, (Span(1, 0, 1),), 1), Cursor(2, 0)))
    await asyncio.wait_for(seal, 60)
    assert not life.journal.failed.done()
    await life.journal.append(Append(lines(b"3")))
    assert life.journal.ledger.accepted == 2
    life.log.silence = "it does not answer"
    with pytest.raises(Overloaded, match="does not answer"):
        life.journal.append(Append(lines(b"4")))


async def test_a_daemon_that_was_replaced_accepts_nothing_more(live) -> None:
    engine = Engine()
    first = await live(engine).open()
    await first.journal.append(Append(lines(b"1")))
    first.journal._renewing.cancel()  # paused; its lease lapses
    second = await live(engine).open()
    with pytest.raises(JournalFailed, match="taken over"):
        await first.journal.append(Append(lines(b"2")))
    assert first.journal.failed.done()
    with pytest.raises(JournalFailed):
        first.journal.append(Append(lines(b"3")))
    await second.journal.append(Append(lines(b"4")))
    assert second.journal.ledger.accepted == 2


async def test_a_daemon_waits_for_the_lease_of_another(live) -> None:
    engine = Engine()
    first = await live(engine).open()
    first.journal._renewing.cancel()
    engine.lease = engine.lease[0], math.inf
    with pytest.raises(JournalFailed, match="owns it"):
        await live(engine).open()
    await first.close()
    await live(engine).open()


async def test_a_lease_that_lapses_while_its_answer_is_on_its_way_is_taken(live) -> None:
    """An answer says who had the lease when it was asked: the engine, or this process, was late."""
    life = live(Engine())
    acquire, first = life.log.acquire, iter([True])

    async def late(owner: str, ttl: float) -> str:
        if next(first, False):
            await asyncio.sleep(4 * ttl)
            return "another"
        return await acquire(owner, ttl)

    life.log.acquire = late
    await life.open()


async def test_a_start_that_reads_nothing_of_its_log_ends(live, monkeypatch) -> None:
    monkeypatch.setattr(log_journal, "OPEN_SECONDS", 0.2)
    life = live(Engine())

    async def lags(first: int, bytes_max: int) -> list[LogMessage]:
        return []

    monkeypatch.setattr(life.log, "read", lags)
    with pytest.raises(JournalFailed, match="nothing is read from 0 on"):
        await asyncio.wait_for(life.open(), 60)


async def test_an_entry_larger_than_a_message_is_whole_or_not_there(live) -> None:
    engine = Engine(message_bytes_max=4096)
    first = await live(engine).open()
    big = Records.sized([b"x" * 20_000])
    await first.journal.append(Append(big))
    engine.faults = ["", "", DOWN]
    with pytest.raises(Overloaded):
        await first.journal.append(Append(big))
    await first.journal.append(Append(lines(b"1")))
    before = everything(first)
    engine.faults = ["", ""] + [DOWN] * 1000
    torn = first.journal.append(Append(big))
    with pytest.raises(Overloaded):
        await torn
    first.log.gone, engine.faults = True, []
    second = await live(engine).open()
    assert everything(second) == before


async def test_a_snapshot_lets_the_log_go_and_keeps_what_is_pending(live) -> None:
    engine = Engine(message_bytes_max=16_384)
    first = await live(engine, snapshot_bytes=100_000).open()
    await use_all(first)
    stays = (Span(1, 7, 3), Span(2, 0, 1))  # of which nothing becomes anything
    await first.journal.write(Seal(Sealed(4, stays, 4), Cursor(3, 0)))
    for n in range(50):
        await first.journal.append(Append(Records.sized([b"%07d" % n * 1000])))
        batch, chunk = n + 10, n + 3
        await first.journal.write(
            Seal(Sealed(batch, (Span(chunk, 0, 1),), 1), Cursor(chunk + 1, 0))
        )
        await first.journal.write(settle(batch, 1, finished=[chunk], finished_bytes=7004))
    await asyncio.to_thread(first.journal._saver.join, 60)
    assert engine.snapshot is not None
    assert engine.bytes < 450_000  # of more than half a megabyte that went through it
    before = everything(first)
    first.log.gone = True
    second = await live(engine).open()
    assert everything(second) == before
    assert [batch.number for batch in second.recovered.batches] == [2, 3, 4]
    await second.journal.append(Append(lines(b"1")))
    assert (await second.journal.close()).counted == second.journal.ledger.pending


async def test_a_damaged_cache_ends_the_journal_and_the_log_heals_it(live) -> None:
    engine = Engine()
    first = await live(engine).open()
    await first.journal.append(Append(lines(b"1")))
    first.journal._store.connection.execute("UPDATE chunks SET payload = x'320A'")
    with pytest.raises(JournalFailed, match="cache"):
        await first.journal.load([Span(1, 0, 1)])
    await first.close()
    second = await live(engine).open()
    loaded = await second.journal.load([Span(1, 0, 1)])
    assert loaded is not None
    assert loaded.items() == [b"1"]


async def test_a_cache_is_not_synced_and_its_wal_stays_small(live, monkeypatch) -> None:
    one = await live(Engine()).open()
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    checkpointer = one.journal._checkpointer
    for connection in (one.journal._store.connection, checkpointer._connection):
        assert connection.execute("PRAGMA synchronous").fetchone() == (0,)
    wal = one.journal.path.with_name("cache.db-wal")
    begun, ended = list[None](), list[None]()
    full, copy = checkpointer.full, checkpointer._copy
    monkeypatch.setattr(checkpointer, "full", lambda: begun.append(full()))
    monkeypatch.setattr(checkpointer, "_copy", lambda: ended.append(copy()))
    for _ in range(64):
        await one.journal.append(Append(lines(*[b"x" * 1000] * 1000)))
        async with asyncio.timeout(60):  # a busy machine gives the thread that copies no time
            while len(ended) < len(begun):
                await asyncio.sleep(0.002)
    assert len(begun) > 4
    assert not synced
    assert wal.stat().st_size < 24 << 20


async def test_commands_do_not_change_a_cache_without_its_daemon(live) -> None:
    first = await live(Engine()).open()
    await use_all(first)
    await first.close()
    letters = CacheFile(first.journal.path).dead_letters
    with pytest.raises(Exception, match="start ingestd"):
        letters.purge(LetterFilter(), 1 << 40)


async def test_a_repair_makes_no_folder_for_a_log_that_was_adopted(live, tmp_path: Path) -> None:
    life = await live(Engine()).open()
    await life.close()
    data = tmp_path / "data"
    for folder in (data, data / "adopted" / "one"):  # as a daemon that was killed leaves them
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(life.journal.path, folder / "cache.db")
    command = [sys.executable, "-m", "ingestd", "journal", "verify", "--repair"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = partial(subprocess.run, [*command, "--data-dir", str(data)], env=env, check=True)
    await asyncio.to_thread(run)
    assert sorted(one.name for one in data.iterdir() if "cache.db" not in one.name) == [
        "adopted", "lock",
    ]  # fmt: skip


async def test_the_last_message_says_if_nothing_is_pending(live, tmp_path) -> None:
    engine = Engine()
    one = await live(engine).open()
    await one.journal.append(Append(lines(b"1", b"2", b"3")))
    assert ending(engine.messages[-1]).ledger == Ledger(3, 0, 0, 0)
    await one.close()
    assert ending(engine.messages[-1]).kind != DRAINED
    two = await live(engine).open()
    await two.journal.write(Seal(Sealed(1, (Span(1, 0, 3),), 3), Cursor(2, 0)))
    dead = [letter(f"{two.journal.id}.1.1", b"2")]
    await two.journal.write(settle(1, 2, dead=dead, finished=[1], finished_bytes=6))
    await two.close()
    last = ending(engine.messages[-1])
    assert last.kind == DRAINED
    assert last.ledger == Ledger(3, 2, 1, 0)
    assert last.end is not None
    assert (last.end.journal, last.end.letters) == (two.journal.id, 1)
    assert (await live(engine).open()).journal.ledger == Ledger(3, 2, 1, 0)


async def test_a_log_that_is_nearly_full_is_drained_in_its_last_message(live) -> None:
    """Without it other daemons would adopt it again and again, with a message each time."""
    engine = Engine()
    life = await live(engine).open()
    life.log.full = "nine tenths full"
    await life.close()
    assert ending(engine.messages[-1]).kind == DRAINED


async def test_a_log_that_has_ended_begins_anew(live) -> None:
    engine = Engine()
    one = await live(engine).open()
    await one.journal.append(Append(lines(b"1")))
    await one.journal.write(Seal(Sealed(1, (Span(1, 0, 1),), 1), Cursor(2, 0)))
    await one.journal.write(settle(1, 1, finished=[1], finished_bytes=2))
    await one.close()
    found = ending(engine.messages[-1])
    assert found.end is not None
    (piece,) = pieces(end_entry(RETIRED, found.end), 1000)
    number = engine.put(packed(*piece[:3], found.number, piece[3]), found.number)
    # As if the daemon that ended it had died before it could delete it.
    two = await live(engine).open()
    assert two.journal.id != one.journal.id
    assert two.journal.ledger == Ledger()
    assert engine.retired == [found.end]
    await two.journal.append(Append(lines(b"2")))
    await two.close()
    # An owner of the log that ended, which was paused in its first snapshot, goes on.
    engine.snapshot = Snapshot(found.number, 0, 0, 0, b"", engine.number())
    assert engine.messages[0].number > number
    three = await live(engine).open()
    assert three.journal.id == two.journal.id
    assert three.journal.ledger == Ledger(1)


class SlowLog(MemoryLog):
    """A log that gives nothing to read before its lease was renewed."""

    async def read(self, first: int, bytes_max: int) -> list[LogMessage]:
        taken = self.engine.lease
        async with asyncio.timeout(60):
            while self.engine.lease == taken:
                await asyncio.sleep(0.001)
        return await super().read(first, bytes_max)


async def test_a_lease_is_renewed_while_a_log_is_read(live: Callable[..., Life]) -> None:
    life = live(Engine())
    life.journal._log = SlowLog(life.log.engine)
    await life.open()


async def test_a_renewal_without_an_answer_is_soon_repeated(live: Callable[..., Life]) -> None:
    engine = Engine()
    life = await live(engine).open()
    life.journal._renewing.cancel()
    answers = iter([LogUnreachable(problem="no answer"), ValueError("no bucket")])
    renewed = asyncio.Event()

    async def acquire(owner: str, ttl: float) -> str:
        if (error := next(answers, None)) is not None:
            raise error
        renewed.set()
        return owner

    life.log.acquire = acquire  # type: ignore[method-assign]
    life.journal._renewing = asyncio.create_task(life.journal._renew())
    async with asyncio.timeout(60):
        await renewed.wait()


async def test_a_log_that_does_not_fit_on_the_disk_is_not_adopted(
    live: Callable[..., Life], tmp_path: Path
) -> None:
    engine = Engine()
    first = await live(engine).open()
    await first.journal.append(Append(lines(b"1")))
    await first.close()
    space = DiskSpaceGuard(tmp_path, 100, ask=lambda _: 99)
    adopter = live(engine, space=space)
    adopter.journal.claimed(adopter.journal._owner, None)
    with pytest.raises(JournalFailed, match="does not fit here: "):
        await adopter.open()
    own = await live(engine, space=space).open()
    assert own.journal.ledger.pending == 1


async def test_an_answer_that_meets_the_close_leaves_no_lease_to_be_renewed(live) -> None:
    """Python 3.11's `wait_for` returns an answer that is there, and forgets the cancellation."""
    one = await live(Engine()).open()
    acquire, asked = one.log.acquire, asyncio.Event()

    async def answered(owner: str, ttl: float) -> str:
        asked.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return await acquire(owner, ttl)

    one.log.acquire = answered
    await asked.wait()
    await one.close()
    async with asyncio.timeout(10):
        await asyncio.wait([one.journal._renewing])


@needs("mount", root=True)
async def test_a_full_disk_is_no_fault_of_the_settings(
    live: Callable[..., Life], tmp_path: Path
) -> None:
    engine = Engine()
    first = await live(engine).open()
    await first.journal.append(Append(lines(b"x" * 1_000_000)))
    await first.close()
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        second = Life(engine, disk)
        with pytest.raises(JournalFailed, match="full"):
            await second.open()


# -- idempotency keys of a group -------------------------------------------------------------------


def two_engines(**options: int) -> tuple[Engine, Engine]:
    """The logs of two daemons on one stream."""
    one = Engine(**options)
    return one, Engine(**options, keys=one.keys)


async def claimed(life: Life, key: str, fingerprint: bytes = b"print") -> IdempotencyClaim:
    claim = await life.journal.idempotency.begin(f"token shop {key}", fingerprint)
    assert isinstance(claim, IdempotencyClaim)
    claim.answer = b"answer of %s" % key.encode()
    return claim


async def answered(life: Life, key: str, fingerprint: bytes = b"print") -> object:
    return await life.journal.idempotency.begin(f"token shop {key}", fingerprint)


async def test_a_key_is_known_to_all_daemons_of_a_group(live) -> None:
    engine, other = two_engines()
    one, two = await live(engine).open(), await live(other).open()
    await one.journal.append(Append(lines(b"1"), claim=await claimed(one, "K")))
    appends = other.appends
    for _ in range(2):
        assert await answered(two, "K") == b"answer of K"
        with pytest.raises(KeyReused):
            await answered(two, "K", b"other")
    assert other.appends == appends
    one.log.gone = True  # and its log is needed no more either
    engine.messages, engine.snapshot = [], None
    three = await live(two_engines()[0]).open()
    three.log.engine.keys = engine.keys
    assert await answered(three, "K") == b"answer of K"
    # Of its own keys a daemon asks no engine; of others it does, and they are not known without.
    await two.journal.append(Append(lines(b"2"), claim=await claimed(two, "L")))
    two.journal.idempotency._recent.clear()
    two.log.silence = "it does not answer"
    assert await answered(two, "L") == b"answer of L"
    with pytest.raises(Overloaded, match="does not answer"):
        await answered(two, "K")
    two.log.silence, two.log.full = "", "it is full"
    claim = await claimed(two, "new")
    with pytest.raises(LogUnreachable, match="full"):
        two.journal.append(Append(lines(b"2"), claim=claim))
    two.journal.idempotency.forget(claim)
    assert await answered(two, "K") == b"answer of K"
    two.log.full = ""
    two.journal.idempotency._recent.clear()
    other.down = True
    with pytest.raises(Overloaded):
        await answered(two, "K")
    other.down = False
    assert await answered(two, "K") == b"answer of K"


@pytest.mark.parametrize("faults", [[], [LOST], [LATE, DOWN, LATE]])
async def test_of_two_daemons_one_accepts_a_key(live, faults) -> None:
    engine, other = two_engines()
    one, two = await live(engine).open(), await live(other).open()
    first, second = await claimed(one, "K"), await claimed(two, "K")
    third = await claimed(two, "L")
    await one.journal.append(Append(lines(b"1"), claim=first))
    other.faults = list(faults)
    appends = [
        two.journal.append(Append(lines(b"%d" % number), claim=claim))
        for number, claim in enumerate((None, second, third, None))
    ]
    found = await asyncio.gather(*appends, return_exceptions=True)
    other.deliver()
    assert [type(one) for one in found] == [Place, KeyTaken, Place, Place]
    assert found[1].retry_after > 0
    assert two.journal.ledger.accepted == 3
    assert not two.journal.failed.done()
    assert await answered(two, "K") == b"answer of K"
    assert await answered(one, "L") == b"answer of L"
    await two.journal.append(Append(lines(b"5")))
    before = everything(two)
    two.log.gone = True
    again = await live(other).open()
    assert everything(again) == before
    assert again.journal.bytes == two.journal.bytes


async def test_an_engine_that_fails_while_a_key_is_taken_refuses_at_once(
    live, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, other = two_engines()
    one, two = await live(engine).open(), await live(other).open()
    claim = await claimed(two, "K")
    await one.journal.append(Append(lines(b"1"), claim=await claimed(one, "K")))

    async def unreachable(*_: object, **__: object) -> None:
        raise LogUnreachable(problem="it is down")

    for ask in ("find_keys", "last"):
        with monkeypatch.context() as patch:
            patch.setattr(two.log, ask, unreachable)
            refused = two.journal.append(Append(lines(b"2"), claim=claim))
            with pytest.raises(LogUnreachable):
                await asyncio.wait_for(refused, 60)
    with pytest.raises(KeyTaken):
        await two.journal.append(Append(lines(b"2"), claim=claim))
    await two.journal.append(Append(lines(b"3")))
    assert await answered(two, "K") == b"answer of K"
    assert two.journal.ledger.accepted == 1


async def test_keys_that_stay_on_their_way_hold_no_commit_back(
    live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another daemon has sent a key, and a majority of the servers is gone before it is there."""
    monkeypatch.setattr(log_journal, "OVERDUE_SECONDS", 0.05)
    monkeypatch.setattr(log_journal, "KEY_RETRY_SECONDS", 0.001)
    one = await live(Engine()).open()
    append = one.log.append

    async def refused(data: bytes, *, after: int, keys: Sequence[LogKey] = ()) -> int:
        if keys:
            raise LogFenced
        return await append(data, after=after, keys=keys)

    monkeypatch.setattr(one.log, "append", refused)
    claim = await claimed(one, "K")
    with pytest.raises(LogUnreachable):
        await asyncio.wait_for(one.journal.append(Append(lines(b"1"), claim=claim)), 60)
    await one.journal.append(Append(lines(b"2")))
    monkeypatch.setattr(one.log, "append", append)
    await one.journal.append(Append(lines(b"1"), claim=claim))
    assert one.journal.ledger.accepted == 2


async def test_a_refused_append_leaves_its_key_to_its_holder(live) -> None:
    engine = Engine()
    one = await live(engine).open()
    claim = await claimed(one, "K")
    engine.faults = [DOWN]
    with pytest.raises(LogUnreachable):
        await one.journal.append(Append(lines(b"1"), claim=claim))
    with pytest.raises(KeyInFlight):
        await claimed(one, "K")
    await one.journal.append(Append(lines(b"1"), claim=claim))
    assert await answered(one, "K") == b"answer of K"
    # One whose holder has left ends with its append.
    claim = await claimed(one, "L")
    engine.faults = [DOWN]
    refused = one.journal.append(Append(lines(b"1"), claim=claim))
    one.journal.idempotency.forget(claim)
    with pytest.raises(LogUnreachable):
        await refused
    claim = await claimed(one, "L")
    engine.faults = [DOWN]
    with pytest.raises(LogUnreachable):
        await one.journal.append(Append(lines(b"1"), claim=claim))
    one.journal.idempotency.forget(claim)
    assert not one.journal.idempotency._claims
    assert not one.journal.idempotency._claimed


async def test_what_came_late_is_never_half_of_a_commit(live) -> None:
    """The commit is on its way as its key is taken; the key lapses, and then the commit comes."""
    engine, other = two_engines()
    one, two = await live(engine).open(), await live(other).open()
    second = await claimed(two, "K")
    other.faults = [LATE]
    await one.journal.append(Append(lines(b"1"), claim=await claimed(one, "K")))
    other.late_chance = 0.0
    with pytest.raises(KeyTaken):
        await two.journal.append(Append(lines(b"2"), claim=second))
    engine.keys.clear()
    other.deliver()
    assert not engine.keys
    await two.journal.append(Append(lines(b"3")))
    assert two.journal.ledger.accepted == 1
    before = everything(two)
    two.log.gone = True
    assert everything(await live(other).open()) == before


async def test_a_look_at_a_replica_that_lags_costs_another_try(live) -> None:
    engine, other = two_engines()
    one, two = await live(engine).open(), await live(other).open()
    await one.journal.append(Append(lines(b"1"), claim=await claimed(one, "K")))
    other.lags = 1
    claim = await claimed(two, "K")
    other.lags = 1
    with pytest.raises(KeyTaken):
        await two.journal.append(Append(lines(b"1"), claim=claim))
    looks = two.log.looks
    assert await answered(two, "K") == b"answer of K"
    with pytest.raises(KeyReused):
        await answered(two, "K", b"other")
    assert two.log.looks == looks


async def test_a_replica_that_never_has_a_key_holds_no_commit_back(live) -> None:
    engine, other = two_engines()
    one, two = await live(engine).open(), await live(other).open()
    await one.journal.append(Append(lines(b"1"), claim=await claimed(one, "K")))
    other.lags = 1 << 30
    claim = await claimed(two, "K")
    append = two.journal.append(Append(lines(b"1"), claim=claim))
    with pytest.raises(KeyTaken):
        await asyncio.wait_for(append, 60)
    assert await answered(two, "K") == b"answer of K"


async def test_keys_that_are_looked_up_together_share_a_request(live) -> None:
    engine, other = two_engines()
    one, two = await live(engine).open(), await live(other).open()
    for n in range(50):
        await one.journal.append(Append(lines(b"1"), claim=await claimed(one, f"K{n}")))
    looks = two.log.looks
    found = await asyncio.gather(*(answered(two, f"K{n}") for n in range(50)))
    assert found == [b"answer of K%d" % n for n in range(50)]
    assert two.log.looks - looks < 50
    # One that leaves takes no answer from the others, and an error is that of each.
    leaves = asyncio.ensure_future(answered(two, "new"))
    stays = asyncio.ensure_future(two.journal._look_up("new too"))
    await asyncio.sleep(0)
    leaves.cancel()
    assert await stays is None
    other.down = True
    failed = await asyncio.gather(
        *(two.journal._look_up(name) for name in "ab"), return_exceptions=True
    )
    assert [type(error) for error in failed] == [LogUnreachable] * 2
    other.down = False
    assert await answered(two, "K1") == b"answer of K1"


async def test_a_key_that_has_expired_is_replaced(live) -> None:
    engine, other = two_engines()
    one, two = await live(engine).open(), await live(other).open()
    await one.journal.append(Append(lines(b"1"), claim=await claimed(one, "K")))
    rule = KeyRule(ttl=1e-9)
    one.journal.idempotency.rule = two.journal.idempotency.rule = rule
    stale = await claimed(one, "K")  # which its own daemon has too
    assert stale.replaces
    await two.journal.append(Append(lines(b"2"), claim=await claimed(two, "K", b"second")))
    with pytest.raises(KeyTaken):
        await one.journal.append(Append(lines(b"3"), claim=stale))
    one.journal.idempotency.rule = two.journal.idempotency.rule = KeyRule()
    with pytest.raises(KeyReused):
        await answered(two, "K")
    assert await answered(two, "K", b"second") == b"answer of K"


async def test_keys_of_a_commit_are_bounded_and_those_of_a_large_entry_come_last(live) -> None:
    engine, other = two_engines(message_bytes_max=4096)
    one, two = await live(engine).open(), await live(other).open()
    assert one.journal._committer.claim_bytes * 900 >= writer.COMMIT_BYTES
    one.journal._committer.claim_bytes = writer.COMMIT_BYTES // 3
    claims = [await claimed(one, f"K{n}") for n in range(10)]
    big = Records.sized([b"x" * 9000])
    first = engine.appends
    appends = [one.journal.append(Append(big, claim=claim)) for claim in claims]
    for append in appends:
        await append
    assert engine.appends - first > 2 * len(claims)
    assert [await answered(two, f"K{n}") for n in range(10)] == [one.answer for one in claims]
    assert engine.keys_max_seen <= 4
    claim = await claimed(two, "L")
    claim.answer = b"x" * 5000
    with pytest.raises(NeverFits):
        two.journal.append(Append(lines(b"1"), claim=claim))
    two.journal.idempotency.forget(claim)
    # The last part of an entry is refused: nothing of it counts.
    claim = await claimed(one, "M")
    await two.journal.append(Append(lines(b"1"), claim=await claimed(two, "M")))
    with pytest.raises(KeyTaken):
        await one.journal.append(Append(big, claim=claim))
    before = everything(one)
    one.log.gone = True
    assert everything(await live(engine).open()) == before


async def test_answers_count_in_the_bound_of_a_commit(live) -> None:
    engine = Engine()
    one = await live(engine).open()
    claims = [await claimed(one, f"K{n}") for n in range(30)]
    for claim in claims:
        claim.answer = b"x" * 1_000_000
    appends = [one.journal.append(Append(lines(b"1"), claim=claim)) for claim in claims]
    await asyncio.gather(*appends)
    assert engine.keys_max_seen <= 9


async def test_what_is_left_of_large_entries_that_were_given_up_goes_too(live) -> None:
    engine, other = two_engines(message_bytes_max=4096)
    one = await live(engine, snapshot_bytes=100_000).open()
    two = await live(other).open()
    for n in range(50):
        claim = await claimed(one, f"K{n}")
        await two.journal.append(Append(lines(b"1"), claim=await claimed(two, f"K{n}")))
        with pytest.raises(KeyTaken):
            await one.journal.append(Append(Records.sized([b"x" * 9000]), claim=claim))
        await one.journal.append(Append(lines(b"1")))
        if one.journal._saver is not None:
            await asyncio.to_thread(one.journal._saver.join, 60)
    assert engine.bytes < 250_000  # of 400,000
    before = everything(one)
    one.log.gone = True
    again = await live(engine).open()
    assert everything(again) == before


async def test_requests_without_a_key_cost_nothing_more(live) -> None:
    engine = Engine()
    one = await live(engine).open()
    looks = one.log.looks
    for _ in range(3):
        await one.journal.append(Append(lines(b"1")))
    assert (one.log.looks, engine.keys_max_seen, len(engine.messages)) == (looks, 0, 1 + 3)
