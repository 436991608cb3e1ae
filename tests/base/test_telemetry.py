from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import pty
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from ingestd.base import logging as daemon_logging
from ingestd.base.logging import LogWriter, start_logging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0


class Pipe:
    """A pipe whose write end poses as stderr."""

    def __init__(self) -> None:
        self.read_fd, write_fd = os.pipe()
        self.stream = os.fdopen(write_fd, "w")
        self.open = True

    def read_to_end(self) -> bytes:
        self.stream.close()
        with os.fdopen(self.read_fd, "rb") as reader:
            self.open = False
            return reader.read()

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.read_to_end().splitlines()]

    def hang_up(self) -> None:
        os.close(self.read_fd)
        self.open = False

    def close(self) -> None:
        self.stream.close()
        if self.open:
            os.close(self.read_fd)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _plain_structlog() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.002)


def fail(message: str) -> None:
    raise ValueError(message)


def report(lines: int) -> bytes:
    return b"lost %d\n" % lines


def writer_to(pipe: Pipe) -> LogWriter:
    return LogWriter(os.dup(pipe.stream.fileno()), report)


# What a line is


def test_a_line_is_one_json_object(pipe: Pipe) -> None:
    writer = start_logging(stream=pipe.stream)
    structlog.get_logger().info("batch_sealed", records=3, path=Path("/x"), text="a\nb\x1b[0m")
    assert writer.close(DEADLINE)
    [event] = pipe.events()
    assert list(event)[:3] == ["timestamp", "level", "event"]
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "level": "info",
        "event": "batch_sealed",
        "records": 3,
        "path": "/x",
        "text": "a\nb\x1b[0m",
    }


def test_the_level_changes_for_loggers_that_are_there(pipe: Pipe) -> None:
    writer = start_logging(level="warning", stream=pipe.stream)
    log = structlog.get_logger()
    log.info("one_written")
    writer.set_level("debug")
    log.debug("two_written")
    logging.getLogger("library").info("three")
    writer.set_level("error")
    log.warning("four_written")
    logging.getLogger("library").warning("five")
    log.error("six_written")
    writer.close(5)
    assert [event["event"] for event in pipe.events()] == [
        "two_written",
        "library_logged",
        "six_written",
    ]


@pytest.mark.parametrize(
    ("level", "seen"),
    [
        ("debug", ["debug", "info", "warning", "error", "critical"]),
        ("info", ["info", "warning", "error", "critical"]),
        ("warning", ["warning", "error", "critical"]),
        ("error", ["error", "critical"]),
    ],
)
def test_the_level_filters(pipe: Pipe, level: Any, seen: list[str]) -> None:
    writer = start_logging(level=level, stream=pipe.stream)
    log = structlog.get_logger()
    for name in ("debug", "info", "warning", "error", "critical"):
        getattr(log, name)("chunk_accepted")
    writer.close(DEADLINE)
    assert [event["level"] for event in pipe.events()] == seen


async def test_ids_come_from_the_context(pipe: Pipe) -> None:
    writer = start_logging(stream=pipe.stream)
    log = structlog.get_logger()

    async def request(number: int) -> None:
        structlog.contextvars.bind_contextvars(request_id=number)
        await asyncio.sleep(0)
        log.info("chunk_accepted", number=number)

    await asyncio.gather(request(1), request(2))
    log.info("daemon_drained")
    writer.close(DEADLINE)
    events = pipe.events()
    assert [(e.get("request_id"), e.get("number")) for e in events] == [
        (1, 1),
        (2, 2),
        (None, None),
    ]


def test_an_exception_is_a_field_without_the_locals_of_its_frames(pipe: Pipe) -> None:
    writer = start_logging(stream=pipe.stream)
    payload = "a-secret-record"
    try:
        int("x" * len(payload))
    except ValueError:
        structlog.get_logger().exception("handler_failed")
    writer.close(DEADLINE)
    raw = pipe.read_to_end()
    assert payload.encode() not in raw
    [line] = raw.splitlines()
    [error] = json.loads(line)["exception"]
    assert error["exc_type"] == "ValueError"
    assert (
        error["frames"][-1]["name"]
        == "test_an_exception_is_a_field_without_the_locals_of_its_frames"
    )


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


