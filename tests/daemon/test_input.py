"""The real daemon on standard input: its summary, exit codes, and the way on after Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import os
import pty
import re
import select
import signal
import sqlite3
import struct
import subprocess
import sys
import termios
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.harness import ROOT, daemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

HANDLER = """
import os, time

import ingestd

def picky(batch: ingestd.Batch[dict]) -> None:
    for place, record in enumerate(batch):
        if record.get("bad"):
            batch.reject(place, "bad")

def slow(batch: list[dict]) -> None:
    time.sleep(0.2)

def hold(record: dict) -> dict:
    while not os.path.exists("go"):
        time.sleep(0.01)
    return record
"""


def run(cwd: Path, data: bytes, *args: str, handler: str = "sqlite") -> tuple[int, dict[str, Any]]:
    """The exit code of a daemon that gets `data`, and its events by name."""
    (cwd / "app.py").write_text(HANDLER)
    path = cwd / "input"
    path.write_bytes(data)
    with path.open("rb") as file:
        arguments = (handler, "--source", "stdin", "--executor.kind", "thread", *args)
        with daemon(*arguments, cwd=cwd, stdin=file) as one:
            code = one.wait()
            return code, {event["event"]: event for event in one.events}


def numbers(cwd: Path) -> list[int]:
    with closing(sqlite3.connect(cwd / "ingestd-data" / "out.db")) as db:
        return [row[0] for row in db.execute("SELECT n FROM records ORDER BY n")]


# -- the summary and the exit code -----------------------------------------------------------------


def test_invalid_records_are_not_counted_with_the_dead(tmp_path: Path) -> None:
    lines = b'{"n": 1}\n{"bad": 1}\n{"n":\n{"n": 2}\n{"bad": 2}\n'
    code, events = run(tmp_path, lines, handler="app:picky")
    assert code == 0
    summary = events["input_summed_up"]
    found = {key: summary[key] for key in ("lines", "accepted", "invalid", "processed", "dead")}
    assert found == {"lines": 5, "accepted": 4, "invalid": 1, "processed": 2, "dead": 2}
    assert events["drained"]["invalid"] == 1
    assert events["daemon_started"]["input"] == str(tmp_path / "input")
    assert "listening" not in events["daemon_started"]
    assert events["input_ended"]["waits"] == "until all is settled, without deadline"
    assert "drain_started" not in events
    assert "input_left" not in events


def test_the_end_of_input_waits_for_all_of_it(tmp_path: Path) -> None:
    """`drain.timeout` is for signals."""
    code, events = run(
        tmp_path, b"{}\n" * 6, "--drain.timeout", "50ms", "--batch.records_max", "1",
        "--executor.workers", "1", handler="app:slow",
    )  # fmt: skip
    assert code == 0
    assert events["drained"]["processed"] == 6
    assert events["input_ended"]["waits"] == "until all is settled, without deadline"
    assert "drain_started" not in events


@pytest.mark.parametrize(
    ("data", "expected", "problem"),
    [
        (b"", 0, None),
        pytest.param(b"\n\n", 0, None, marks=pytest.mark.slow),
        pytest.param(b'{"n": 1}', 0, None, marks=pytest.mark.slow),
        (b'{"n": 1}\nx\n', 0, None),
        (b"x\ny\n", 65, "it is not JSON"),
        ('{"n": 1}\n'.encode("utf-16"), 65, "it is UTF-16 text"),
        pytest.param(
            gzip.compress(b'{"n": 1}\n' * 99), 65, "it is compressed (gzip)", marks=pytest.mark.slow
        ),
        pytest.param(
            b"\x7fELF\0\0\0\0\n\0\0\0\0\n",
            65,
            "it is not text: there are zero bytes in it",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["empty", "blank", "no last LF", "some", "none", "UTF-16", "gzip", "binary"],
)
def test_an_input_of_which_nothing_could_be_accepted_is_65(
    data: bytes, expected: int, problem: str | None, tmp_path: Path
) -> None:
    code, events = run(tmp_path, data)
    assert code == expected
    assert ("nothing_processed" in events) == (expected == 65)
    assert events.get("input_unsuitable", {}).get("problem") == problem
    if expected == 65:
        assert events["nothing_processed"]["level"] == "error"
        assert events["input_invalid"]["level"] == "warning"


def test_an_input_whose_records_are_all_dead_is_65(tmp_path: Path) -> None:
    code, events = run(tmp_path, b'{"bad": 1}\n' * 3 + b"x\n", handler="app:picky")
    assert code == 65
    found = events["nothing_processed"]
    assert (found["lines"], found["dead"], found["invalid"]) == (4, 3, 1)


# -- leaving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_ctrl_c_says_where_to_go_on_and_there_each_line_comes_once(
    kind: str, tmp_path: Path
) -> None:
    """The line that it names is the first one that was not accepted, whatever was under way."""
    lines = [b'{"n": %d, "text": "%s"}\n' % (n, b"x" * (n % 400)) for n in range(30_000)]
    path = tmp_path / "in.ndjson"
    path.write_bytes(b"".join(lines))
    (tmp_path / "app.py").write_text(HANDLER)
    go = tmp_path / "go"
    first = 1
    # Nothing is stored before Ctrl-C, and the journal has no room for all lines: they do not end.
    arguments = ("sqlite", "--source", "stdin", "--stdin.inflight_bytes_max", "256KiB",
                 "--batch.records_max", "10000", "--handler.transform", "app:hold",
                 "--journal.bytes_max", "4MiB")  # fmt: skip
    for _ in range(3):
        go.unlink(missing_ok=True)
        command = ["tail", "-n", f"+{first}", str(path)]
        with contextlib.ExitStack() as stack:
            if kind == "file" and first == 1:
                stdin: Any = stack.enter_context(path.open("rb"))
            else:
                feed = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
                stdin = feed.stdout
            with daemon(*arguments, cwd=tmp_path, stdin=stdin) as one:
                enough, deadline = min(first + 2000, len(lines)), time.monotonic() + 60
                while one.status()["pipelines"]["default"]["accepted"] < enough:
                    assert time.monotonic() < deadline
                one.terminate(signal.SIGINT)
                one.event("drain_started")
                go.touch()
                assert one.wait() == 0
                left = [event for event in one.events if event["event"] == "input_left"]
        if not left:
            break
        shown = str(path) if kind == "file" and first == 1 else ""
        way = f"tail -n +{left[0]['line']} {shown} |" if shown else (
            f"... | tail -n +{left[0]['line']} |")  # fmt: skip
        assert left[0]["go_on"] == way
        first += left[0]["line"] - 1
    else:
        command = ["tail", "-n", f"+{first}", str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as feed, daemon(
            *arguments, cwd=tmp_path, stdin=feed.stdout
        ) as one:  # fmt: skip
            assert one.wait() == 0
    assert first > 1, "it was never left before its end"
    assert numbers(tmp_path) == list(range(30_000))


CTRL_C = b"\x03"


FEED = """
import sys, time
for n in range(5000):
    sys.stdout.write('{"n": %d}\\n' % n)
