"""Files of lines are exact: what a crash left is cut off, and a batch that comes again is known."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ingestd.base.record import Records, Span
from ingestd.handlers.batch import Batch
from ingestd.handlers.outcome import Job
from ingestd.sinks import ledger
from ingestd.sinks.jsonl import JsonlOptions, JsonlSink

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
HOUR = "2026-01-01T09.jsonl"


class At(JsonlSink):
    seconds = 1767258000.0  # 2026-01-01T09:00:00Z

    def now(self) -> float:  # type: ignore[override]
        return self.seconds


def sink(folder: Path, **options: object) -> At:
    return At(JsonlOptions.of(path=folder, **options))


def batch(name: str, *numbers: int, lineage: Sequence[str] = ()) -> Batch[bytes]:
    records = Records.lines([b"%d" % n for n in numbers])
    return Batch(None, Job(name, 1, records, [Span(1, 0, len(numbers))], "j", 0.0, list(lineage)))


def numbers(folder: Path) -> list[int]:
    return [int(n) for file in sorted(folder.glob("*.jsonl")) for n in file.read_text().split()]


def test_a_batch_that_comes_again_also_in_parts_changes_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        one = sink(tmp_path)
        one(batch("j-1", 1, 2, 3))
        one(batch("j-2", 1, lineage=["j-1"]))
        one(batch("j-4", 2, lineage=["j-1", "j-3"]))
        one(batch("j-5", 4, lineage=["j-9"]))
        one.close()
    assert numbers(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("left", [b"7\n8\n", b"7\n8", b"7"])
def test_whole_lines_that_a_crash_left_are_cut_off(tmp_path: Path, left: bytes) -> None:
    one = sink(tmp_path)
    one(batch("j-1", 1, 2))
    with (tmp_path / HOUR).open("ab") as file:
        file.write(left)  # of j-2, whose name was not entered
    other = sink(tmp_path)
    other(batch("j-2", 7, 8, 9))
    one(batch("j-3", 10))
    assert numbers(tmp_path) == [1, 2, 7, 8, 9, 10]
    one.close()
    other.close()


@pytest.mark.parametrize("compress", ["none", "gzip"])
def test_what_a_crash_left_in_an_hour_that_is_over(tmp_path: Path, compress: str) -> None:
    one = sink(tmp_path)
    one(batch("j-1", 1, 2))
    one.close()
    with (tmp_path / HOUR).open("ab") as file:
        file.write(b"7\n")
    other = sink(tmp_path, compress=compress)
    other.seconds += 3600
    other(batch("j-2", 7, 8))
    other.close()
    found = numbers(tmp_path)
    for file in tmp_path.glob("*.gz"):
        import gzip

        found += [int(n) for n in gzip.decompress(file.read_bytes()).split()]
    assert sorted(found) == [1, 2, 7, 8]


def test_files_that_were_there_before_the_ledger_or_were_taken_away(tmp_path: Path) -> None:
    (tmp_path / HOUR).write_bytes(b"1\n2\n")
    one = sink(tmp_path)
    one(batch("j-1", 3))
    (tmp_path / HOUR).rename(tmp_path / "taken.jsonl")
    one(batch("j-2", 4))
    one(batch("j-3", 5))
    one(batch("j-1", 3))
    one.close()
    assert (tmp_path / "taken.jsonl").read_bytes() == b"1\n2\n3\n"
    assert (tmp_path / HOUR).read_bytes() == b"4\n5\n"


def test_a_torn_line_of_the_ledger_is_no_line(tmp_path: Path) -> None:
    one = sink(tmp_path)
    one(batch("j-1", 1))
    one.close()
    with (tmp_path / ".batches").open("ab") as file:
        file.write(b"j-2 2026-01")
    with (tmp_path / HOUR).open("ab") as file:
        file.write(b"2\n")
    again = sink(tmp_path)
    again(batch("j-1", 1))
    again(batch("j-2", 2))
    again.close()
    assert numbers(tmp_path) == [1, 2]


def test_the_ledger_is_bounded_for_all_writers(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ledger, "NAMES_MAX", 20)
    one, other = sink(tmp_path, rotate_bytes="1KiB"), sink(tmp_path, rotate_bytes="1KiB")
    for number in range(400):
        (one, other)[number % 2](batch(f"j-{number}", number))
        (other, one)[number % 2](batch(f"j-{number}", number))
    one.close()
    other.close()
    assert sorted(numbers(tmp_path)) == list(range(400))
    assert (tmp_path / ".batches").stat().st_size < 64 * 20 * 5
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


def test_a_disk_that_refuses_the_name_takes_the_lines_back(tmp_path: Path, monkeypatch) -> None:
    one = sink(tmp_path)
    one(batch("j-1", 1))
    with monkeypatch.context() as patched:
        patched.setattr(
            ledger.BatchLedger, "enter", lambda *_: (_ for _ in ()).throw(OSError("full"))
        )
        with pytest.raises(OSError, match="full"):
            one(batch("j-2", 2))
    assert numbers(tmp_path) == [1]
    one(batch("j-2", 2))
    one.close()
    assert numbers(tmp_path) == [1, 2]


CHILD = """
import sys
from tests.sinks.test_jsonl_ledger import batch
from ingestd.sinks.jsonl import JsonlOptions, JsonlSink
sink = JsonlSink(JsonlOptions.of(path=sys.argv[1], rotate_bytes="4KiB"))
for number in range(int(sys.argv[2]), 100_000):
    sink(batch(f"j-{number}", *range(number * 20, number * 20 + 20)))
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_each_batch_once(tmp_path: Path) -> None:
    following = 0
    for kill in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, tmp_path, str(following)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        assert child.stdout is not None
        for _ in range(3 + kill * 5):
            following = int(child.stdout.readline())
        threading.Timer(0.001 * kill, os.kill, (child.pid, signal.SIGKILL)).start()
        rest = child.stdout.read().split()
        child.wait()
        child.stdout.close()
        following = int(rest[-1]) if rest else following  # comes again: its answer is not known
    last = sink(tmp_path, rotate_bytes="4KiB")
    last(batch(f"j-{following}", *range(following * 20, following * 20 + 20)))
    last.close()
    found = [
        json.loads(line)
        for file in tmp_path.glob("*.jsonl")
        for line in file.read_bytes().splitlines()
    ]
    assert len(found) == len(set(found))
    assert set(range((following + 1) * 20)) <= set(found)