NESTED: list[Any] = []
NESTED.append(NESTED)


@pytest.mark.parametrize("fmt", ["json", "console"])
@pytest.mark.parametrize(
    "value",
    [
        "\ud800",
        2**80,
        {("a", 1): 2},
        float("nan"),
        object(),
        Unprintable(),
        NESTED,
        {1, 2},
        b"\xff",
    ],
    ids=["surrogate", "huge", "odd-key", "nan", "object", "unprintable", "endless", "set", "bytes"],
)
def test_no_value_fails_the_caller(pipe: Pipe, fmt: Any, value: object) -> None:
    writer = start_logging(form=fmt, stream=pipe.stream)
    structlog.get_logger().info("chunk_accepted", value=value)
    assert writer.close(DEADLINE)
    [line] = pipe.read_to_end().splitlines()
    assert b"chunk_accepted" in line
    if fmt == "json":
        assert json.loads(line)["level"] == "info"


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_a_line_is_bounded(pipe: Pipe, fmt: Any) -> None:
    writer = start_logging(form=fmt, stream=pipe.stream)
    size = daemon_logging.LINE_BYTES_MAX + 1
    structlog.get_logger().info("chunk_accepted", request_id="r1", value="x" * size)
    writer.close(DEADLINE)
    raw = pipe.read_to_end()
    assert len(raw) < 500
    assert b"chunk_accepted" in raw
    assert b"r1" in raw
    assert b"left_out_bytes" in raw


def test_console_lines_cannot_move_the_cursor(pipe: Pipe) -> None:
    writer = start_logging(form="console", stream=pipe.stream)
    try:
        fail("\x1b[2J")
    except ValueError:
        structlog.get_logger().exception("handler_failed", value="\x1b[2J\n")
    writer.close(DEADLINE)
    assert b"\x1b" not in pipe.read_to_end()


@pytest.mark.parametrize("no_color", ["", "1"])
def test_auto_is_console_on_a_terminal(monkeypatch: pytest.MonkeyPatch, no_color: str) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream, os.fdopen(master, "rb", buffering=0) as terminal:
        writer = start_logging(stream=stream)
        structlog.get_logger().info("batch_sealed", records=3)
        assert writer.close(DEADLINE)
        text = terminal.read(4096)
    assert b"batch_sealed" in text
    assert not text.startswith(b"{")
    assert (b"\x1b[" in text) == (no_color == "")


# What libraries say


def test_library_logs_and_warnings_take_the_same_way(pipe: Pipe) -> None:
    before = logging.getLogger().handlers[:]
    writer = start_logging(level="debug", stream=pipe.stream)
    logging.getLogger("aiohttp.server").error("failed: %s", "x", exc_info=ValueError("y"))
    logging.getLogger("asyncio").debug("Using selector")
    odd = logging.LogRecord("asyncio", logging.WARNING, "", 0, "broken %d", ("x",), None)
    logging.getLogger().handlers[-1].handle(odd)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(capture=True)
        warnings.warn("an old call", stacklevel=1)
        logging.captureWarnings(capture=False)
    assert writer.close(DEADLINE)
    events = pipe.events()
    assert {event["event"] for event in events} == {"library_logged"}
    assert [e["logger"] for e in events] == ["aiohttp.server", "asyncio", "py.warnings"]
    assert [e["message"] for e in events[:2]] == ["failed: x", "broken %d"]
    assert events[0]["exception"][0]["exc_type"] == "ValueError"
    assert "an old call" in events[2]["message"]
    assert logging.getLogger().handlers == before


# A reader that stalls


