"""Faults of processes: killed at any moment, doubled, orphaned, and workers that misbehave."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest

from ingestd.base.append import Append
from tests.daemon.harness import Daemon, daemon
from tests.faults.tools import (
    HANDLER,
    Client,
    check_names,
    finish,
    into,
    needs,
    notes,
    seen,
    strace,
    until,
)
from tests.pipeline.test_pipeline import drained, numbers

SEED = int(os.environ.get("FAULTS_SEED", "1"))
KILLS = int(os.environ.get("FAULTS_KILLS", "50"))
SMALL = {"batch__records_max": "7", "batch__age_max": "5ms", "executor__workers": "2"}


def _killed_once(arguments: list[str], folder: Path, dice: random.Random, supply) -> list[int]:
    """One life that ends by SIGKILL; what it accepted."""
    with Daemon(*arguments, cwd=folder) as one:
        if dice.random() < 0.2:
            time.sleep(dice.uniform(0.0, 0.6))  # somewhere in its start and recovery
            one.terminate(signal.SIGKILL)
            one.wait()
            return []
        one.event("daemon_started")
        with Client(one, supply) as first, Client(one, supply) as second:
            time.sleep(dice.uniform(0.0, 0.15))
            one.terminate(signal.SIGKILL)
        one.wait()
    return first.accepted + second.accepted


@pytest.mark.slow
def test_sigkill_at_random_times(tmp_path: Path) -> None:
    """SIGKILL over and over on one data directory: no 202 is lost, every batch keeps its name."""
    dice = random.Random(SEED)
    supply = itertools.count()
    arguments = into(tmp_path, **SMALL)
    accepted: list[int] = []
    for _ in range(KILLS):
        accepted += _killed_once(arguments, tmp_path, dice, supply)
    report = finish(*arguments, cwd=tmp_path)
    assert accepted
    assert set(accepted) <= seen(tmp_path)
    assert report["accepted"] == report["processed"] >= len(accepted)
    assert len(seen(tmp_path)) == report["accepted"]
    check_names(tmp_path)


CALLS = [
    *(("pwrite64", n) for n in (1, 2, 3, 5, 8, 13, 21, 34)),
    *(("fdatasync", n) for n in (1, 2, 3, 5, 8, 13)),
    *(("ftruncate", n) for n in (1, 2)),
    *(("rename", n) for n in (1, 2)),
    *(("fsync", n) for n in (1, 2)),
]


@pytest.mark.slow
@needs("strace")
@pytest.mark.parametrize(("call", "when"), CALLS)
def test_sigkill_at_the_nth_system_call(tmp_path: Path, call: str, when: int) -> None:
    """SIGKILL as a thread enters its Nth write, sync or rename: no 202 is lost, it starts again."""
    arguments = into(tmp_path, **SMALL)
    prefix = strace(f"{call}:signal=SIGKILL:when={when}")
    accepted: list[int] = []
    with Daemon(*arguments, cwd=tmp_path, prefix=prefix) as one:
        until(lambda: one.events or one.process.poll() is not None)
        if one.process.poll() is None:
            with contextlib.suppress(AssertionError):  # it may die before it is up
                one.event("daemon_started")
        if any(event["event"] == "daemon_started" for event in one.events):
            with Client(one, itertools.count()) as client:
                client.join(1.0)
            accepted = client.accepted
        if one.process.poll() is None:
            one.terminate()  # the call comes when it leaves, or never
        assert one.wait() in {-signal.SIGKILL, 0}, one.other
    finish(*arguments, cwd=tmp_path)
    assert set(accepted) <= seen(tmp_path)
    check_names(tmp_path)


@pytest.mark.slow
def test_a_second_daemon_on_the_same_directory(tmp_path: Path) -> None:
    """A second daemon on a data directory that is in use: refused with 78, the first goes on."""
    with daemon(*into(tmp_path), cwd=tmp_path) as one:
        with Daemon(*into(tmp_path), cwd=tmp_path) as two:
            assert two.wait() == 78
            assert any("another ingestd" in line for line in two.other)
        assert one.post(b"1\n")[0] == 202
        assert one.until_settled()["processed"] == 1


@pytest.mark.parametrize(
    ("how", "tries"),
    [
        ("SIGKILL", 2),
        ("SIGTERM", 1),  # a worker leaves SIGTERM to the daemon
        ("SIGSEGV", 2),
        ("memory", 2),
        ("hang", 2),
        ("sys.exit", 2),
        ("KeyboardInterrupt", 2),
        ("exception", 2),
        ("result", 1),
    ],
)
async def test_a_worker_that_misbehaves(start, tmp_path: Path, how: str, tries: int) -> None:
    """A worker dies, hangs, or raises or returns what can't be pickled: its batch comes again."""
    pipeline = await start(
        HANDLER + "Misbehaves",
        executor={"kind": "process", "workers": 2, "timeout": "5s" if how == "hang" else "60s"},
        batch={"records_max": 4},
        options={"folder": str(tmp_path), "how": how},
    )
    await pipeline.accept(Append(numbers(0, 8)))
    report = await drained(pipeline)
    assert report.ledger[:3] == (8, 8, 0)
    assert report.balanced
    assert sorted(attempt for _, attempt, _ in notes(tmp_path)) == [
        attempt for attempt in range(1, tries + 1) for _ in range(2)
    ]
    check_names(tmp_path)


