"""Faults of those around it: clients, whoever reads its logs, the sink, and the clock."""

from __future__ import annotations

import http.client
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ingestd.base.append import Append
from ingestd.prove.servers import free_port
from tests.daemon.harness import ROOT, Daemon, daemon
from tests.daemon.test_daemon import _Address, _until_connects
from tests.faults.tools import HANDLER, check_names, into, notes, seen, until
from tests.pipeline.test_pipeline import drained, numbers
from tests.pipeline.test_pipeline import until as awaited

HEAD = b"POST /v1/records HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n"


def _connected(one: Daemon, address: str = "") -> socket.socket:
    return socket.create_connection(("127.0.0.1", one.port), 60, (address, 0))


def _accepts(one: Daemon) -> bool:
    """Whether a record gets its 202: on a busy machine this client may be slow, too."""
    try:
        return one.post(b"1\n")[0] == 202
    except (OSError, http.client.HTTPException):
        return False


def test_slow_headers(tmp_path: Path) -> None:
    """A client that never ends its headers: its connection is closed, others are served."""
    with daemon(*into(tmp_path, http__header_timeout="1s"), cwd=tmp_path) as one:
        with _connected(one) as slow:
            slow.sendall(b"POST /v1/records HT")
            until(lambda: _accepts(one))
            until(lambda: slow.recv(1024) == b"", what="the connection is still open")
        one.terminate()
        assert one.wait() == 0


def test_a_slow_body(tmp_path: Path) -> None:
    """A client that never ends its body: 408 at `http.body_timeout`, nothing of it is kept."""
    with daemon(*into(tmp_path, http__body_timeout="300ms"), cwd=tmp_path) as one:
        with _connected(one) as slow:
            slow.sendall(HEAD + b"1\n")
            assert slow.recv(4096).startswith(b"HTTP/1.1 408")
        with _connected(one) as quick:  # in one piece: never late for its deadline
            quick.sendall(HEAD + b"9\n\n\n")
            assert quick.recv(4096).startswith(b"HTTP/1.1 202")
        assert one.until_settled()["accepted"] == 1
    assert seen(tmp_path) == {9}


