"""A damaged journal file: it always starts, and what it can't read it sets aside and reports."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
from typing import TYPE_CHECKING, NamedTuple

import pytest

from ingestd.base import envelope
from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.envelope import Envelope
from ingestd.base.errors import JournalFailed, JournalUnreadable
from ingestd.base.record import Records, Span
from ingestd.journal.dead_letters import DeadLetter
from ingestd.journal.interface import Cursor, Seal, Sealed, Settle
from ingestd.journal.sqlite.journal import SqliteJournal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SEED = int(os.environ.get("FAULTS_SEED", "1"))
CHUNKS = 30
PAGE = 16384


def records(chunk: int) -> list[bytes]:
    """What chunk `chunk` holds: some lie on one page, some on many."""
    size = 60_000 if chunk % 5 == 0 else 900
    return [b"%d-%d-" % (chunk, n) + b"x" * (size // 3) for n in range(3)]


def envelopes(chunk: int) -> bytes:
    """Where its records came from: those of some share an envelope, those of others are lines."""
    if chunk % 2:
        return envelope.pack(Envelope("http", "records", f"client-{chunk}"))
    lines = envelope.pack(Envelope("fetch", attributes={"url": "u"}, numbered="line"))
    return envelope.numbered(lines, 3, chunk)


def journal_in(folder: Path) -> SqliteJournal:
    return SqliteJournal(
        folder / "journal.db", bytes_max=1 << 30, clock=SystemClock(), on_commit=lambda *_: None
    )


async def _build(folder: Path, *, checkpointed: bool) -> None:
    """30 chunks, of which 1 is done, 2 to 9 are sealed, and one dead letter."""
    journal = journal_in(folder)
    await journal.open(lambda _: None)
    for chunk in range(1, CHUNKS + 1):
        await journal.append(Append(Records.lines(records(chunk)), envelope=envelopes(chunk)))
    for number in range(1, 10):
        span = Span(number, 0, 3)
        await journal.write(
            Seal(
                Sealed(number, (span,), 3, accepted_at=1.0, lineage=(number - 1,)),
                Cursor(number + 1, 0),
            )
        )
    letter = DeadLetter("j.1.0", "rejected", "no", "", b"1", 1, 1.0, 2.0, envelope=envelopes(1))
    size = sum(map(len, records(1))) + 3 + len(envelopes(1))
    await journal.write(Settle(1, 2, [letter], [], [1], size))
    if not checkpointed:  # as SIGKILL leaves it
        for suffix in ("", "-wal"):
            shutil.copy(folder / f"journal.db{suffix}", folder / f"kept{suffix}")
    await journal.close()
    if not checkpointed:
        for suffix in ("", "-wal"):
            (folder / f"kept{suffix}").rename(folder / f"journal.db{suffix}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same journal as a clean end and as SIGKILL leave it."""
    folders = {}
    for name in ("clean", "killed"):
        folders[name] = tmp_path_factory.mktemp(name)
        asyncio.run(_build(folders[name], checkpointed=name == "clean"))
    return folders


class Life(NamedTuple):
    """What came out of a damaged journal."""

    read: dict[int, tuple[list[bytes], bytes]]
    damaged: int
    pending: int
    set_aside: str


