"""`ingestd try HANDLER FILE…` calls a handler with the records of files, without journal or daemon.

Records are framed, cut into batches and decoded by the code of the daemon, with the bounds of the
settings; the handler runs in this process, so that `print` and `breakpoint()` work. A batch that
fails is split at once, as the daemon does after `retry.attempts_max` tries, to find its bad
records, with at most `SPLIT_CALLS_MAX` more calls in all. Nothing is tried again later.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import statistics
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ingestd.base.errors import Exit, UsageError
from ingestd.cli.arguments import add_settings, positive
from ingestd.cli.configured import configured
from ingestd.cli.output import add_json, fail, say, say_json

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence
    from typing import BinaryIO

    from ingestd.base.record import Records, Span
    from ingestd.batching.batcher import BatchDraft
    from ingestd.cli.output import Parser
    from ingestd.codecs.lines import Parsed
    from ingestd.config.layers import Flag
    from ingestd.execution.settings import HandlerSettings
    from ingestd.handlers.outcome import Job, Result
    from ingestd.pipeline_settings import PipelineSettings

STDIN = "-"
READ_BYTES = 256 * 1024
SPLIT_CALLS_MAX = 100
"""Calls that splitting failed batches may take; what is left of them has failed as a whole."""
LISTED_MAX = 20
"""Batches and records that are listed; all are counted."""
INFLATED_MAX = 1 << 40
_OUTCOMES = ("done", "invalid", "rejected", "failed", "retry")
_ENCODINGS = {".gz": "gzip", ".zst": "zstd"}

DESCRIPTION = """\
Calls HANDLER with the records of FILES in real batches, without a journal or a daemon, and prints
what becomes of them. HANDLER is module:name or the name of a sink, as for run; - is standard input;
files named .gz and .zst are decompressed. The handler runs in this process, and a sink writes.

