"""Faults of the disk under a real daemon: full, failing, frozen, read-only, gone."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.daemon.harness import Daemon, daemon
from tests.faults.tools import (
    Client,
    check_names,
    ext4,
    finish,
    into,
    mounted,
    needs,
    notes,
    seen,
    strace,
    until,
)

SMALL = {"batch__records_max": "7", "batch__age_max": "5ms"}
UP_TO_THE_END = {"journal__free_min": "0"}
"""The file systems here are smaller than what is left free by default."""


def _post_until(one: Daemon, status: int, supply, accepted: list[int], limit: int = 500) -> None:
    deadline = time.monotonic() + 60
    while limit or time.monotonic() < deadline:
        limit = max(0, limit - 1)
        ids = [next(supply) for _ in range(5000)]
        code, _ = one.post(b"".join(b"%d\n" % i for i in ids))
        assert code in {202, 503}
        if code == 202:
            accepted += ids
        if code == status:
            return
    raise AssertionError(f"no {status}")


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as theirs, contextlib.suppress(OSError):
        while True:
            theirs.write(bytes(4096))


@needs("mount", root=True)
@pytest.mark.parametrize("handler", ["Note", "Hangs"])
def test_no_space_and_then_space_again(tmp_path: Path, handler: str) -> None:
    """The disk is full: 503, no 202 is lost, it goes on; with space again it accepts again."""
    (tmp_path / "hang").touch()
    supply, accepted = itertools.count(10_000_000), []
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=4m", "tmpfs") as disk:
        data = {"data-dir": str(disk / "data"), "executor__workers": "1", **UP_TO_THE_END}
        arguments = into(tmp_path, handler, **data)
        with daemon(*arguments, cwd=tmp_path) as one:
            if handler == "Note":  # somebody else fills the disk
                _post_until(one, 202, supply, accepted)
                _fill(disk / "theirs")
            _post_until(one, 503, supply, accepted)
            assert accepted
            assert one.request("GET", "/livez", admin=True)[0] == 200
            assert one.post(b"1" * 100_000)[0] == 503
            (disk / "theirs").unlink(missing_ok=True)
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            _post_until(one, 202, supply, accepted)
            (tmp_path / "hang").unlink()
            assert one.until_settled()["processed"] == len(accepted)
            one.terminate()
            assert one.wait() == 0
            assert one.event("drained")["balanced"]
    assert seen(tmp_path) == set(accepted)
    check_names(tmp_path)


@needs("mount", root=True)
def test_a_start_without_space(tmp_path: Path) -> None:
    """No space at the start: it ends with 75, not 78, or starts; with space nothing is missing."""
    (tmp_path / "hang").touch()
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=4m", "tmpfs") as disk:
        place = {"data-dir": str(disk / "data"), "drain__timeout": "300ms"}
        arguments = into(tmp_path, "Hangs", **place, **UP_TO_THE_END)
        with daemon(*arguments, cwd=tmp_path) as one:
            assert one.post(b"1\n2\n")[0] == 202
            one.terminate(signal.SIGKILL)
            one.wait()
        _fill(disk / "theirs")
        with Daemon(*arguments, cwd=tmp_path) as two:
            until(lambda: two.events or two.process.poll() is not None)
            two.terminate()
            assert two.wait() in {0, 75}, two.other
        (disk / "theirs").unlink()
        (tmp_path / "hang").unlink()
        finish(*arguments, cwd=tmp_path)
    assert seen(tmp_path) == {1, 2}


@needs("strace")
@pytest.mark.parametrize(
    ("call", "when"),
    [
        ("fdatasync", 3),
        pytest.param("fdatasync", 1, marks=pytest.mark.slow),
        pytest.param("fdatasync", 9, marks=pytest.mark.slow),
        pytest.param("pwrite64", 10, marks=pytest.mark.slow),
        pytest.param("pwrite64", 1, marks=pytest.mark.slow),
        pytest.param("pwrite64", 31, marks=pytest.mark.slow),
    ],
)
def test_an_input_output_error(tmp_path: Path, call: str, when: int) -> None:
    """EIO on one write or sync of the WAL: no 202 for it or after it, 75, and a clean recovery."""
    arguments = into(tmp_path, **SMALL)
    finish(*arguments, cwd=tmp_path)  # so that the file is there and the fault comes while running
    trace = tmp_path / "trace"
    prefix = strace(
        f"{call}:error=EIO:when={when}",
        path=tmp_path / "ingestd-data" / "journal.db-wal",
        to=str(trace),
    )
    with Daemon(*arguments, cwd=tmp_path, prefix=prefix) as one:
        one.event("daemon_started")
        with Client(one, itertools.count()) as client:
            assert one.wait() == 75
        assert "journal_failed" in {event["event"] for event in one.events}
    assert set(client.answers) <= {202, 503, 0}
    finish(*arguments, cwd=tmp_path)
    assert set(client.accepted) <= seen(tmp_path)
    check_names(tmp_path)
    calls = trace.read_text().splitlines()
    failed = [number for number, line in enumerate(calls) if "(INJECTED)" in line]
    assert failed  # of each thread by itself
    for number in failed if call == "fdatasync" else ():
        # The thread whose sync failed never synced that file again.
        thread = calls[number].split()[0]
        later = [line for line in calls[number + 1 :] if line.split()[0] == thread]
        assert not [line for line in later if "fdatasync" in line]


@needs("strace")
@pytest.mark.parametrize("when", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 6))])
def test_an_error_while_recovery_reads(tmp_path: Path, when: int) -> None:
    """EIO on a read of the journal at the start: 75, the file untouched, then a clean recovery."""
    arguments = into(tmp_path, **SMALL)
    (tmp_path / "hang").touch()
    with daemon(*into(tmp_path, "Hangs"), cwd=tmp_path) as one:
        for n in range(20):
            assert one.post(b"%d\n" % n)[0] == 202
        one.terminate(signal.SIGKILL)
        one.wait()
    path = tmp_path / "ingestd-data" / "journal.db-wal"
    with Daemon(
        *arguments, cwd=tmp_path, prefix=strace(f"pread64:error=EIO:when={when}", path=path)
    ) as two:
        until(lambda: two.events or two.process.poll() is not None)
        if two.process.poll() is None and when > 1:
            two.terminate()
        assert two.wait() in ({75} if when == 1 else {0, 75}), two.other
    assert not list((tmp_path / "ingestd-data").glob("*damaged*"))
    finish(*arguments, cwd=tmp_path)
    assert seen(tmp_path) == set(range(20))


@needs("mkfs.ext4", "losetup", root=True)
def test_a_file_system_that_turns_read_only(tmp_path: Path) -> None:
    """ext4 gives up and turns read-only: no 202 any more, 75; mounted again, nothing is missing."""
    (tmp_path / "hang").touch()
    supply = itertools.count()
    with ext4(tmp_path / "disk") as disk:
        arguments = into(tmp_path, **{"data-dir": str(disk / "data")}, **UP_TO_THE_END, **SMALL)
        with daemon(*arguments, cwd=tmp_path) as one:
            with Client(one, supply) as client:
                until(lambda: len(client.accepted) > 30)
                subprocess.run(["mount", "-o", "remount,abort", str(disk)], check=False)
                assert one.wait() == 75
            accepted = client.accepted
            assert one.event("journal_failed")
    # The disk as it is, but of its own: a container that started meanwhile holds the first mount in
    # its namespace for a while, and to the kernel the same file is the file system that gave up.
    image = shutil.copy(tmp_path / "image", tmp_path / "image-again")
    with mounted(tmp_path / "again", "-o", "loop", str(image)) as disk:
        arguments = into(tmp_path, **{"data-dir": str(disk / "data")}, **UP_TO_THE_END, **SMALL)
        finish(*arguments, cwd=tmp_path)
    assert set(accepted) <= seen(tmp_path)
    check_names(tmp_path)


@needs("mkfs.ext4", "losetup", "fsfreeze", root=True)
def test_a_disk_that_hangs(tmp_path: Path) -> None:
    """A frozen file system: health and status answer, nobody gets a 202; then it goes on."""
    with ext4(tmp_path / "disk") as disk:
        arguments = into(tmp_path, **{"data-dir": str(disk / "data")}, **UP_TO_THE_END, **SMALL)
        with daemon(*arguments, cwd=tmp_path) as one:
            assert one.post(b"1\n")[0] == 202
            subprocess.run(["fsfreeze", "-f", str(disk)], check=True)
            try:
                answers: list[int] = []
                waiting = threading.Thread(target=lambda: answers.append(one.post(b"2\n")[0]))
                waiting.start()
                for _ in range(10):
                    assert one.request("GET", "/livez", admin=True)[0] == 200
                    assert one.status()["state"] == "running"
                waiting.join(0.5)
                assert not answers
            finally:
                subprocess.run(["fsfreeze", "-u", str(disk)], check=True)
            waiting.join(60)
            assert answers == [202]
            one.terminate()
            assert one.wait() == 0
            assert one.event("drained")["processed"] == 2


@needs("mkfs.ext4", "losetup", "fsfreeze", root=True)
def test_a_drain_on_a_disk_that_hangs(tmp_path: Path) -> None:
    """SIGTERM while the file system is frozen: at the deadline it reports and leaves, with 75."""
    with ext4(tmp_path / "disk") as disk:
        arguments = into(tmp_path, **{"data-dir": str(disk / "data")}, drain__timeout="1s",
                         **UP_TO_THE_END, **SMALL)  # fmt: skip
        with daemon(*arguments, cwd=tmp_path) as one:
            assert one.post(b"1\n")[0] == 202
            one.until_settled()
            subprocess.run(["fsfreeze", "-f", str(disk)], check=True)
            try:
                answers: list[int] = []
                waiting = threading.Thread(target=_post_into, args=(one, b"2\n", answers))
                waiting.start()
                until(lambda: _hangs_in_the_kernel(one.pid), what="nothing is written")
                assert one.status()["pipelines"]["default"]["pending"] == 0
                one.terminate()
                assert one.event("daemon_left")["code"] == 75
                assert one.event("journal_stuck")
                with pytest.raises(ConnectionRefusedError):
                    one.status()
                waiting.join(60)
                assert answers == [0]
            finally:
                # Its thread hangs in the kernel: only now can the process be gone.
                subprocess.run(["fsfreeze", "-u", str(disk)], check=True)
            assert one.wait() == 75
        report = finish(*arguments, cwd=tmp_path)
        assert {1} <= seen(tmp_path) <= {1, 2}
        assert report["accepted"] == report["processed"] == len(seen(tmp_path))
        check_names(tmp_path)


def _hangs_in_the_kernel(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task").glob("*/stat")
    return any(one.read_text().rpartition(")")[2].split()[0] == "D" for one in tasks)


def _post_into(one: Daemon, body: bytes, answers: list[int]) -> None:
    try:
        answers.append(one.post(body)[0])
    except (OSError, http.client.HTTPException):
        answers.append(0)


@pytest.mark.parametrize(
    "name", ["journal.db", pytest.param("journal.db-wal", marks=pytest.mark.slow)]
)
def test_the_file_is_removed_while_it_runs(tmp_path: Path, name: str) -> None:
    """Somebody deletes the journal under a running daemon: no 202 for what would go with it."""
    arguments = into(tmp_path, **SMALL)
    with daemon(*arguments, cwd=tmp_path) as one:
        with Client(one, itertools.count()) as client:
            until(lambda: len(client.accepted) > 20)
            (tmp_path / "ingestd-data" / name).unlink()
            assert one.wait() == 75
        assert client.answers[202]
        assert one.event("journal_failed")
    finish(*arguments, cwd=tmp_path)


@needs("prlimit")
def test_out_of_file_descriptors(tmp_path: Path) -> None:
    """No descriptor is left: new clients wait or are turned away, and it recovers."""
    prefix = ("prlimit", "--nofile=64:64")
    with daemon(*into(tmp_path), cwd=tmp_path, prefix=prefix) as one:
        assert one.post(b"1\n")[0] == 202
        crowd = [socket.create_connection(("127.0.0.1", one.port), 60) for _ in range(100)]
        try:
            with socket.create_connection(("127.0.0.1", one.port), 60) as sock:
                sock.settimeout(0.5)
                sock.sendall(
                    b"POST /v1/records HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n2\n"
                )
                try:
                    answer = sock.recv(4096)
                except OSError:
                    answer = b""
            assert not answer or answer.startswith((b"HTTP/1.1 503", b"HTTP/1.1 202"))
            assert one.process.poll() is None
        finally:
            for other in crowd:
                other.close()

        def works() -> bool:
            try:
                return one.post(b"3\n")[0] == 202
            except (OSError, http.client.HTTPException):
                return False

        until(works)
        until(lambda: 3 in seen(tmp_path))
        one.terminate()
        assert one.wait() == 0
        assert one.event("drained")["balanced"]
    assert notes(tmp_path)
