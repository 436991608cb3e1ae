"""`ingestd peek` on journals as daemons leave them, and beside one that is open."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from ingestd.__main__ import main
from ingestd.base.append import Append
from ingestd.base.clock import SystemClock
from ingestd.base.envelope import Envelope, pack
from ingestd.base.record import Records, Span
from ingestd.codecs.pointer import Where
from ingestd.journal.interface import Cursor, Seal, Sealed, Settle
from ingestd.journal.sqlite.journal import SqliteJournal

if TYPE_CHECKING:
    from pathlib import Path


def peek(capsys: pytest.CaptureFixture[str], folder: Path, *args: str) -> list[str]:
    assert main(["peek", "--data-dir", str(folder), *args]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
async def journal(tmp_path: Path):
    found = SqliteJournal(
        tmp_path / "journal.db", bytes_max=1 << 30, clock=SystemClock(), on_commit=lambda *_: None
    )
    await found.open(lambda _: None)
    yield found
    await found.close()


async def test_what_is_pending_is_printed_and_stays(
    journal: SqliteJournal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = pack(Envelope(source="http", client="shop"))
    await journal.append(
        Append(Records.lines([b'{"n":%d}' % n for n in range(5)]), envelope=origin)
    )
    await journal.append(Append(Records.sized([b'{\n"n": 5\n}', b"a \xff", "grün".encode()])))
    done, retried = Sealed(1, (Span(1, 0, 1),), 1), Sealed(2, (Span(1, 1, 2),), 2, attempts=3)
    await journal.write(Seal(done, Cursor(1, 1)))
    await journal.write(Seal(retried, Cursor(1, 3)))
    await journal.write(Settle(1, 1, (), (), (), 0))
    every = [
        '{"n":1}', '{"n":2}', '{"n":3}', '{"n":4}', '{"n":5}', '{"payload_base64":"YSD/"}', '"grün"'
    ]  # fmt: skip
    assert peek(capsys, tmp_path) == every
    assert peek(capsys, tmp_path, "default", "--limit", "2") == every[:2]
    assert peek(capsys, tmp_path, "--where", "n=5") == ['{"n":5}']
    first, *others = [json.loads(line) for line in peek(capsys, tmp_path, "--envelope")]
    assert first.pop("accepted_at").startswith("2")
    assert first == {
        "pipeline": "default", "id": f"{journal.id}.1.1", "batch": f"{journal.id}-2",
        "attempts": 3, "envelope": {"source": "http", "client": "shop"}, "payload": '{"n":1}',
    }  # fmt: skip
    assert [one["id"].partition(".")[2] for one in others] == [
        "1.2", "1.3", "1.4", "2.0", "2.1", "2.2",
    ]  # fmt: skip
    assert others[1]["batch"] == ""
    assert journal.ledger.pending == 7


async def test_every_record_is_one_line_of_json_in_utf_8(
    journal: SqliteJournal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000  # a line of a text pipeline may be
    await journal.append(Append(Records.sized([deep, b'{"a":"\xff"}', b"1"])))
    assert peek(capsys, tmp_path) == [
        json.dumps(deep.decode()), '{"payload_base64":"eyJhIjoi/yJ9"}', "1"
    ]  # fmt: skip


async def test_damage_is_counted_and_passed_by(
    journal: SqliteJournal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(3):
        await journal.append(Append(Records.lines([b"%d" % n])))
    journal._store.connection.execute("UPDATE chunks SET payload = x'380a' WHERE id = 2")
    assert main(["peek", "--data-dir", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.out.split() == ["0", "2"]
    assert printed.err == "1 record can't be read (ingestd journal verify)\n"


def test_wrong_use_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, text in (
        (["--where", "n"], "is no condition"),
        (["--limit", "0"], "at least 1"),
        (["--data-dir", str(tmp_path)], "there is no journal"),
    ):
        assert main(["peek", *args]) in {2, 78}
        assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("written", "record", "holds"),
    [
        (["a=1"], b'{"a":1}', True),
        (["a=1"], b'{"a":"1"}', True),
        (["a=1"], b'{"a":10}', False),
        (["a=x", "/b/0=y"], b'{"a":"x","b":["y"]}', True),
        (["a=x", "/b/0=y"], b'{"a":"x","b":[]}', False),
        (["a/b=~"], b'{"a/b":"~"}', True),
        (["a="], b'{"a":""}', True),
        (["a=ü"], b'{"a":"\\u00fc"}', True),
        (["a=1"], b"no JSON", False),
        ([], b"no JSON", True),
    ],
)
def test_conditions(written: list[str], record: bytes, holds: bool) -> None:
    assert Where(written).holds(record) == holds
