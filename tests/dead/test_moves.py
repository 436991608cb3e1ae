"""Dead letters are fed into another pipeline; whatever is killed, none is lost or comes twice."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from ingestd.__main__ import main
from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.record import InvalidRecord, Records, Span
from ingestd.journal.dead_letters import DeadLetter, LetterFilter
from ingestd.journal.interface import Cursor, Ledger, Seal, Sealed, Settle
from ingestd.journal.sqlite import check, dead_letters
from ingestd.journal.sqlite.journal import SqliteJournal
from ingestd.journal.sqlite.offline import opened
from ingestd.journal.sqlite.repair import repair
from tests.daemon.harness import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

LETTERS = 5


@pytest.fixture
async def journals(tmp_path: Path):
    """Two pipelines, one of them with five dead letters and one that was never accepted."""
    (tmp_path / "ingestd.toml").write_text("[pipelines.other]\nrecord_bytes_max = '1KiB'\n")
    (tmp_path / "pipelines" / "other").mkdir(parents=True)
    async with AsyncExitStack() as stack:
        found = []
        for folder in (tmp_path, tmp_path / "pipelines" / "other"):
            journal = SqliteJournal(
                folder / "journal.db", bytes_max=1 << 20, clock=SystemClock(),
                on_commit=lambda *_: None,
            )  # fmt: skip
            await journal.open(lambda _: None)
            stack.push_async_callback(journal.close)
            found.append(journal)
        source = found[0]
        await source.append(Append(Records.lines([b"%d" % n for n in range(LETTERS)])))
        await source.write(Seal(Sealed(1, (Span(1, 0, LETTERS),), LETTERS), Cursor(2, 0)))
        letters = [
            DeadLetter(f"{source.id}.1.{n}", "failed", "no", "", b"%d" % n, 8, 1.0, 2.0)
            for n in range(LETTERS)
        ]
        await source.write(Settle(1, 0, letters, (), [1], 10))
        invalid = [InvalidRecord(0, "malformed", "no", b"{")]
        await source.append(Append(Records.lines([]), invalid))
        yield found


def command(folder: Path) -> list[str]:
    return [
        "dead", "retry", "--data-dir", str(folder), "--config", str(folder / "ingestd.toml"),
        "--pipeline", "default",
    ]  # fmt: skip


async def check_both(source: SqliteJournal, target: SqliteJournal, moved: list[int]) -> None:
    """The letters with these numbers are records of the target, once each."""
    assert await target.dead_letters.poll_marked()
    taken = await target.dead_letters.requeue()
    (chunk,) = taken.chunks
    assert chunk.records.items() == [b"%d" % n for n in moved]
    assert chunk.records.names == tuple(f"{source.id}.1.{n}" for n in moved)
    assert taken.arrived == len(moved)
    assert not await target.dead_letters.poll_marked()
    assert target.ledger == Ledger(accepted=len(moved))
    assert source.ledger == Ledger(accepted=LETTERS, dead=LETTERS, invalid=1)
    for journal in (source, target):
        with opened(journal.path) as db:
            assert list(check.findings(db)) == []


async def test_letters_become_records_of_the_other_pipeline(
    journals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = journals
    run = command(tmp_path)
    assert main([*run, "2", "3", "6", "--into", "other"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "2 dead letters were moved into pipeline other\n"
    assert printed.err == "1 letter is no record of other: it stays\n"
    await check_both(source, target, [1, 2])
    assert main([*run, "--into", "other"]) == 0
    assert capsys.readouterr().out.startswith("3 dead")
    assert (await target.dead_letters.requeue()).arrived == 3
    await source.dead_letters.poll_marked()
    assert source.dead_totals.letters == source.dead_totals.invalid == 1
    with opened(target.path) as db:  # the next move forgets what the one before has left
        assert db.execute("SELECT count(*), sum(taken) FROM arrivals").fetchone() == (2, 2)
        assert db.execute("SELECT arrived FROM moved").fetchone() == (5,)
    with opened(source.path) as db:
        assert db.execute("SELECT letters FROM moved").fetchone() == (5,)
    assert main([*run, "--into", "default"]) == 0
    assert main([*run, "--into", "nothing"]) == 2


async def test_a_target_that_is_gone_stops_no_other_retry(
    journals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = journals
    with opened(source.path, write=True) as db:
        chosen = LetterFilter(ids=frozenset([1]))
        dead_letters.move(db, chosen, 1, lambda _: "", target="gone")
    assert main([*command(tmp_path), "2"]) == 0
    printed = capsys.readouterr()
    assert "1 dead letter will be requeued" in printed.out
    assert "still on their way: pipeline 'gone' has no journal" in printed.err
    assert main(["dead", "list", *command(tmp_path)[2:]]) == 0
    assert "[moving]" in capsys.readouterr().out


async def test_a_journal_that_is_built_anew_knows_its_arrivals(
    journals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = journals
    run = [*command(tmp_path), "--into", "other"]
    assert main([*run, "1", "2"]) == 0
    assert (await target.dead_letters.requeue()).arrived == 2
    assert main([*run, "3"]) == 0
    await target.close()
    repair(target.path, 1.0)
    with opened(source.path, write=True) as db:  # as if it had been killed before it deleted these
        db.execute("UPDATE dead SET retry = 2 WHERE id = 5")
        db.execute("INSERT INTO moving VALUES(5, 'other')")
    assert main(run) == 0
    assert "2 dead letters of an earlier command were moved" in capsys.readouterr().err
    await target.open(lambda _: None)
    assert (await target.dead_letters.requeue()).arrived == 3
    assert target.ledger == Ledger(accepted=LETTERS)


async def test_a_full_journal_takes_nothing_in(journals, tmp_path: Path) -> None:
    _, target = journals
    assert main([*command(tmp_path), "--into", "other", "--reason", "failed"]) == 0
    await target.append(Append(Records.lines([b"x" * ((1 << 20) - 20)])))
    assert await target.dead_letters.poll_marked()
    assert (await target.dead_letters.requeue()).arrived == 0
    await target.write(Seal(Sealed(1, (Span(1, 0, 1),), 1), Cursor(2, 0)))
    await target.write(Settle(1, 1, (), (), [1], (1 << 20) - 19))
    assert (await target.dead_letters.requeue()).arrived == LETTERS
    assert target.ledger == Ledger(accepted=LETTERS + 1, processed=1)


KILLED = """
import os, signal, sys
from ingestd.__main__ import main
from ingestd.journal.sqlite import offline
commits = int(sys.argv[1])
connect = offline.sqlite3.connect
class Connection(offline.sqlite3.Connection):
    def execute(self, sql, *rest):
        global commits
        if sql == "COMMIT":
            commits -= 1
            if commits == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(sql, *rest)