@pytest.mark.parametrize("how", ["sys.exit", "KeyboardInterrupt", "exception", "result"])
async def test_a_thread_that_misbehaves(start, tmp_path: Path, how: str) -> None:
    """The same in a thread of the daemon: the daemon stays."""
    pipeline = await start(
        HANDLER + "Misbehaves",
        executor={"kind": "thread", "workers": 1},
        options={"folder": str(tmp_path), "how": how},
    )
    await pipeline.accept(Append(numbers(0, 8)))
    report = await drained(pipeline)
    assert report.ledger[:3] == (8, 8, 0)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    return []


def _gone(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return stat.rsplit(")", 1)[1].split()[0] == "Z"


def test_a_killed_parent_leaves_no_orphan(tmp_path: Path) -> None:
    """SIGKILL of the daemon with busy and idle workers: they end, and the port is free at once."""
    (tmp_path / "hang").touch()
    arguments = into(tmp_path, "Hangs", executor__kind="process", executor__workers="3")
    with daemon(*arguments, cwd=tmp_path) as one:
        assert one.post(b"1\n")[0] == 202
        until(lambda: notes(tmp_path))
        workers = _children(one.pid)
        port = one.port
        assert len(workers) == 3
        one.terminate(signal.SIGKILL)
        one.wait()
        until(lambda: all(map(_gone, workers)), what="a worker outlived the daemon")
        with socket.create_server(("127.0.0.1", port)):
            pass


@needs("unshare", root=True)
def test_process_1_of_a_namespace(tmp_path: Path) -> None:
    """As process 1 of a container: SIGTERM drains, and what handlers orphan is reaped."""
    prefix = ("unshare", "--fork", "--pid", "--mount-proc", "--kill-child")
    arguments = into(tmp_path, "Leaves", executor__kind="process", executor__workers="1",
                     batch__records_max="1")  # fmt: skip
    with daemon(*arguments, cwd=tmp_path, prefix=prefix) as one:
        (inside,) = _children(one.process.pid)
        assert len(_children(inside)) == 1  # the daemon; all that is orphaned comes beside it
        assert one.post(b"".join(b"%d\n" % n for n in range(20)))[0] == 202
        one.until_settled()
        until(lambda: len(_children(inside)) == 1, what="an orphan was not reaped")
        os.kill(inside, signal.SIGTERM)
        assert one.wait() == 0
        assert one.event("drained")["processed"] == 20
