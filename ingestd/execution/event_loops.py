"""Event loops for `async def` handlers, each in a thread of its own.

A handler may block its loop, swallow its cancellation, or wait in a `finally`. None of that reaches
the daemon's own loop, from which deadlines are kept. All calls of a pool share one loop, because
clients of the user's belong to a loop. What does not come back is given up, and stays owned:

- A call that goes on after its cancellation is **abandoned**: it keeps running on its loop, which
  goes on to serve the others. At most `ABANDONED_MAX` calls of a pool are abandoned at a time.
- A loop that a handler has closed ends with all of its calls, and the next call gets a new one.
- A loop that does not answer is **retired**: the next call gets a new loop in a new thread. The old
  one cancels what is on it as soon as it turns again, and ends. There are at most `RETIRED_MAX`.

Beyond either bound nothing is given up any more: a call then keeps its batch until it ends, so the
pipeline slows down and at last stands, and the log says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ingestd.base.logging import get_logger
from ingestd.execution.failure_log import FailureKinds
from ingestd.handlers.failure import failure_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextvars import Context

log = get_logger()

ABANDONED_MAX = 100
"""Calls of one pool that did not end when they were cancelled, and still run."""
RETIRED_MAX = 8
"""Loops of one pool that do not turn any more."""

_END_SECONDS = 0.5  # for a loop that has nothing to do

T = TypeVar("T")


class Call(Generic[T]):
    """A coroutine on a handler's loop, as the daemon's loop sees it.

    Attributes:
        loop: where it runs.
        done: resolved on the daemon's loop when the coroutine has ended.
    """

    def __init__(self, loop: HandlerLoop, make: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self.loop = loop
        self.done: asyncio.Future[T] = loop.home.create_future()
        # Nobody may wait for it any more.
        self.done.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._make = make
        self._context: Context = copy_context()  # log lines say which batch they are about
        self._task: asyncio.Task[T] | None = None
        self._cancelled = False

    async def ended_within(self, seconds: float | None) -> bool:
        """Waits for its end, for so many seconds at most."""
        done, _ = await asyncio.wait({self.done}, timeout=seconds)
        return bool(done)

    def cancel(self) -> None:
        """Cancels it as soon as its loop turns."""
        self.loop.soon(self._cancel)

    def begin(self) -> None:
        """Begins the coroutine; on its loop."""
        if self._cancelled:
            self._tell(None)
            return
        self._task = self.loop.own(self._make(), self._context)
        self._task.add_done_callback(self._tell)

    def _cancel(self) -> None:
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()

    def _tell(self, task: asyncio.Task[T] | None) -> None:
        with contextlib.suppress(RuntimeError):  # the daemon's loop is gone
            self.loop.home.call_soon_threadsafe(self._resolve, task)

    def _resolve(self, task: asyncio.Task[T] | None) -> None:
        if self.done.done():
            return
        if task is None or task.cancelled():
            self.done.cancel()
        elif error := task.exception():
            self.done.set_exception(error)
        else:
            self.done.set_result(task.result())


class HandlerLoop:
    """One event loop and its thread. Made on the daemon's loop, which is its `home`.

    Args:
        name: of the thread.
        on_end: called on the daemon's loop when the thread has ended.

    Attributes:
        ended: set when the thread has ended.
    """

    def __init__(self, name: str, on_end: Callable[[HandlerLoop], None]) -> None:
        self.home = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        self._on_end = on_end
        self._loop = _new_loop()
        self._loop.set_exception_handler(self._callback_failed)
        self._calls: set[Call[Any]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._kinds = FailureKinds()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> Call[T]:
        """Begins a coroutine; on the daemon's loop."""
        call = Call(self, make)
        self._calls.add(call)
        call.done.add_done_callback(lambda _: self._calls.discard(call))
        self.soon(call.begin)
        return call

    def soon(self, callback: Callable[[], None]) -> None:
        """Calls back on this loop, when it turns."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(callback)

    async def answers(self, seconds: float) -> bool:
        """Returns True if it turns within so many seconds."""
        answer = self.call(_nothing)
        if await answer.ended_within(seconds):
            return True
        answer.cancel()
        return False

    def own(self, coroutine: Coroutine[Any, Any, T], context: Context) -> asyncio.Task[T]:
        """A task that is kept until it ends; on this loop."""
        task = self._loop.create_task(coroutine, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def end(self) -> None:
        """Cancels what is on it, and ends as soon as that has ended."""
        self.soon(self._end)

    def _end(self) -> None:
        self._ending = True
        for task in self._tasks:
            task.cancel()
        self._stop_if_empty()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._stop_if_empty()

    def _stop_if_empty(self) -> None:
        if self._ending and not self._tasks:
            self._loop.stop()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        while not (self._loop.is_closed() or (self._ending and not self._tasks)):
            try:
                self._loop.run_forever()
            except BaseException as error:  # noqa: BLE001
                self._report(error)
        with contextlib.suppress(Exception):
            self._loop.close()
        with contextlib.suppress(RuntimeError):
            self.home.call_soon_threadsafe(self._ended)

    def _callback_failed(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is None:
            log.error("handler_task_failed", error=str(context.get("message")))
        else:
            self._report(error)

    def _report(self, error: BaseException) -> None:
        """Logs errors that are never awaited, each kind once; no user code may end this thread."""
        failure = failure_of(error)
        new = self._kinds.note(failure, self.home.time())
        write = log.error if new else log.debug
        write("handler_task_failed", error=failure.error, exception=failure.traceback)

    def _ended(self) -> None:
        for call in list(self._calls):  # they never end any more: a handler has closed the loop
            call.done.cancel()
        self.ended.set()
        self._on_end(self)


class HandlerLoops:
    """The loop of a pool, and those that were given up.

    Args:
        name: of the pool, for threads and the log.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._current: HandlerLoop | None = None
        self._retired: set[HandlerLoop] = set()
        self._abandoned: set[Call[Any]] = set()

    @property
    def current(self) -> HandlerLoop:
        """The loop for new calls."""
        if self._current is None or self._current.ended.is_set():
            self._current = HandlerLoop(f"{self._name}-loop", self._retired.discard)
        return self._current

    @property
    def left_behind(self) -> int:
        """Counts calls and loops that still run although they were given up."""
        return len(self._abandoned) + len(self._retired)

    async def give_up(self, call: Call[Any], seconds: float) -> bool:
        """Gives up a call that did not end when it was cancelled.

        Args:
            call: the call.
            seconds: a loop that does not turn for so long is retired.

        Returns:
            Whether it is given up; else there are too many already.
        """
        if call.loop is self._current and not await call.loop.answers(seconds):
            if len(self._retired) >= RETIRED_MAX:
                return False
            if call.loop is self._current:  # no other call was quicker
                self._current = None
                self._retired.add(call.loop)
                call.loop.end()
                log.error("handler_loop_retired", pool=self._name)
        if call.loop in self._retired or call.done.done():
            return True
        if len(self._abandoned) >= ABANDONED_MAX:
            return False
        self._abandoned.add(call)
        call.done.add_done_callback(lambda _: self._abandoned.discard(call))
        return True

    async def end(self, deadline: float) -> bool:
        """Ends the loop, when nothing is to be called any more.

        Returns:
            Whether everything that was ever called has ended, by `deadline` (loop time).
        """
        current, self._current = self._current, None
        if current is None:
            return not self.left_behind
        self._retired.add(current)
        current.end()
        try:
            async with asyncio.timeout_at(max(deadline, current.home.time() + _END_SECONDS)):
                await current.ended.wait()
        except TimeoutError:
            return False
        return not self.left_behind


async def _nothing() -> None:
    pass


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop  # noqa: PLC0415  not on every platform
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
