"""A record's id is for ever: it goes with the record into dead letters and back."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.append import Append
from ingestd.base.record import Records, Span, join
from ingestd.handlers.batch import Batch
from ingestd.handlers.outcome import Job
from ingestd.journal.dead_letters import DeadLetter
from ingestd.journal.interface import Cursor, Seal, Sealed, Settle
from ingestd.journal.letter_rows import packed, split, taken_apart

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


@given(st.data())
def test_names_go_with_their_records_through_cuts_and_joins(data: st.DataObject) -> None:
    runs = []
    for number in range(data.draw(st.integers(1, 4))):
        count = data.draw(st.integers(1, 6))
        items = [b"%d" % (10 * number + i) for i in range(count)]
        run = Records.sized(items) if data.draw(st.booleans()) else Records.lines(items)
        if data.draw(st.booleans()):
            run = run._replace(names=tuple(f"n{item.decode()}" for item in items))
        runs.append(run)
    whole = join(runs)
    pieces = whole.pieces(data.draw(st.integers(1, 12)))
    assert join(pieces) == whole
    first = data.draw(st.integers(0, whole.count - 1))
    part = whole.part(first, data.draw(st.integers(1, whole.count - first)))
    for name, item in zip(part.names, part.items(), strict=bool(part.names)):
        assert name in {"", f"n{item.decode()}"}
    named = {item for run in runs if run.names for item in run.items()}
    assert {item for name, item in zip(whole.names, whole.items(), strict=False) if name} == named


def test_a_batch_shows_the_names_it_was_given() -> None:
    records = Records.lines([b"1", b"2", b"3"])._replace(names=("old.1.7", "", "old.1.9"))
    batch = Batch(None, Job("j-1", 1, records, [Span(5, 0, 3)], "j"))
    assert batch.ids == ["old.1.7", "j.5.1", "old.1.9"]


async def test_a_record_that_is_fed_again_keeps_its_id_on_disk(opened, tmp_path: Path) -> None:
    j = await opened()
    await j.journal.append(Append(Records.lines([b"0", b"1", b"2"])))
    await j.journal.write(Seal(Sealed(1, (Span(1, 0, 3),), 3), Cursor(2, 0)))
    ids = [f"{j.journal.id}.1.{i}" for i in range(3)]
    dead = [DeadLetter(ids[i], "rejected", f"no {i}", "", b"%d" % i, 1, 1.0, 2.0) for i in range(3)]
    await j.journal.write(Settle(1, 0, dead, [], [1], 6))
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db, db:
        assert db.execute("SELECT letters FROM dead").fetchall() == [(3,)]
        db.execute("UPDATE dead SET retry = 1")
    await j.journal.dead_letters.requeue()
    assert j.chunks[-1].records.names == tuple(ids)
    await j.journal.close()
    again = await opened()
    (chunk,) = await again.journal.read(2, 1 << 20)
    assert (chunk.records.names, chunk.records.items()) == (tuple(ids), [b"0", b"1", b"2"])
    assert (await again.journal.load([Span(2, 1, 2)])).names == tuple(ids[1:])
    await again.journal.close()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db, db:
        db.execute("UPDATE chunks SET names = CAST(replace(names, '.1.', '.2.') AS BLOB)")
    damaged = await opened()
    (chunk,) = await damaged.journal.read(2, 1 << 20)
    assert chunk.damaged  # a wrong name is as bad as a wrong record


LETTERS = st.lists(
    st.builds(
        DeadLetter,
        record=st.sampled_from(["", "a.1.0", "a.1.1", "a.1.2", "b.7.3", "odd", "a.1.x"]),
        reason=st.sampled_from(["failed", "rejected"]),
        error=st.text(max_size=20),
        traceback=st.sampled_from(["", "Traceback"]),
        payload=st.binary(max_size=8),
        attempts=st.integers(0, 2),
        first_at=st.just(1.0),
        last_at=st.just(2.0),
        records=st.just(1),
        principal=st.sampled_from(["", "p"]),
        place=st.none(),
    ),
    min_size=1,
    max_size=12,
)


@given(LETTERS, st.sets(st.integers(1, 12)))
def test_rows_give_back_each_letter_under_its_number(
    letters: list[DeadLetter], chosen: set[int]
) -> None:
    rows = packed(letters, 0)
    back = [part for row in rows for part in taken_apart(row)]
    assert [number for number, _, _ in back] == list(range(1, len(letters) + 1))
    assert sorted(letter for _, _, letter in back) == sorted(letters)
    every = {number: letter for number, _, letter in back}
    for row in rows:
        inside, outside = split(row, chosen)
        for parts, wanted in ((inside, True), (outside, False)):
            for number, size, letter in (one for part in parts for one in taken_apart(part)):
                assert (number in chosen) is wanted
                assert letter == every[number]
                assert size == len(letter.payload)
        numbers = [n for part in (*inside, *outside) for n in part.numbers]
        assert sorted(numbers) == list(row.numbers)


@pytest.mark.parametrize("count", [2, 1000, 100_000])
@pytest.mark.parametrize("error", ["the same", "no. {} is wrong: `int`, got `str` - at `$.x`"])
def test_letters_of_a_batch_take_at_most_twice_their_bytes(count: int, error: str) -> None:
    letters = [
        DeadLetter(f"{'a' * 12}.1.{i}", "undecodable", error.format(i), "", b"1", 1, 1.0, 2.0)
        for i in range(count)
    ]
    rows = packed(letters, 0)
    assert sum(row.size for row in rows) <= 2 * count + 65536
    assert len(rows) == -(-count // 1000)
    back = [letter for row in rows for _, _, letter in taken_apart(row)]
    assert [letter.record for letter in back] == [letter.record for letter in letters]
    if count <= 1000:
        assert back == letters


async def test_a_commit_of_many_letters_keeps_the_file_small(opened, tmp_path: Path) -> None:
    j = await opened()
    await j.journal.append(Append(Records.lines([b"1"] * 1000)))
    await j.journal.write(Seal(Sealed(1, (Span(1, 0, 1000),), 1000), Cursor(2, 0)))
    dead = [
        DeadLetter(f"{j.journal.id}.1.{i}", "undecodable", f"at {i}", "", b"1", 1, 1.0, 2.0)
        for i in range(1000)
    ]
    await j.journal.write(Settle(1, 0, dead, [], [1], 2000))
    await asyncio.gather(*[j.journal.append(Append(Records.lines([b"1"]))) for _ in range(3)])
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db:
        (size,) = db.execute("SELECT sum(pgsize) FROM dbstat WHERE name = 'dead'").fetchone()
    assert size <= 2 * 2000 + 65536
    assert j.journal.dead_totals.bytes <= 2 * 2000 + 65536
