"""A throttle of a real pipeline: its drain, its status, and workers that are busy."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from ingestd.admin.status import status_of
from ingestd.base.append import Append
from tests.pipeline import recording
from tests.pipeline.test_pipeline import HANDLER, numbers, until


async def throttled(start: Any, folder: Any, kind: str = "thread", **executor: Any) -> Any:
    return await start(
        HANDLER + ("AsyncNote" if kind == "async" else "Note"),
        executor={"kind": kind, "workers": 2, **executor},
        batch={"records_max": 10},
        options={"folder": str(folder)},
    )


async def test_a_drain_leaves_what_it_may_not_give_by_its_deadline(start, tmp_path) -> None:
    pipeline = await throttled(start, tmp_path, records_per_second=0.1)
    await pipeline.accept(Append(numbers(0, 50)))
    await until(lambda: pipeline.ledger.processed == 10)
    status = status_of(pipeline)
    assert (status.throttled, status.dispatch_stopped) == (True, "")
    assert status.bounds_near == ["executor.records_per_second"]
    assert not pipeline.dispatcher.stage().could_go_on  # it does not hang
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.timeout(60):
        await pipeline.drain(began + 5)  # the next batch may go in a minute and a half
    report = await pipeline.close()
    assert (report.ledger.processed, report.counted, report.balanced) == (10, 40, True)
    # Without the throttle the rest goes at once, in the next life.
    pipeline = await throttled(start, tmp_path)
    await pipeline.drain(None)
    assert not status_of(pipeline).throttled
    assert (await pipeline.close()).ledger.processed == 50


@pytest.mark.parametrize(
    "kind", ["thread", "async", pytest.param("process", marks=pytest.mark.slow)]
)
async def test_a_drain_without_a_deadline_keeps_the_rate(start, tmp_path, kind) -> None:
    pipeline = await throttled(start, tmp_path, kind, batches_per_second=100)
    assert pipeline.dispatcher.pool.places == 2  # nothing lies ready, to be run beyond the rate
    began = time.monotonic()
    await pipeline.accept(Append(numbers(0, 200)))
    await pipeline.drain(None)
    assert time.monotonic() - began >= 20 / 100 - 0.06
    assert len(recording.calls(tmp_path)) == 20
    assert (await pipeline.close()).ledger.processed == 200
