"""The control of a dispatcher: the reasons why no batch may go to a worker."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from ingestd.base.batch import SealedBatch
from ingestd.base.clock import SystemClock
from ingestd.execution.dispatch_control import DispatchControl, PauseMark
from ingestd.execution.dispatcher import Dispatcher
from ingestd.execution.outage import Outage
from ingestd.execution.pool import Pool, TaskPool
from ingestd.execution.ready_queue import Load, ReadyQueue
from ingestd.execution.settings import ExecutorSettings, HandlerSettings, RetrySettings
from ingestd.testing.fake_time import FakeTimeLoop


class Letters:
    """Dead letters that are at their bound if a test says so."""

    bytes_max = 100
    is_full = False


class Unpaused(PauseMark):
    """A mark without a file."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))

    def since(self) -> float:
        return 0.0


def control(letters: Letters, changes: list[str] | None = None) -> DispatchControl:
    seen = [] if changes is None else changes
    return DispatchControl(
        "default", letters, Unpaused(), SystemClock(), on_change=lambda: seen.append("changed")
    )


def test_dead_letters_at_their_bound_stop_it_and_their_purge_opens_it() -> None:
    letters, changes = Letters(), []
    made = control(letters, changes)
    made.look()
    assert (made.stopped, made.free_at(), changes) == ("", 0.0, [])
    letters.is_full = True
    assert "dead.bytes_max" in made.stopped  # at once: a drain may ask before the next look
    assert made.free_at() == math.inf
    made.look()
    made.look()
    assert changes == ["changed"]
    letters.is_full = False
    made.look()
    assert (made.stopped, made.free_at(), changes) == ("", 0.0, ["changed"] * 2)


async def test_a_batch_that_waits_is_not_given_while_it_is_closed() -> None:
    letters = Letters()
    made = control(letters)
    queue: ReadyQueue[str] = ReadyQueue(
        waiting_max=Load(10, 10),
        outage=Outage(60.0, lambda: 0.5),
        on_empty=lambda: None,
        free_at=made.free_at,
    )
    waiting = asyncio.ensure_future(queue.next())
    await asyncio.sleep(0)
    letters.is_full = True
    await queue.put("a")
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    assert (queue.ready_at, queue.could_give(1e9)) == (math.inf, False)
    letters.is_full = False
    queue.look_again()
    assert await waiting == "a"


async def opened(folder: Path, letters: Letters, changes: list[str]) -> Dispatcher:
    made = Dispatcher(
        "default", RetrySettings(), SystemClock(),
        folder=folder, letters=letters, pending=int, on_idle=lambda: None,
        on_control=lambda: changes.append("changed"),
    )  # fmt: skip
    made.start_pool = _started  # type: ignore[assignment]
    await made.open(ExecutorSettings(), HandlerSettings())
    return made


async def _started(*_: object) -> tuple[Pool[Any], str]:
    return TaskPool([object()]), "async"  # type: ignore[list-item]  nothing is run


async def test_a_stopped_dispatch_is_no_stage_that_hangs(tmp_path: Path) -> None:
    letters, changes = Letters(), []
    made = await opened(tmp_path, letters, changes)
    await made.queue.put(SealedBatch(1, (), 1, accepted_at=0.0))
    assert made.stage().could_go_on
    letters.is_full = True
    assert not made.stage().could_go_on
    made.control.look()
    assert changes == ["changed"]


def test_time_behind_a_stopped_dispatch_is_no_time_of_failing(tmp_path: Path) -> None:
    """A pause of days would else give up, at their next failure, what failed before it."""
    loop = FakeTimeLoop()
    letters = Letters()

    async def run() -> list[float]:
        made = await opened(tmp_path, letters, [])
        before, within, never = (SealedBatch(n, (), 1, accepted_at=0.0) for n in range(3))
        before.failing_since = loop.time()
        made.park(before, 0.0)
        made.park(never, 0.0)
        await asyncio.sleep(60)
        letters.is_full = True
        made.control.look()
        await asyncio.sleep(1000)
        within.failing_since = loop.time()  # it was with a worker
        made.park(within, 0.0, asked=True)
        await asyncio.sleep(86400)
        letters.is_full = False
        made.control.look()
        assert never.failing_since is None
        return [loop.time() - (one.failing_since or 0.0) for one in (before, within)]

    try:
        assert loop.run_until_complete(run()) == pytest.approx([60.0, 0.0], abs=0.001)
    finally:
        loop.close()
