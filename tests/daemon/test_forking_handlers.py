"""Handlers in a thread that fork: the child keeps nothing of the daemon's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.daemon.harness import ROOT, Daemon, daemon

pytestmark = pytest.mark.slow  # each starts processes of its own

FORKS = """\
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor

fork = multiprocessing.get_context("fork")
HERE = os.path.dirname(os.path.abspath(__file__))

def stay(seconds):
    with open(f"{HERE}/child.part", "w") as said:
        said.write(str(os.getpid()))
    os.rename(f"{HERE}/child.part", f"{HERE}/child")
    time.sleep(seconds)

def starts(batch: list[int]) -> None:
    fork.Process(target=stay, args=(300,)).start()

def pools(batch: list[int]) -> None:
    ProcessPoolExecutor(1, fork).submit(stay, 300)

def forks(batch: list[int]) -> None:
    if os.fork() == 0:
        stay(300)
        os._exit(0)

def terminates(batch: list[int]) -> None:
    child = fork.Process(target=stay, args=(300,))
    child.start()
    while not os.path.exists(f"{HERE}/child"):
        time.sleep(0.01)
    child.terminate()
    child.join()
    assert child.exitcode == -15, child.exitcode

def terminates_at_once(batch: list[int]) -> None:
    for _ in range(200):
        child = os.fork()
        if child == 0:
            time.sleep(300)
            os._exit(0)
        os.kill(child, 15)
        assert os.waitpid(child, 0)[1] == 15

def logs_all(number):
    import logging
    logging.getLogger("theirs").warning("from child %d", number)

def logs(batch: list[int]) -> None:
    child = fork.Process(target=logs_all, args=(7,))
    child.start()
    child.join(60)
    assert child.exitcode == 0, child.exitcode
"""
HOLDS = """\
import fcntl, sys, time
lock = open(sys.argv[1], "r+")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(300)
"""
THREAD = ("--executor.kind", "thread", "--executor.workers", "2")


def child_of(folder: Path) -> int:
    deadline = time.monotonic() + 60
    while not (folder / "child").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int((folder / "child").read_text())


@pytest.mark.parametrize("name", ["starts", "pools", "forks"])
def test_an_orphan_keeps_neither_lock_nor_port_nor_journal(tmp_path: Path, name: str) -> None:
    (tmp_path / "theirs.py").write_text(FORKS)
    with daemon(f"theirs:{name}", *THREAD, cwd=tmp_path) as one:
        waiting = socket.create_connection(("127.0.0.1", one.port), 60)
        assert one.post(b"1")[0] == 202
        child, port = child_of(tmp_path), one.port
        try:
            held = [str(link.readlink()) for link in Path(f"/proc/{child}/fd").iterdir()]
            assert not [path for path in held if str(tmp_path / "ingestd-data") in path]
            one.process.kill()
            one.process.wait()
            assert waiting.recv(1) == b""  # nobody holds the connection open
            waiting.close()
            os.kill(child, 0)  # it lives
            with daemon("jsonl", "--listen", f"127.0.0.1:{port}", cwd=tmp_path) as again:
                again.until_settled()
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("name", ["terminates", "terminates_at_once"])
def test_a_signal_to_a_child_is_not_the_daemons(tmp_path: Path, name: str) -> None:
    (tmp_path / "theirs.py").write_text(FORKS)
    with daemon(f"theirs:{name}", *THREAD, cwd=tmp_path) as one:
        assert one.post(b"1")[0] == 202
        assert one.until_settled()["processed"] == 1, one.events
        assert one.post(b"1")[0] == 202
        assert not [event for event in one.events if event["event"] == "drain_started"]


def test_a_child_can_log(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(FORKS)
    with daemon("theirs:logs", *THREAD, cwd=tmp_path) as one:
        assert one.post(b"1")[0] == 202
        assert one.until_settled()["processed"] == 1, one.events
        assert one.event("library_logged")["message"] == "from child 7"


def test_whoever_holds_the_lock_is_named_while_it_lives(tmp_path: Path) -> None:
    """A child that was forked behind Python's back has it still open."""
    with daemon(cwd=tmp_path) as one, Daemon(cwd=tmp_path) as other:
        assert other.wait() == 78
        assert f"another ingestd (process {one.process.pid}) uses it" in other.other[-1]
    lock = tmp_path / "ingestd-data" / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(lock)],
        stdout=subprocess.PIPE, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with Daemon(cwd=tmp_path) as other:
            assert other.wait() == 78
            assert f"end process {holder.pid}" in other.other[-1]
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