exit codes: 0 every record is done; 1 a record was invalid, rejected, failed or asked for another
try; 2 usage; 78 configuration or handler"""


class NotDone(msgspec.Struct, frozen=True):
    """A record that is not done.

    Attributes:
        file: its file.
        record: its number in the file, from 1; blank lines do not count.
        outcome: `invalid`, `rejected`, `failed` or `retry`.
        reason: one line.
    """

    file: str
    record: int
    outcome: str
    reason: str


class TrialCall(NamedTuple):
    """One batch.

    Attributes:
        records: how many it has.
        seconds: that its call took, with those of its parts if it was split.
        counts: its records by outcome.
    """

    records: int
    seconds: float
    counts: Counter[str]


class TrialBatch(NamedTuple):
    """Records of one call.

    Attributes:
        name: the batch's id.
        records: the records.
        spans: where they lie; the chunks are blocks of the files.
        numbers: of each record among all, from 0.
        lineage: the ids of the batches that it was split from.
    """

    name: str
    records: Records
    spans: Sequence[Span]
    numbers: Sequence[int]
    lineage: tuple[str, ...] = ()

    def halves(self) -> Iterator[TrialBatch]:
        """The batch in two."""
        from ingestd.base.record import select  # noqa: PLC0415  help needs none of it

        middle, count = self.records.count // 2, self.records.count
        for first, end in ((0, middle), (middle, count)):
            yield TrialBatch(
                f"{self.name}.{1 if first else 0}",
                self.records.part(first, end - first),
                select(self.spans, range(first, end)),
                self.numbers[first:end],
                (*self.lineage, self.name),
            )


class Trial:
    """Calls a handler with batches, and counts what becomes of their records.

    Args:
        run: gives the result of a job.
        place_of: gives file and number there of a record, from its number among all.
        told: gets the traceback of each error, once.

    Attributes:
        counts: records by outcome: `done`, `invalid`, `rejected`, `failed`, `retry`.
        calls: the batches.
        problems: the first records that are not done.
        listed: how many these stand for.
    """

    def __init__(
        self,
        run: Callable[[Job], Result],
        place_of: Callable[[int], tuple[str, int]],
        told: Callable[[str], None],
    ) -> None:
        self.origin = f"try{secrets.token_hex(4)}"
        self.counts: Counter[str] = Counter()
        self.calls: list[TrialCall] = []
        self.problems: list[NotDone] = []
        self.listed = 0
        self._run = run
        self._place_of = place_of
        self._told = told
        self._errors: set[str] = set()
        self._calls_left = SPLIT_CALLS_MAX

    def refuse(self, parsed: Parsed) -> None:
        """Counts the records of a block that can't be accepted."""
        self.counts["invalid"] += parsed.invalid
        for one in parsed.refused:
            self._list(one.index, "invalid", f"{one.reason}: {one.detail}")

    def call(self, batch: TrialBatch) -> TrialCall:
        """Calls the handler with a batch, and with its parts if it fails."""
        counts: Counter[str] = Counter()
        started = time.perf_counter()
        waiting = [batch]
        while waiting:
            parts = self._try(waiting.pop(), counts)
            waiting += reversed(parts)
        call = TrialCall(batch.records.count, time.perf_counter() - started, counts)
        self.calls.append(call)
        self.counts += counts
        return call

    def _try(self, batch: TrialBatch, counts: Counter[str]) -> list[TrialBatch]:
        """Makes one call; returns the parts that have to be tried."""
        from ingestd.handlers.outcome import Job  # noqa: PLC0415

        count = batch.records.count
        result = self._run(
            Job(
                batch.name, 1, batch.records, list(batch.spans), self.origin, time.time(),
                list(batch.lineage),
            )
        )  # fmt: skip
        failure = result.failure
        if failure is None:
            for gone in result.rejections:
                self._list(batch.numbers[gone.index], "rejected", gone.error or gone.reason)
            for later in result.retries:
                self._list(batch.numbers[later.index], "retry", later.error or "not now")
            counts["rejected"] += len(result.rejections)
            counts["retry"] += len(result.retries)
            counts["done"] += count - len(result.rejections) - len(result.retries)
            return []
        if failure.traceback and failure.error not in self._errors:
            self._errors.add(failure.error)
            self._told(failure.traceback)
        if count > 1 and not failure.is_asked and self._calls_left >= 2:
            self._calls_left -= 2
            return list(batch.halves())
        outcome = "retry" if failure.is_asked else "failed"
        counts[outcome] += count
        more = f", with {count - 1:,} more of its batch" if count > 1 else ""
        self._list(batch.numbers[0], outcome, f"{failure.error}{more}", count)
        return []

    def _list(self, number: int, outcome: str, reason: str, records: int = 1) -> None:
        if len(self.problems) < LISTED_MAX:
            self.listed += records
            self.problems.append(NotDone(*self._place_of(number), outcome, reason))


# -- files -----------------------------------------------------------------------------------------


class Files:
    """The records of some files, framed as the daemon does.

    Args:
        paths: of the files; `-` is standard input.
        settings: of the pipeline.
        limit: most records, good and bad; `None` for all.

    Raises:
        UsageError: a file can't be opened: a handler is not to be called with half of them.
    """

    def __init__(self, paths: Sequence[str], settings: PipelineSettings, limit: int | None) -> None:
        self._paths = [(path, Path(path).absolute()) for path in paths]  # before a change of folder
        for path, file in self._paths:
            if path != STDIN and not file.is_fifo():  # which is opened once
                _open(path, file).close()
        self._settings = settings
        self._limit = limit or sys.maxsize
        self._begins: list[tuple[int, str]] = []
        self._head = b""  # of the file that is read, until something is said of it

    def place_of(self, number: int) -> tuple[str, int]:
        """The file of a record, and its number there, from 1."""
        begin, path = next(one for one in reversed(self._begins) if one[0] <= number)
        return path, number - begin + 1

    def blocks(self) -> Iterator[tuple[Parsed, Sequence[int]]]:
        """Yields parsed blocks with the numbers of their good records among all.

        Raises:
            UsageError: a file can't be read.
        """
        from ingestd.codecs.framing import Framer  # noqa: PLC0415

        one, index = self._settings, 0
        for path, file in self._paths:
            self._begins.append((index, path))
            self._head = b""
            framer = Framer(one.format, one.record_bytes_max, one.json_depth_max, index=index)
            for piece in _read(path, file):
                self._head = self._head or piece
                yield from self._bounded(framer.feed(piece), index)
                index = framer.index
                if index >= self._limit:
                    return
            yield from self._bounded(framer.end(), index)
            index = framer.index

    def _bounded(self, parsed: Parsed | None, first: int) -> Iterator[tuple[Parsed, Sequence[int]]]:
        if parsed is None:
            return
        if parsed.refused and self._head:
            self._explain()
        refused = {one.index for one in parsed.refused}
        numbers = [n for n in range(first, first + parsed.total) if n not in refused]
        numbers = [n for n in numbers[: parsed.records.count] if n < self._limit]
        listed = [one for one in parsed.refused if one.index < self._limit]
        records = parsed.records.part(0, len(numbers))
        yield parsed._replace(records=records, refused=listed), numbers

    def _explain(self) -> None:
        """Says what a file with invalid lines seems to be, once for each."""
        from ingestd.codecs.framing import HEAD_BYTES, guess  # noqa: PLC0415

        if found := guess(self._head[:HEAD_BYTES], self._settings.format):
            advice = f", advice: {found.advice}" if found.advice else ""
            fail(f"{self._begins[-1][1]}: it is {found.what}{advice}")
        self._head = b""