async def live(folder: Path) -> Life:
    """One life: opens, reads everything back and settles it, accepts, closes."""
    journal = journal_in(folder)
    opened = await journal.open(lambda _: None)
    read: dict[int, tuple[list[bytes], bytes]] = {}
    written: list[asyncio.Future[None]] = []
    damaged = 0

    def settle(number: int, count: int, chunks: list[int], items: object) -> None:
        letter = DeadLetter("r", "damaged", "", "", b"", 1, 1.0, 2.0, count)
        dead, aside = ([], []) if items is not None else ([letter], chunks)
        done = 0 if items is None else count
        written.append(journal.write(Settle(number, done, dead, [], chunks, 0, aside)))

    try:
        pending = journal.ledger.pending
        assert pending >= 0
        for batch in opened.batches:
            got = await journal.load(batch.spans)
            if got is None:
                damaged += batch.count
            else:
                read[batch.number] = got.items(), got.envelopes
            items = None if got is None else read[batch.number]
            settle(batch.number, batch.count, [span.chunk for span in batch.spans], items)
        number, chunk = opened.next_batch, opened.cursor.chunk
        while chunk <= opened.last_chunk and (chunks := await journal.read(chunk, 1 << 20)):
            for one in chunks:
                count = one.records.count
                span = Span(one.id, 0, count)
                written.append(
                    journal.write(Seal(Sealed(number, (span,), count), Cursor(one.id + 1, 0)))
                )
                if one.damaged:
                    damaged += count
                else:
                    read[one.id] = one.records.items(), one.records.envelopes
                settle(number, count, [one.id], None if one.damaged else read[one.id])
                number += 1
                chunk = one.id + 1
        written.append(journal.append(Append(Records.lines([b"new"]))))
    finally:
        ended = await asyncio.gather(*written, return_exceptions=True)
        ledger, counted, *_ = await journal.close()
    for error in ended:
        if isinstance(error, BaseException):
            raise error
    if counted is None:  # what could be settled can't be counted: the next start repairs it
        await live(folder)
    else:
        assert counted == ledger.pending == 1, (ledger, counted)
    return Life(read, damaged, pending, opened.set_aside)


async def lives(folder: Path) -> Life | None:
    """At most two lives: damage that shows in the middle of one ends it with 75; the next heals.

    None: the header names another program or version, which is refused and left untouched.
    """
    before = (folder / "journal.db").read_bytes() if (folder / "journal.db").exists() else b""
    async with asyncio.timeout(60):
        for _ in range(2):
            try:
                return await live(folder)
            except JournalFailed:
                continue
            except JournalUnreadable:
                assert (folder / "journal.db").read_bytes() == before
                return None
    raise AssertionError("it crashes again and again")


def check(life: Life | None) -> int:
    """Nothing was read wrongly; how many of the 29 chunks that were to be done came back."""
    if life is None:
        return 0
    for chunk, (items, packed) in life.read.items():
        assert items == records(chunk)
        assert packed == envelopes(chunk)
    return len(life.read)


def damaged_copy(whole: Path, folder: Path, damage: Callable[[bytearray], None]) -> Path:
    """A copy of a whole journal with damage in its `journal.db`."""
    folder.mkdir()
    for path in whole.iterdir():
        shutil.copy(path, folder / path.name)
    content = bytearray((folder / "journal.db").read_bytes())
    damage(content)
    (folder / "journal.db").write_bytes(content)
    return folder


async def test_the_whole_journal_reads_back(whole, tmp_path: Path) -> None:
    """The control: without damage everything comes back, from both."""
    for name, folder in whole.items():
        copy = damaged_copy(folder, tmp_path / name, lambda _: None)
        assert check(await lives(copy)) == CHUNKS - 1


async def each(whole: Path, tmp_path: Path, damages: dict[str, Callable[[bytearray], None]]) -> int:
    """Lives through every damage; the chunks that came back, over all."""
    came, failed = 0, []
    for name, damage in damages.items():
        copy = damaged_copy(whole, tmp_path / "journal", damage)
        try:
            came += check(await lives(copy))
        except Exception as error:
            failed.append(f"{name}: {error!r}"[:300])
        shutil.rmtree(copy)
    assert not failed, f"{len(failed)} of {len(damages)}: " + "\n".join(failed[:20])
    return came


def cut(at: int) -> Callable[[bytearray], None]:
    def damage(raw: bytearray) -> None:
        del raw[at:]

    return damage


