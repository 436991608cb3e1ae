"""Builds the worker pool of a pipeline from its settings.

The executor `auto` is decided here. A sink of ours runs in threads: it is known to come back and to
leave the process as it is. The user's handler runs in processes, and its module is never imported
by the daemon; the first child says whether it is async. If it is, the child ends, and it runs on an
event loop in a thread of the daemon's. The other children start while the daemon is ready already.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgspec

from ingestd.base.errors import HandlerLoadError
from ingestd.base.logging import get_logger
from ingestd.execution.inprocess import CoroutinePool, CoroutineWorker, ThreadWorker
from ingestd.execution.pool import START_TIMEOUT, Pool, ThreadedPool
from ingestd.execution.settings import ExecutorKind
from ingestd.handlers.runner import HandlerConfig, Runner
from ingestd.handlers.target import own_sink
from ingestd.registry import EXECUTORS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Executor
    from pathlib import Path

    from ingestd.base.record import Format
    from ingestd.execution.settings import ExecutorSettings, HandlerSettings
    from ingestd.execution.validator import Validator
    from ingestd.host.process import Surroundings

    StartPool: TypeAlias = Callable[
        [ExecutorSettings, "PoolContext"], Awaitable[tuple[Pool[Any], str]]
    ]

log = get_logger()

_CLOSE_SECONDS = 5.0


class PoolContext(NamedTuple):
    """The surroundings of a pool.

    Attributes:
        name: of the pipeline.
        config: the handler that its workers load.
        on_restart: called with `crashed` or `timeout` each time a process has to be replaced.
        surroundings: what processes are started with; those of now if not given.
    """

    name: str
    config: HandlerConfig
    on_restart: Callable[[str], None]
    surroundings: Surroundings | None

    def worker(self, number: int) -> str:
        """The name of a worker."""
        return f"{self.name}-worker-{number}"


async def start_pool(
    name: str,
    executor: ExecutorSettings,
    handler: HandlerSettings,
    record_format: Format,
    *,
    data_dir: Path,
    on_restart: Callable[[str], None],
    surroundings: Surroundings | None = None,
) -> tuple[Pool[Any], str]:
    """Starts the workers of a pipeline, of the kind that the settings name.

    Args:
        name: of the pipeline.
        executor: `[executor]`.
        handler: `[handler]`.
        record_format: of the pipeline.
        data_dir: the daemon's, for the handler.
        on_restart: called with `crashed` or `timeout` each time a process has to be replaced.
        surroundings: what processes are started with; those of now if not given.

    Returns:
        The pool, and the kind that it is: `process`, `thread`, `async`, `external`, or one from
        outside.

    Raises:
        HandlerLoadError: the handler can't be loaded.
        ExecutorLoadError: `executor.factory` can't be, or gives no executor.
    """
    config = handler_config(name, executor, handler, record_format, data_dir)
    context = PoolContext(name, config, on_restart, surroundings)
    if executor.factory:
        return await _start_external(executor, context, executor.factory)
    kind = EXECUTORS.load(executor.kind)
    if isinstance(kind, type) and issubclass(kind, ExecutorKind):
        factory = partial(kind().build, executor.own)
        return await _start_external(executor, context, factory, executor.kind)
    start: StartPool = kind
    return await start(executor, context)


def make_validator(
    name: str,
    executor: ExecutorSettings,
    handler: HandlerSettings,
    record_format: Format,
    *,
    data_dir: Path,
    surroundings: Surroundings | None = None,
) -> Validator:
    """Makes the validator of a pipeline's records; it is not started yet.

    Takes what `start_pool` takes. A handler that runs in the daemon is imported in a process too:
    decoding holds the interpreter.
    """
    from ingestd.execution.process import ProcessWorker  # noqa: PLC0415  threads do without
    from ingestd.execution.validator import CALL_SECONDS, Validator  # noqa: PLC0415
    from ingestd.handlers.wire import InitMessage  # noqa: PLC0415

    config = validating_config(handler_config(name, executor, handler, record_format, data_dir))
    worker = ProcessWorker(
        f"{name}-validator",
        InitMessage(config, os.getpid()),
        timeout=min(executor.timeout, CALL_SECONDS),
        on_restart=lambda _: None,
        surroundings=surroundings,
    )
    return Validator(name, ThreadedPool([worker]), lambda: worker.schema)


def validating_config(config: HandlerConfig) -> HandlerConfig:
    """The same for a process that validates: it makes no handler, and needs no options."""
    return msgspec.structs.replace(config, options={}, executor="process", validates=True)


def handler_config(
    name: str,
    executor: ExecutorSettings,
    handler: HandlerSettings,
    record_format: Format,
    data_dir: Path,
) -> HandlerConfig:
    """The configuration of a pipeline's workers; takes what `start_pool` takes."""
    return HandlerConfig(
        target=handler.target,
        options=dict(handler.options),
        record_format=record_format,
        executor=executor.kind,
        pipeline=name,
        data_dir=os.fsencode(data_dir),
        transform=handler.transform,
        targets=handler.targets,
    )


