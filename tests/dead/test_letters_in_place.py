"""`ingestd dead` on a journal that is open in this process: summed up, chosen by error, edited."""

from __future__ import annotations

import json
import os
import pty
import shutil
from typing import TYPE_CHECKING

import pytest

from ingestd.__main__ import main
from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.record import InvalidRecord, Records, Span
from ingestd.cli import dead
from ingestd.journal import handling
from ingestd.journal.dead_letters import DeadLetter
from ingestd.journal.interface import Cursor, Ledger, Seal, Sealed, Settle
from ingestd.journal.sqlite import check
from ingestd.journal.sqlite.journal import SqliteJournal
from ingestd.journal.sqlite.offline import opened

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
    monkeypatch.setattr(handling, "ERRORS_MAX", 1)
    facts = [json.loads(line) for line in run("summary", "--json")[0].splitlines()]
    assert [(f["error"], f["letters"]) for f in facts] == [
        ("KeyError: 'id'", 2), ("(further errors)", 2), ("(further errors)", 1),
    ]  # fmt: skip
    assert run("summary", "--error", "none of it")[1] == "no dead letters\n"


async def test_letters_of_one_error_are_retried_and_purged(journal: SqliteJournal, run) -> None:
    assert run("retry", "--error", "timeout", "--limit", "1")[0].startswith("1 dead")
    assert run("retry", "--error", "timeout")[0].startswith("1 dead letter will be requeued, 1 ")
    moved = await journal.dead_letters.requeue()
    assert [chunk.records.items() for chunk in moved.chunks] == [[b'{"n":1}', b'{"n":3}']]
    assert run("purge", "--error", "KeyError", "--yes")[0] == "2 dead letters deleted\n"
    listed = [json.loads(line) for line in run("list", "--json")[0].splitlines()]
    assert [one["id"] for one in listed] == [5]
    assert journal.ledger.dead == 2


async def test_an_edited_letter_is_requeued_and_every_number_stays_exact(
    journal: SqliteJournal, run, tmp_path: Path
) -> None:
    text = run("edit", "2", "--set", "n=7", "--set", "/who/name=jo", "--set", '/tags=["a"]')[0]
    assert text == "dead letter 2 was edited and will be requeued\n"
    (tmp_path / "new.json").write_text('{\n  "n": 8\n}\n')
    run("edit", "5", "--input", str(tmp_path / "new.json"))
    listed = [json.loads(line) for line in run("list", "--json")[0].splitlines()]
    assert [(one["id"], one["retry"]) for one in listed] == [
        (1, False), (2, True), (3, False), (4, False), (5, True),
    ]  # fmt: skip
    assert await journal.dead_letters.poll_marked()
    moved = await journal.dead_letters.requeue()
    (chunk,) = moved.chunks
    assert chunk.records.items() == [b'{"n":7,"who":{"name":"jo"},"tags":["a"]}', b'{"n":8}']
    assert chunk.records.names == (f"{journal.id}.1.1", "")
    assert (moved.requeued, moved.readmitted, moved.unfit) == (1, 1, 0)
    assert journal.ledger == Ledger(accepted=5, processed=0, dead=3, invalid=0)
    with opened(journal.path) as db:
        assert list(check.findings(db)) == []


async def test_an_edit_changes_what_it_names_and_nothing_else(
    journal: SqliteJournal, run, tmp_path: Path
) -> None:
    written = (
        b'{"a": 1.10, "b":[1e5,{"c":0.12345678901234567890}], "d":"\\u00e9",'
        b' "e":12345678901234567890123}'
    )
    (tmp_path / "new.json").write_bytes(written)
    run("edit", "2", "--input", str(tmp_path / "new.json"))
    assert await journal.dead_letters.poll_marked()
    (chunk,) = (await journal.dead_letters.requeue()).chunks
    (record,) = chunk.records.items()
    values = [("/b/1/x/y", "9.90"), ("f", "0.98765432109876543210"), ("/b/0", '"é"')]
    tokens = [dead._assignment(f"{key}={value}") for key, value in values]
    assert dead.with_values(record, tokens).decode() == (
        '{"a":1.10,"b":["é",{"c":0.12345678901234567890,"x":{"y":9.90}}],"d":"\\u00e9",'
        '"e":12345678901234567890123,"f":0.98765432109876543210}'
    )


