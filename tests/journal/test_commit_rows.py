"""A commit of any size leaves the rows that its parts name, in one transaction."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.record import Records, Span
from ingestd.journal.interface import Chunk, Cursor, Failing, Seal, Sealed, Settle
from ingestd.journal.sqlite.store import Store, Write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "journal.db")
    yield made
    made.close()


def chunks(first: int, count: int) -> list[Chunk]:
    records = Records.lines([b"1", b"22"])
    return [Chunk(first + i, 1.0, records) for i in range(count)]


def seals(first: int, count: int, failing: Failing = Failing()) -> list[Seal]:  # noqa: B008
    return [
        Seal(
            Sealed(number, (Span(number, 0, 2),), 2, 0, 0.0, 1.0, failing),
            Cursor(number + 1, 0),
        )
        for number in range(first, first + count)
    ]


def settles(*numbers: int) -> list[Settle]:
    return [Settle(n, 2, [], [], [n], 5) for n in numbers]


def left(store: Store) -> tuple[list[int], list[int], int]:
    db = store.connection
    return (
        [row[0] for row in db.execute("SELECT id FROM chunks ORDER BY id")],
        [row[0] for row in db.execute("SELECT number FROM batches ORDER BY number")],
        store.chunk_bytes(),
    )


@pytest.mark.parametrize("count", [1, 2, 8, 9, 40])
def test_chunks_and_batches_come_and_go(store: Store, count: int) -> None:
    store.write(Write(chunks(1, count)))
    store.write(Write(chunks(count + 1, 1), sealed=seals(1, count), at=1.0))
    assert left(store) == (list(range(1, count + 2)), list(range(1, count + 1)), 5 * (count + 1))
    assert store.meta.ledger.accepted == 2 * (count + 1)
    assert store.meta.cursor == (count + 1, 0)
    store.write(Write(settled=settles(*range(1, count + 1))))
    assert left(store) == ([count + 1], [], 5)
    assert store.meta.ledger.processed == 2 * count
    assert store.meta == Store(store.path).meta


def test_only_the_named_rows_go_however_they_lie(store: Store) -> None:
    store.write(Write(chunks(1, 40), sealed=seals(1, 40), at=1.0))
    gone = {1, 2, 3, 5, 8, 13, 14, 20, 22, 24, 26, 39}
    store.write(Write(settled=settles(*sorted(gone, key=lambda n: n * 7 % 41))))
    there = [n for n in range(1, 41) if n not in gone]
    assert left(store) == (there, there, 5 * len(there))


def test_what_is_known_of_failures_goes_with_its_batch(store: Store) -> None:
    store.write(Write(chunks(1, 2), sealed=seals(1, 2, Failing(3.0, 1)), at=1.0))
    failing = "SELECT number FROM failing"
    assert store.connection.execute(failing).fetchall() == [(1,), (2,)]
    store.write(Write(settled=settles(1)))
    assert store.connection.execute(failing).fetchall() == [(2,)]


@pytest.mark.parametrize("count", [1, 20])
def test_a_commit_that_fails_leaves_nothing(store: Store, count: int) -> None:
    """Its last row is there already, whether it is one statement or several."""
    store.write(Write(chunks(1, 1), sealed=seals(count + 1, 1), at=1.0))
    before, meta = left(store), store.meta
    with pytest.raises(sqlite3.IntegrityError):
        store.write(Write(chunks(2, count), sealed=seals(2, count), at=1.0))
    assert not store.connection.in_transaction
    assert (left(store), store.meta) == (before, meta)
    store.write(Write(chunks(2, 1)))
    assert left(store)[0] == [1, 2]


class Counting:
    """A connection that notes the statements it is given, not what triggers make of them."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.statements: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        self.statements.append(statement)
        return self.connection.execute(statement, *parameters)


@pytest.mark.parametrize(("count", "statements"), [(1, 1), (8, 1), (9, 4), (16, 4)])
def test_most_commits_are_one_statement(store: Store, count: int, statements: int) -> None:
    """Two for a transaction, and one for each eight chunks where there are more."""
    store.write(Write(chunks(1, count), sealed=seals(1, count), at=1.0))
    counting: Any = Counting(store.connection)
    store.connection = counting
    more, done = chunks(count + 1, count), settles(*range(1, count + 1))
    write = Write(more, sealed=seals(count + 1, count), settled=done, at=1.0)
    store.write(write, hurried=count <= 8)
    ours = [one for one in counting.statements if not one.startswith(("SELECT", "PRAGMA"))]
    assert len(ours) == statements
    assert count > 8 or counting.statements == ours
