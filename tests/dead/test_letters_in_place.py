"""`ingestd dead` on a journal that is open in this process: summed up, chosen by error, edited."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from ingestd.__main__ import main
from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.record import InvalidRecord, Records, Span
from ingestd.cli import dead
from ingestd.journal.dead_letters import DeadLetter
from ingestd.journal.interface import Cursor, Seal, Sealed, Settle
from ingestd.journal.sqlite.journal import SqliteJournal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ERRORS = ["KeyError: 'id'", "timeout after 12 ms", "KeyError: 'id'", "timeout after 7 ms"]


@pytest.fixture
async def journal(tmp_path: Path):
    """A journal with four dead letters in one row, and one that was never accepted."""
    found = SqliteJournal(
        tmp_path / "journal.db", bytes_max=1 << 30, clock=SystemClock(), on_commit=lambda *_: None
    )
    await found.open(lambda _: None)
    await found.append(Append(Records.lines([b'{"n":%d}' % n for n in range(4)])))
    await found.write(Seal(Sealed(1, (Span(1, 0, 4),), 4), Cursor(2, 0)))
    letters = [
        DeadLetter(f"{found.id}.1.{n}", "failed", error, "", b'{"n":%d}' % n, 8, 1.0, 2.0)
        for n, error in enumerate(ERRORS)
    ]
    await found.write(Settle(1, 0, letters, (), [1], 32))
    await found.append(Append(Records.lines([]), [InvalidRecord(0, "malformed", "no", b'{"n":')]))
    yield found
    await found.close()


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    def run(action: str, *args: str, code: int = 0) -> tuple[str, str]:
        assert main(["dead", action, "--data-dir", str(tmp_path), *args]) == code
        return capsys.readouterr()

    return run


async def test_errors_are_summed_up_whatever_the_numbers_in_them(
    journal: SqliteJournal, run, monkeypatch
) -> None:
    facts = [json.loads(line) for line in run("summary", "--json")[0].splitlines()]
    assert [(f["reason"], f["letters"], f["bytes"], f["example"], f["error"]) for f in facts] == [
        ("failed", 2, 14, 3, "KeyError: 'id'"),
        ("failed", 2, 14, 4, "timeout after 7 ms"),
        ("malformed", 1, 5, 5, "no"),
    ]
    table = run("summary", "--reason", "failed", "--limit", "3")[0].splitlines()
    assert [line.split()[0] for line in table] == ["LETTERS", "2", "1"]
    monkeypatch.setattr(dead, "ERRORS_MAX", 1)
    facts = [json.loads(line) for line in run("summary", "--json")[0].splitlines()]
    assert [(f["error"], f["letters"]) for f in facts] == [
        ("KeyError: 'id'", 2), ("(further errors)", 2), ("(further errors)", 1),
    ]  # fmt: skip
    assert run("summary", "--error", "none of it")[1] == "no dead letters\n"


async def test_letters_of_one_error_are_retried_and_purged(journal: SqliteJournal, run) -> None:
    assert run("retry", "--error", "timeout", "--limit", "1")[0].startswith("1 dead")
    assert run("retry", "--error", "timeout")[0].startswith("1 dead letters will be requeued, 1 ")
    moved = await journal.dead_letters.requeue()
    assert [chunk.records.items() for chunk in moved.chunks] == [[b'{"n":1}', b'{"n":3}']]
    assert run("purge", "--error", "KeyError", "--yes")[0] == "2 dead letters deleted\n"
    listed = [json.loads(line) for line in run("list", "--json")[0].splitlines()]
    assert [one["id"] for one in listed] == [5]
    assert journal.ledger.dead == 2
