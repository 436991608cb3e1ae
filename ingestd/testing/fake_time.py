"""Fake time: an event loop whose clock goes from timer to timer at once.

The clock stands still while anything is to be done. Only when nothing is ready on the loop, and
nothing is under way outside it that will come back to it, does the clock go to the earliest timer.
A backoff of an hour, the age of a batch and a timeout so pass at once, in the order in which they
would have passed, and what takes real time (a commit, a call of the handler) takes none.

Invariants, each with a test:

1. Timers fire in their order, at their time, or less than a microsecond after it.
2. Time never passes while a call of `run_in_executor` has not come back, inside `outside()`, or
   while `busy` says that something else will call back. All three are known on the loop itself, so
   that nothing is missed between a thread's end and its callback.
3. `quiet()` returns when nothing is ready and nothing is under way, at the same time of the clock;
   or when what is under way stalls.
4. Where nothing comes back for `patience` real seconds, `on_stall` is called, and again after as
   long; so it is where neither a timer nor anything else is left to wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import selectors
from typing import TYPE_CHECKING, NoReturn, TypeVar, TypeVarTuple, Unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Executor
    from datetime import datetime

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

BEGIN = 1000.0
"""The loop's time at its beginning, seconds."""
TICK = 2.0**-20
"""Seconds: the clock goes in steps of this, which a time since the epoch holds without rounding, so
that what is due after a second is due then on both clocks."""


def _stalled() -> NoReturn:
    raise RuntimeError("the loop waits for something that will not come")


class FakeTimeLoop(asyncio.SelectorEventLoop):
    """An event loop on fake time; see above.

    Attributes:
        busy: says whether something is under way outside that `run_in_executor` and `outside` do
            not know of.
        patience: real seconds; `None` for no bound.
        on_stall: called on the loop; see above.
    """

    def __init__(self) -> None:
        self._now = BEGIN
        self._outside = 0
        self._quiet: list[asyncio.Future[None]] = []
        self.busy: Callable[[], bool] = lambda: False
        self.patience: float | None = None
        self.on_stall: Callable[[], object] = _stalled
        super().__init__(_SkippingSelector(self))

    def time(self) -> float:
        """Returns the fake time, seconds."""
        return self._now

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """See `asyncio.loop.run_in_executor`; time stands still until it has come back."""
        future = super().run_in_executor(executor, func, *args)
        self._outside += 1
        future.add_done_callback(self._came_back)
        return future

    def _came_back(self, _: object) -> None:
        self._outside -= 1

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Has time stand still inside of the `with`."""
        self._outside += 1
        try:
            yield
        finally:
            self._outside -= 1

    async def quiet(self) -> None:
        """Returns when all that could go on without time has come to its end."""
        waiting = self.create_future()
        self._quiet.append(waiting)
        await waiting

    @property
    def has_work(self) -> bool:
        """Tells if something is under way outside the loop."""
        return self._outside > 0 or self.busy()

    def rest(self, timeout: float | None) -> None:
        """Nothing is ready or under way: wakes `quiet`, or goes to the timer that is next."""
        if self._quiet:
            self._wake()
        elif timeout is None:
            self.on_stall()
        else:
            self._now = math.ceil((self._now + timeout) / TICK) * TICK

    def stall(self) -> None:
        """Nothing has come back for `patience`."""
        self._wake()
        self.on_stall()

    def _wake(self) -> None:
        waiting, self._quiet = self._quiet, []
        for one in waiting:
            if not one.done():
                one.set_result(None)


class _SkippingSelector(selectors.DefaultSelector):
    """Waits for what is under way, and for nothing else."""

    def __init__(self, loop: FakeTimeLoop) -> None:
        super().__init__()
        self._fake = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """See `selectors.BaseSelector.select`; `timeout` passes at once."""
        events = super().select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if not self._fake.has_work:
            self._fake.rest(timeout)
            return []
        events = super().select(self._fake.patience)
        if not events:
            self._fake.stall()
        return events


class FakeClock:
    """See `ingestd.base.clock.Clock`: both clocks follow those of a loop. Read by any thread.

    Args:
        loop: the loop.
        begin: the wall-clock time at the loop's beginning; with a time zone.
    """

    def __init__(self, loop: FakeTimeLoop, begin: datetime) -> None:
        self._loop = loop
        self._begin = math.floor(begin.timestamp() / TICK) * TICK

    def now(self) -> float:
        """See `Clock.now`."""
        return self._begin + self._loop.time() - BEGIN

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return self._loop.time()