async def test_records_that_cannot_be_read_are_edited_as_a_whole(
    journal: SqliteJournal, run, tmp_path: Path
) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    odd = [deep, b'{"a":{"b":"\xff"}}', b'{"\xff":1}']
    await journal.append(
        Append(
            Records.lines([]),
            [InvalidRecord(n, "malformed", "no", one) for n, one in enumerate(odd)],
        )
    )
    assert "needs a record that is JSON" in run("edit", "6", "--set", "n=1", code=2)[1]
    assert "not UTF-8" in run("edit", "7", "--set", "n=1", code=2)[1]
    assert "needs a record that is JSON" in run("edit", "8", "--set", "n=1", code=2)[1]
    for value in ("[" * 100_000 + "]" * 100_000, "\udcff", '"\udcff"'):
        assert "no JSON and no text" in run("edit", "1", "--set", f"n={value}", code=2)[1]
    (tmp_path / "new.json").write_bytes(deep)
    assert (
        "no record of pipeline"
        in run("edit", "7", "--input", str(tmp_path / "new.json"), code=2)[1]
    )
    (tmp_path / "new.json").write_bytes(b'{"n":8}')
    for number in ("6", "7", "8"):
        run("edit", number, "--input", str(tmp_path / "new.json"))
    assert run("edit", "7", "--set", '/a/b="b"', code=2)[1]  # it is requeued


async def test_what_is_no_record_changes_nothing(journal: SqliteJournal, run, monkeypatch) -> None:
    for args, problem in (
        (("1", "--input", "/dev/null"), "no record of pipeline default"),
        (("5", "--set", "n=1"), "needs a record that is JSON"),
        (("1", "--set", "/n/x=1"), "no place /n/x in the record"),
        (("1", "2", "--set", "n=1"), "the number of one dead letter"),
        (("1", "--set", "n"), "should be KEY=VALUE"),
        (("1",), "needs --set or --input"),
    ):
        monkeypatch.setattr("sys.stdin", None)
        assert problem in run("edit", *args, code=2)[1]
    assert run("edit", "1", "--set", "n=0")[1] == "nothing was changed\n"
    assert not await journal.dead_letters.poll_marked()
    run("edit", "1", "--set", "n=1")
    assert "is being requeued" in run("edit", "1", "--set", "n=2", code=2)[1]
    assert not journal.dead_letters.edit(2, b"something else", b"1")
    assert not journal.dead_letters.edit(9, b"", b"1")


EDITOR = """#!/bin/sh
grep -q '"n": 3' "$2" && sed "$1" "$2" > "$2.new" && mv "$2.new" "$2"
"""


async def test_an_editor_gets_the_record_in_a_file(
    journal: SqliteJournal, tmp_path: Path, monkeypatch, capfd
) -> None:
    editor = tmp_path / "editor"
    editor.write_text(EDITOR)
    editor.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("VISUAL", raising=False)
    number, side = pty.openpty()
    with os.fdopen(number, "rb"), os.fdopen(side) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        args = ["dead", "edit", "4", "--data-dir", str(tmp_path)]
        monkeypatch.setenv("EDITOR", f"{editor} s/3/nothing/")
        assert main(args) == 2
        (left,) = tmp_path.glob("ingestd-*/payload.json")
        assert f"your text is in {left}" in capfd.readouterr().err
        assert left.parent.stat().st_mode & 0o777 == 0o700
        shutil.rmtree(left.parent)
        monkeypatch.setenv("EDITOR", f"{editor} s/3/33/")
        assert main(args) == 0
        for editor_line, said in {
            "rm": "rm has left no ",
            "vi 'open": 'EDITOR is "vi \'open": No closing quotation',
        }.items():
            monkeypatch.setenv("EDITOR", editor_line)
            assert main(["dead", "edit", "1", "--data-dir", str(tmp_path)]) == 2
            assert capfd.readouterr().err.startswith(f"ingestd: {said}")
    assert not list(tmp_path.glob("ingestd-*"))
    moved = await journal.dead_letters.requeue()
    assert moved.chunks[0].records.items() == [b'{"n":33}']
