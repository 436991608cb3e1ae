"""The count is exact whatever the journal does between two of its steps."""

from __future__ import annotations

import tempfile
from collections import deque
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestd.base.record import Records, Span
from ingestd.journal.interface import Chunk, Cursor, Seal, Sealed, Settle
from ingestd.journal.sqlite import audit
from ingestd.journal.sqlite.audit import Count, Difference
from ingestd.journal.sqlite.store import Store, Write

NOTHING = Difference(0, 0)


class Life:
    """Writes to a real store as a pipeline does, and counts between its commits."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.store.connection.execute("PRAGMA synchronous=OFF")
        self.count = Count()
        self.sealed: deque[Sealed] = deque()
        self.found: list[Difference] = []

    def write(self, **what: object) -> None:
        self.store.write(Write(**what))  # type: ignore[arg-type]

    def append(self, chunks: int) -> None:
        first = self.store.meta.last_chunk + 1
        run = Records.lines([b"1", b"2", b"3"])
        self.write(chunks=[Chunk(n, 1.0, run) for n in range(first, first + chunks)])

    def seal(self, records: int) -> None:
        """The next records, at most to the end of the cursor's chunk."""
        meta = self.store.meta
        chunk, record = meta.cursor
        if chunk > meta.last_chunk:
            return
        records = min(records, 3 - record)
        ends = record + records == 3
        cursor = Cursor(chunk + 1, 0) if ends else Cursor(chunk, record + records)
        batch = Sealed(meta.next_batch, (Span(chunk, record, records),), records)
        self.sealed.append(batch)
        self.write(sealed=[Seal(batch, cursor)])

    def rush(self, chunks: int) -> None:
        """The next chunks, whole."""
        for _ in range(chunks):
            self.seal(3)

    def settle(self) -> None:
        """The oldest batch; its chunk goes with its last record, as nothing is settled twice."""
        if not self.sealed:
            return
        batch = self.sealed.popleft()
        (span,) = batch.spans
        done = [span.chunk] if span.first + span.count == 3 else []
        self.write(settled=[Settle(batch.number, span.count, (), (), done, 6 * len(done))])

    def step(self) -> Difference | None:
        found = self.count.step(self.store.connection)
        if found is not None:
            self.found.append(found)
        return found

    def to_the_end(self) -> Difference:
        while (found := self.step()) is None:
            pass
        return found


MOVES = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 9)),
    st.tuples(st.just("seal"), st.integers(1, 3)),
    st.tuples(st.just("rush"), st.integers(1, 30)),
    st.tuples(st.just("settle")),
    st.tuples(st.just("step")),
)


@given(moves=st.lists(MOVES, max_size=60), rows=st.integers(1, 6), begin=st.integers(0, 30))
@settings(max_examples=150)
@pytest.mark.slow
def test_it_finds_nothing_where_nothing_is(
    moves: list[tuple[str, int]], rows: int, begin: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "CHUNKS_MAX", rows)
        store = Store(Path(folder) / "journal.db")
        try:
            life = Life(store)
            if begin:
                life.append(begin)
            for name, *argument in moves:
                getattr(life, name)(*argument)
            life.to_the_end()
            life.to_the_end()
            assert set(life.found) == {NOTHING}
            store.connection.execute("UPDATE meta SET accepted = accepted + 7, chunk_bytes = 1")
            life.to_the_end()  # it may have been under way
            stored = store.connection.execute("SELECT total(bytes) FROM chunks").fetchone()[0]
            assert life.to_the_end() == Difference(7, 1 - int(stored))
        finally:
            store.close()


def test_a_backlog_that_moves_all_the_time_is_counted_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much comes as goes while it counts."""
    monkeypatch.setattr(audit, "CHUNKS_MAX", 20)
    store = Store(tmp_path / "journal.db")
    try:
        life = Life(store)
        life.append(1_000)
        steps = 0
        while life.step() is None:
            life.append(4)
            for _ in range(4):
                life.seal(3)
                life.settle()
            steps += 1
        assert life.found == [NOTHING]
        assert 1_000 // 20 < steps < 1_000 // 10
    finally:
        store.close()


def test_a_step_reads_a_bounded_number_of_rows(tmp_path: Path) -> None:
    """Counted in instructions of SQLite's machine: about as many a step, however many rows."""
    done = 0

    def tick() -> int:
        nonlocal done
        done += 1
        return 0

    store = Store(tmp_path / "journal.db")
    try:
        life = Life(store)
        life.append(20_000)
        store.connection.set_progress_handler(tick, 10)
        steps = []
        while True:
            done = 0
            found = life.step()
            steps.append(done)
            if found is not None:
                break
        assert len(steps) >= 20_000 // audit.CHUNKS_MAX
        assert max(steps) * 10 < audit.CHUNKS_MAX * 12
    finally:
        store.close()
