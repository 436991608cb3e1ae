"""Two gigabytes through `fetch`, killed in the middle: every line is in the sink exactly once."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.harness import daemon

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1024**2
LINE = b'{"n": %9d, "text": "' + b"all work and no play makes jack a dull boy. " * 92 + b'"}\n'
BLOCK_LINES = 1000
BLOCKS = 2 * 1024**3 // (BLOCK_LINES * len(LINE % 0)) + 1
LINES = BLOCKS * BLOCK_LINES
MEMORY_MAX = 250 * MIB


def member(block: int) -> bytes:
    """One gzip member, of lines with numbers that no other one has."""
    first = block * BLOCK_LINES
    lines = b"".join([LINE % n for n in range(first, first + BLOCK_LINES)])
    return zlib.compress(lines, 1, wbits=31)


class Handler(SimpleHTTPRequestHandler):
    def copyfile(self, source: Any, outputfile: Any) -> None:
        assert isinstance(self.server, Server)
        while piece := source.read(MIB):
            self.server.wait_to_send(source.tell())
            outputfile.write(piece)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Sends no more of its file than it may.

    Attributes:
        url: of the file.
        size: of it.
    """

    url = ""
    size = 0

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self._end = 0.0
        self._moved = threading.Condition()

    def allow(self, share: float) -> None:
        with self._moved:
            self._end = share * self.size
            self._moved.notify_all()

    def wait_to_send(self, end: int) -> None:
        with self._moved:
            self._moved.wait_for(lambda: end <= self._end)

    def handle_error(self, *_: object) -> None:
        pass  # a client that was killed


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Server]:
    """A server of two gigabytes of lines, gzipped."""
    folder = tmp_path / "served"
    folder.mkdir()
    with (folder / "lines.ndjson.gz").open("wb") as file, ThreadPoolExecutor(2) as pool:
        file.writelines(pool.map(member, range(BLOCKS)))
    server = Server(folder)
    server.url = f"http://127.0.0.1:{server.server_address[1]}/lines.ndjson.gz"
    server.size = (folder / "lines.ndjson.gz").stat().st_size
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.allow(1)
    server.shutdown()
    thread.join()
    server.server_close()


def small_table(path: Path) -> None:
    """The sink's table, made before it: the text of a row goes as soon as the row is there."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute('CREATE TABLE records("_id" TEXT PRIMARY KEY NOT NULL, "n", "text")')
        db.execute(
            "CREATE TRIGGER shorten AFTER INSERT ON records BEGIN"
            " UPDATE records SET text = length(new.text) WHERE rowid = new.rowid; END"
        )


def rows(path: Path) -> int:
    with closing(sqlite3.connect(path, timeout=30)) as db:
        return int(db.execute("SELECT count(*) FROM records").fetchone()[0])


def memory(pid: int, what: str) -> int:
    """Bytes, from the kernel's own account."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith(f"{what}:")]
    return int(line.split()[1]) * 1024


@pytest.mark.slow
def test_two_gigabytes_and_three_kills_are_every_line_exactly_once(
    served: Server, tmp_path: Path
) -> None:
    sink = tmp_path / "rows.db"
    small_table(sink)
    arguments = [
        "sqlite", "--source", "fetch", "--fetch.urls", served.url, "--fetch.allow_private", "true",
        "--handler.options.path", str(sink), "--executor.kind", "process",
        "--executor.workers", "1",
    ]  # fmt: skip
    peaks = []
    for share in (0.2, 0.5, 0.8):
        served.allow(share + 0.1)  # so that it is not done before it is killed
        with daemon(*arguments, cwd=tmp_path) as one:
            deadline = time.monotonic() + 240
            while rows(sink) < share * LINES:
                assert time.monotonic() < deadline
                assert one.process.poll() is None, one.other
                time.sleep(0.05)
            peaks.append(memory(one.process.pid, "VmHWM"))
            os.kill(one.process.pid, signal.SIGKILL)
            one.wait()
    assert rows(sink) < LINES
    served.allow(1)
    with daemon(*arguments, cwd=tmp_path) as one:
        while one.process.poll() is None and not any(
            event["event"] == "input_ended" for event in one.events
        ):
            time.sleep(0.02)
        peaks.append(memory(one.process.pid, "VmHWM"))
        assert one.wait(240) == 0, one.events[-5:]
        assert one.event("drained")["balanced"]
    with closing(sqlite3.connect(sink)) as db:
        found = db.execute("SELECT count(*), count(DISTINCT n), min(n), max(n) FROM records")
        assert found.fetchone() == (LINES, LINES, 0, LINES - 1)
        assert db.execute("SELECT DISTINCT text FROM records").fetchall() == [(44 * 92,)]
    assert max(peaks) < MEMORY_MAX, peaks
