"""The source `stdin` reads lines from standard input as fast as they become durable.

It begins appends in the order of the input and tracks how far all of it is accepted without a gap,
which is where a run that ended early can go on.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import stat
import sys
from collections import deque
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ingestd.base.append import Append
from ingestd.base.envelope import Envelope, pack
from ingestd.base.errors import InputUnreadable, Overloaded
from ingestd.base.logging import get_logger
from ingestd.codecs.framing import HEAD_BYTES, Framer, guess
from ingestd.sources.base import InputCounts, Source, again_after
from ingestd.sources.descriptors import open_reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ingestd.base.record import InvalidRecord
    from ingestd.codecs.lines import Parsed
    from ingestd.sources.base import Intake, SourceContext
    from ingestd.sources.descriptors import Reader
    from ingestd.sources.stdin import StdinSettings


class Part:
    """The lines that one append takes.

    Attributes:
        lines: lines of the input up to its end.
        records: records in it.
        accepted: it is durable.
        refused: an overload has sent it back.
        turn: what it waits for; `None` while it waits for nothing.
    """

    __slots__ = ("accepted", "lines", "records", "refused", "turn")

    def __init__(self, lines: int, records: int) -> None:
        self.lines = lines
        self.records = records
        self.accepted = self.refused = False
        self.turn: asyncio.Future[None] | None = None


class AcceptedPrefix:
    """Tracks how far an input is accepted without a gap, although its appends end in any order.

    Attributes:
        lines: so many lines from the beginning are accepted, every one of them.
    """

    def __init__(self) -> None:
        self.lines = 0
        self._parts: deque[Part] = deque()

    def begin(self, lines: int, records: int) -> Part:
        """Begins the next part.

        Args:
            lines: lines of the input up to its end.
            records: records in it.
        """
        part = Part(lines, records)
        self._parts.append(part)
        return part

    def accept(self, part: Part) -> None:
        """Marks a part as durable."""
        part.accepted = True
        while self._parts and self._parts[0].accepted:
            self.lines = self._parts.popleft().lines

    def is_first(self, part: Part) -> bool:
        """Returns True if all before a part are accepted."""
        return self._parts[0] is part

    def first(self, most: int | None = None) -> Iterator[Part]:
        """Yields parts from the first one on that is not accepted, at most so many."""
        return islice(self._parts, most)

    @property
    def is_whole(self) -> bool:
        """Returns True if every part that was begun is accepted."""
        return not self._parts

    @property
    def behind(self) -> int:
        """Records that are accepted although something before them is not."""
        return sum(part.records for part in self._parts if part.accepted)


# -- the source -------------------------------------------------------------------------------

log = get_logger()

_HINT = "reading records from the terminal, one a line; end with Ctrl-D\n"
_SIGNAL_SECONDS = 0.02
_CALLED_MAX = 64  # of those that wait, after each that was accepted
_REFUSED_BYTES = 256  # what a refused record costs beside its payload, about


class StdinSource(Source):
    """Reads one descriptor to its end and hands the records to one pipeline.

    Many appends are under way at once, bounded by their bytes; at the bound the descriptor is
    simply not read. Appends are made in the order of the input, also where the journal is full:

    * What was refused is tried again when all before it are accepted, at once and then again and
      again. What begins behind it, or is refused behind it, waits for that.
    * When nothing is left that was refused, what waits goes on in its order, many at once.

    So nothing overtakes what was refused but an append that was under way before that was known:
    a journal refuses at once, and only a commit that finds the disk full, or a log that takes
    nothing, says so later.

    Args:
        settings: its bound.
        intake: the pipeline.
        name: of the source.
        fd: the descriptor; it stays open.
        stderr: where the hint for a terminal goes.
        is_interrupted: tells if a signal has asked the process to leave.

    Attributes:
        bytes: read so far.
        records: made durable so far.
        refused: invalid ones, which were never accepted, so far.
        ended: it was read to its end, and all of it was accepted or refused.
    """

    def __init__(
        self,
        settings: StdinSettings,
        intake: Intake,
        *,
        name: str = "stdin",
        fd: int = 0,
        stderr: TextIO | None = None,
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._is_interrupted = is_interrupted
        self._bytes_max = settings.inflight_bytes_max
        self._intake = intake
        self._fd = fd
        self._envelope = pack(Envelope(name))
        self._stderr = stderr
        self._framer = Framer(intake.format, intake.record_bytes_max, intake.json_depth_max)
        self._inflight = 0
        self._appends: set[asyncio.Task[None]] = set()
        self._moved = asyncio.Event()
        self._refused = 0  # parts that were, and are not accepted
        self._waiting = 0  # parts that wait for their turn
        self._error: BaseException | None = None
        self._unreadable: InputUnreadable | None = None
        self._head: bytes | None = b""  # until it was looked at
        self._lines = 0  # that were read to their LF
        self._prefix = AcceptedPrefix()
        self._has_ended = self._has_refused = self._was_cancelled = False
        self.bytes = 0
        self.records = 0
        self.refused = 0

    @classmethod
    def of(cls, settings: StdinSettings, context: SourceContext) -> StdinSource:
        """See `Source`."""
        return cls(
            settings,
            context.pipelines[context.pipeline],
            name=context.name,
            fd=context.input_fd,
            stderr=context.stderr,
            is_interrupted=context.is_interrupted,
        )

    async def start(self) -> None:
        """Begins to read."""
        self._name, self._is_fed = _name_of(self._fd), _is_fed(self._fd)
        self._reader: Reader = open_reader(self._fd)
        if os.isatty(self._fd):
            print(_HINT, end="", file=self._stderr or sys.stderr, flush=True)
        self._task = asyncio.create_task(self._run(), name="stdin")

    def facts(self) -> dict[str, object]:
        """See `Source`."""
        return {"input": self._name or ("terminal" if os.isatty(self._fd) else "stream")}

    def counts(self) -> InputCounts:
        """See `Source`."""
        return InputCounts(self.records, self.refused, self.bytes)

    async def wait_finished(self) -> None:
        """Returns when the input is at its end, or given up, and all of it is accepted.

        Raises:
            InputUnreadable: it can't be read to its end; what was read is accepted.
            IngestdError: the pipeline can't take records any more.
        """
        await asyncio.wait([self._task])
        if error := self._error or self._unreadable:
            raise error

    @property
    def ended(self) -> bool:  # noqa: D102 - see the class
        return self._has_ended and self._prefix.is_whole

    def report(self) -> None:
        """Logs the line to go on from, if the input was left before its end."""
        if self.ended or self._name is None or not self.bytes:
            return
        line, behind = self._prefix.lines + 1, self._prefix.behind
        log.warning(
            "input_left",
            line=line,  # the first one that was not accepted
            go_on=_way_on(self._name, line),
            # With several appends under way, some may be accepted behind one that is not.
            **({"accepted_behind": behind} if behind else {}),
            **({"exact": False} if self._was_cancelled else {}),
        )

    async def stop_taking(self, deadline: float) -> None:
        """Stops reading; a line that was begun is refused as `unfinished`."""
        self._reader.stop()
        left = max(0.0, deadline - asyncio.get_running_loop().time())
        await asyncio.wait([self._task], timeout=left)

    async def close(self) -> None:
        """Ends the reading. Records that are not accepted by now are given up, and logged."""
        self._reader.stop()
        tasks = {self._task, *self._appends}
        # Whether they still become durable is decided without them.
        self._was_cancelled = bool(self._appends)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        self._reader.close()
        if self._inflight:
            log.error("stdin_records_abandoned", bytes=self._inflight)

    async def _run(self) -> None:
        try:
            await self._read()
            while self._appends:
                await asyncio.wait(self._appends)
        except Exception as error:  # noqa: BLE001 - `wait_finished` raises it
            self._fail(error)

    async def _read(self) -> None:
        """Reads until the end, until it is stopped, or until nothing can be stored."""
        data: bytes | None
        try:
            while data := await self._reader.read():
                self.bytes += len(data)
                if self._head is not None:
                    self._look_at(data)
                held = self._framer.held
                parsed = self._framer.feed(data)
                self._lines += _lines_of(data, parsed, held + len(data) - self._framer.held)
                if parsed:
                    await self._append(parsed)
        except OSError as error:
            log.error("stdin_failed", error=error.strerror)  # noqa: TRY400 - one line says it all
            self._unreadable = InputUnreadable(problem=error.strerror)
            data = None
        if data is not None and self._is_fed and await self._was_torn():
            data = None
        if data is None:
            last = self._framer.cut()  # not a line that was accepted
        else:
            self._look_at(b"")
            last = self._framer.end()
            self._has_ended = True
        if last:
            await self._append(last)

    async def _was_torn(self) -> bool:
        """Returns True if the writer of a pipe was interrupted, not at its end.

        A terminal's Ctrl-C goes to both, and the pipe's end may be seen first.
        """
        await asyncio.sleep(_SIGNAL_SECONDS)
        return self._is_interrupted()

    def _look_at(self, data: bytes) -> None:
        """Logs the likely format of an input that is not lines, once enough of it is there."""
        if self._head is None:
            return
        self._head += data[:HEAD_BYTES]
        if len(self._head) < HEAD_BYTES and data:
            return
        found, self._head = guess(self._head, self._intake.format), None
        if found is not None:
            log.warning("input_unsuitable", problem=f"it is {found.what}", advice=found.advice)

    async def _append(self, parsed: Parsed) -> None:
        """Begins an append, as soon as there is room for it."""
        part = self._prefix.begin(self._lines, parsed.total)
        kept = sum(len(one.payload) + _REFUSED_BYTES for one in parsed.refused)
        size = len(parsed.records.payload) + kept
        if parsed.refused and not self._has_refused:
            self._has_refused = True
            self._look_at(b"")
            _warn_of(parsed.refused[0])
        while self._error is None and self._inflight and self._inflight + size > self._bytes_max:
            self._moved.clear()
            await self._moved.wait()
        self._inflight += size
        if self._error is not None:
            return
        task = asyncio.create_task(self._accept(parsed, size, part), name="stdin-append")
        self._appends.add(task)
        task.add_done_callback(self._appends.discard)
        # An input that always has more must not keep other tasks from running.
        await asyncio.sleep(0)

    async def _accept(self, parsed: Parsed, size: int, part: Part) -> None:
        try:
            await self._take_in_turn(parsed, part)
        except Exception as error:  # noqa: BLE001 - see `_run`
            self._fail(error)
        else:
            self._inflight -= size
            self._refused -= part.refused
            self._prefix.accept(part)
            if self._waiting:
                self._call(1 if self._refused else _CALLED_MAX)
            self.records += parsed.records.count
            self.refused += parsed.invalid
            self._moved.set()

    async def _take(self, parsed: Parsed) -> None:
        records, unkept = parsed.records, parsed.unlisted
        await self._intake.accept(
            Append(records, parsed.refused, unkept=unkept, envelope=self._envelope)
        )

    async def _take_in_turn(self, parsed: Parsed, part: Part) -> None:
        """Tries until the pipeline accepts a part; see the class."""
        called = False
        while True:
            # Those that were called and have not gone on yet come before one that begins.
            is_behind = self._refused or (self._waiting and not called)
            if is_behind and not self._prefix.is_first(part):
                await self._turn_of(part)
                called = True
                continue
            try:
                await self._take(parsed)
            except Overloaded as overloaded:
                self._refused += not part.refused
                part.refused = True
                if self._prefix.is_first(part):
                    await asyncio.sleep(again_after(overloaded))
            else:
                return

    async def _turn_of(self, part: Part) -> None:
        """Waits until a part is called.

        Raises:
            Exception: the reading failed meanwhile.
        """
        part.turn = asyncio.get_running_loop().create_future()
        self._waiting += 1
        try:
            await part.turn
        finally:
            part.turn, self._waiting = None, self._waiting - 1
        if self._error is not None:
            raise self._error

    def _call(self, most: int | None) -> None:
        """Calls those of the first parts that wait, in their order."""
        for part in self._prefix.first(most):
            if part.turn is not None and not part.turn.done():
                part.turn.set_result(None)

    def _fail(self, error: BaseException) -> None:
        """Stops reading: nothing more can be stored. `wait_finished` raises the error."""
        if self._error is None:
            self._error = error
            self._call(None)
        self._reader.stop()
        self._moved.set()


def _lines_of(data: bytes, parsed: Parsed | None, size: int) -> int:
    """Counts the lines that ended in a piece of the input.

    Args:
        data: the piece.
        parsed: what it completed.
        size: bytes of that as they came.
    """
    if parsed is not None and len(parsed.records.payload) == size and not parsed.invalid:
        return parsed.records.count  # nothing was left out; counting reads every byte once more
    return data.count(b"\n")


def _warn_of(refused: InvalidRecord) -> None:
    """Logs the first invalid record alone: the summary counts them."""
    if refused.reason == "unfinished":
        return  # where reading stopped: `report` says how to go on
    log.warning(
        "input_invalid", record=refused.index + 1, reason=refused.reason, detail=refused.detail
    )


def _name_of(fd: int) -> str | None:
    """The path of a file that is read from its beginning; empty for a pipe, `None` for a terminal.

    Of a pipe and of a file that is read from elsewhere, lines count from where reading began.
    """
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode) and os.lseek(fd, 0, os.SEEK_CUR) == 0:
            return str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError:
        return ""
    return None if stat.S_ISCHR(mode) else ""


def _is_fed(fd: int) -> bool:
    """Returns True if another process writes the input, and may be interrupted."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _way_on(name: str, line: int) -> str:
    """The beginning of the command that goes on with a line."""
    if name:
        return f"tail -n +{line} {shlex.quote(name)} |"
    return f"... | tail -n +{line} |"
