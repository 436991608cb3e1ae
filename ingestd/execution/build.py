"""From settings to a pool."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ingestd.execution.coroutine import CoroutineLane
from ingestd.execution.pool import Pool
from ingestd.execution.process import ProcessLane
from ingestd.execution.thread import ThreadLane
from ingestd.handlers.runner import Runner, Wanted
from ingestd.handlers.wire import Hello

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ingestd.base.settings import PipelineSettings
    from ingestd.execution.lane import Lane


def build_pool(
    name: str, settings: PipelineSettings, *, data_dir: Path, on_restart: Callable[[str], None]
) -> Pool:
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

    def lane(number: int) -> Lane:
        lane_name = f"{name}-worker-{number}"
        if executor.kind == "process":
            hello = Hello(wanted, os.getpid())
            return ProcessLane(lane_name, hello, timeout=executor.timeout, on_restart=on_restart)
        kind = CoroutineLane if executor.kind == "async" else ThreadLane
        return kind(lane_name, Runner(wanted), timeout=executor.timeout)

    return Pool([lane(number) for number in range(executor.workers)])