sys.stdout.write('{"n": 5000, "text": "be')
sys.stdout.flush()
time.sleep(600)
"""


def test_ctrl_c_of_a_terminal_ends_whoever_feeds_the_pipe_too(tmp_path: Path) -> None:
    """Then the end of the pipe is not the end of the input, and its last line is torn."""
    (tmp_path / "feed.py").write_text(FEED)
    ours, theirs = pty.openpty()
    line = (
        f"{sys.executable} feed.py | exec {sys.executable} -m ingestd run sqlite --source stdin"
        " --log.format json --admin.listen ''"
    )
    pid = os.fork()
    if not pid:
        _login(theirs)
        os.chdir(tmp_path)
        os.environ["PYTHONPATH"] = str(ROOT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job's is ignored
        os.execvp("bash", ["bash", "-c", line])
    os.close(theirs)
    said, status, asked = b"", None, False
    try:
        deadline = time.monotonic() + 90
        while status is None and time.monotonic() < deadline:
            if select.select([ours], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    said += os.read(ours, 65536)
            if not asked and re.search(rb"5,000 processed", said):
                os.write(ours, CTRL_C)
                asked = True
            done, found = os.waitpid(pid, os.WNOHANG)
            status = found if done else None
        with contextlib.suppress(OSError):
            while more := os.read(ours, 65536):
                said += more
    finally:
        os.close(ours)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert status is not None, said[-2000:]
    (left,) = re.findall(rb"\{[^{}]*\"input_left\"[^{}]*\}", said)
    first = json.loads(left)["line"]
    assert b"input_ended" not in said
    assert first == 5001
    assert numbers(tmp_path) == list(range(5000))


def _login(fd: int) -> None:
    os.setsid()
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
    for standard in (0, 1, 2):
        os.dup2(fd, standard)


# -- on a terminal ---------------------------------------------------------------------------------


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


def shown_by(ours: int, process: subprocess.Popen[bytes]) -> str:
    """All that a process wrote, until it ended."""
    text, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        ready, _, _ = select.select([ours], [], [], 0.05)
        if ready:
            text += os.read(ours, 65536)
        elif process.poll() is not None:
            return text.decode()
    raise AssertionError(text)


@pytest.mark.parametrize("columns", [62, pytest.param(80, marks=pytest.mark.slow)])
def test_the_live_line_fits_and_log_lines_do_not_run_into_it(columns: int, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(HANDLER)
    environ = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with terminal(columns) as (ours, theirs):
        process = subprocess.Popen(
            [sys.executable, "-m", "ingestd", "run", "app:slow", "--source", "stdin",
             "--admin.listen", "", "--batch.records_max", "500", "--executor.workers", "1"],
            cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=theirs,
            env={**environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "TERM": "xterm"},
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(b"{}\n" * 3000)
        process.stdin.close()
        shown = shown_by(ours, process)
        assert process.wait(60) == 0
    live = [part for part in shown.split("\r\x1b[K") if re.match(r"[\d,.kM]+ lines", part)]
    assert len(live) > 5
    for line in live[:-1]:
        assert len(line) < columns, line
        assert "\n" not in line  # nothing was written behind it before it was erased
        assert line.count("lines") == 1
    rates = [re.search(r"\(([\d.,k]+)/s\)", line) for line in live[:-1]]
    worked_off = [
        rate for line, rate in zip(live, rates, strict=False) if " 0 processed" not in line
    ]
    assert worked_off
    assert all(rate and rate[1] != "0" for rate in worked_off), live
    assert re.fullmatch(
        r"3,000 lines, 3,000 processed \([\d,]+/s\), 0 pending(, 8.8 KiB)?, [\d.]+ s\r\n",
        live[-1].partition("\n")[0] + "\n",
    )
    for event in ("input_ended", "drained", "daemon_left"):
        (line,) = [line for line in shown.split("\n") if event in line]
        assert re.fullmatch(r"(.*\x1b\[K)?\d{4}-\d\d-\d\dT[\d:.]+Z \[.*", line.rstrip("\r")), line
