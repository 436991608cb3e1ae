"""Signals at every moment of the daemon's life."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.daemon.harness import Daemon, daemon
from tests.faults.tools import Client, check_names, finish, into, notes, seen, until


def test_sigterm_while_idle(tmp_path: Path) -> None:
    """SIGTERM with nothing to do: leaves at once with 0."""
    with daemon(*into(tmp_path, drain__timeout="10m"), cwd=tmp_path) as one:
        one.terminate()
        assert one.wait(60) == 0
        assert one.event("drained")["balanced"]


def test_two_signals_while_a_handler_is_imported(tmp_path: Path) -> None:
    """The first signal is logged with what it waits for, the second one leaves at once with 0."""
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(600)\n"
    )
    with Daemon("slow:store", cwd=tmp_path) as one:
        until((tmp_path / "importing").exists)
        one.terminate(signal.SIGINT)
        assert one.event("start_interrupted")["second_signal"] == "leaves at once"
        one.terminate(signal.SIGINT)
        assert one.wait(60) == 0
        assert one.event("start_abandoned")


def test_sigterm_in_the_middle_of_a_body(tmp_path: Path) -> None:
    """SIGTERM while a body is coming in: it is taken or refused, never half, and answered."""
    with daemon(*into(tmp_path, drain__timeout="10m"), cwd=tmp_path) as one:
        with socket.create_connection(("127.0.0.1", one.port), 60) as sock:
            sock.sendall(
                b"POST /v1/records HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
                b"Expect: 100-continue\r\n\r\n"
            )
            assert sock.recv(4096).startswith(b"HTTP/1.1 100 ")  # it waits for the body
            sock.sendall(b"1\n")
            one.terminate()
            assert one.event("drain_started")["second_signal"] == "leaves at once"
            sock.sendall(b"2\n")
            answer = sock.recv(65536)
        assert one.wait() == 0
    report = finish(*into(tmp_path), cwd=tmp_path)
    if answer.startswith(b"HTTP/1.1 202"):
        assert seen(tmp_path) == {1, 2}
    else:
        assert answer.startswith(b"HTTP/1.1 503")
        assert report["accepted"] == 0


def test_sigterm_in_the_middle_of_a_batch(tmp_path: Path) -> None:
    """SIGTERM while a handler works: its batch is finished, each record is handled once."""
    (tmp_path / "hang").touch()
    with daemon(*into(tmp_path, "Hangs"), cwd=tmp_path) as one:
        assert one.post(b"1\n2\n")[0] == 202
        until(lambda: notes(tmp_path))
        one.terminate()
        one.event("drain_started")
        (tmp_path / "hang").unlink()
        assert one.wait() == 0
        assert one.event("drained")["processed"] == 2
    assert [records for _, _, records in notes(tmp_path)] == [[1, 2]]


@pytest.mark.slow
def test_sigterm_in_the_middle_of_a_retry(tmp_path: Path) -> None:
    """SIGTERM while a batch waits for its retry: leaves without waiting for it, keeps its tries."""
    (tmp_path / "down").touch()
    # With full jitter the wait may be short: many batches, of which some wait beyond the deadline.
    slow = {"retry__backoff": "1d", "retry__backoff_max": "1d", "drain__timeout": "10m"}
    with daemon(*into(tmp_path, "Fails", **slow), cwd=tmp_path) as one:
        assert one.post(b"1\n")[0] == 202
        one.event("batch_failed")
        one.terminate()
        assert one.wait(60) == 0
        assert one.event("drained_partly")["pending"] == 1
    (tmp_path / "down").unlink()
    with daemon(*into(tmp_path, "Fails"), cwd=tmp_path) as two:
        # It is due when it is due: only its name and its tries are looked at here.
        assert two.event("journal_recovered")["sealed"] == 1


def test_sigterm_at_start(tmp_path: Path) -> None:
    """SIGTERM while the handler is being made: it leaves with 0 as soon as that is over."""
    (tmp_path / "starting").touch()
    with Daemon(*into(tmp_path, "SlowToImport"), cwd=tmp_path) as one:
        until((tmp_path / "begun").exists)
        one.terminate()
        (tmp_path / "starting").unlink()
        assert one.wait() == 0


def test_two_sigterms_at_start(tmp_path: Path) -> None:
    """Two SIGTERMs while the handler is being made: it leaves at once, with 0."""
    (tmp_path / "starting").touch()
    with Daemon(*into(tmp_path, "SlowToImport"), cwd=tmp_path) as one:
        until((tmp_path / "begun").exists)
        one.terminate()
        one.event("start_interrupted")  # two signals of one kind that wait together are one
        one.terminate()
        assert one.wait(60) == 0  # its handler takes 5 min


@pytest.mark.slow
def test_sigterm_during_recovery(tmp_path: Path) -> None:
    """SIGTERM as soon as a start finds many records to be done: it leaves, nothing is lost."""
    (tmp_path / "hang").touch()
    arguments = into(tmp_path, "Hangs", drain__timeout="100ms", batch__records_max="10")
    total = 20_000
    with daemon(*arguments, cwd=tmp_path) as one:
        for first in range(0, total, 5000):
            body = b"".join(b"%d\n" % n for n in range(first, first + 5000))
            assert one.post(body)[0] == 202
        one.terminate(signal.SIGKILL)
        one.wait()
    with Daemon(*arguments, cwd=tmp_path) as two:
        two.event("journal_recovered")
        two.terminate()
        assert two.wait() == 0
        assert two.event("drained_partly")["pending"] == total
    (tmp_path / "hang").unlink()
    report = finish(*into(tmp_path, "Hangs"), cwd=tmp_path)
    assert report["processed"] == total
    assert seen(tmp_path) == set(range(total))
    check_names(tmp_path)


def _stopped_for(tmp_path: Path, seconds: float, **more: str) -> None:
    arguments = into(tmp_path, executor__kind="process", batch__records_max="10", **more)
    with daemon(*arguments, cwd=tmp_path) as one:
        with Client(one, itertools.count()) as client:
            until(lambda: len(client.accepted) > 20)
            one.terminate(signal.SIGSTOP)
            time.sleep(seconds)  # the fault itself
            one.terminate(signal.SIGCONT)
            before = len(client.accepted)
            until(lambda: len(client.accepted) > before + 20 or not client.is_alive())
        assert not client.answers[0]
        assert set(client.answers) == {0, 202}
        one.terminate()
        assert one.wait() == 0
        assert one.event("drained")["processed"] == len(client.accepted)
    assert seen(tmp_path) == set(client.accepted)


@pytest.mark.parametrize("sent", [0, 30, -1], ids=["nothing", "half a head", "half a body"])
def test_what_came_while_it_was_stopped_is_answered(tmp_path: Path, sent: int) -> None:
    """The deadlines for the next request passed meanwhile, but its client kept them."""
    deadlines = ("keepalive_timeout", "header_timeout", "body_timeout")
    limits = {f"http__{name}": "1s" for name in deadlines}
    request = b"POST /v1/records HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n1\n"
    with daemon(*into(tmp_path, **limits), cwd=tmp_path) as one:
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", one.port), timeout=60) as client:
                began = time.monotonic()
                client.sendall(request)
                assert client.recv(4096).startswith(b"HTTP/1.1 202")
                client.sendall(request[:sent])
                time.sleep(0.2)
                one.terminate(signal.SIGSTOP)
                if time.monotonic() - began > 0.9:  # we may have been late ourselves: once more
                    one.terminate(signal.SIGCONT)
                    continue
                client.sendall(request[sent:])
                time.sleep(3)  # the fault itself
                one.terminate(signal.SIGCONT)
                assert client.recv(4096).startswith(b"HTTP/1.1 202")
                assert client.recv(4096) == b""  # the deadline itself still holds
                break
        else:
            raise AssertionError("it was never stopped in time")
        one.terminate()
        assert one.wait() == 0


@pytest.mark.slow
def test_sigstop_for_a_moment(tmp_path: Path) -> None:
    """SIGSTOP, then SIGCONT: it goes on as if nothing had been; no worker is taken for hung."""
    _stopped_for(tmp_path, 1.5)


@pytest.mark.slow
def test_sigstop_for_longer_than_the_deadlines_of_a_connection(tmp_path: Path) -> None:
    """SIGSTOP for 8 s, with all of them at 6 s; the client waits for a minute."""
    deadlines = ("keepalive_timeout", "header_timeout", "body_timeout")
    _stopped_for(tmp_path, 8, **{f"http__{name}": "6s" for name in deadlines})


@pytest.mark.slow
def test_sigstop_for_a_minute(tmp_path: Path) -> None:
    """SIGSTOP for a minute: clients may have given up, the daemon has lost nothing."""
    arguments = into(tmp_path, executor__kind="process", executor__timeout="20s")
    with daemon(*arguments, cwd=tmp_path) as one:
        assert one.post(b"1\n")[0] == 202
        one.terminate(signal.SIGSTOP)
        time.sleep(60)
        one.terminate(signal.SIGCONT)
        assert one.post(b"2\n")[0] == 202
        assert one.until_settled()["processed"] == 2
        one.terminate()
        assert one.wait() == 0


def test_a_thread_that_never_returns(tmp_path: Path) -> None:
    """A handler's thread that hangs at SIGTERM: leaves at the deadline with 0, its batch stays."""
    (tmp_path / "hang").touch()
    with daemon(
        *into(tmp_path, "Hangs", drain__timeout="500ms", executor__kind="thread"), cwd=tmp_path
    ) as one:
        assert one.post(b"1\n2\n")[0] == 202
        until(lambda: notes(tmp_path))
        one.terminate()
        assert one.wait(60) == 0  # the handler hangs for 10 min
        report = one.event("drained_partly")
        assert (report["pending"], report["balanced"], report["workers_gone"]) == (2, True, False)
    (tmp_path / "hang").unlink()
    finish(*into(tmp_path, "Hangs"), cwd=tmp_path)
    assert len(notes(tmp_path)) == 2
    check_names(tmp_path)


def test_sigterm_to_the_whole_group(tmp_path: Path) -> None:
    """systemd's `KillMode=control-group`: workers get SIGTERM too, and still finish."""
    arguments = into(tmp_path, "Slow", executor__kind="process", batch__records_max="1")
    with daemon(*arguments, cwd=tmp_path) as one:
        assert one.post(b"1\n2\n3\n4\n")[0] == 202
        workers = [
            int(child)
            for task in Path(f"/proc/{one.pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
        for pid in (one.pid, *workers):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        assert one.wait() == 0
        assert one.event("drained")["processed"] == 4
    assert len(notes(tmp_path)) == 4
