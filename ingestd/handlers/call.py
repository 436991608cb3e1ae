"""One call of the handler: a job in, a result out, whatever happens in between."""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING, Any

from ingestd.handlers.batch import Batch, Reject
from ingestd.handlers.failure import failure_of
from ingestd.handlers.outcome import Failure, Job, Result

if TYPE_CHECKING:
    from asyncio import Task
    from collections.abc import Callable

    from ingestd.handlers.load import HandlerSpec


def call(spec: HandlerSpec, handler: Callable[[Any], Any], job: Job) -> Result:
    """Call a handler that is not async, in this thread. Raises nothing, whatever it raises."""
    batch = _batch(spec, job)
    if not isinstance(batch, Batch):
        return batch
    started = time.perf_counter()
    try:
        returned = handler(_argument(spec, batch))
    except BaseException as exc:  # noqa: BLE001  SystemExit and KeyboardInterrupt are the batch's
        return _after(batch, time.perf_counter() - started, exc)
    return _after(batch, time.perf_counter() - started, None, returned)


async def call_async(spec: HandlerSpec, handler: Callable[[Any], Any], job: Job) -> Result:
    """Call an async handler, in this task.

    Raises:
        asyncio.CancelledError: this task was cancelled. One that the handler raises by itself is
            a failure like any other.
    """
    import asyncio  # noqa: PLC0415  thread and process workers do without

    batch = _batch(spec, job)
    if not isinstance(batch, Batch):
        return batch
    started = time.perf_counter()
    try:
        returned = handler(_argument(spec, batch))
        if inspect.isawaitable(returned):
            returned = await returned
    except asyncio.CancelledError as exc:
        if _is_cancelled(asyncio.current_task()):
            raise
        return _after(batch, time.perf_counter() - started, exc)
    except BaseException as exc:  # noqa: BLE001
        return _after(batch, time.perf_counter() - started, exc)
    return _after(batch, time.perf_counter() - started, None, returned)


def close(spec: HandlerSpec, handler: object) -> Failure | None:
    """Call `close()` of a handler that was made by `create`, if it is a class and has one.

    What it raises comes back as data: a worker leaves in good order all the same.
    """
    try:
        shut = getattr(handler, "close", None) if spec.is_class else None
        return _not_run(shut()) if callable(shut) else None
    except BaseException as exc:  # noqa: BLE001
        return failure_of(exc)


async def close_async(spec: HandlerSpec, handler: object) -> Failure | None:
    """`close` for an async handler; its `close` may be async or not.

    Raises:
        asyncio.CancelledError: this task was cancelled.
    """
    import asyncio  # noqa: PLC0415

    try:
        shut = getattr(handler, "close", None) if spec.is_class else None
        returned = shut() if callable(shut) else None
        if inspect.isawaitable(returned):
            await returned
    except asyncio.CancelledError as exc:
        if _is_cancelled(asyncio.current_task()):
            raise
        return failure_of(exc)
    except BaseException as exc:  # noqa: BLE001
        return failure_of(exc)
    return None


def _is_cancelled(task: Task[Any] | None) -> bool:
    """Whether a CancelledError is the task's own, not one that the handler came upon."""
    return task is not None and task.cancelling() > 0


def _batch(spec: HandlerSpec, job: Job) -> Batch[Any] | Result:
    """The decoded batch, or the result at once if there is nothing to call the handler with."""
    if spec.wants_batch and spec.decoder.one is None and job.records.count:
        return Batch(None, job)  # a sink that writes the payload as it is needs nothing else
    try:
        values, undecodable = spec.decoder.decode(job.records)
        return Batch(values, job, undecodable) if values else Result(undecodable)
    except BaseException as exc:  # noqa: BLE001  a validator of the user's may raise anything
        return Result(failure=failure_of(exc))


def _argument(spec: HandlerSpec, batch: Batch[Any]) -> Any:
    # A list of its own: the handler may pop from it, and the batch still knows its records.
    return batch if spec.wants_batch else list(batch)


def _after(
    batch: Batch[Any], seconds: float, raised: BaseException | None, returned: object = None
) -> Result:
    if isinstance(raised, Reject):
        batch.reject_all(raised.why)
    elif raised is not None:
        return Result(failure=failure_of(raised), seconds=seconds)
    elif failure := _not_run(returned):
        return Result(failure=failure, seconds=seconds)
    return Result(batch.rejections, batch.retries, None, seconds)


def _not_run(returned: object) -> Failure | None:
    """A returned coroutine or generator has not done anything yet: that is no success."""
    if inspect.iscoroutine(returned):
        returned.close()  # it would warn that it was never awaited
    elif inspect.isgenerator(returned) or inspect.isasyncgen(returned):
        problem = "a generator, so none of it ran: a handler must not yield"
        return Failure("raised", f"the handler returned {problem}")
    elif not inspect.isawaitable(returned):
        return None
    kind = type(returned).__name__
    return Failure(
        "raised",
        f"the handler returned a {kind} that nobody awaits:"
        ' declare it async def and set executor.kind = "async"',
    )