def flip(bit: int) -> Callable[[bytearray], None]:
    def damage(raw: bytearray) -> None:
        raw[bit // 8] ^= 1 << bit % 8

    return damage


def zero(first: int, last: int | None = None) -> Callable[[bytearray], None]:
    def damage(raw: bytearray) -> None:
        end = len(raw) if last is None else last
        raw[first:end] = bytes(end - first)

    return damage


def size_of(whole: Path, name: str = "journal.db") -> int:
    return (whole / name).stat().st_size


async def test_truncated_at_each_page(whole, tmp_path: Path) -> None:
    """`journal.db` cut at every page boundary."""
    places = range(0, size_of(whole["clean"]), PAGE)
    await each(whole["clean"], tmp_path, {f"at {at}": cut(at) for at in places})


@pytest.mark.slow
async def test_truncated_at_200_random_bytes(whole, tmp_path: Path) -> None:
    """`journal.db` cut anywhere."""
    dice, size = random.Random(SEED), size_of(whole["clean"])
    places = [dice.randrange(size) for _ in range(200)]
    await each(whole["clean"], tmp_path, {f"at {at}": cut(at) for at in places})


async def test_each_page_zeroed(whole, tmp_path: Path) -> None:
    """One page of `journal.db` reads as zeros, as an unreadable sector may."""
    places = range(PAGE, size_of(whole["clean"]), PAGE)
    damages = {f"page at {at}": zero(at, at + PAGE) for at in places}
    came = await each(whole["clean"], tmp_path, damages)
    # One page costs one chunk, or the neighbours that share it.
    assert came > 0.5 * len(damages) * (CHUNKS - 1)


async def test_zero_filled_tail(whole, tmp_path: Path) -> None:
    """`journal.db` with zeros from some page on, as a file system may leave it after a crash."""
    places = range(0, size_of(whole["clean"]), 3 * PAGE)
    await each(whole["clean"], tmp_path, {f"from {at}": zero(at) for at in places})


async def test_60_bit_flips(whole, tmp_path: Path) -> None:
    """One bit of `journal.db` is wrong: at most what lies there is lost, and it is counted."""
    await _bit_flips(whole["clean"], tmp_path, 60)


@pytest.mark.slow
async def test_500_bit_flips(whole, tmp_path: Path) -> None:
    """The same, anywhere, 500 times."""
    await _bit_flips(whole["clean"], tmp_path, 500)


async def _bit_flips(whole: Path, tmp_path: Path, count: int) -> None:
    dice, size = random.Random(SEED), size_of(whole)
    bits = [dice.randrange(size * 8) for _ in range(count)]
    came = await each(whole, tmp_path, {f"bit {bit}": flip(bit) for bit in bits})
    assert came > 0.9 * count * (CHUNKS - 1)


@pytest.mark.slow
async def test_bit_flips_where_structure_is(whole, tmp_path: Path) -> None:
    """One bit of each page's head, where SQLite keeps what the page is and where its rows are."""
    size = size_of(whole["clean"])
    dice = random.Random(SEED)
    bits = [
        (page + at) * 8 + dice.randrange(8) for page in range(0, size, PAGE) for at in range(16)
    ]
    await each(whole["clean"], tmp_path, {f"bit {bit}": flip(bit) for bit in bits})


async def _wal(
    whole: Path, tmp_path: Path, damages: dict[str, Callable[[bytearray], None]]
) -> None:
    """Damage in the WAL: what was synced before it is there, in order, and nothing else."""
    for name, damage in damages.items():
        copy = damaged_copy(whole, tmp_path / "journal", lambda _: None)
        content = bytearray((copy / "journal.db-wal").read_bytes())
        damage(content)
        (copy / "journal.db-wal").write_bytes(content)
        life = await lives(copy)
        assert life is not None, name
        check(life)
        assert sorted(life.read) == list(
            range(min(life.read, default=1), max(life.read, default=0) + 1)
        )
        shutil.rmtree(copy)


async def test_damage_in_the_wal(whole, tmp_path: Path) -> None:
    """The WAL cut, zeroed at its end, or with a wrong bit."""
    size = size_of(whole["killed"], "journal.db-wal")
    dice = random.Random(SEED)
    damages = {f"cut {at}": cut(at) for at in range(0, size, size // 15)}
    damages |= {f"zero {at}": zero(at) for at in range(0, size, size // 15)}
    damages |= {f"bit {bit}": flip(bit) for bit in (dice.randrange(size * 8) for _ in range(30))}
    await _wal(whole["killed"], tmp_path, damages)


async def test_a_missing_wal(whole, tmp_path: Path) -> None:
    """`journal.db-wal` was deleted: it starts with what `journal.db` has."""
    copy = damaged_copy(whole["killed"], tmp_path / "journal", lambda _: None)
    (copy / "journal.db-wal").unlink()
    check(await lives(copy))


async def test_an_unknown_version(whole, tmp_path: Path) -> None:
    """A journal of another version: refused with 78, untouched."""
    copy = damaged_copy(whole["clean"], tmp_path / "journal", lambda _: None)
    with sqlite3.connect(copy / "journal.db") as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    assert await lives(copy) is None