def _open(path: str, file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise UsageError(problem=f"{path}: {error.strerror}") from error


def _read(path: str, file: Path) -> Iterator[bytes]:
    from ingestd.codecs.compression import Corrupt, Inflater  # noqa: PLC0415

    encoding = _ENCODINGS.get(file.suffix.lower())
    inflater = Inflater(encoding, INFLATED_MAX) if encoding else None
    try:
        with nullcontext(sys.stdin.buffer) if path == STDIN else _open(path, file) as opened:
            while piece := opened.read(READ_BYTES):
                yield from [piece] if inflater is None else inflater.feed(piece)
        if inflater is not None:
            inflater.finish()
    except (OSError, Corrupt) as error:
        problem = getattr(error, "strerror", None) or error
        raise UsageError(problem=f"{path}: {problem}") from error


# -- the command -----------------------------------------------------------------------------------


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    """Adds the flags: those of `run`, and some of its own."""
    add_settings(parser, argv)
    parser.add_argument("--limit", type=positive, metavar="N", help="stop after N records")
    parser.add_argument(
        "--pipeline", default="default", metavar="NAME", help="pipeline with the settings [default]"
    )
    add_json(parser, "print the result as one JSON object")


def execute(arguments: argparse.Namespace) -> int:
    """Calls the handler with all records; the exit code tells if all are done.

    Raises:
        UsageError: no file is named, or one can't be read, or there is no such pipeline.
        ConfigError: the configuration is wrong.
        HandlerLoadError: the handler can't be loaded.
    """
    from ingestd.execution.build import handler_config  # noqa: PLC0415
    from ingestd.handlers.runner import Runner  # noqa: PLC0415

    if not arguments.files:
        raise UsageError(problem="name a HANDLER and at least one FILE (see ingestd try --help)")
    settings = configured(arguments).settings
    pipelines = settings.pipeline_settings()
    name = arguments.pipeline
    if name not in pipelines:
        raise UsageError(
            problem=f"there is no pipeline {name!r}; there are: {', '.join(pipelines)}"
        )
    one = pipelines[name]
    files = Files(arguments.files, one, arguments.limit)
    handler = _named(one.handler, arguments.flags)
    wanted = handler_config(name, one.executor, handler, one.format, settings.data_dir)
    # It runs here, whatever the executor: one that is async on a loop of its own.
    runner = Runner(msgspec.structs.replace(wanted, executor="auto"), fail)
    interrupts = _Interrupts()
    not_ready = runner.prepare()
    interrupts.check()
    if not_ready:
        fail(f"the handler is not ready: {not_ready}")
    unread: UsageError | None = None
    with asyncio.Runner() as loop:

        def run(job: Job) -> Result:
            result = loop.run(runner.run_async(job)) if runner.is_async else runner.run(job)
            interrupts.check(result)
            return result

        trial = Trial(run, files.place_of, lambda text: print(text, end="", file=sys.stderr))
        try:
            _call_all(trial, files, one, quiet=arguments.json)
        except KeyboardInterrupt:
            fail("interrupted")
        except UsageError as error:  # after what was done with the records before it
            unread = error
        finally:
            closed = loop.run(runner.close_async()) if runner.is_async else runner.close()
            if closed:
                fail(f"the handler did not close: {closed}")
    if arguments.json:
        say_json(_facts(trial))
    else:
        say("\n".join(_told(trial)))
    if unread is not None:
        raise unread
    done = trial.counts["done"] == trial.counts.total() and not interrupts.came
    return int(Exit.OK if done else Exit.UNEXPECTED)


def _named(handler: HandlerSettings, flags: Sequence[Flag]) -> HandlerSettings:
    """The handler of a pipeline, which is HANDLER: a pipeline may have another one of its own."""
    named = (one.value for one in reversed(flags) if one.key == "handler.target")
    target = next(named, handler.target)
    options = handler.options_for(target)
    return handler.model_copy(update={"target": target, "targets": (), "options": options})


class _Interrupts:
    """Ctrl-C, and leaving the debugger, end the command: a runner takes them for failures."""

    def __init__(self) -> None:
        self.came = False
        signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: object) -> None:
        self.came = True
        raise KeyboardInterrupt

    def check(self, result: Result | None = None) -> None:
        """Ends the command if its user wants that.

        Raises:
            KeyboardInterrupt: that is so.
        """
        failure = result.failure if result else None
        if self.came or (failure is not None and failure.error.startswith("bdb.BdbQuit")):
            self.came = True
            raise KeyboardInterrupt


