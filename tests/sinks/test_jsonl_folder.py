from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ingestd.sinks.files import Folder, hour_of, next_number

ROOT = Path(__file__).parents[2]
NINE = 1_767_258_000.0  # 2026-01-01T09:00:00Z


class Time:
    def __init__(self, seconds: float = NINE) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


@pytest.fixture
def made(tmp_path: Path):
    folders: list[Folder] = []

    def made(**more) -> Folder:
        folders.append(Folder(tmp_path / "a" / "out", **({"rotate_bytes": 1 << 20} | more)))
        return folders[-1]

    yield made
    for folder in folders:
        folder.close()


def test_hours_are_utc_and_sort_like_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hour_of(NINE) == hour_of(NINE + 3599.9) == "2026-01-01T09"
    assert hour_of(NINE - 0.1) == "2026-01-01T08"
    assert hour_of(NINE + 3600 * 15) == "2026-01-02T00"


def test_numbers_go_up_whatever_became_of_the_files() -> None:
    have = ["2026-01-01T09.jsonl", "2026-01-01T09.2.jsonl.gz", "2026-01-01T08.7.jsonl", "x.9.jsonl"]
    assert next_number(have, "2026-01-01T09") == 3
    assert next_number(["2026-01-01T09.10.jsonl", "2026-01-01T09.9.jsonl"], "2026-01-01T09") == 11
    assert next_number([], "2026-01-01T09") == 1


def test_one_file_an_hour_private_to_the_user(made, tmp_path: Path) -> None:
    now = Time()
    old = os.umask(0)
    try:
        folder = made(now=now)
        assert not (tmp_path / "a").exists()
        folder.append(b"1\n")
        folder.append(b"2\n3\n")
        now.seconds += 3600
        folder.append(b"4\n")
    finally:
        os.umask(old)
    assert names(folder.path) == ["2026-01-01T09.jsonl", "2026-01-01T10.jsonl"]
    assert (folder.path / "2026-01-01T09.jsonl").read_bytes() == b"1\n2\n3\n"
    assert (folder.path / "2026-01-01T10.jsonl").read_bytes() == b"4\n"
    assert {oct(p.stat().st_mode & 0o777) for p in folder.path.iterdir()} == {"0o600"}
    assert oct(folder.path.stat().st_mode & 0o777) == "0o700"
    assert oct(folder.path.parent.stat().st_mode & 0o777) == "0o700"


def test_a_full_file_is_set_aside_and_others_notice(made) -> None:
    rotated: list[str] = []
    one = made(now=Time(), rotate_bytes=6, set_aside=lambda: rotated.append("one"))
    other = made(now=Time(), rotate_bytes=6, set_aside=lambda: rotated.append("other"))
    one.append(b"11\n")
    other.append(b"22\n")
    one.append(b"33\n")
    other.append(b"44\n")  # holds the old file open, which has another name by now
    other.append(b"longer than six\n")
    one.append(b"55\n")
    contents = {name: (one.path / name).read_bytes() for name in names(one.path)}
    assert contents == {
        "2026-01-01T09.1.jsonl": b"11\n22\n",
        "2026-01-01T09.2.jsonl": b"33\n44\n",
        "2026-01-01T09.3.jsonl": b"longer than six\n",
        "2026-01-01T09.jsonl": b"55\n",
    }
    assert rotated == ["one", "other", "one"]


