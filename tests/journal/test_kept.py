"""Processed chunks are kept within their bounds, and a replay feeds each record of them once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from ingestd.__main__ import main
from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.envelope import Envelope, facts_of, numbered, pack, singles, with_attribute
from ingestd.base.errors import ConfigError
from ingestd.base.record import Records, Span
from ingestd.journal.build import build_journal
from ingestd.journal.dead_letters import DeadLetter
from ingestd.journal.interface import Cursor, Ledger, Place, Seal, Sealed, Settle
from ingestd.journal.settings import DeadSettings, JournalSettings
from ingestd.journal.sqlite import check, kept
from ingestd.journal.sqlite.journal import SqliteJournal
from ingestd.journal.sqlite.offline import opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from ingestd.journal.dead_letters import Moved

DAY = 86400.0
ORIGIN = pack(Envelope(source="http", client="shop"))


class Time:
    """A clock that a test moves."""

    monotonic = staticmethod(SystemClock.monotonic)

    def __init__(self) -> None:
        self.ahead = 0.0

    def now(self) -> float:
        return SystemClock.now() + self.ahead


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
async def build(tmp_path: Path, time: Time) -> AsyncIterator[Callable[..., SqliteJournal]]:
    """Opens the journal of this test."""
    live: list[SqliteJournal] = []

    async def build(
        keep: float = DAY, keep_bytes_max: int = 1 << 20, bytes_max: int = 1 << 30
    ) -> SqliteJournal:
        for one in live:
            await one.close()
        live[:] = [
            SqliteJournal(
                tmp_path / "journal.db", bytes_max=bytes_max, clock=time,
                on_commit=lambda *_: None, keep=keep, keep_bytes_max=keep_bytes_max,
            )
        ]  # fmt: skip
        await live[0].open(lambda _: None)
        return live[0]

    yield build
    for one in live:
        await one.close()


async def process(journal: SqliteJournal, records: Records, dead: dict[int, bytes] | None = None):
    """Accepts records and settles them; those of `dead` by their index die."""
    place = await journal.append(Append(records, envelope=ORIGIN))
    size, number = records.stored_bytes + len(ORIGIN), place.chunk
    span = Span(place.chunk, 0, records.count)
    await journal.write(Seal(Sealed(number, (span,), records.count), Cursor(number + 1, 0)))
    letters = [
        DeadLetter(f"{journal.id}.{place.chunk}.{n}", "failed", "no", "", payload, 8, 1.0, 2.0,
                   place=Place(place.chunk, n))
        for n, payload in (dead or {}).items()
    ]  # fmt: skip
    await journal.write(
        Settle(number, records.count - len(letters), letters, (), [place.chunk], size)
    )


async def finish(journal: SqliteJournal, moved: Moved) -> None:
    """Settles the chunks that came back."""
    for chunk in moved.chunks:
        span = Span(chunk.id, 0, chunk.records.count)
        batch = Sealed(chunk.id, (span,), chunk.records.count)
        await journal.write(Seal(batch, Cursor(chunk.id + 1, 0)))
        settle = (chunk.records.count, (), (), [chunk.id], chunk.records.stored_bytes)
        await journal.write(Settle(chunk.id, *settle))


def lines(*numbers: int) -> Records:
    return Records.lines([b'{"n":%d}' % n for n in numbers])


def replay(folder: Path, *args: str, code: int = 0) -> None:
    assert main(["replay", "--data-dir", str(folder), "--yes", *args]) == code


async def fed(journal: SqliteJournal) -> list[bytes]:
    """All that a replay feeds; it is settled."""
    found: list[bytes] = []
    while await journal.dead_letters.poll_marked():
        moved = await journal.dead_letters.requeue()
        for chunk in moved.chunks:
            found += chunk.records.items()
            for one in singles(chunk.records.envelopes, chunk.records.count):
                assert facts_of(one)["attributes"]["replayed"].startswith(f"{journal.id}.")
                assert facts_of(one)["client"] == "shop"
        await finish(journal, moved)
        if not moved.more:
            break
    return found


@pytest.mark.slow
async def test_what_was_processed_is_fed_again_once(build, tmp_path: Path) -> None:
    journal = await build()
    await process(journal, lines(0, 1, 2), {1: b'{"n":1}'})
    await process(journal, lines(3, 4))
    await process(journal, lines(5), {0: b'{"n":5}'})
    assert not await journal.dead_letters.poll_marked()
    assert journal.status().kept[:2] == (3, 6)
    replay(tmp_path, "--all")
    again = [b'{"n":%d}' % n for n in (0, 2, 3, 4)]
    assert await fed(journal) == again
    assert journal.ledger == Ledger(accepted=10, processed=8, dead=2)
    assert not await journal.dead_letters.poll_marked()
    assert journal.status().kept == (3, 6, journal.kept.bytes, 4)
    # A replay is not kept itself, so the next one feeds no more than this one.
    replay(tmp_path, "--since", "1h")
    journal = await build()  # by the next life
    assert await fed(journal) == again
    replay(tmp_path, "--where", "n=4")
    assert await fed(journal) == [b'{"n":4}']
    replay(tmp_path, "--until", "1h")
    assert not await journal.dead_letters.poll_marked()
    with opened(journal.path) as db:
        assert list(check.findings(db)) == []
        assert db.execute("SELECT count(*) FROM replaying").fetchone() == (0,)


@pytest.mark.slow
async def test_a_chunk_without_a_processed_record_is_passed_by(build, tmp_path: Path) -> None:
    journal = await build()
    await process(journal, lines(1), {0: b'{"n":1}'})
    replay(tmp_path, "--all")
    assert await fed(journal) == []
    assert [one.state for one in check.SqliteFile(journal.path).replays()] == ["done"]


@pytest.mark.slow
async def test_the_oldest_go_beyond_a_bound(build, tmp_path: Path, time: Time) -> None:
    size = 1000 + len(ORIGIN) + 1 + kept.ROW_BYTES
    journal = await build(keep_bytes_max=2 * size)
    for letter in (b"a", b"b", b"c"):
        await process(journal, Records.lines([letter * 1000]))
    await journal.dead_letters.poll_marked()
    assert journal.status().kept[:3] == (2, 2, 2 * size)
    replay(tmp_path, "--all")
    assert [item[:1] for item in await fed(journal)] == [b"b", b"c"]
    time.ahead = 2 * DAY  # a clock that jumps makes nothing older
    assert not await journal.dead_letters.poll_marked()
    journal = await build()
    assert await journal.dead_letters.poll_marked()
    assert (await journal.dead_letters.requeue()).more
    await journal.dead_letters.poll_marked()
    assert journal.status().kept[0] == 0


async def test_kept_chunks_make_room_for_new_records(build) -> None:
    journal = await build(bytes_max=10_000)
    for _ in range(5):
        await process(journal, Records.lines([b"a" * 1000]))
    await journal.dead_letters.poll_marked()
    assert journal.status().kept.chunks == 5
    await journal.append(Append(Records.lines([b"b" * 6000])))  # 8,000 for both
    assert await journal.dead_letters.poll_marked()
    await journal.dead_letters.requeue()
    assert not await journal.dead_letters.poll_marked()
    assert journal.status().kept.chunks == 1
    await journal.append(Append(Records.lines([b"b" * 3000])))  # they never refuse one


@pytest.mark.slow
async def test_nothing_is_fed_while_much_is_pending(build, tmp_path: Path, monkeypatch) -> None:
    journal = await build()
    for n in range(3):
        await process(journal, lines(n))
    replay(tmp_path, "--all")
    monkeypatch.setattr(kept, "PENDING_BYTES", 1000)
    await journal.append(Append(Records.lines([b"x" * 2000])))
    assert await journal.dead_letters.poll_marked()
    assert (await journal.dead_letters.requeue())[:2] == ((), 0)
    await journal.write(Seal(Sealed(4, (Span(4, 0, 1),), 1), Cursor(5, 0)))
    await journal.write(Settle(4, 1, (), (), [4], 2001))
    assert await fed(journal) == [b'{"n":%d}' % n for n in range(3)]


async def test_a_full_disk_is_no_reason_to_keep_chunks(build) -> None:
    journal = await build()
    await process(journal, lines(1))
    await journal.append(Append(Records.lines([b"x" * 100_000])))
    db = journal._store.connection
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    db.execute(f"PRAGMA max_page_count={pages}")
    await journal.write(Seal(Sealed(2, (Span(2, 0, 1),), 1), Cursor(3, 0)))
    await journal.write(Settle(2, 1, (), (), [2], 100_001))
    assert journal.ledger == Ledger(accepted=2, processed=2)
    await journal.dead_letters.poll_marked()
    assert journal.status().kept.chunks == 1
    assert journal._committer.keep is not None  # it is tried again from then on


async def test_without_the_setting_nothing_is_kept(build, tmp_path: Path, capsys) -> None:
    journal = await build(keep=0.0)
    await process(journal, lines(1))
    assert journal.status().kept == (0, 0, 0, 0)
    with opened(journal.path) as db:
        assert not kept.exist(db)
    replay(tmp_path, "--all")
    assert "no records of that time are kept" in capsys.readouterr().err
    journal = await build()
    await process(journal, lines(2))
    journal = await build(keep=0.0)  # what is kept goes with the setting
    assert await journal.dead_letters.poll_marked()
    await journal.dead_letters.requeue()
    assert not await journal.dead_letters.poll_marked()
    assert journal.status().kept.chunks == 0


def test_a_journal_that_keeps_nothing_refuses_the_setting(tmp_path: Path) -> None:
    settings = JournalSettings(kind="memory", keep=60.0)
    with pytest.raises(ConfigError, match="keeps no processed records"):
        build_journal(settings, DeadSettings(), folder=tmp_path, clock=SystemClock())


@pytest.mark.slow
async def test_replays_are_listed_stopped_and_confirmed(build, tmp_path: Path, capsys) -> None:
    journal = await build()
    await process(journal, lines(1, 2))
    where = ["--data-dir", str(tmp_path)]
    assert main(["replay", *where]) == 2
    assert "needs --since" in capsys.readouterr().err
    assert main(["replay", "--all", *where]) == 2
    assert "without a terminal, add --yes" in capsys.readouterr().err
    replay(tmp_path, "--list")
    assert capsys.readouterr() == ("", "no replays\n")
    replay(tmp_path, "--all", "--dry-run")
    said = capsys.readouterr().err
    assert "would feed 2 kept records of pipeline default, dead letters excepted" in said
    replay(tmp_path, "--all", "--json", "--where", "n=1")
    assert json.loads(capsys.readouterr().out) == {"pipeline": "default", "kept": 2, "replay": 1}
    replay(tmp_path, "--stop")
    assert capsys.readouterr().out == "1 replay stopped\n"
    replay(tmp_path, "--list", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["where"], facts["records"]) == ("stopped", ["n=1"], 0)
    assert await fed(journal) == []


@pytest.mark.slow
async def test_kept_damage_is_counted_and_not_fed(build, tmp_path: Path, capsys) -> None:
    journal = await build()
    await process(journal, lines(1))
    await process(journal, lines(2))
    journal._store.connection.execute("UPDATE kept SET payload = x'00' WHERE id = 1")
    replay(tmp_path, "--all")
    assert await fed(journal) == [b'{"n":2}']
    capsys.readouterr()
    replay(tmp_path, "--list")
    assert "done, 1 record fed and 1 that can't be read" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["no json", "5", "[1]", '["no condition"]'])
async def test_a_replay_whose_conditions_are_damaged_is_stopped(
    build, tmp_path: Path, capsys, damage: str
) -> None:
    journal = await build()
    await process(journal, lines(1, 2))
    replay(tmp_path, "--all", "--where", "n=1")
    replay(tmp_path, "--all", "--where", "n=2")
    changed = "UPDATE replays SET conditions = ? WHERE id = 1"
    journal._store.connection.execute(changed, (damage,))
    assert await fed(journal) == [b'{"n":2}']
    capsys.readouterr()
    replay(tmp_path, "--list", "--json")
    listed = map(json.loads, capsys.readouterr().out.splitlines())
    assert [one["state"] for one in listed] == ["stopped", "done"]


def test_an_attribute_is_added_to_every_form_of_envelopes() -> None:
    lines_of_a_file = pack(Envelope(source="fetch", attributes={"url": "u"}, numbered="line"))
    for packed, facts in (
        (b"", {"attributes": {"replayed": "j.1"}}),
        (ORIGIN, {"source": "http", "client": "shop", "attributes": {"replayed": "j.1"}}),
        (
            numbered(lines_of_a_file, 2, 7),
            {"source": "fetch", "attributes": {"replayed": "j.1", "url": "u", "line": 7}},
        ),
    ):
        marked = with_attribute(packed, 2, "replayed", "j.1")
        assert facts_of(singles(marked, 2)[0]) == facts
