"""What a handler logs in a process worker comes out of the daemon's log, bounded; stdout is its."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ingestd.base.rate import BurstBudget
from ingestd.execution.worker_log import BYTES_BURST, BYTES_PER_SECOND, WorkerLog
from ingestd.handlers import log_relay
from ingestd.handlers.log_relay import LogLine
from tests.daemon.harness import Daemon

pytestmark = pytest.mark.slow

HANDLER = """
import ctypes, logging, os, signal, subprocess, sys, threading, time, warnings
import structlog
from pathlib import Path
slog, log = structlog.get_logger(), logging.getLogger("shop")

def speaks(batch):
    log.debug("not seen"); log.info("got %d", len(batch)); log.critical("very bad")
    log.info("%d", "no number")
    try: 1 / 0
    except ZeroDivisionError: log.exception("failed")
    warnings.warn("a warning of the user's")
    slog.info("stored", rows=5, odd=object, pipeline="not this one", text="x" * 5000)
    try: {}["x"]
    except KeyError: slog.exception("missing")
    print("to stdout"); print("to stderr", file=sys.stderr)
    sys.stderr.write("two\\nlines \\udc80\\n"); sys.stderr.write("no end")
    subprocess.run("echo from a program >&2; echo out of a program", shell=True)
    thread = threading.Thread(target=lambda: [][1], name="theirs"); thread.start(); thread.join()
    if os.fork() == 0:
        log.warning("from a forked child"); os._exit(0)
    os.wait()
    print("part of a line", end="")

def floods(batch):
    for i in range(20_000): log.info("line %d %s", i, "x" * 2000)
    log.error("the error in the flood")
    print("x" * 10_000_000, file=sys.stderr)
    subprocess.run("yes | head -c 3000000 >&2", shell=True)
    log.info("y" * 10_000_000)

def killed(batch: "Batch"):
    print("before the end"); print("to stderr before the end", file=sys.stderr)
    if batch.attempt == 1: os.kill(os.getpid(), signal.SIGKILL)

