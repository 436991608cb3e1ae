"""One call of the handler: a job in, a result out, whatever happens in between."""

from __future__ import annotations

import types
from inspect import signature

# By name: a handler may freeze or replace the module's.
from os import getpid
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from ingestd.handlers.batch import (
    Batch,
    Blocked,
    PartFailed,
    Reject,
    Retry,
    Unavailable,
    seconds_of,
)
from ingestd.handlers.failure import failure_of
from ingestd.handlers.forked import ParentOnly, end_child
from ingestd.handlers.outcome import BLOCKED, POSTPONED, UNAVAILABLE, Failure, Job, Result
from ingestd.handlers.text import definer_of, message_of, name_of, plain

if TYPE_CHECKING:
    from asyncio import Task
    from collections.abc import Callable

    from ingestd.handlers.chain import ChainSpec
    from ingestd.handlers.load import HandlerSpec


def call(spec: HandlerSpec | ChainSpec, handler: Callable[[Any], Any], job: Job) -> Result:
    """Call a handler that is not async, in this thread. Raises nothing, whatever it raises."""
    process = getpid()
    prepared = _prepared(spec, job)
    if isinstance(prepared, Result):
        return prepared
    batch, argument = prepared
    started = perf_counter()
    try:
        returned = handler(argument)
    except BaseException as exc:  # noqa: BLE001  SystemExit and KeyboardInterrupt are the batch's
        seconds = perf_counter() - started
        if getpid() != process:  # as `ParentOnly`, which costs a batch of one record too much
            end_child(exc)
        return _after(batch, seconds, exc)
    seconds = perf_counter() - started
    if getpid() != process:
        end_child(None)
    return _after(batch, seconds, None, returned)


async def call_async(
    spec: HandlerSpec | ChainSpec, handler: Callable[[Any], Any], job: Job
) -> Result:
    """Call an async handler, in this task.

    Raises:
        asyncio.CancelledError: this task was cancelled. One that the handler raises by itself is
            a failure like any other.
    """
    import asyncio  # noqa: PLC0415  thread and process workers do without

    prepared = _prepared(spec, job)
    if isinstance(prepared, Result):
        return prepared
    batch, argument = prepared
    started = perf_counter()
    try:
        with ParentOnly():
            returned = handler(argument)
            if _is_awaitable(returned):
                returned = await returned
    except asyncio.CancelledError as exc:
        if _is_cancelled(asyncio.current_task()):
            raise
        return _after(batch, perf_counter() - started, exc)
    except BaseException as exc:  # noqa: BLE001
        return _after(batch, perf_counter() - started, exc)
    return _after(batch, perf_counter() - started, None, returned)


def close(spec: HandlerSpec | ChainSpec, handler: object) -> Failure | None:
    """Call `close()` of a handler that was made by `create`, if it is a class and has one.

    What it raises comes back as data: a worker leaves in good order all the same.
    """
    try:
        shut = getattr(handler, "close", None) if spec.is_class else None
        with ParentOnly():
            return _not_run(shut()) if callable(shut) else None
    except BaseException as exc:  # noqa: BLE001
        return failure_of(exc)


async def close_async(spec: HandlerSpec | ChainSpec, handler: object) -> Failure | None:
    """`close` for an async handler; its `close` may be async or not.

    Raises:
        asyncio.CancelledError: this task was cancelled.
    """
    import asyncio  # noqa: PLC0415

    try:
        shut = getattr(handler, "close", None) if spec.is_class else None
        returned: Any = shut() if callable(shut) else None
        if _is_awaitable(returned):
            await returned
    except asyncio.CancelledError as exc:
        if _is_cancelled(asyncio.current_task()):
            raise
        return failure_of(exc)
    except BaseException as exc:  # noqa: BLE001
        return failure_of(exc)
    return None


def check_of(spec: HandlerSpec | ChainSpec, handler: object) -> Callable[[], Any] | None:
    """The `check()` of a handler that was made by `create`; `None` if it has none.

    One that needs arguments is a method of the user's that has nothing but the name of it.
    """
    found: Any = getattr(handler, "check", None) if spec.is_class else None
    try:
        signature(found).bind()
    except (TypeError, ValueError):
        return None
    return cast("Callable[[], Any]", found)