def by_folder(path: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for file in sorted(path.rglob("*.jsonl")):
        held = found.setdefault(str(file.parent.relative_to(path)), [])
        held += [json.loads(line)["n"] for line in file.read_bytes().splitlines()]
    return found


def of(name: str, *records: object) -> Batch[bytes]:
    lines = Records.lines([json.dumps(one).encode() for one in records])
    return Batch(None, Job(name, 1, lines, [Span(1, 0, len(records))], "j"))


def test_folders_by_fields(tmp_path: Path) -> None:
    records = [
        {"n": 1, "c": "de", "k": 1}, {"n": 2, "c": "fr", "k": True}, {"n": 3, "c": "de", "k": 1},
        {"n": 4}, {"n": 5, "c": "../..", "k": "a b"}, {"n": 6, "c": ".", "k": {}},
        {"n": 7, "c": "x" * 65, "k": 1.5},
    ]  # fmt: skip
    for _ in range(2):
        one = sink(tmp_path, partition="c={c}/{k}")
        one(of("j-1", *records))
        one.close()
    assert by_folder(tmp_path) == {
        "c=de/1": [1, 3], "c=fr/true": [2], "c=_none/_none": [4], "c=%2E.%2F../a%20b": [5],
        "c=%2E/_none": [6], "c=_other/1.5": [7],
    }  # fmt: skip


def test_a_name_that_is_too_long_for_a_folder_is_another_one(tmp_path: Path) -> None:
    one = sink(tmp_path, partition="c={c}-{k}")
    one(of("j-1", {"n": 1, "c": "é" * 64}, {"n": 2, "c": "é" * 20, "k": "é" * 21}, {"n": 3}))
    one(of("j-2", {"n": 4, "c": "😀" * 10, "k": "é" * 20}))
    one.close()
    found = by_folder(tmp_path)
    assert (found.pop("_other"), found.pop("c=_none-_none")) == ([1], [3])
    assert sorted(found.values()) == [[2], [4]]


def test_a_batch_that_is_in_some_of_its_folders_comes_again(tmp_path: Path) -> None:
    one = sink(tmp_path, partition="{c}")
    (tmp_path / "b").write_bytes(b"")  # in the way of a folder
    with pytest.raises(OSError, match="b"):
        one(of("j-1", {"n": 1, "c": "a"}, {"n": 2, "c": "b"}, {"n": 3, "c": "c"}))
    (tmp_path / "b").unlink()
    one(of("j-1", {"n": 1, "c": "a"}, {"n": 2, "c": "b"}, {"n": 3, "c": "c"}))
    one.close()
    assert by_folder(tmp_path) == {"a": [1], "b": [2], "c": [3]}


def test_folders_and_open_files_are_bounded(tmp_path: Path) -> None:
    for life in range(2):
        one = sink(tmp_path, partition="{c}", partitions_max=40)
        before = len(list(Path("/proc/self/fd").iterdir()))
        one(of(f"j-{life}", *({"n": life * 100 + n, "c": f"c{n}"} for n in range(60))))
        assert len(list(Path("/proc/self/fd").iterdir())) - before <= 2 * 33
        one.close()
    found = by_folder(tmp_path)
    assert len(found) == 41
    assert len(found["_other"]) == 40
    assert sorted(n for numbers in found.values() for n in numbers) == [
        *range(60),
        *range(100, 160),
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"partition": "all"}, "has no {field}"), ({"partition": "/{a}"}, "is not a path"),
        ({"partition": "../{a}"}, "is not a path"), ({"partition": "{a}//{b}"}, "is not a path"),
        ({"partition": "{a}", "compress": "gzip"}, "compress: does not go"),
        ({"partition": "{a}", "partitions_max": 0}, "of at least 1"),
    ],
)  # fmt: skip
def test_patterns_that_make_no_sense(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        JsonlOptions.of(**options)
