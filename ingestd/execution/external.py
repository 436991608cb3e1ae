"""A pool over any `concurrent.futures.Executor`, which the user's factory builds.

An executor is opaque: it may be processes, threads or a cluster, and no worker of it can be named
or ended. So these rules hold for all of them:

* Whatever the submitted function does comes back as its answer. An exception instead is the
  executor's own, or a worker that died: each batch in flight fails as `crashed`, and the factory
  builds another executor for the next call. Which batch is guilty can't be known.
* A call that overruns fails its batch as `timeout` and is left behind, as a thread is. Its executor
  is retired: it gets no further call, finishes the others that it runs, and is shut down.
* Everything that may block (the factory, `submit`, `shutdown`) runs in one thread of the pool's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from ingestd.base.errors import ExecutorLoadError, HandlerLoadError
from ingestd.base.logging import get_logger
from ingestd.base.tasks import OwnThread
from ingestd.execution.pool import Pool, Worker, not_started
from ingestd.handlers.external import ExternalAnswer, call_externally
from ingestd.handlers.outcome import Failure, Result, flaw_of
from ingestd.handlers.runner import CLOSE_SECONDS
from ingestd.handlers.target import find
from ingestd.handlers.text import describe

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable

    from ingestd.handlers.outcome import Job
    from ingestd.handlers.runner import HandlerConfig

log = get_logger()

START_SECONDS = 30.0
"""How long a start waits until the handler is loaded; a cluster may have no worker yet."""
LEFT_MAX = 100
"""Calls that may be left behind; beyond them a call that overruns keeps its batch."""
HANG_SECONDS = 5.0
"""A process of the daemon's ends itself after twice the timeout and so long: by then no other call
that was submitted to its executor is waited for."""

_decode = msgspec.msgpack.Decoder(ExternalAnswer).decode


Factory: TypeAlias = "Callable[[], concurrent.futures.Executor]"


def load_factory(target: str | Factory) -> Factory:
    """Finds an executor's factory, `module:callable`, or the callable itself.

    Raises:
        ExecutorLoadError: it can't be imported or called.
    """
    if callable(target):
        return target
    try:
        found = find(target)
    except HandlerLoadError as error:
        raise ExecutorLoadError(target=target, problem=error.facts["problem"]) from error
    if not callable(found):
        raise ExecutorLoadError(target=target, problem="is not callable")
    return found


class _NoExecutorError(Exception):
    """The factory raised; the message is one line."""


class _Built:
    """One executor of the factory's.

    Attributes:
        retired: it gets no further call.
        ended: it is being shut down.
    """

    def __init__(self, executor: concurrent.futures.Executor) -> None:
        self.executor = executor
        self.retired = False
        self.ended = False


class _Call:
    """One call on its way.

    Attributes:
        built: the executor that it was submitted to.
        future: its answer, once it is submitted.
        given_up: nothing waits for it any more.
    """

    built: _Built | None = None
    future: concurrent.futures.Future[bytes] | None = None
    given_up = False


class ExternalPool(Pool[Worker]):
    """Submits each job to an executor.

    Args:
        name: of the pipeline.
        factory: `module:callable`, or the callable itself.
        config: the handler.
        workers: calls that are submitted at once.
        timeout: seconds after which a call is given up.
        on_restart: called with `crashed` or `timeout` each time an executor is retired.
    """

    def __init__(
        self,
        name: str,
        factory: str | Factory,
        config: HandlerConfig,
        *,
        workers: int,
        timeout: float,
        on_restart: Callable[[str], None],
    ) -> None:
        super().__init__(())
        self._name = name
        self._factory_of = factory
        self._target = factory if isinstance(factory, str) else "executor.kind"
        self._handler = config.target
        self._config = msgspec.msgpack.encode(config)
        self.size = workers
        self._timeout = timeout
        self._on_restart = on_restart
        self._built: _Built | None = None
        self._executors: list[_Built] = []  # that are not ended
        self._calls: set[_Call] = set()
        self._left = 0  # calls that were given up and still run
        self._moved = asyncio.Event()
        self._thread = OwnThread(f"{name}-executor")

    resizable = True

    def resize(self, workers: int) -> None:
        """See `Pool.resize`."""
        self.size = workers
        self._freed.set()

    async def start(self) -> None:
        """Builds the executor and has the handler loaded in it.

        Raises:
            ExecutorLoadError: the factory can't be imported, or gives no executor.
            HandlerLoadError: the handler can't be loaded.
        """
        loop = asyncio.get_running_loop()
        try:
            self._factory = await loop.run_in_executor(self._thread, load_factory, self._factory_of)
            answer, failure = await self._answer(None, START_SECONDS)
        except BaseException:
            await self.close(loop.time())
            raise
        if answer is not None and answer.load_error:
            await self.close(loop.time() + CLOSE_SECONDS)
            raise HandlerLoadError(target=self._handler, problem=answer.load_error)
        # A cluster may be down, or have no worker yet: records are taken all the same.
        problem = failure.error if failure else answer.not_ready if answer else ""
        if problem:
            log.warning("handler_not_ready", pipeline=self._name, error=problem)

    async def run(self, job: Job) -> Result:
        """See `Pool.run`."""
        began = time.monotonic()
        # So many threads may hang for ever: from here on a call that overruns keeps its batch.
        timeout = None if self._left >= LEFT_MAX else self._timeout
        answer, failure = await self._answer(job, timeout)
        if answer is not None and answer.load_error:
            failure = not_started(answer.load_error)
        elif answer is not None:
            result = answer.result
            flaw = "none" if result is None else flaw_of(result, job.records.count)
            if result is not None and not flaw:
                return result
            failure = Failure("crashed", f"the executor gave an impossible result: {flaw}")
        return Result(failure=failure, seconds=time.monotonic() - began)

    async def _answer(
        self, job: Job | None, seconds: float | None
    ) -> tuple[ExternalAnswer | None, Failure | None]:
        """The answer of one call, or the reason why there is none."""
        call = _Call()
        self._calls.add(call)
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                loop = asyncio.get_running_loop()
                future = await loop.run_in_executor(self._thread, self._submit, call, job)
                answer: bytes = await asyncio.wrap_future(future)
            return _decode(answer), None
        except (ExecutorLoadError, _NoExecutorError) as error:
            if job is None and isinstance(error, ExecutorLoadError):
                raise  # a start is refused; later it may be the cluster that is down
            return None, not_started(str(error))
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            failure = Failure("crashed", f"the executor cancelled the call: {describe(error)}")
        except TimeoutError as error:
            failure = Failure("crashed", f"the executor failed: {describe(error)}")
            if limit.expired():
                failure = Failure("timeout", f"the call was given up after {seconds:g} s")
        except Exception as error:  # noqa: BLE001  the function submitted raises nothing
            failure = Failure("crashed", f"the executor failed: {describe(error)}")
        finally:
            self._call_ended(call)
        if call.built is not None:
            self._retire(call.built, failure)
        return None, failure

    def _submit(self, call: _Call, job: Job | None) -> concurrent.futures.Future[bytes]:
        """Submits a call to an executor that takes calls; in the pool's thread."""
        built = self._built
        if built is None or built.retired:
            built = self._built = self._build()
        if call.given_up:
            raise asyncio.CancelledError
        call.built = built
        hangs_after = 2 * self._timeout + HANG_SECONDS
        call.future = built.executor.submit(
            call_externally, self._config, job, os.getpid(), hangs_after
        )
        return call.future

    def _build(self) -> _Built:
        try:
            made = self._factory()
        except BaseException as error:  # it is the user's code
            problem = f"the factory {self._target!r} of the executor raised {describe(error)}"
            raise _NoExecutorError(problem) from error
        if not (callable(getattr(made, "submit", None)) and hasattr(made, "shutdown")):
            problem = f"gave {type(made).__name__}, which is no concurrent.futures.Executor"
            raise ExecutorLoadError(target=self._target, problem=problem)
        log.info("executor_built", pipeline=self._name, executor=type(made).__name__)
        built = _Built(made)
        self._executors = [one for one in self._executors if not one.ended] + [built]
        return built

    def _call_ended(self, call: _Call) -> None:
        """A call has ended, or is given up."""
        call.given_up = True
        self._calls.discard(call)
        self._moved.set()
        future = call.future
        if future is not None and not future.done() and not future.cancel():
            self._left += 1
            loop = asyncio.get_running_loop()
            future.add_done_callback(lambda _: _later(loop, self._came_back))
        if call.built is not None:
            self._end_idle(call.built)

    def _came_back(self) -> None:
        self._left -= 1

    def _retire(self, built: _Built, failure: Failure) -> None:
        if built.retired:
            return
        built.retired = True
        reason = "timeout" if failure.reason == "timeout" else "crashed"
        log.warning("executor_retired", pipeline=self._name, reason=reason, error=failure.error)
        self._on_restart(reason)
        self._end_idle(built)

    def _end_idle(self, built: _Built) -> None:
        """Shuts a retired executor down when nothing that it runs is waited for."""
        if built.retired and not any(call.built is built for call in self._calls):
            with contextlib.suppress(RuntimeError):  # it is closed, and with it every executor
                self._thread.submit(self._shut_down, built, wait=False)

    def _shut_down(self, built: _Built, *, wait: bool) -> None:
        if built.ended:
            return
        built.ended = True
        try:
            built.executor.shutdown(wait=wait)
        except BaseException as error:  # noqa: BLE001  it may be the user's own
            log.warning("executor_close_failed", pipeline=self._name, error=describe(error))

    async def close(self, deadline: float) -> bool:
        """See `Pool.close`. Calls that run then are given up."""
        loop = asyncio.get_running_loop()
        while self._calls and loop.time() < deadline:
            self._moved.clear()
            moved = asyncio.ensure_future(self._moved.wait())
            await asyncio.wait({moved}, timeout=deadline - loop.time())
            moved.cancel()
        idle = not self._calls
        for call in list(self._calls):
            if call.future is not None:
                call.future.cancel()
        ending = loop.run_in_executor(self._thread, self._shut_down_all, idle)
        self._thread.shutdown(wait=False)
        await asyncio.wait({ending}, timeout=max(CLOSE_SECONDS / 10, deadline - loop.time()))
        return idle and not self._left and ending.done()

    def _shut_down_all(self, wait: bool) -> None:
        for built in self._executors:
            self._shut_down(built, wait=wait and not built.retired)


def _later(loop: asyncio.AbstractEventLoop, done: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is gone, and the daemon with it
        loop.call_soon_threadsafe(done)
