"""From settings to a pool."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import structlog

from ingestd.execution.coroutine import CoroutineLane
from ingestd.execution.pool import TaskPool, ThreadedPool
from ingestd.execution.process import ProcessLane
from ingestd.execution.thread import ThreadLane
from ingestd.handlers.runner import Runner, Wanted
from ingestd.handlers.wire import Hello

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ingestd.base.settings import PipelineSettings

log = structlog.get_logger(__name__)


def build_pool(
    name: str, settings: PipelineSettings, *, data_dir: Path, on_restart: Callable[[str], None]
) -> TaskPool | ThreadedPool:
    """One lane a worker, of the kind that the settings name. Nothing is started yet."""
    executor = settings.executor
    wanted = Wanted(
        target=settings.handler.target,
        options=dict(settings.handler.options),
        record_format=settings.format,
        executor=executor.kind,
        pipeline=name,
        data_dir=str(data_dir),
    )

    names = [f"{name}-worker-{number}" for number in range(executor.workers)]
    timeout = executor.timeout
    if executor.kind == "process":
        hello = Hello(wanted, os.getpid())
        return ThreadedPool(
            [ProcessLane(lane, hello, timeout=timeout, on_restart=on_restart) for lane in names]
        )
    if executor.kind == "thread":
        return ThreadedPool(
            [ThreadLane(lane, _runner(wanted, lane)) for lane in names], overrun=timeout
        )
    return TaskPool([CoroutineLane(lane, _runner(wanted, lane), timeout=timeout) for lane in names])


def _runner(wanted: Wanted, lane: str) -> Runner:
    return Runner(wanted, lambda error: log.warning("handler_close_failed", lane=lane, error=error))
