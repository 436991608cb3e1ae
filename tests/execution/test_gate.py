"""The gate of a dispatcher: the reasons why no batch may go to a worker."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from ingestd.execution.dispatcher import Dispatcher
from ingestd.execution.gate import DispatchGate
from ingestd.execution.outage import Outage
from ingestd.execution.pool import Pool, TaskPool
from ingestd.execution.ready_queue import Load, ReadyQueue
from ingestd.execution.settings import RetrySettings


class Letters:
    """Dead letters that are at their bound if a test says so."""

    bytes_max = 100
    is_full = False


def gate(letters: Letters, changes: list[str] | None = None) -> DispatchGate:
    seen = [] if changes is None else changes
    return DispatchGate("default", letters, on_change=lambda: seen.append("changed"))


def test_dead_letters_at_their_bound_stop_it_and_their_purge_opens_it() -> None:
    letters, changes = Letters(), []
    made = gate(letters, changes)
    made.look()
    assert (made.stopped, made.open_at(), changes) == ("", 0.0, [])
    letters.is_full = True
    assert "dead.bytes_max" in made.stopped  # at once: a drain may ask before the next look
    assert made.open_at() == math.inf
    made.look()
    made.look()
    assert changes == ["changed"]
    letters.is_full = False
    made.look()
    assert (made.stopped, made.open_at(), changes) == ("", 0.0, ["changed"] * 2)


async def test_a_batch_that_waits_is_not_given_while_it_is_closed() -> None:
    letters = Letters()
    made = gate(letters)
    queue: ReadyQueue[str] = ReadyQueue(
        waiting_max=Load(10, 10),
        outage=Outage(60.0, lambda: 0.5),
        on_empty=lambda: None,
        open_at=made.open_at,
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


async def test_a_closed_gate_is_no_stage_that_hangs() -> None:
    letters, changes = Letters(), []
    made = Dispatcher(
        "default", RetrySettings(), None,  # type: ignore[arg-type]
        letters=letters, pending=int, on_idle=lambda: None, on_gate=lambda: changes.append(1),
    )  # fmt: skip
    made.start_pool = _started  # type: ignore[assignment]
    await made.open()
    await made.queue.put(object())  # type: ignore[arg-type]
    assert made.stage().could_go_on
    letters.is_full = True
    assert not made.stage().could_go_on
    made.gate.look()
    assert changes == [1]


async def _started(*_: object) -> tuple[Pool[Any], str]:
    return TaskPool([object()]), "async"  # type: ignore[list-item]  nothing is run
