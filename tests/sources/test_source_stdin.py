"""Standard input, whatever it is: nothing is lost, doubled or left blocking, on both loops."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import itertools
import os
import pty
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import structlog
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.errors import InputUnreadable, JournalFailed, Overloaded
from ingestd.base.record import InvalidRecord, Records
from ingestd.codecs.framing import Framer
from ingestd.codecs.lines import LISTED_MAX, Parsed
from ingestd.sources.descriptors import READ_BYTES, ReadyReader, ThreadReader
from ingestd.sources.stdin import StdinSettings
from ingestd.sources.stdin.source import StdinSource
from tests.real_input import real_input
from tests.sources.source_tools import MemoryIntake, check, until

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


@pytest.fixture(params=LOOPS, ids=["asyncio", "uvloop"])
def run(request):
    """Runs a coroutine on one of the two loops."""

    def turn(work):
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(asyncio.wait_for(work, 90))

    return turn


@contextlib.asynccontextmanager
async def reading(fd, intake, *, inflight=16 * 1024**2):
    source = StdinSource(
        StdinSettings(inflight_bytes_max=inflight), intake, fd=fd, stderr=io.StringIO()
    )
    await source.start()
    try:
        yield source
    finally:
        await source.close()


async def read_all(fd, form="json", **bounds):
    intake = MemoryIntake(form, **bounds)
    async with reading(fd, intake) as source:
        await source.wait_finished()
        total = source.records, source.refused
    assert total == (len(intake.items), len(intake.refused))
    return intake


@contextlib.contextmanager
def fed(data, kind):
    """A descriptor of some kind, with a thread (or process) that writes into it."""
    if kind == "pipe":
        fd, into = os.pipe()
        write, close = (lambda part: os.write(into, part)), (lambda: os.close(into))
    elif kind == "socket":
        mine, theirs = socket.socketpair()
        fd, write, close = mine.detach(), theirs.send, theirs.close

    def feed():
        rest = memoryview(data)
        while rest:
            rest = rest[write(rest[: random.randint(1, 200_000)]) :]
        close()

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield fd
    finally:
        os.close(fd)
        thread.join()


# -- framing --------------------------------------------------------------------------------------

tokens = st.sampled_from(
    [b"\n", b"\r\n", b"\r", b"1", b'"ab"', b" ", b"{}", b"\xef\xbb\xbf", b"\xff", b"\x00", b"x" * 9]
)


def frame(form, bound, pieces):
    framer = Framer(form, bound)
    parts = [framer.feed(piece) for piece in pieces]
    parts.append(framer.end())
    return (
        [item for part in parts if part for item in part.records.items()],
        [one for part in parts if part for one in part.refused],
    )


@given(
    st.sampled_from(["json", "text", "bytes"]),
    st.integers(1, 12),
    st.lists(tokens | st.binary(max_size=3), max_size=30).map(b"".join),
    st.lists(st.integers(0, 10**6), max_size=12),
)
def test_any_division_gives_the_same(form, bound, data, cuts):
    cuts = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    pieces = [data[a:b] for a, b in itertools.pairwise(cuts)]
    whole = frame(form, bound, [data])
    assert frame(form, bound, pieces) == whole
    assert frame(form, bound, [data[n : n + 1] for n in range(len(data))]) == whole
    items, refused = whole
    assert [one.index for one in refused] == sorted({one.index for one in refused})
    assert all(one.index < len(items) + len(refused) for one in refused)
    if form == "bytes" and not refused:
        assert b"\n".join(items) == data.removesuffix(b"\n")


def test_time_is_linear_in_a_long_line():
    framer = Framer("text", 100 * 1024**2)
    piece = b"x" * 4096
    start = time.process_time()
    for _ in range(100 * 1024 // 4):
        assert framer.feed(piece) is None
    parsed = framer.feed(b"\n")
    assert time.process_time() - start < 30  # it would be minutes if each piece were joined
    assert len(parsed.records.items()[0]) == 100 * 1024**2


def test_an_over_long_line_takes_no_memory():
    framer = Framer("text", 1000)
    for _ in range(1000):
        assert framer.feed(b"x" * 100_000) is None
    assert len(framer._tail) <= 64 * 1024
    parsed = framer.feed(b"\nnext\n")
    assert parsed.records.items() == [b"next"]
    assert parsed.refused[0].detail.startswith("100000000 bytes")


def test_a_line_that_was_begun_is_refused_where_reading_stops():
    framer = Framer("json", 100)
    assert framer.feed(b'1\n{"a":').records.count == 1
    assert framer.cut() == Parsed(
        Records.lines([]),
        [InvalidRecord(1, "unfinished", "reading stopped after 5 bytes of the line", b'{"a":')],
    )
    assert framer.cut() is None
    framer.feed(b"x" * 200)
    assert framer.cut().refused[0].reason == "too_large"


# -- kinds of input -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_pipes_and_sockets(run, kind):
    lines = [b'{"n":%d,"pad":"%s"}' % (n, b"x" * (n % 300)) for n in range(20_000)]
    with fed(b"\n".join(lines), kind) as fd:
        intake = run(read_all(fd))
        assert os.get_blocking(fd)
    assert intake.items == lines


def test_a_fifo(run, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = subprocess.Popen(["sh", "-c", f"printf '1\\n2\\n' > {fifo}; "])
    fd = os.open(fifo, os.O_RDONLY)
    try:
        assert run(read_all(fd)).items == [b"1", b"2"]
    finally:
        os.close(fd)
        writer.wait()


def test_a_regular_file_from_where_it_stands(run, tmp_path):
    lines = [b"%d" % n for n in range(300_000)]
    path = tmp_path / "file"
    path.write_bytes(b"0\n" + b"\n".join(lines))
    with path.open("rb", buffering=0) as file:
        file.seek(2)
        assert run(read_all(file.fileno())).items == lines


def test_dev_null_and_a_closed_descriptor_are_empty(run):
    with Path(os.devnull).open("rb") as null:
        assert run(read_all(null.fileno())).runs == []
    assert run(read_all(987)).runs == []


def test_a_folder_is_said_to_be_unreadable(run, tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with structlog.testing.capture_logs() as logs, pytest.raises(InputUnreadable) as caught:
            run(read_all(fd))
        assert [line["event"] for line in logs] == ["stdin_failed"]
        assert str(caught.value).endswith("could not be read to its end: Is a directory")
    finally:
        os.close(fd)


def test_the_end_of_a_pipe_that_is_written_to_is_said_to_be_unreadable(run):
    reading, writing = os.pipe()
    try:
        with pytest.raises(InputUnreadable, match="Bad file descriptor"):
            run(read_all(writing))
    finally:
        os.close(reading)
        os.close(writing)


def test_a_terminal(run):
    async def work():
        intake = MemoryIntake()
        leader, follower = pty.openpty()
        try:
            async with reading(follower, intake) as source:
                assert source._stderr.getvalue().count("Ctrl-D") == 1
                assert os.get_blocking(follower)
                os.write(leader, b'{"typed":1}\n')
                await until(lambda: intake.items)
                os.write(leader, b"2\n\x04")
                await source.wait_finished()
        finally:
            os.close(leader)
            os.close(follower)
        return intake.items

    assert run(work()) == [b'{"typed":1}', b"2"]


def test_a_terminal_that_nobody_types_into_can_be_left(run):
    async def work():
        leader, follower = pty.openpty()
        try:
            async with reading(follower, MemoryIntake()) as source:
                await source.stop_taking(asyncio.get_running_loop().time() + 60)
                await source.wait_finished()
        finally:
            os.close(leader)
            os.close(follower)

    before = threading.active_count()
    run(work())
    assert threading.active_count() == before


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_shared_flags_stay_as_they_are(run, kind):
    async def work():
        if kind == "pipe":
            fd, into = os.pipe()
        else:
            fd, into = (one.detach() for one in socket.socketpair())
        shared = os.dup(fd)
        intake = MemoryIntake()
        try:
            async with reading(fd, intake) as source:
                assert isinstance(source._reader, ReadyReader)
                os.write(into, b"1\n")
                await until(lambda: intake.items)
                assert os.get_blocking(shared)
            assert not fcntl.fcntl(shared, fcntl.F_GETFL) & os.O_NONBLOCK
        finally:
            for one in (fd, into, shared):
                os.close(one)

    run(work())


def test_a_pipe_that_cannot_be_opened_anew_gets_its_flag_back(run, monkeypatch):
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest: real("/no/proc" if "/proc" in str(path) else path, *rest)
    )
    with fed(b"1\n2\n", "pipe") as fd:
        assert run(read_all(fd)).items == [b"1", b"2"]
        assert os.get_blocking(fd)


def test_descriptors_and_threads_are_given_back(run, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1\n")
    before = set(Path("/proc/self/fd").iterdir())
    for _ in range(5):
        with path.open("rb") as file:
            run(read_all(file.fileno()))
        with fed(b"1\n", "pipe") as fd:
            run(read_all(fd))
        with fed(b"1\n", "socket") as fd:
            run(read_all(fd))
    assert set(Path("/proc/self/fd").iterdir()) == before
    assert "stdin-reader" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("kind", ["pipe", "file"])
@pytest.mark.parametrize("name", ["apache.log", "nginxplus.ndjson"])
def test_real_data_byte_for_byte(run, tmp_path, name, kind):
    data = real_input(name).read_bytes()
    form = "text" if name == "apache.log" else "json"
    if kind == "pipe":
        with fed(data, "pipe") as fd:
            intake = run(read_all(fd, form))
    else:
        path = tmp_path / name
        path.write_bytes(data)
        with path.open("rb") as file:
            intake = run(read_all(file.fileno(), form))
    assert b"".join(r.payload for r in intake.runs) == data
    assert not intake.refused


# -- what is in it --------------------------------------------------------------------------------


def test_bad_lines_are_refused_with_their_place(run):
    data = b'1\r\n\nbad\n"\xff"\n"\x00"\n"' + b"x" * 100 + b'"\n 2 \n{"last":1}'
    with fed(data, "pipe") as fd:
        intake = run(read_all(fd, record_bytes_max=50))
    assert intake.items == [b"1", b" 2 ", b'{"last":1}']
    assert [(one.index, one.reason) for one in intake.refused] == [
        (1, "malformed"),
        (2, "malformed"),
        (3, "malformed"),
        (4, "too_large"),
    ]


def test_so_many_bad_lines_are_counted_and_some_of_them_kept(run):
    async def read(fd):
        intake = MemoryIntake("json")
        async with reading(fd, intake) as source:
            await source.wait_finished()
            assert (source.records, source.refused) == (1, 100_000)
        return intake

    with fed(b"1\n" + b"x\n" * 100_000, "pipe") as fd:
        intake = run(read(fd))
    assert intake.items == [b"1"]
    assert LISTED_MAX <= len(intake.refused) < 50_000
    assert len(intake.refused) + intake.unkept == 100_000


@pytest.mark.parametrize(
    ("form", "items"),
    [("text", [b"a", b"\xff\x00", b" ", b"b"]), ("bytes", [b"a\r", b"", b"\xff\x00", b" ", b"b"])],
)
def test_text_and_bytes(run, form, items):
    with fed(b"a\r\n\n\xff\x00\n \nb", "pipe") as fd:
        assert run(read_all(fd, form)).items == items


# -- pressure -------------------------------------------------------------------------------------


def test_what_is_in_flight_is_bounded_and_the_pipe_backs_up(run):
    lines = [b'{"n":%d,"pad":"%s"}' % (n, b"x" * 100) for n in range(100_000)]
    data = b"\n".join(lines) + b"\n"

    async def work(fd):
        intake = MemoryIntake()
        intake.gate.clear()
        async with reading(fd, intake, inflight=2 * 1024**2) as source:
            await until(lambda: source._inflight > 1024**2)
            for _ in range(100):
                await asyncio.sleep(0)
            # One more read may wait for room.
            assert source.bytes <= 2 * 1024**2 + READ_BYTES < len(data)
            intake.gate.set()
            await source.wait_finished()
        assert intake.waiting_most <= 2 * 1024**2
        return intake.items

    with fed(data, "pipe") as fd:
        assert run(work(fd)) == lines


def test_several_appends_are_under_way_at_once(run):
    async def work():
        intake = MemoryIntake()
        intake.gate.clear()
        fd, into = os.pipe()
        try:
            async with reading(fd, intake) as source:
                for n in range(5):
                    os.write(into, b"%d\n" % n)
                    await until(lambda n=n: len(source._appends) == n + 1)
                intake.gate.set()
                os.close(into)
                await source.wait_finished()
        finally:
            os.close(fd)
        return intake.items

    assert run(work()) == [b"0", b"1", b"2", b"3", b"4"]


def test_an_overload_is_waited_out(run):
    async def work(fd):
        intake = MemoryIntake()
        intake.errors = [Overloaded(what="the journal", retry_after=0.01) for _ in range(7)]
        async with reading(fd, intake) as source:
            await source.wait_finished()
        assert not intake.errors
        return intake.items

    lines = [b'"%s"' % (b"x" * 1000)] * 5000
    with fed(b"\n".join(lines), "pipe") as fd:
        assert run(work(fd)) == lines


class Bounded(MemoryIntake):
    """Refuses what it has no room for, at once, and has more room after each refusal.

    What it takes becomes durable later.
    """

    def __init__(self) -> None:
        super().__init__("text")
        self.room, self.refusals = 300, 0

    async def accept(self, append):
        size = len(append.records.payload)
        if size > self.room:
            self.refusals += 1
            self.room += random.randint(0, 900)
            raise Overloaded(what="the journal", retry_after=0.001)
        self.room -= size
        check(append.records)
        self.runs.append(append.records)
        await asyncio.sleep(0.001)


def test_lines_keep_their_order_while_a_journal_is_full_and_freed_again(run):
    lines = [b"%d %s" % (n, b"x" * random.randint(0, 250)) for n in range(120)]

    async def work():
        intake = Bounded()
        fd, into = os.pipe()
        try:
            async with reading(fd, intake, inflight=4000) as source:
                for line in lines:  # each is an append
                    sent = source.bytes + os.write(into, line + b"\n")
                    await until(lambda sent=sent: source.bytes == sent)
                os.close(into)
                await source.wait_finished()
        finally:
            os.close(fd)
        assert intake.refusals > 10
        return intake.items

    assert run(work()) == lines


@pytest.mark.parametrize("error", [JournalFailed(path="j", problem="sync"), KeyError("bug")])
def test_a_failure_ends_the_reading_and_is_told(run, error):
    async def work(fd):
        intake = MemoryIntake()
        intake.errors = [error] * 1000
        async with reading(fd, intake, inflight=1) as source:
            with pytest.raises(type(error)):
                await source.wait_finished()

    fd, into = os.pipe()
    try:
        os.write(into, b"1\n")  # and the pipe stays open
        with structlog.testing.capture_logs() as logs:
            run(work(fd))
        assert [line["event"] for line in logs] == ["stdin_records_abandoned"]
    finally:
        os.close(fd)
        os.close(into)


# -- leaving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_leaving_in_the_middle_of_a_line_keeps_its_beginning(run, kind):
    async def work():
        intake = MemoryIntake()
        if kind == "pipe":
            fd, into = os.pipe()
        else:
            fd, into = (one.detach() for one in socket.socketpair())
        try:
            async with reading(fd, intake) as source:
                os.write(into, b'1\n2\n{"half":')
                await until(lambda: source.bytes == 12)
                intake.gate.clear()
                stopping = asyncio.create_task(
                    source.stop_taking(asyncio.get_running_loop().time() + 60)
                )
                await until(lambda: intake.waiting == 0 and source._appends)
                assert not stopping.done()
                intake.gate.set()
                await stopping
                os.write(into, b"1}\n3\n")
                await source.wait_finished()
        finally:
            os.close(fd)
            os.close(into)
        return intake

    intake = run(work())
    assert intake.items == [b"1", b"2"]
    assert [(one.index, one.reason, one.payload) for one in intake.refused] == [
        (2, "unfinished", b'{"half":')
    ]


def test_leaving_has_a_deadline(run):
    async def work():
        intake = MemoryIntake()
        intake.gate.clear()
        fd, into = os.pipe()
        loop = asyncio.get_running_loop()
        try:
            async with reading(fd, intake) as source:
                os.write(into, b"1\n")
                await intake.asked.wait()
                start = loop.time()
                await source.stop_taking(start + 0.02)
                assert loop.time() - start < 30
        finally:
            os.close(fd)
            os.close(into)

    with structlog.testing.capture_logs() as logs:
        run(work())
    assert [(line["event"], line["bytes"]) for line in logs] == [("stdin_records_abandoned", 2)]


def test_a_file_is_left_where_it_was_read_to(run, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b'"%s"\n' % (b"x" * 1000) * 20_000)

    async def work(file):
        intake = MemoryIntake()
        async with reading(file.fileno(), intake, inflight=1024**2) as source:
            assert isinstance(source._reader, ThreadReader)
            await intake.asked.wait()
            await source.stop_taking(asyncio.get_running_loop().time() + 60)
            await source.wait_finished()
            return intake, source.bytes

    with path.open("rb", buffering=0) as file:
        intake, read = run(work(file))
        assert file.tell() == read
    kept = sum(len(run.payload) for run in intake.runs) + sum(
        len(r.payload) for r in intake.refused
    )
    assert kept == read


def test_as_a_real_process_with_standard_input_closed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio\n"
        "from ingestd.sources.stdin import StdinSettings\n"
        "from ingestd.sources.stdin.source import StdinSource\n"
        "class In:\n"
        "    name, format, record_bytes_max, json_depth_max = 'default', 'json', 1024, 128\n"
        "    async def accept(self, append):\n"
        "        print(append.records.items())\n"
        "async def main():\n"
        "    source = StdinSource(StdinSettings(), In())\n"
        "    await source.start()\n"
        "    await source.wait_finished()\n"
        "    await source.close()\n"
        "    print('end')\n"
        "asyncio.run(main())\n"
    )
    for redirect, out in (("<&-", "end\n"), ("< /dev/null", "end\n"), ("", "[b'1']\nend\n")):
        done = subprocess.run(
            ["sh", "-c", f'echo 1 | "{sys.executable}" "{script}" {redirect}'],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        )
        assert (done.stdout, done.stderr) == (out, "")