def test_a_file_or_folder_that_someone_took_away_is_made_again(made) -> None:
    folder = made(now=Time())
    folder.append(b"1\n")
    file = folder.path / "2026-01-01T09.jsonl"
    file.rename(folder.path.parent / "elsewhere")
    folder.append(b"2\n")
    assert file.read_bytes() == b"2\n"
    file.unlink()
    folder.path.rmdir()
    folder.append(b"3\n")
    assert file.read_bytes() == b"3\n"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b"new\n"),
        (b"whole\n", b"whole\nnew\n"),
        (b"whole\nto", b"whole\nnew\n"),
        (b"torn from the start", b"new\n"),
        (b"whole\n" + b"t" * 200_000, b"whole\nnew\n"),
        (b"w" * 200_000 + b"\n" + b"t" * 65_536, b"w" * 200_000 + b"\nnew\n"),
        (b"whole\n" + bytes(4096), b"whole\nnew\n"),
    ],
    ids=["empty", "whole", "torn", "nothing-whole", "long", "at-a-block", "zeros-after-power-loss"],
)
@pytest.mark.parametrize("was_open", [False, True])
def test_a_torn_tail_is_cut(made, before, after, was_open, caplog) -> None:
    folder = made(now=Time())
    file = folder.path / "2026-01-01T09.jsonl"
    if was_open:
        folder.append(b"")
    else:
        folder.path.mkdir(parents=True)
    file.write_bytes(before)
    folder.append(b"new\n")
    assert file.read_bytes() == after
    lost = len(before) + 4 - len(after)
    assert [f"bytes={lost}" in r.message for r in caplog.records] == ([True] if lost else [])


def test_a_tail_is_cut_only_under_the_lock(made) -> None:
    """A writer in the middle of its write is not a torn tail."""
    folder = made(now=Time())
    folder.append(b"1\n")
    file = folder.path / "2026-01-01T09.jsonl"
    with file.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        os.write(other.fileno(), b"2 is only ha")
        thread = threading.Thread(target=folder.append, args=(b"3\n",))
        thread.start()
        os.write(other.fileno(), b"lf\n")
    thread.join(60)
    assert file.read_bytes() == b"1\n2 is only half\n3\n"


FULL_DISK = """
import os, resource, signal, sys
from pathlib import Path
from ingestd.sinks.files import Folder
folder = Folder(Path(sys.argv[1]), rotate_bytes=1 << 20, now=lambda: 1767258000.0)
folder.append(b"first\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
file = Path(sys.argv[1]) / "2026-01-01T09.jsonl"
for attempt in range(2):
    try:
        folder.append(b"x" * 20_000 + b"\\n")
    except OSError as exc:
        print(exc.errno, file.stat().st_size)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
folder.append(b"last\\n")
folder.close()
print(len(os.listdir("/proc/self/fd")))
"""


def test_a_write_that_runs_out_of_space_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stderr == ""
    first, second, _ = done.stdout.splitlines()
    assert first == second == f"{errno.EFBIG} 6"
    assert (tmp_path / "2026-01-01T09.jsonl").read_bytes() == b"first\nlast\n"


def test_a_folder_that_can_not_be_made(made, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(OSError):
        made().append(b"1\n")


KILLED = """
import sys
from pathlib import Path
from ingestd.sinks.files import Folder
folder = Folder(Path(sys.argv[1]), rotate_bytes=40_000, now=lambda: 1767258000.0)
line = sys.argv[2].encode() * 500 + b"\\n"
folder.append(line)
print("wrote", flush=True)
while True:
    folder.append(line * 20)
"""


def test_writers_killed_at_any_moment_leave_only_whole_lines(made, tmp_path: Path, until) -> None:
    """`kill -9` while several write and rotate: the survivors and the next start go on."""
    path = tmp_path / "a" / "out"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, path, letter], stdout=subprocess.PIPE, cwd=ROOT
        )
        for letter in "abc"
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline()
        for count, writer in enumerate(writers, start=1):
            until(lambda count=count: len(list(path.glob("*"))) > 5 * count)
            writer.kill()
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            writer.stdout.close()
    made(now=Time(), rotate_bytes=40_000).append(b"end\n")
    lines = [line for file in path.iterdir() for line in file.read_bytes().splitlines()]
    assert lines.count(b"end") == 1
    assert {bytes(set(line)) for line in lines if line != b"end"} == {b"a", b"b", b"c"}
    assert {len(line) for line in lines if line != b"end"} == {500}