def _call_all(trial: Trial, files: Files, settings: PipelineSettings, *, quiet: bool) -> None:
    """Cuts the records of all files into batches as the daemon does, and calls with each."""
    from ingestd.batching.batcher import Batcher  # noqa: PLC0415

    batcher = Batcher(**settings.batch.bounds())
    numbers: list[int] = []

    def call(draft: BatchDraft | None) -> bool:
        if draft is None or draft.records is None:
            return False
        own = numbers[: draft.records.count]
        del numbers[: draft.records.count]
        name = f"{trial.origin}-{len(trial.calls) + 1}"
        done = trial.call(TrialBatch(name, draft.records, draft.spans, own))
        if not quiet and (len(trial.calls) <= LISTED_MAX):
            say(f"batch {len(trial.calls)}: {_counted(done.counts)} in {_time(done.seconds)}")
        return True

    for chunk, (parsed, own) in enumerate(files.blocks(), 1):
        trial.refuse(parsed)
        numbers += own
        batcher.add(chunk, parsed.records, first=0, accepted_at=time.time())
        while call(batcher.take()):
            pass
    call(batcher.close())


def _told(trial: Trial) -> Iterator[str]:
    counts = trial.counts
    left = counts.total() - counts["done"]
    for one in trial.problems:
        yield f"{one.file} record {one.record:,}: {one.outcome}: {one.reason}"
    if left > trial.listed:
        yield f"… and {left - trial.listed:,} more"
    if not trial.calls:
        yield f"all records: {_counted(counts) if left else 'none'}"
        return
    each = [one.seconds for one in trial.calls]
    speed = sum(one.records for one in trial.calls) / max(sum(each), 1e-9)
    batches = f"{len(each):,} batches" if len(each) > 1 else "1 batch"
    yield (
        f"all records: {_counted(counts)}; {batches},"
        f" {_time(statistics.median(each))} at the median, {_time(max(each))} at most;"
        f" {speed:,.0f} records/s in the handler"
    )


def _facts(trial: Trial) -> dict[str, object]:
    each = [one.seconds for one in trial.calls]
    return {
        "records": trial.counts.total(),
        **{name: trial.counts[name] for name in _OUTCOMES},
        "batches": len(each),
        "seconds": round(sum(each), 6),
        "seconds_median": round(statistics.median(each), 6) if each else 0,
        "seconds_max": round(max(each, default=0), 6),
        "problems": trial.problems,
    }


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[name]:,} {name}" for name in _OUTCOMES if counts[name])


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