def fill(fd: int) -> int:
    """Writes until the pipe is full; how many bytes that took."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    size = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            size += os.write(fd, b" " * 65536)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return size


@pytest.mark.parametrize("blocking", [True, False])
def test_a_stalled_reader_costs_lines_and_learns_how_many(pipe: Pipe, blocking: bool) -> None:
    filled = fill(pipe.stream.fileno())
    os.set_blocking(pipe.stream.fileno(), blocking)
    writer = start_logging(stream=pipe.stream)
    log = structlog.get_logger()
    total = 2 * daemon_logging.LINES_MAX
    slow = 0
    for number in range(total):
        start = time.monotonic()
        log.info("chunk_accepted", number=number)
        slow += time.monotonic() - start > 0.5
    # A moment without time makes a few calls slow; the reader would have made most of them so.
    assert slow < total / 100, "the caller waited for the reader"
    assert writer.lines_lost >= total - daemon_logging.LINES_MAX
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_to_end()))
    pipe.stream.close()
    reader.start()
    assert writer.close(DEADLINE)
    reader.join(DEADLINE)
    events = [json.loads(line) for line in got[0][filled:].splitlines()]
    numbers = [e["number"] for e in events if e["event"] == "chunk_accepted"]
    reported = sum(e["lines"] for e in events if e["event"] == "log_lines_dropped")
    assert numbers == sorted(numbers)
    assert len(numbers) + reported == total
    assert reported == writer.lines_lost


def test_lines_flow_again_without_a_new_line_to_push_them(pipe: Pipe) -> None:
    rest = fill(pipe.stream.fileno())
    writer = writer_to(pipe)
    total = 0
    while not writer.lines_lost:
        writer.write(b"%08d " % total + b"x" * 990 + b"\n")
        total += 1
    while rest:
        rest -= len(os.read(pipe.read_fd, rest))
    with os.fdopen(os.dup(pipe.read_fd), "rb") as reader:
        lines = [reader.readline() for _ in range(total)]
    assert writer.close(DEADLINE)
    reports = [line for line in lines if line.startswith(b"lost")]
    assert reports == [b"lost 1\n"]
    assert [int(line[:8]) for line in lines if line not in reports] == list(range(total - 1))


def test_what_waits_is_bounded_in_bytes(pipe: Pipe) -> None:
    fill(pipe.stream.fileno())
    writer = writer_to(pipe)
    line = b"x" * (1024**2 - 1) + b"\n"
    for _ in range(12):
        writer.write(line)
    assert writer.lines_lost == 12 - daemon_logging.BYTES_MAX // len(line)
    pipe.hang_up()
    assert writer.close(DEADLINE)
    assert writer.lines_lost == 12


def test_close_keeps_its_deadline_while_the_reader_stalls(pipe: Pipe) -> None:
    fill(pipe.stream.fileno())
    writer = writer_to(pipe)
    writer.write(b"one\n")
    start = time.monotonic()
    assert not writer.close(0.2)
    assert 0.2 <= time.monotonic() - start < DEADLINE
    writer.write(b"two\n")
    assert writer.lines_lost == 1
    pipe.hang_up()
    assert writer.close(DEADLINE)


def test_close_gives_up_on_a_stalled_descriptor_that_does_not_block(pipe: Pipe) -> None:
    fill(pipe.stream.fileno())
    os.set_blocking(pipe.stream.fileno(), False)
    writer = writer_to(pipe)
    writer.write(b"one\n")
    writer.close(0.2)
    assert writer.close(DEADLINE)
    assert writer.lines_lost == 1


# A reader that is gone, a disk that is full


def test_a_reader_that_left_costs_lines_only(pipe: Pipe) -> None:
    writer = start_logging(stream=pipe.stream)
    pipe.hang_up()
    log = structlog.get_logger()
    for _ in range(3):
        log.info("chunk_accepted")
    until(lambda: writer.lines_lost == 3)
    log.info("chunk_accepted")
    assert writer.close(DEADLINE)
    assert writer.lines_lost == 4


@pytest.mark.parametrize("stream", [io.StringIO(), None, "closed"], ids=["no-fd", "none", "closed"])
def test_no_stderr_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stream: Any
) -> None:
    if stream == "closed":
        stream = (tmp_path / "log").open("w")
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    writer = start_logging()
    structlog.get_logger().info("chunk_accepted")
    assert writer.close(DEADLINE)
    assert writer.lines_lost == 1


def test_a_process_started_with_closed_streams_writes_no_log_into_its_files(tmp_path: Path) -> None:
    program = """