@pytest.mark.slow
def test_2000_idle_connections(tmp_path: Path) -> None:
    """2,000 clients that connect and say nothing: the one who speaks gets its 202."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 8192:
        pytest.skip(f"needs 8,192 file descriptors, may have {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, hard))
    idle: list[socket.socket] = []
    try:
        with daemon(*into(tmp_path), cwd=tmp_path) as one:
            idle += [_connected(one, f"127.0.1.{1 + n % 20}") for n in range(2000)]
            assert one.post(b"1\n")[0] == 202
            assert one.request("GET", "/readyz", admin=True)[0] == 200
            one.terminate()
            assert one.wait() == 0
            assert one.event("drained")["processed"] == 1
    finally:
        for sock in idle:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_that_are_reset(tmp_path: Path) -> None:
    """Clients reset their connections before, while and after they get an answer."""
    reset = struct.pack("ii", 1, 0)
    answered = []
    with daemon(*into(tmp_path), cwd=tmp_path) as one:
        for n in range(100, 160):
            with _connected(one) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                sock.sendall(HEAD + (b"%d\n" % n)[: 2 if n % 3 == 0 else 4])
                if n % 3 == 1:
                    assert sock.recv(4096).startswith(b"HTTP/1.1 202")
                    answered.append(n)
        assert one.post(b"1\n")[0] == 202
        one.until_settled()
        one.terminate()
        assert one.wait() == 0
        report = one.event("drained")
        assert report["balanced"]
        assert report["accepted"] == len(seen(tmp_path))
        assert not [event for event in one.events if event["level"] == "error"]
    assert {1, *answered} <= seen(tmp_path)
    assert not {n for n in seen(tmp_path) if n % 3 == 0}


@pytest.mark.parametrize(
    "closed",
    [
        ">&- 2>&- <&-",
        pytest.param(">&-", marks=pytest.mark.slow),
        pytest.param("2>&-", marks=pytest.mark.slow),
    ],
)
def test_standard_streams_that_are_closed(tmp_path: Path, closed: str) -> None:
    """It is started with its standard streams closed: it serves, and no journal gets a log line."""
    door, admin = free_port(), free_port()
    process = subprocess.Popen(
        ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "ingestd", "run",
         *into(tmp_path), "--listen", f"127.0.0.1:{door}", "--admin.listen", f"127.0.0.1:{admin}"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _until_connects(door)
        one = _Address(door, admin)
        for n in range(5):
            assert one.post(b"%d\n{" % n)[0] == 202  # and something to be logged
        assert one.until_settled()["processed"] == 5
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert seen(tmp_path) == set(range(5))
    assert not list((tmp_path / "ingestd-data").glob("*damaged*"))


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


@pytest.mark.slow
def test_a_burst_ten_times_the_memory_bound(tmp_path: Path) -> None:
    """A burst of ten times `queue.bytes_max` while the sink hangs: it goes to disk, not memory."""
    (tmp_path / "hang").touch()
    bound = 12 << 20
    more = {"queue__bytes_max": str(bound), "drain__timeout": "300ms", "format": "text"}
    body = b"\n".join(b"%06d" % n + b"x" * 1000 for n in range(1000))
    with daemon(*into(tmp_path, "Hangs", **more), cwd=tmp_path) as one:
        for _ in range(12):  # so that what every request needs is there
            assert one.post(body)[0] == 202
        before = _resident(one.pid)
        for _ in range(10 * bound // len(body)):
            assert one.post(body)[0] == 202
        grown = _resident(one.pid) - before
        # The queue, and the page caches of the journal's connections.
        assert grown < bound + (48 << 20), f"{grown / 1e6:.0f} MB"
        one.terminate()
        assert one.wait() == 0


async def test_a_sink_that_loses_its_answer(start, tmp_path: Path) -> None:
    """The sink commits and its answer is lost: the same records again under the same id."""
    (tmp_path / "down").touch()
    pipeline = await start(
        HANDLER + "Fails",
        batch={"records_max": 5},
        retry={"backoff": "1ms", "backoff_max": "2ms", "attempts_max": 1000},
        options={"folder": str(tmp_path)},
    )
    await pipeline.accept(Append(numbers(0, 20)))
    await awaited(lambda: len(notes(tmp_path)) > 12)
    (tmp_path / "down").unlink()
    report = await drained(pipeline)
    assert report.ledger[:3] == (20, 20, 0)
    check_names(tmp_path)
    assert max(attempt for _, attempt, _ in notes(tmp_path)) > 1


LIBRARY = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)
needs_faketime = pytest.mark.skipif(LIBRARY is None, reason="libfaketime is not installed")
YEAR = 365 * 86400


def _faked(offset: Path) -> dict[str, str]:
    return {
        "LD_PRELOAD": str(LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


@pytest.mark.slow
@needs_faketime
@pytest.mark.parametrize("jump", [YEAR, -YEAR], ids=["forward", "back"])
def test_the_clock_jumps_a_year(tmp_path: Path, jump: int) -> None:
    """The wall clock jumps while it runs: batches still go by their age, retries still come."""
    offset = tmp_path / "offset"
    offset.write_text("+0")
    arguments = into(tmp_path, "Fails", retry__backoff="300ms", retry__backoff_max="300ms",
                     retry__attempts_max="1000", batch__age_max="300ms")  # fmt: skip
    with daemon(*arguments, cwd=tmp_path, environ=_faked(offset)) as one:
        assert one.post(b"1\n")[0] == 202
        until(lambda: 1 in seen(tmp_path))
        (tmp_path / "down").touch()
        assert one.post(b"2\n")[0] == 202
        one.event("batch_failed")
        assert one.post(b"3\n")[0] == 202  # open when the clock jumps
        offset.write_text(f"{jump:+d}")
        (tmp_path / "down").unlink()
        assert one.post(b"4\n")[0] == 202
        assert one.until_settled(timeout=120)["processed"] == 4
        one.terminate()
        assert one.wait() == 0
        last = one.event("daemon_left")["timestamp"]
    assert abs(int(last[:4]) - time.gmtime().tm_year) == 1  # it did see another time
    assert seen(tmp_path) == {1, 2, 3, 4}


@pytest.mark.slow
@needs_faketime
@pytest.mark.parametrize("jump", [YEAR, -YEAR], ids=["forward", "back"])
def test_the_clock_jumps_between_two_lives(tmp_path: Path, jump: int) -> None:
    """The wall clock jumps while a batch waits and the daemon is down: it does not wait a year."""
    offset = tmp_path / "offset"
    offset.write_text("+0")
    (tmp_path / "down").touch()
    more = {"retry__backoff": "1d", "retry__backoff_max": "1d", "drain__timeout": "100ms"}
    arguments = into(tmp_path, "Fails", **more)
    with daemon(*arguments, cwd=tmp_path, environ=_faked(offset)) as one:
        assert one.post(b"1\n")[0] == 202
        one.event("batch_failed")
        one.terminate()
        assert one.wait() == 0
    (tmp_path / "down").unlink()
    offset.write_text(f"{jump:+d}")
    with daemon(*arguments, cwd=tmp_path, environ=_faked(offset)) as two:
        assert two.until_settled(timeout=60)["processed"] == 1
    check_names(tmp_path)