from ingestd import Batch
"""


@pytest.fixture
def handler(tmp_path: Path) -> Path:
    (tmp_path / "log_handlers.py").write_text(HANDLER)
    return tmp_path


def run(name: str, folder: Path, *more: str) -> tuple[Daemon, bytes]:
    """A daemon that handles one batch from standard input; all of its events, and its stdout."""
    with Daemon(
        f"log_handlers:{name}", "--source", "stdin", "--executor.kind", "process",
        "--executor.workers", "1", *more, cwd=folder, stdin=subprocess.PIPE,
    ) as one:  # fmt: skip
        assert one.process.stdin is not None
        assert one.process.stdout is not None
        one.process.stdin.write(b"1\n2\n")
        one.process.stdin.close()
        out = one.process.stdout.read()
        assert one.wait() == 0, one.events
    return one, out


def named(one: Daemon, event: str, **fields: Any) -> list[dict[str, Any]]:
    return [
        line for line in one.events
        if line["event"] == event and all(line.get(key) == value for key, value in fields.items())
    ]  # fmt: skip


def test_everything_that_is_said_is_an_event_of_its_batch(handler: Path) -> None:
    one, out = run("speaks", handler)
    assert one.other == []  # each line is JSON
    assert out == b"to stdout\nout of a program\npart of a line"
    levels = {
        "got 2": "info",
        "very bad": "critical",
        "%d": "info",
        "failed": "error",
        "from a forked child": "warning",
    }
    for message, level in levels.items():
        (line,) = named(one, "library_logged", message=message)
        assert line["level"] == level
        assert line["logger"] == "shop"
    (failed,) = named(one, "library_logged", message="failed")
    assert failed["traceback"].endswith("ZeroDivisionError: division by zero\n")
    (warned,) = named(one, "library_logged", logger="py.warnings")
    assert "UserWarning: a warning of the user's" in warned["message"]
    (stored,) = named(one, "stored")
    assert (stored["rows"], stored["odd"], stored["level"]) == (5, "<class 'object'>", "info")
    assert len(stored["text"]) == log_relay.FIELD_CHARS_MAX
    assert "KeyError" in named(one, "missing", level="error")[0]["traceback"]
    assert named(one, "handler_thread_failed", thread="theirs", level="error")
    wrote = "\n".join(line["text"] for line in named(one, "handler_wrote"))
    for text in ("to stderr", "two\nlines \\udc80", "no end", "from a program"):
        assert text in wrote
    assert not [line for line in one.events if "not seen" in str(line)]
    said = {"library_logged", "stored", "missing", "handler_wrote", "handler_thread_failed"}
    batches = set()
    for line in one.events:
        if line["event"] in said:
            assert line["pipeline"] == "default"
            assert line["worker"] == "default-worker-0"
            batches.add(line["batch_id"])
    assert len(batches) == 1


def test_a_flood_costs_lines_and_nothing_else(handler: Path) -> None:
    began = time.monotonic()
    one, _ = run("floods", handler, "--executor.timeout", "300s", "--drain.timeout", "300s")
    seconds = time.monotonic() - began
    assert not named(one, "worker_died")  # nobody was killed for it
    lines = named(one, "library_logged", logger="shop")
    dropped = sum(line["lines"] for line in named(one, "worker_lines_dropped"))
    shown = [line for line in lines if line["message"].startswith("line ")]
    assert len(shown) < 2 * (log_relay.LINES_BURST + log_relay.LINES_PER_SECOND * seconds)
    assert len(shown) + dropped >= 20_000  # each one is seen or counted
    assert named(one, "library_logged", message="the error in the flood")
    size = sum(len(json.dumps(line)) for line in one.events)
    assert size < 2 * (BYTES_BURST + BYTES_PER_SECOND * seconds)
    assert max(len(json.dumps(line)) for line in one.events) < 64 * 1024
    assert one.event("drained")["processed"] == 2


def test_what_was_printed_before_a_kill_is_there(handler: Path) -> None:
    one, out = run("killed", handler)
    assert out.startswith(b"before the end\n")
    assert out.count(b"before the end\n") == 2
    texts = [line["text"] for line in named(one, "handler_wrote")]
    assert [text for text in texts if text.startswith("to stderr before the end")]
    (died,) = named(one, "worker_died")
    assert died["error"] == "the worker was killed by SIGKILL"


def test_the_level_of_the_log_counts(handler: Path) -> None:
    one, _ = run("speaks", handler, "--log.level", "error")
    assert {line["level"] for line in one.events} <= {"error", "critical"}
    assert named(one, "library_logged", message="very bad")


def test_a_budget() -> None:
    budget = BurstBudget(3, 2.0, 10.0)
    assert [budget.spend(1, 10.0) for _ in range(4)] == [True, True, True, False]
    assert [budget.spend(1, 10.5) for _ in range(2)] == [True, False]
    assert budget.spend(3, 100.0)
    assert not budget.spend(1, 99.0)  # a clock that goes back gives nothing


@pytest.mark.parametrize("packet", [b"", b"garbage", b"\xc1", log_relay.encode([1])])
def test_a_packet_that_is_no_line_is_counted(packet: bytes) -> None:
    log = WorkerLog("default", "w")
    log.packet(packet)
    assert log.holds


def test_a_line_that_lies_about_what_was_dropped_does_not_pay_back() -> None:
    log = WorkerLog("default", "w")
    log.packet(log_relay.encode(LogLine(dropped=-5)))
    assert not log.holds


def test_the_daemon_itself_does_not_need_it() -> None:
    """The worker's part needs neither the server nor structlog."""
    code = "import sys, ingestd.handlers.worker; print('structlog' in sys.modules)"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.stdout == b"False\n", done.stderr
