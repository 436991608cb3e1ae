"""Lets threads that compute next to an event loop yield to it between bursts.

The loop gives the interpreter's lock away after each callback. A thread that computes has it then
for `SWITCH_SECONDS`, whatever the callback took: beside one such thread the loop runs a callback a
millisecond, and a turn with a hundred of them takes as many.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

T = TypeVar("T")

BURST_SECONDS = 0.005
"""Time that a thread computes before the loop takes its turn. Asking for it takes about 0.1 ms."""
TURN_SECONDS_MAX = 0.25
"""Longest wait for that turn: a loop that has stopped takes none."""
TRIP_SECONDS = 0.003
"""Calls begin in one trip of a `ComputeThread` for so long."""


class _Burst(threading.local):
    loop: asyncio.AbstractEventLoop | None = None
    end = BURST_SECONDS


_burst = _Burst()


def compute_beside(loop: asyncio.AbstractEventLoop) -> None:
    """Sets the loop to which the calling thread yields."""
    _burst.loop = loop


def let_loop_go_first() -> None:
    """Waits until the loop has taken a turn, if this thread has computed for a burst.

    Does nothing in a thread that computes beside no loop, so pure functions may call it now and
    then.
    """
    loop = _burst.loop
    if loop is None or time.thread_time() < _burst.end:
        return
    turn = threading.Event()
    try:
        # Twice, because the first one may be called in the middle of a turn.
        loop.call_soon_threadsafe(loop.call_soon, turn.set)
    except RuntimeError:
        return  # it is closed
    turn.wait(TURN_SECONDS_MAX)
    _burst.end = time.thread_time() + BURST_SECONDS


class _WaitingCall(NamedTuple):
    future: asyncio.Future[Any]
    call: Callable[..., Any]
    arguments: tuple[object, ...]


class ComputeThread:
    """A thread that computes beside an event loop. Used on the loop.

    All calls that wait go to the thread together, and come back together. Each way there and back
    is a turn of the loop, a wake-up of the thread and a fight for the interpreter's lock, and
    records that come back alone are appended, committed and synced alone. A trip ends after
    `TRIP_SECONDS`, so results do not wait long, and are few; calls that were not begun then are
    the first ones of the next trip. A call that comes alone goes and comes back at once.

    Args:
        name: of the thread.
        loop: the one to which it yields between bursts.
    """

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  workers import this module

        self._loop = loop
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix=name, initializer=compute_beside, initargs=(loop,)
        )
        self._waiting: list[_WaitingCall] = []
        self._is_away = self._is_closed = False

    def run(self, call: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Returns the future of a call's result; a call whose future is cancelled may not begin.

        Raises:
            RuntimeError: the thread is closed.
        """
        if self._is_closed:
            raise RuntimeError("the thread is closed")
        future: asyncio.Future[T] = self._loop.create_future()
        self._waiting.append(_WaitingCall(future, call, arguments))
        if not self._is_away:
            self._depart()
        return future

    def close(self) -> None:
        """Ends the thread; a call that was begun is finished, those that wait are cancelled."""
        self._is_closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._cancel(self._waiting)

    def _depart(self) -> None:
        calls, self._waiting, self._is_away = self._waiting, [], True
        trip = self._loop.run_in_executor(self._thread, _make, calls)
        trip.add_done_callback(lambda trip: self._arrive(calls, trip))

    def _arrive(
        self,
        calls: list[_WaitingCall],
        trip: asyncio.Future[list[tuple[Any, BaseException | None]]],
    ) -> None:
        """Gives the results out, and begins the next trip."""
        results = [] if trip.cancelled() else trip.result()
        for one, (value, error) in zip(calls, results, strict=False):
            if one.future.done():
                continue
            if error is None:
                one.future.set_result(value)
            else:
                one.future.set_exception(error)
        self._waiting[:0] = calls[len(results) :]
        self._is_away = False
        if self._is_closed:
            self._cancel(self._waiting)
        elif self._waiting:
            self._depart()

    @staticmethod
    def _cancel(calls: list[_WaitingCall]) -> None:
        for one in calls:
            one.future.cancel()
        calls.clear()


def _make(calls: Sequence[_WaitingCall]) -> list[tuple[Any, BaseException | None]]:
    """Makes calls, in the thread: the result or the error of each one that was begun in time."""
    results: list[tuple[Any, BaseException | None]] = []
    end = time.monotonic() + TRIP_SECONDS
    for future, call, arguments in calls:
        try:
            results.append((None if future.cancelled() else call(*arguments), None))
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            results.append((None, error))
        if time.monotonic() >= end:
            break
    return results