def _is_cancelled(task: Task[Any] | None) -> bool:
    """Returns True if a CancelledError is the task's own, not one that the handler met."""
    return task is not None and task.cancelling() > 0


def _prepared(spec: HandlerSpec | ChainSpec, job: Job) -> tuple[Batch[Any], Any] | Result:
    """The decoded batch and what the handler is called with, or the result if there is nothing."""
    if spec.wants_batch and spec.decoder.one is None and job.records.count:
        batch: Batch[Any] = Batch(None, job)
        return batch, batch  # a sink that writes the payload as it is needs nothing else
    try:
        values, undecodable = spec.decoder.decode(job.records)
        if not values:
            return Result(undecodable)
        batch = Batch(values, job, undecodable)
    except BaseException as exc:  # noqa: BLE001  a validator of the user's may raise anything
        return Result(failure=failure_of(exc))
    # A handler may pop from the list: the values are not looked at again.
    return batch, batch if spec.wants_batch else values


def _after(
    batch: Batch[Any], seconds: float, raised: BaseException | None, returned: Any = None
) -> Result:
    """The result of a call; what goes wrong in finding out is the batch's failure as well."""
    try:
        # By its type: `isinstance` would ask the exception, which may lie, or raise.
        if issubclass(type(raised), Reject):
            batch.reject_all(_why(raised))
        elif failure := _not_run(returned) if raised is None else failure_from(raised):
            return Result(failure=failure, seconds=seconds, runs=batch.runs)
        return Result(batch.rejections, batch.retries, None, seconds, batch.runs)
    except BaseException as exc:  # noqa: BLE001  a thread of the handler's still says something
        return Result(failure=failure_of(exc), seconds=seconds)


def _why(raised: Any) -> Any:
    """The reason of a `Reject` or `Retry`, also if its subclass does not call our constructor."""
    try:
        return raised.why
    except BaseException:  # noqa: BLE001
        return message_of(raised, 4000)


def failure_from(raised: Any) -> Failure:
    """The failure that an exception of the handler's leaves, with what `Retry` asks for."""
    kind = type(raised)
    if kind is PartFailed:
        failure: Failure = raised.failure
        return failure
    if issubclass(kind, Unavailable | Blocked):
        failure = failure_of(raised)
        line = plain(message_of(raised, 4000)) or failure.error
        reason = BLOCKED if issubclass(kind, Blocked) else UNAVAILABLE
        after = _wait_of(raised) if reason == UNAVAILABLE else None
        return Failure(reason, line, failure.traceback, after)
    if not issubclass(kind, Retry):
        return failure_of(raised)
    why = plain(_why(raised)) or "the handler asked to wait"
    return Failure(POSTPONED, why, "", _wait_of(raised))


def _wait_of(raised: Any) -> float | None:
    try:  # a subclass need not call our constructor
        return seconds_of(raised.after)
    except AttributeError:
        return None


_GENERATORS = (types.GeneratorType, types.AsyncGeneratorType)


def _not_run(returned: Any) -> Failure | None:
    """A returned coroutine or generator has not done anything yet: that is no success."""
    if returned is None:
        return None
    # By its type: what is returned may be an object whose class answers for another one.
    kind = type(returned)
    if issubclass(kind, types.CoroutineType):
        returned.close()  # it would warn that it was never awaited
    elif issubclass(kind, _GENERATORS):
        problem = "a generator, so none of it ran: a handler must not yield"
        return Failure("raised", f"the handler returned {problem}")
    elif not _is_awaitable(returned):
        return None
    return Failure(
        "raised",
        f"the handler returned a {name_of(kind)} that is never awaited:"
        ' declare it async def and set executor.kind = "async"',
    )


def _is_awaitable(returned: Any) -> bool:
    """`inspect.isawaitable`, without asking the object."""
    kind = type(returned)
    if issubclass(kind, types.GeneratorType):
        return bool(returned.gi_code.co_flags & _ITERABLE_COROUTINE)
    return definer_of(kind, "__await__") is not None


_ITERABLE_COROUTINE = 0x100  # inspect.CO_ITERABLE_COROUTINE: @types.coroutine
