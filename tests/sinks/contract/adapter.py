"""What the contract suite needs of a sink: the other side, real, and ways to disturb it.

A sink has a module `adapter_NAME.py` here with a class `Adapter`; it is found by its name.
"""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ingestd.base.record import Records, Span
from ingestd.handlers.outcome import Job
from ingestd.handlers.runner import HandlerConfig, Runner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from ingestd.handlers.outcome import Result, SinkFinding


class SinkAdapter:
    """The other side of one sink, for one test.

    Attributes:
        target: the name of the sink.
        secret: a text among the options that is shown nowhere; empty if there is none.
        exactly_once: a batch that comes again is stored once; otherwise at least once.
        bad: a JSON record that the sink or the other side refuses; `None` if it takes all.
        executor: that the sink runs in where it is not chosen.
        environ: of a daemon with this sink.
        can_be_killed: the other side is a process, see `kill`.
        is_slow: it needs packages that only `.ci/run` installs.
        timeout: of a try, for sinks that have one; a test in which it comes to that makes it short.
    """

    target = ""
    secret = ""
    exactly_once = True
    bad: bytes | None = None
    executor = "thread"
    can_be_killed = False
    environ: dict[str, str] = {}  # noqa: RUF012
    is_slow = False
    timeout = "30s"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def options(self) -> dict[str, Any]:
        """The options, as they would be written."""
        return {}

    def stored(self) -> list[int]:
        """The `n` of each record that is stored; of one that is there twice, twice."""
        raise NotImplementedError

    def down(self) -> AbstractContextManager[object] | None:
        """While entered the other side does not answer; `None`: it always does."""
        return None

    def unusable(self) -> AbstractContextManager[object] | None:
        """While entered a table or a right is missing; `None`: there is no such thing."""
        return None

    def slow(self) -> AbstractContextManager[Slow]:
        """While entered, and until `end()` of what it gives, a call does not come to its end."""
        raise NotImplementedError

    def kill(self) -> None:
        """Ends the other side with SIGKILL, and starts it again."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends what was started."""

    # -- calls without a daemon ----------------------------------------------------------------

    def worker(self) -> Worker:
        """A worker of this sink."""
        config = HandlerConfig(self.target, self.options(), "json", self.executor, "default", b"/x")
        return Worker(config)


class Slow:
    """Ends the time in which calls do not come to their end."""

    def __init__(self, end: Callable[[], object]) -> None:
        self._end: Callable[[], object] | None = end

    def end(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end()


class Worker:
    """A sink in a worker, called from here; on an event loop of its own if it is async."""

    def __init__(self, config: HandlerConfig) -> None:
        self.runner = Runner(config)
        self.not_ready = self.runner.prepare()
        self._loop = asyncio.Runner() if self.runner.is_async else None

    def run(self, one: Job) -> Result:
        """One try."""
        if self._loop is not None:
            return self._loop.run(self.runner.run_async(one))
        return self.runner.run(one)

    def check(self) -> list[SinkFinding]:
        if self._loop is not None:
            return self._loop.run(self.runner.check_async())
        return self.runner.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is None:
            assert self.runner.close() == ""
            return
        with self._loop as loop:
            assert loop.run(self.runner.close_async()) == ""


def job(
    numbers: Sequence[int], batch: int = 1, lineage: Iterable[int] = (), bad: bytes | None = None
) -> Job:
    """A try of a batch of the records `{"n": …}`; `bad` is put in the middle of them.

    Record ids depend on the numbers alone, as a part of a batch has those of the whole.
    """
    items = [b'{"n":%d,"text":"\xc3\xa9 \\n"}' % n for n in numbers]
    spans = [Span(1 + n // 1000, n % 1000, 1) for n in numbers]
    if bad is not None:
        items.insert(len(items) // 2, bad)
        spans.insert(len(spans) // 2, Span(10**6, 0, 1))
    return Job(f"j-{batch}", 1, Records.lines(items), spans, "j", 0.0, [f"j-{n}" for n in lineage])


def adapters() -> list[type[SinkAdapter]]:
    """The adapters that there are."""
    names = [one.name for one in pkgutil.iter_modules([str(Path(__file__).parent)])]
    return [
        importlib.import_module(f"{__package__}.{name}").Adapter
        for name in names
        if name.startswith("adapter_")
    ]