offline.sqlite3.connect = lambda *a, **o: connect(*a, **o, factory=Connection)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("commit", "is_taken"),
    [(1, False), (2, False), (3, False), (3, True), (4, False), (6, True)],
)
async def test_a_kill_before_any_commit_neither_loses_nor_doubles(
    journals, tmp_path: Path, capsys: pytest.CaptureFixture[str], commit: int, is_taken: bool
) -> None:
    source, target = journals
    run = [*command(tmp_path), "--into", "other", "--reason", "failed"]
    killed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, str(commit), *run,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert await killed.wait() == -signal.SIGKILL
    arrived = (await target.dead_letters.requeue()).arrived if is_taken else 0
    there = command(tmp_path)[2:]
    if commit > 1:  # no other command takes what is on its way
        assert main(["dead", "purge", "--all", "--yes", *there]) == 0
        capsys.readouterr()
        assert main(["dead", "list", *there]) == 0
        assert ("[moving]" in capsys.readouterr().out) == (commit < 4)
    assert main(run) == 0
    arrived += (await target.dead_letters.requeue()).arrived
    assert arrived == LETTERS
    assert target.ledger == Ledger(accepted=LETTERS)
    capsys.readouterr()
    assert main(["dead", "list", "--json", *there]) == 0
    assert "failed" not in capsys.readouterr().out
    with opened(source.path) as db:
        assert db.execute("SELECT count(*) FROM moving").fetchone() == (0,)
        assert db.execute("SELECT letters FROM moved").fetchone() == (LETTERS,)
