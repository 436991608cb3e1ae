"""From settings to a pool that is ready.

The executor `auto` is decided here. A sink of ours runs in threads: it is known to come back and to
leave the process as it is. The user's handler runs in processes, and its module is never imported
by the daemon; the first child says whether it is async. If it is, the child ends, and it runs on an
event loop in a thread of the daemon's. The other children start while the daemon is ready already.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from ingestd.base.errors import HandlerLoadError
from ingestd.base.logging import get_logger
from ingestd.execution.event_loops import HandlerLoops
from ingestd.execution.inprocess import CoroutinePool, CoroutineWorker, ThreadWorker
from ingestd.execution.pool import START_TIMEOUT, TaskPool, ThreadedPool
from ingestd.execution.process import ProcessWorker
from ingestd.handlers.runner import HandlerConfig, Runner
from ingestd.handlers.target import is_ours
from ingestd.handlers.wire import InitMessage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ingestd.base.record import Format
    from ingestd.execution.settings import ExecutorSettings, HandlerSettings
    from ingestd.host.process import Surroundings

log = get_logger()

_CLOSE_SECONDS = 5.0


async def start_pool(
    name: str,
    executor: ExecutorSettings,
    handler: HandlerSettings,
    record_format: Format,
    *,
    data_dir: Path,
    on_restart: Callable[[str], None],
    surroundings: Surroundings | None = None,
) -> tuple[TaskPool | ThreadedPool, str]:
    """One lane a worker, of the kind that the settings name, started.

    Args:
        name: of the pipeline.
        executor: `[executor]`.
        handler: `[handler]`.
        record_format: of the pipeline.
        data_dir: the daemon's, for the handler.
        on_restart: called with `crashed` or `timeout` each time a process has to be replaced.
        surroundings: what processes are started with; those of now if not given.

    Returns:
        The pool, and the kind that it is: `process`, `thread` or `async`.

    Raises:
        HandlerLoadError: the handler can't be loaded.
    """
    kind = executor.kind
    if kind == "auto" and is_ours(handler.target):
        kind = "thread"
    wanted = HandlerConfig(
        target=handler.target,
        options=dict(handler.options),
        record_format=record_format,
        executor=kind,
        pipeline=name,
        data_dir=os.fsencode(data_dir),
    )
    lanes = [f"{name}-worker-{number}" for number in range(executor.workers)]
    if kind in {"auto", "process"}:
        hello = InitMessage(wanted, os.getpid())
        processes = [
            ProcessWorker(
                lane,
                hello,
                timeout=executor.timeout,
                on_restart=on_restart,
                surroundings=surroundings,
            )
            for lane in lanes
        ]
        loop, first = asyncio.get_running_loop(), processes[0]
        try:
            await first.start()
        except BaseException:
            await first.close(loop.time())
            raise
        if not first.is_async:
            pool = ThreadedPool(processes, first=0)
            await pool.start()
            return pool, "process"
        await first.close(loop.time() + _CLOSE_SECONDS)
        wanted, kind = msgspec.structs.replace(wanted, executor="async"), "async"
    if kind == "thread":
        threads = [ThreadWorker(lane, _runner(wanted, lane)) for lane in lanes]
        pool = ThreadedPool(threads, overrun=executor.timeout)
        await _start(pool, wanted.target)
        return pool, kind
    loops = HandlerLoops(name)
    coroutines = CoroutinePool(
        [
            CoroutineWorker(lane, partial(_runner, wanted, lane), loops, timeout=executor.timeout)
            for lane in lanes
        ],
        loops,
    )
    await _start(coroutines, wanted.target)
    return coroutines, kind


async def _start(pool: CoroutinePool | ThreadedPool, target: str) -> None:
    """Starts workers that nobody can kill; one that hangs ends the start all the same."""
    try:
        async with asyncio.timeout(START_TIMEOUT):
            await pool.start()
    except TimeoutError:
        await pool.close(asyncio.get_running_loop().time())
        problem = f"it was not loaded within {START_TIMEOUT:g} s"
        raise HandlerLoadError(target=target, problem=problem) from None


def _runner(wanted: HandlerConfig, lane: str) -> Runner:
    return Runner(wanted, lambda error: log.warning("handler_close_failed", lane=lane, error=error))
