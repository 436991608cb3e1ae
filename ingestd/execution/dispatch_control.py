"""Control of a dispatcher: every reason why no batch may go to a worker, the handler's state aside.

Some stop it until something changes (dead letters at their bound, a pause). A throttle holds it for
a moment: a batch may go while no bucket is in debt, and is charged whole, each of its tries anew.

Reasons are read where they arise, never copied, so none can be forgotten here when it has gone.
The ready queue asks `free_at` before it gives a batch, the watchdog and the drain ask it and
`stopped` at any time. A reason that begins or ends without an event is noticed by `look`, which the
control's own task calls once a second.

Invariants, each with a test:

1. While a reason holds, no batch is given; what a worker has, or lies ready before one, comes to
   its end.
2. A drain does not wait for what a stopped control keeps back, and it stays in the journal.
3. A dispatch that is stopped is no stage that hangs.
4. A pause is on disk before `pause` returns, and holds through restarts until `resume`, or until
   its file is removed by another process (`ingestd resume`), which is noticed within a second.
5. In any time no more batches, and no more records, are given than the throttle's rate gives in
   that time and in `BURST_SECONDS`, and one batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ingestd.base.errors import DataDirError
from ingestd.base.files import make_private, sync_folder
from ingestd.base.logging import get_logger
from ingestd.base.rate import TokenBucket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ingestd.base.clock import Clock
    from ingestd.execution.settings import ExecutorSettings

log = get_logger()

POLL_SECONDS = 1.0
"""Between two looks at reasons that no event tells of."""


BURST_SECONDS = 0.05
"""What a throttle gives at once after a rest: so much that a loop which is late reaches the rate,
and so little that a second has no more calls than an API allows."""
PAUSED = "the pipeline is paused (ingestd pause): ingestd resume has it go on"


class PauseMark:
    """File in a pipeline's folder: while it is there, the pipeline is paused.

    A file, because every process that may write to the folder can make it, with or without a
    daemon, whatever the journal is. It holds nothing; its time is when the pause began.

    Args:
        folder: of the pipeline; exists.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "paused"

    def since(self) -> float:
        """Seconds since the epoch at which the pause began; 0 if there is none.

        Raises:
            OSError: the folder can't be read.
        """
        try:
            return max(1.0, self._path.lstat().st_mtime)
        except FileNotFoundError:
            return 0.0

    def put(self) -> None:
        """Makes the file; one that is there stays as it is. It is on disk when this returns.

        Raises:
            DataDirError: it can't be made.
        """
        try:
            make_private(self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            raise self._problem(error) from error

    def remove(self) -> None:
        """Removes the file, if it is there; that is on disk when this returns.

        Raises:
            DataDirError: it can't be removed.
        """
        try:
            self._path.unlink(missing_ok=True)
            sync_folder(self._path.parent)
        except OSError as error:
            raise self._problem(error) from error

    def _problem(self, error: OSError) -> DataDirError:
        problem = f"{self._path.name} can't be changed: {error.strerror or error}"
        return DataDirError(path=self._path.parent, problem=problem)


class Throttle:
    """Bounds the batches and the records that are given a second.

    Args:
        executor: `[executor]`; at least one of its rates is not 0.
        now: seconds that do not go back.
    """

    def __init__(self, executor: ExecutorSettings, now: float) -> None:
        names = ("batches_per_second", "records_per_second")
        rates = {name: getattr(executor, name) for name in names}
        self._buckets = {
            name: TokenBucket(rate, now, BURST_SECONDS) for name, rate in rates.items() if rate
        }

    def wait(self, now: float) -> tuple[float, str]:
        """Seconds until a batch may be given, and the setting that says so."""
        waits = [(one.wait(now), f"executor.{name}") for name, one in self._buckets.items()]
        return max(waits)

    def charge(self, records: int, now: float) -> None:
        """Charges a batch that is given."""
        for name, bucket in self._buckets.items():
            bucket.charge(1 if name == "batches_per_second" else records, now)


class BoundedLetters(Protocol):
    """Dead letters of accepted records, as far as they stop the dispatcher."""

    bytes_max: int

    @property
    def is_full(self) -> bool:
        """Tells if they are at their bound: more would come."""
        ...


class StopReason(NamedTuple):
    """A reason why no batch is given out until something changes.

    Attributes:
        name: for the log: the setting whose bound it is, where it is one.
        text: for people, with what to do about it.
        facts: for the log.
        is_fault: something is wrong; else a person wants it so.
    """

    name: str
    text: str
    facts: dict[str, object]
    is_fault: bool = True


class DispatchControl:
    """The control of one pipeline's dispatcher.

    Args:
        pipeline: its name, for the log.
        letters: its dead letters.
        mark: says whether it is paused.
        clock: where time comes from.
        on_change: called when a reason has come or gone.

    Attributes:
        paused_since: seconds since the epoch; 0 while the pipeline is not paused.
        poll_seconds: between two looks.
        throttle: bounds the rates; `None` for none.
    """

    def __init__(
        self,
        pipeline: str,
        letters: BoundedLetters,
        mark: PauseMark,
        clock: Clock,
        *,
        on_change: Callable[[], object],
    ) -> None:
        self._pipeline = pipeline
        self._letters = letters
        self._mark = mark
        self._marking = asyncio.Lock()
        self._clock = clock
        self.throttle: Throttle | None = None
        self.paused_since = 0.0
        self._on_change = on_change
        self._seen: dict[str, StopReason] = {}
        self.poll_seconds = POLL_SECONDS

    @property
    def stopped(self) -> str:
        """Reason for people why no batch is given out; empty while batches are."""
        return next((reason.text for reason in self._reasons()), "")

    def free_at(self) -> float:
        """Loop time from which on a batch may be given; infinite until something changes."""
        if self.paused_since or self._letters.is_full:
            return math.inf
        if self.throttle is None:
            return 0.0
        now = self._clock.monotonic()
        wait, _ = self.throttle.wait(now)
        return now + wait if wait > 0 else 0.0

    @property
    def throttled_by(self) -> str:
        """The setting whose rate holds batches back now; empty if none does."""
        if self.throttle is None:
            return ""
        wait, setting = self.throttle.wait(self._clock.monotonic())
        return setting if wait > 0 else ""

    def given(self, records: int) -> None:
        """A batch of so many records goes to a worker."""
        if self.throttle is not None:
            self.throttle.charge(records, self._clock.monotonic())

    def _reasons(self) -> Iterator[StopReason]:
        if self._letters.is_full:
            text = "the dead letters are at dead.bytes_max: purge some or requeue them"
            yield StopReason("dead.bytes_max", text, {"bytes_max": self._letters.bytes_max})
        if self.paused_since:
            facts: dict[str, object] = {"since": round(self.paused_since, 3)}
            yield StopReason("paused", PAUSED, facts, is_fault=False)

    def look(self) -> None:
        """Notices what has come or gone since the last look, and logs it."""
        if not (self._seen or self.paused_since or self._letters.is_full):
            return  # before each batch: it costs a third of a microsecond then
        seen, self._seen = self._seen, {reason.name: reason for reason in self._reasons()}
        if seen.keys() == self._seen.keys():
            return
        for name, reason in self._seen.items():
            if name not in seen:
                write = log.error if reason.is_fault else log.warning
                write("dispatch_stopped", pipeline=self._pipeline, reason=name, **reason.facts)
        for name, reason in seen.items():
            if name not in self._seen:
                log.info("dispatch_resumed", pipeline=self._pipeline, reason=name, **reason.facts)
        self._on_change()

    # -- pause -------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Pauses the pipeline until `resume`, also after a restart.

        Raises:
            DataDirError: that can't be kept; the pipeline goes on.
        """
        await self._change(self._mark.put)

    async def resume(self) -> None:
        """Ends a pause.

        Raises:
            DataDirError: that can't be kept; the pipeline stays paused.
        """
        await self._change(self._mark.remove)

    async def _change(self, write: Callable[[], None]) -> None:
        async with self._marking:  # what a poll read before it would be out of date after it
            await asyncio.get_running_loop().run_in_executor(None, write)
        await self.poll()

    async def poll(self) -> None:
        """Notices what has come or gone, the mark of another process too."""
        async with self._marking:
            loop = asyncio.get_running_loop()
            with contextlib.suppress(OSError):  # the disk is the journal's to report: as it was
                self.paused_since = await loop.run_in_executor(None, self._mark.since)
        self.look()

    async def run(self) -> None:
        """Polls once a second until it is cancelled."""
        while True:
            await self.poll()
            await asyncio.sleep(self.poll_seconds)
