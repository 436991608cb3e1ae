"""Where to go on with an input that was left, and what an unsuitable input is called."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import itertools
import os
import pty
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.append import Append
from ingestd.base.errors import InputUnreadable, JournalFailed, Overloaded
from ingestd.codecs.framing import Framer, guess
from ingestd.codecs.lines import BOM
from ingestd.sources.stdin import StdinSettings
from ingestd.sources.stdin.source import AcceptedPrefix, StdinSource, _lines_of
from tests.sources.source_tools import MemoryIntake, until

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator
    from pathlib import Path

# -- without a gap ---------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=30), st.randoms())
def test_only_what_is_accepted_without_a_gap_counts(
    parts: list[tuple[int, bool]], chance: random.Random
) -> None:
    prefix, ends, lines = AcceptedPrefix(), [], 0
    for size, _ in parts:
        lines += size
        ends.append(prefix.begin(lines, size))
    order = [n for n, (_, done) in enumerate(parts) if done]
    chance.shuffle(order)
    for number in order:
        prefix.accept(ends[number])
    whole = next((n for n, (_, done) in enumerate(parts) if not done), len(parts))
    assert prefix.lines == sum(size for size, _ in parts[:whole])
    assert prefix.is_whole == (whole == len(parts))
    assert prefix.behind == sum(size for size, done in parts[whole:] if done)


# -- leaving ---------------------------------------------------------------------------------------


class Picky(MemoryIntake):
    """Holds back the appends with the given numbers; the others are accepted at once."""

    def __init__(self, *held: int, form: Any = "json") -> None:
        super().__init__(form)
        self.held = held
        self.count = 0

    async def accept(self, append: Append) -> None:
        self.count += 1
        if self.count - 1 in self.held:
            await self.gate.wait()
        self.runs.append(append.records)
        self.refused.extend(append.invalid)


@contextlib.asynccontextmanager
async def reading(fd: int, intake: MemoryIntake, **more: Any) -> AsyncIterator[StdinSource]:
    source = StdinSource(StdinSettings(), intake, fd=fd, stderr=io.StringIO(), **more)
    await source.start()
    try:
        yield source
    finally:
        await source.close()


def left(source: StdinSource) -> dict[str, Any]:
    with structlog.testing.capture_logs() as logs:
        source.report()
    return dict(logs[0]) if logs else {}


async def stop(source: StdinSource, seconds: float = 60) -> None:
    await source.stop_taking(asyncio.get_running_loop().time() + seconds)


@given(
    st.lists(st.sampled_from([b"1\n", b"\n", b"{\n", b'"' + b"x" * 60 + b'"\n', b" 2\r\n", BOM])),
    st.lists(st.integers(0, 400), max_size=8),
    st.sampled_from(["json", "text", "bytes"]),
)
def test_lines_are_counted_as_they_are_in_the_input(
    parts: list[bytes], cuts: list[int], form: Any
) -> None:
    data, framer, lines = b"".join(parts), Framer(form, 50), 0
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for start, end in itertools.pairwise(places):
        piece, held = data[start:end], framer.held
        parsed = framer.feed(piece)
        lines += _lines_of(piece, parsed, held + len(piece) - framer.held)
        assert lines == data.count(b"\n", 0, end)


@pytest.mark.parametrize("held", [(), (0,), (2,), (1, 4), (0, 1, 2, 3, 4)])
async def test_a_pipe_goes_on_at_the_first_line_that_was_not_accepted(held: tuple[int]) -> None:
    """Five appends of three lines, blank and bad ones among them; some are never accepted."""
    fd, into = os.pipe()
    intake = Picky(*held)
    intake.gate.clear()
    try:
        async with reading(fd, intake) as source:
            for n in range(5):
                os.write(into, b"%d\n\n{\n" % n)
                await until(lambda n=n: intake.count == n + 1)
            os.write(into, b'{"half":')
            await until(lambda: source.bytes == 5 * 5 + 8)
            await stop(source, 0.01 if held else 10)
            found = left(source)
        after_close = left(source)
    finally:
        os.close(fd)
        os.close(into)
    line = 1 + 3 * min((*held, 5))
    assert found["event"] == "input_left"
    assert found["log_level"] == "warning"
    assert found["line"] == line
    assert found["go_on"] == f"... | tail -n +{line} |"
    behind = sum(2 for n in range(5) if n > min((*held, 5)) and n not in held)
    if not held:
        assert "accepted_behind" not in found
        assert "exact" not in after_close
    else:
        # The line that was begun is kept, too, as one that is unfinished.
        assert found["accepted_behind"] in (behind, behind + 1)
        assert after_close["exact"] is False  # what was cancelled may be on its way


async def test_a_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "it's a log"
    path.write_bytes(b'"x"\n' * 500_000)
    fd = os.open(path, os.O_RDONLY)
    intake = MemoryIntake()
    try:
        async with reading(fd, intake) as source:
            await until(lambda: intake.items)
            await stop(source)
            found = left(source)
            line = len(intake.items) + 1
    finally:
        os.close(fd)
    assert found["line"] == line
    quoted = str(path).replace("'", "'\"'\"'")
    assert found["go_on"] == f"tail -n +{line} '{quoted}' |"


async def test_what_is_read_from_the_middle_counts_from_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b'"x"\n' * 500_000)
    fd = os.open(path, os.O_RDONLY)
    os.lseek(fd, 400, os.SEEK_SET)
    intake = MemoryIntake()
    try:
        async with reading(fd, intake) as source:
            await until(lambda: intake.items)
            await stop(source)
            found = left(source)
    finally:
        os.close(fd)
    assert found["go_on"] == f"... | tail -n +{len(intake.items) + 1} |"


async def test_the_end_of_a_pipe_whose_other_side_ended_by_the_same_signal_is_not_the_end() -> None:
    """Ctrl-C of a terminal goes to both: the last line is torn, and there may have been more."""
    fd, into = os.pipe()
    os.write(into, b'1\n2\n{"half":')
    os.close(into)
    signals = iter([True])  # it is asked for once the end was seen
    intake = MemoryIntake()
    try:
        async with reading(fd, intake, is_interrupted=lambda: next(signals)) as source:
            await source.wait_finished()
            assert not source.ended
            assert left(source)["line"] == 3
    finally:
        os.close(fd)
    assert intake.items == [b"1", b"2"]
    assert [one.reason for one in intake.refused] == ["unfinished"]


async def test_the_end_of_a_file_is_the_end_whatever_signal_comes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"1\n2")
    fd = os.open(path, os.O_RDONLY)
    intake = MemoryIntake()
    try:
        async with reading(fd, intake, is_interrupted=lambda: True) as source:
            await source.wait_finished()
            assert source.ended
    finally:
        os.close(fd)
    assert intake.items == [b"1", b"2"]


@pytest.mark.parametrize("data", [b"", b"1\n2\n", b"1\n2", b"1\n\n\n"])
async def test_nothing_is_said_where_all_was_read(data: bytes) -> None:
    fd, into = os.pipe()
    os.write(into, data)
    os.close(into)
    try:
        async with reading(fd, MemoryIntake()) as source:
            await source.wait_finished()
            assert source.ended
            assert left(source) == {}
    finally:
        os.close(fd)


async def test_nothing_is_said_to_one_who_types() -> None:
    leader, follower = pty.openpty()
    intake = MemoryIntake()
    try:
        async with reading(follower, intake) as source:
            os.write(leader, b"1\n")
            await until(lambda: intake.items)
            await stop(source)
            assert left(source) == {}
    finally:
        os.close(leader)
        os.close(follower)


async def test_a_journal_that_fails_leaves_a_way_on() -> None:
    fd, into = os.pipe()
    intake = MemoryIntake()
    try:
        async with reading(fd, intake) as source:
            os.write(into, b"1\n2\n")
            await until(lambda: intake.items)
            intake.errors = [JournalFailed(path="j", problem="sync")]
            os.write(into, b"3\n")
            with pytest.raises(JournalFailed):
                await source.wait_finished()
            assert left(source)["line"] == 3
    finally:
        os.close(fd)
        os.close(into)


async def test_an_append_that_was_sent_back_is_counted_in_its_place() -> None:
    fd, into = os.pipe()
    intake = MemoryIntake()
    try:
        async with reading(fd, intake) as source:
            many = 10**6
            intake.errors = [Overloaded(what="the journal", retry_after=0.001)] * many
            os.write(into, b"1\n2\n")
            await until(lambda: len(intake.errors) < many)
            os.write(into, b"3\n")
            await until(lambda: source._waiting == 1)
            assert (left(source)["line"], "accepted_behind" in left(source)) == (1, False)
            intake.errors.clear()
            await until(lambda: len(intake.items) == 3)
            assert intake.items == [b"1", b"2", b"3"]
            await stop(source)
            assert left(source)["line"] == 4
    finally:
        os.close(fd)
        os.close(into)


# -- what it seems to be ---------------------------------------------------------------------------

UNSUITABLE = [
    (gzip.compress(b"1\n" * 100), "it is compressed (gzip)", "zcat FILE |"),
    (b"\x28\xb5\x2f\xfd" + b"x" * 99, "it is compressed (zstd)", "zstdcat FILE |"),
    (b"BZh91AY&SY" + b"x" * 99, "it is compressed (bzip2)", "bzcat FILE |"),
    ('{"a": 1}\n'.encode("utf-16"), "it is UTF-16 text", "iconv -f UTF-16 -t UTF-8 FILE |"),
    ('{"a": 1}\n'.encode("utf-32"), "it is UTF-32 text", "iconv -f UTF-32 -t UTF-8 FILE |"),
    ('{"a": 1}\n'.encode("utf-16-le"), "it is UTF-16LE text", "iconv -f UTF-16LE"),
    ('{"a": 1}\n'.encode("utf-16-be"), "it is UTF-16BE text", "iconv -f UTF-16BE"),
    (b"\x7fELF" + b"\0\1\2" * 50, "it is not text: there are zero bytes in it", ""),
    (b"user,page\nann,1\n", "it is not JSON", "--format text"),
    (b'{\n  "a": 1\n}\n', "it is JSON over several lines", "jq -c ."),
    (b'\xef\xbb\xbf[\r\n{"a": 1},\n', "it is JSON over several lines", "jq -c ."),
]


@pytest.mark.parametrize(("data", "problem", "advice"), UNSUITABLE)
async def test_an_unsuitable_input_is_called_what_it_seems_to_be(
    data: bytes, problem: str, advice: str
) -> None:
    fd, into = os.pipe()
    os.write(into, data)
    os.close(into)
    try:
        with structlog.testing.capture_logs() as logs:
            async with reading(fd, MemoryIntake()) as source:
                await source.wait_finished()
    finally:
        os.close(fd)
    assert (source.records, source.refused > 0) == (0, True) or problem.startswith("it is JSON")
    said, *more = [line for line in logs if line["log_level"] == "warning"]
    assert (said["event"], said["problem"]) == ("input_unsuitable", problem)
    assert said["advice"].startswith(advice)
    assert [line["event"] for line in more] == ["input_invalid"]


@pytest.mark.parametrize(
    "data",
    [b"", b"1", b'{"a": 1}\n{"b": 2}\n', b"[1, 2]\n[3]\n", b'[\n{"a": 1},\n', b"PK", b"\xff",
     "ä€😀\n".encode() * 9, b"a\0b" + b"x" * 50],
)  # fmt: skip
def test_what_may_be_text_is_not_called_anything(data: bytes) -> None:
    assert guess(data, "text") is None
    assert guess(data, "bytes") is None


@pytest.mark.parametrize("data", [b'{"a": 1\n', b"{'a': 1}\n", b"1\nx\n", b"\nx\n", b"x"])
def test_what_may_be_json_is_not_called_anything(data: bytes) -> None:
    assert guess(data, "json") is None


def test_bytes_may_be_anything() -> None:
    assert [guess(data, "bytes") for data, _, _ in UNSUITABLE] == [None] * len(UNSUITABLE)


async def test_the_first_invalid_record_is_told_and_the_others_are_counted() -> None:
    fd, into = os.pipe()
    os.write(into, b'1\n\n2\n{"a":\n{"b":\n3\n')
    os.close(into)
    try:
        with structlog.testing.capture_logs() as logs:
            async with reading(fd, MemoryIntake()) as source:
                await source.wait_finished()
    finally:
        os.close(fd)
    assert (source.records, source.refused) == (3, 2)
    (said,) = logs
    assert said["event"] == "input_invalid"
    assert (said["record"], said["reason"]) == (3, "malformed")
    assert said["detail"]


async def test_an_input_that_breaks_keeps_what_was_read_and_says_where_to_go_on() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    theirs = socket.create_connection(server.getsockname())
    ours, _ = server.accept()
    intake = MemoryIntake()
    with server, theirs, ours:
        async with reading(ours.fileno(), intake) as source:
            theirs.sendall(b"1\n2\n")
            await until(lambda: intake.items)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            theirs.close()
            with pytest.raises(InputUnreadable, match="Connection reset by peer"):
                await source.wait_finished()
            assert not source.ended
            assert left(source)["line"] == 3
