"""What is measured beside throughput: the paced load, memory, the journal."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from benchmarks.cells import choose, measure_all
from benchmarks.journal import CHUNK_BYTES, journal_loop, payload, plain_loop
from benchmarks.latency import pace, quantile
from benchmarks.measure import Plan
from benchmarks.memory import descendants, is_worker, memory_of
from benchmarks.peers.base import Service
from benchmarks.processes import Failed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

STALL_SECONDS = 0.6
"""The server answers nobody for so long, once."""
RATE = 200.0


@contextmanager
def server(*, stall_at: int = 0, status: int = 202) -> Iterator[Service]:
    """Answers at once, but for one stall of everybody at a request."""
    counter = itertools.count(1)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                if next(counter) == stall_at:
                    time.sleep(STALL_SECONDS)
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    try:
        yield Service((), serving.server_address[1], (), ())
    finally:
        serving.shutdown()
        thread.join()
        serving.server_close()


@pytest.fixture
def body(tmp_path: Path) -> Path:
    path = tmp_path / "body"
    path.write_bytes(b'{"id":1}\n')
    return path


@pytest.mark.slow
def test_every_request_that_a_stall_would_have_held_up_counts(tmp_path: Path, body: Path) -> None:
    """A closed loop of 64 connections would see 64 slow answers; at this rate 120 were due."""
    medians = []
    for _ in range(5):  # a machine that stands still meanwhile delays more than the stall does
        with server(stall_at=20) as service:
            seen = pace(service, [body], RATE, 2.0, tmp_path)
        assert seen.sent == 400
        assert not seen.refused
        assert seen.max > STALL_SECONDS * 0.9
        # 120 of 400 were due in the stall: the hundredth slowest of all waited for a sixth of it.
        assert seen.p99 > STALL_SECONDS * 0.9
        medians.append(seen.p50)
        if seen.p50 < STALL_SECONDS:
            break
    assert min(medians) < STALL_SECONDS


@pytest.mark.slow
def test_a_refusal_is_seen(tmp_path: Path, body: Path) -> None:
    with server(status=503) as service:
        seen = pace(service, [body], RATE, 0.2, tmp_path)
    assert seen.refused == seen.sent == 40


def test_nobody_there_is_no_quick_answer(tmp_path: Path, body: Path) -> None:
    with server() as service:
        pass
    with pytest.raises(Failed, match="exit code"):
        pace(service, [body], RATE, 0.2, tmp_path)


def test_quantiles_are_nearest_ranks() -> None:
    times = [float(number) for number in range(1, 101)]
    assert quantile(times, 0.5) == 50
    assert quantile(times, 0.99) == 99
    assert quantile([7.0], 0.99) == 7


def test_memory_of_a_process_and_of_who_it_started() -> None:
    code = (
        "import subprocess, sys; block = bytearray(64 << 20); block[::4096] = b'x' * (16 << 10);"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=sys.stdin);"
        "del block; print('ready', flush=True); child.wait()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"ready\n"
            (child,) = descendants(parent.pid)
            memory = memory_of(parent.pid)
            assert is_worker(child)
            assert not is_worker(parent.pid)
        finally:
            parent.communicate(b"\n", timeout=60)
    assert memory.peak > 64 << 20 > memory.rss >= memory.pss > 0
    assert memory_of(parent.pid) == (0, 0, 0)
    assert descendants(parent.pid) == []


async def test_both_sides_of_the_journal_write_the_same_chunks(tmp_path: Path) -> None:
    chunk = payload()
    assert CHUNK_BYTES - 200 < len(chunk.payload) <= CHUNK_BYTES
    assert chunk.payload.count(b"\n") == chunk.count
    plain = await asyncio.to_thread(plain_loop, tmp_path / "plain", chunk.payload, 0.5)
    numbers = itertools.count(1)
    for _ in range(2):  # the second goes on in the file of the first, as in the probe
        journal = await journal_loop(tmp_path / "journal.db", chunk, 1.0, numbers)
        assert journal.bytes % len(chunk.payload) == 0
        assert journal.bytes > 0
    assert plain.bytes % len(chunk.payload) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["journal.db"]


@pytest.mark.slow
def test_memory_and_latency_of_the_daemon(tmp_path: Path) -> None:
    plan = Plan(1, 0.5, 1000, 0.1, "python", tmp_path / "none")
    cells = choose(["memory", "latency-*"])
    results = {result.scenario: result for result in measure_all(cells, plan, tmp_path)}
    assert not any(result.problem for result in results.values()), results
    memory = results["memory"].figures
    assert 10 < memory["idle_pss"] <= memory["idle_rss"] <= memory["load_daemon"] < 2000
    assert 5 < memory["load_worker"] < 1000
    for probe in ("latency-1", "latency-100"):
        latency = results[probe].figures
        assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]
        assert latency["rate"] > 0
    assert list(tmp_path.iterdir()) == []