async def _start_external(
    executor: ExecutorSettings,
    context: PoolContext,
    factory: str | Callable[[], Executor],
    kind: str = "external",
) -> tuple[Pool[Any], str]:
    from ingestd.execution.external import ExternalPool  # noqa: PLC0415  others do without

    pool = ExternalPool(
        context.name,
        factory,
        _with_kind(context, "external").config,
        workers=executor.workers,
        timeout=executor.timeout,
        on_restart=context.on_restart,
    )
    await pool.start()
    return pool, kind


async def start_fitting(executor: ExecutorSettings, context: PoolContext) -> tuple[Pool[Any], str]:
    """Starts threads for a sink of ingestd's, an event loop for a coroutine, else processes."""
    kind = fitting_kind(context.config)
    if kind == "process":
        return await start_processes(executor, context)
    start = start_coroutines if kind == "async" else start_threads
    return await start(executor, _with_kind(context, kind))


def fitting_kind(config: HandlerConfig) -> str:
    """The executor that suits a handler: `process` for all that is not ingestd's own.

    A process may still find that it is async; see `start_processes`.
    """
    sinks = [own_sink(target) for target in config.targets or (config.target,)]
    if config.transform or None in sinks:
        return "process"
    return "async" if any(iscoroutinefunction(sink.__call__) for sink in sinks) else "thread"


async def start_processes(
    executor: ExecutorSettings, context: PoolContext
) -> tuple[Pool[Any], str]:
    """Starts child processes; of a coroutine that may choose, an event loop instead."""
    from ingestd.execution.process import ProcessWorker  # noqa: PLC0415  threads do without
    from ingestd.handlers.wire import InitMessage  # noqa: PLC0415

    def make(number: int) -> ProcessWorker:
        checks = number == 0 and pool is None
        return ProcessWorker(
            context.worker(number),
            InitMessage(context.config, os.getpid(), checks),
            timeout=executor.timeout,
            on_restart=context.on_restart,
            surroundings=context.surroundings,
        )

    pool: ThreadedPool | None = None
    processes = [make(number) for number in range(executor.workers)]
    loop, first = asyncio.get_running_loop(), processes[0]
    try:
        await first.start()
    except BaseException:
        await first.close(loop.time())
        raise
    if first.is_async:
        await first.close(loop.time() + _CLOSE_SECONDS)
        return await start_coroutines(executor, _with_kind(context, "async"))
    pool = ThreadedPool(processes, make, first=0, prefetch=not executor.is_throttled)
    await pool.start()
    return pool, "process"


async def start_threads(executor: ExecutorSettings, context: PoolContext) -> tuple[Pool[Any], str]:
    """Starts threads of the daemon."""

    def make(number: int) -> ThreadWorker:
        worker = context.worker(number)
        checks = number == 0 and pool is None
        return ThreadWorker(worker, _runner(context.config, worker), checks=checks)

    pool: ThreadedPool | None = None
    threads = [make(number) for number in range(executor.workers)]
    prefetch = not executor.is_throttled
    pool = ThreadedPool(threads, make, overrun=executor.timeout, prefetch=prefetch)
    await _start(pool, context.config.target)
    return pool, "thread"


async def start_coroutines(
    executor: ExecutorSettings, context: PoolContext
) -> tuple[Pool[Any], str]:
    """Starts coroutines on an event loop in a thread of its own."""
    from ingestd.execution.event_loops import HandlerLoops  # noqa: PLC0415  others do without

    loops = HandlerLoops(context.name)

    def make(number: int) -> CoroutineWorker:
        worker = context.worker(number)
        return CoroutineWorker(
            worker,
            partial(_runner, context.config, worker),
            loops,
            timeout=executor.timeout,
            checks=number == 0 and pool is None,
        )

    pool: CoroutinePool | None = None
    pool = CoroutinePool([make(number) for number in range(executor.workers)], loops, make)
    await _start(pool, context.config.target)
    return pool, "async"


def _with_kind(context: PoolContext, kind: str) -> PoolContext:
    return context._replace(config=msgspec.structs.replace(context.config, executor=kind))


async def _start(pool: CoroutinePool | ThreadedPool, target: str) -> None:
    """Starts workers that cannot be killed; one that hangs ends the start all the same."""
    try:
        async with asyncio.timeout(START_TIMEOUT):
            await pool.start()
    except TimeoutError:
        await pool.close(asyncio.get_running_loop().time())
        problem = f"it was not loaded within {START_TIMEOUT:g} s"
        raise HandlerLoadError(target=target, problem=problem) from None


def _runner(wanted: HandlerConfig, worker: str) -> Runner:
    return Runner(
        wanted, lambda error: log.warning("handler_close_failed", worker=worker, error=error)
    )
