"""Ends of tasks: also of those that lose a cancellation."""

from __future__ import annotations

import asyncio

from ingestd.base import tasks
from ingestd.base.tasks import end_tasks


async def test_a_task_that_loses_a_cancellation_is_cancelled_again(monkeypatch) -> None:
    monkeypatch.setattr(tasks, "CANCEL_SECONDS", 0.01)
    steps: list[str] = []

    async def lose_two() -> None:
        for number in range(3):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                steps.append(f"cancelled {number}")
        steps.append("ended")

    stubborn, plain = asyncio.create_task(lose_two()), asyncio.create_task(asyncio.sleep(60))
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await end_tasks(stubborn, plain)
    assert steps == ["cancelled 0", "cancelled 1", "cancelled 2", "ended"]
    assert plain.cancelled()


async def test_a_task_has_time_to_clean_up() -> None:
    cleaned: list[bool] = []

    async def clean_up() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            cleaned.append(True)

    task = asyncio.create_task(clean_up())
    await asyncio.sleep(0)
    await end_tasks(task)
    assert cleaned == [True]
    await end_tasks(task)  # it has ended