import structlog, sys
from ingestd.base.logging import start_logging
files = [open(f"file{n}", "w") for n in range(4)]
writer = start_logging()
structlog.get_logger().error("chunk_accepted")
closed = writer.close(60)
sys.exit(0 if closed and writer.lines_lost == 1 else 1)
"""
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" -c "$1" 0<&- 1>&- 2>&-', sys.executable, program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=DEADLINE,
    )
    assert done.returncode == 0
    assert [(tmp_path / f"file{n}").read_bytes() for n in range(4)] == [b""] * 4


def test_the_log_does_not_pose_as_a_standard_stream() -> None:
    program = """
import os
from ingestd.base.logging import start_logging
start_logging()
os.fstat(0)
"""
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" -c "$1" 0<&-', sys.executable, program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=DEADLINE,
    )
    assert b"Bad file descriptor" in done.stderr


def test_a_stream_that_is_closed_later_does_not_give_its_number_away(
    pipe: Pipe, tmp_path: Path
) -> None:
    writer = start_logging(stream=pipe.stream)
    number = pipe.stream.fileno()
    pipe.stream.close()
    with (tmp_path / "journal").open("wb") as journal:
        assert journal.fileno() == number
        structlog.get_logger().info("chunk_accepted")
        assert writer.close(DEADLINE)
    assert (tmp_path / "journal").read_bytes() == b""
    assert [event["event"] for event in pipe.events()] == ["chunk_accepted"]


def test_a_full_disk_tears_no_second_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    room = 8
    real = os.write

    def write(fd: int, data: Any) -> int:
        nonlocal room
        if threading.current_thread().name != "log-writer":
            return real(fd, data)
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        sent = real(fd, bytes(data[:room]))
        room -= sent
        return sent

    monkeypatch.setattr(os, "write", write)
    writer = LogWriter(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), report)
    writer.write(b"one\n")
    writer.write(b"two-is-long\n")
    until(lambda: writer.lines_lost == 1)
    room = 1000
    writer.write(b"three\n")
    assert writer.close(DEADLINE)
    lines = path.read_bytes().splitlines()
    assert lines[0] == b"one"
    assert b"two-is-long".startswith(lines[1])
    assert lines[1] != b"two-is-long"
    assert [lines[-2], lines[-1]] == [b"three", b"lost 1"]


def test_a_real_full_device() -> None:
    writer = LogWriter(os.open("/dev/full", os.O_WRONLY), report)
    writer.write(b"one\n")
    writer.write(b"two\n")
    assert writer.close(DEADLINE)
    assert writer.lines_lost == 2


# The price


def test_a_line_is_cheap_and_a_filtered_one_is_cheaper(pipe: Pipe) -> None:
    """Bounds are some twenty times what was measured: this finds a mistake, not a slow machine."""
    pipe.hang_up()
    writer = start_logging(stream=pipe.stream)
    log = structlog.get_logger()

    def fastest(call: Callable[[], object]) -> float:
        times = []
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(100):
                call()
            times.append((time.perf_counter() - start) / 100)
        return min(times)

    debug = fastest(lambda: log.debug("chunk_accepted", pipeline="default", records=1000))
    info = fastest(lambda: log.info("chunk_accepted", pipeline="default", records=1000))
    writer.close(DEADLINE)
    assert debug < 20e-6
    assert info < 200e-6
