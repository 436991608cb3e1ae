"""When the daemon counts as hung, and when it does not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.admin.status import stages_of
from ingestd.base.append import Append
from ingestd.base.record import Records
from ingestd.base.watchdog import LOOK_SECONDS, Liveness, Stage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow

HANDLER = "tests.pipeline.recording:"


def look(liveness: Liveness, stages: list[Stage], *, at: float, times: int) -> float:
    for _ in range(times):
        liveness.look(stages, at)
        at += LOOK_SECONDS
    return at


def test_a_stage_that_could_go_on_and_does_not_hangs() -> None:
    liveness = Liveness(10)
    at = look(liveness, [Stage("pump", True, 7)], at=100, times=10)
    assert not liveness.hung()
    look(liveness, [Stage("pump", True, 7)], at=at, times=1)
    assert liveness.hung() == "pump has not moved for 10 s"


def test_one_step_is_enough() -> None:
    liveness = Liveness(10)
    at = 0.0
    for steps in range(5):
        at = look(liveness, [Stage("pump", True, steps)], at=at, times=9)
    assert not liveness.hung()


def test_a_moment_without_work_is_enough() -> None:
    liveness = Liveness(10)
    at = look(liveness, [Stage("pump", True, 7)], at=0, times=10)
    at = look(liveness, [Stage("pump", False, 7)], at=at, times=1)
    look(liveness, [Stage("pump", True, 7)], at=at, times=10)
    assert not liveness.hung()


def test_who_waits_for_another_does_not_hang() -> None:
    liveness = Liveness(10)
    look(liveness, [Stage("pump", False, 7)], at=0, times=1000)
    assert not liveness.hung()


def test_each_stage_counts_by_itself() -> None:
    liveness = Liveness(10)
    for second in range(12):
        liveness.look([Stage("pump", True, second), Stage("consumer", True, 7)], float(second))
    assert liveness.hung().startswith("consumer")


def test_it_moves_again_and_is_alive_again() -> None:
    liveness = Liveness(10)
    at = look(liveness, [Stage("pump", True, 7)], at=0, times=20)
    assert liveness.hung()
    look(liveness, [Stage("pump", True, 8)], at=at, times=1)
    assert not liveness.hung()


def test_time_in_which_nobody_looked_does_not_count() -> None:
    """A process that was stopped, or a machine that slept."""
    liveness = Liveness(10)
    look(liveness, [Stage("pump", True, 7)], at=0, times=2)
    liveness.look([Stage("pump", True, 7)], 3600)
    assert not liveness.hung()


# -- what a real pipeline says of itself ---------------------------------------------------------


def free_to_go(pipeline: Any) -> list[str]:
    return [stage.name for stage in stages_of(pipeline) if stage.could_go_on]


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.002)


async def fill(pipeline: Any, chunks: int = 40) -> None:
    """More than its line, its queue and its room hold."""
    for first in range(chunks):
        await pipeline.accept(Append(Records.lines([b"%d" % (first * 20 + n) for n in range(20)])))


SMALL = {"batch": {"records_max": 1, "bytes_max": 64}, "queue": {"bytes_max": 128, "chunks_max": 2}}


async def test_an_idle_pipeline_rests(start, tmp_path: Path) -> None:
    pipeline = await start(HANDLER + "Note", options={"folder": str(tmp_path)})
    await pipeline.accept(Append(Records.lines([b"1"])))
    await until(lambda: pipeline.journal.ledger.processed == 1)
    await until(lambda: not free_to_go(pipeline))


async def test_behind_a_slow_handler_everything_rests(start, tmp_path: Path) -> None:
    options = {"folder": str(tmp_path)}
    pipeline = await start(HANDLER + "Gate", executor={"workers": 1}, options=options, **SMALL)
    await fill(pipeline)
    await until(lambda: pipeline.dispatcher.running and pipeline.reader.waiting)
    await until(lambda: not free_to_go(pipeline))
    (tmp_path / "open").touch()


async def test_behind_a_full_line_and_a_full_queue_everything_rests(start, tmp_path: Path) -> None:
    pipeline = await start(
        HANDLER + "Gate",
        executor={"workers": 1},
        options={"folder": str(tmp_path)},
        batch={"records_max": 1},
        queue={"chunks_max": 1},
    )
    for number in range(200):
        await pipeline.accept(Append(Records.lines([b"%d" % number])))
    await until(lambda: pipeline.dispatcher.queue.is_long and pipeline.queue.full())
    await until(lambda: not free_to_go(pipeline))
    assert pipeline.reader.could_give
    (tmp_path / "open").touch()


async def test_behind_a_dead_sink_everything_rests(start, tmp_path: Path) -> None:
    pipeline = await start(
        HANDLER + "Fails",
        options={"folder": str(tmp_path), "times": 1000},
        retry={
            "backoff": "1d",
            "backoff_max": "30d",
            "waiting_records_max": 2,
            "attempts_max": 1000,
        },
        **SMALL,
    )
    await fill(pipeline)
    await until(lambda: pipeline.dispatcher.queue.waiting >= 2 and not pipeline.dispatcher.running)
    await until(lambda: not free_to_go(pipeline))
    assert pipeline.reader.waiting


NAMES = {"pump": "pump", "consume": "consumer", "dispatch": "dispatcher"}


@pytest.mark.parametrize("stage", NAMES)
async def test_a_stage_that_is_gone_is_noticed(start, tmp_path: Path, stage: str) -> None:
    pipeline = await start(HANDLER + "Note", options={"folder": str(tmp_path)})
    (task,) = (task for task in pipeline._turning if task.get_name().endswith(stage))
    task.cancel()
    await asyncio.wait({task})
    if stage == "consume":
        await pipeline.accept(Append(Records.lines([b"1"])))
    else:
        await fill(pipeline, 1)
    name = f"the {NAMES[stage]} of default"
    await until(lambda: free_to_go(pipeline) == [name])
    liveness = Liveness(5)
    for second in range(7):
        liveness.look(stages_of(pipeline), float(second))
    assert liveness.hung().startswith(name)


async def test_a_commit_that_does_not_end_is_noticed(start, tmp_path: Path) -> None:
    import threading

    pipeline = await start(HANDLER + "Note", options={"folder": str(tmp_path)})
    let_go, store = threading.Event(), pipeline.journal._store
    write = store.write

    def held(order: Any, **more: Any) -> Any:
        let_go.wait(120)
        return write(order, **more)

    store.write = held
    accepting = asyncio.ensure_future(pipeline.accept(Append(Records.lines([b"1"]))))
    await until(lambda: free_to_go(pipeline) == ["the journal of default"])
    liveness = Liveness(5)
    for second in range(7):
        liveness.look(stages_of(pipeline), float(second))
    assert liveness.hung().startswith("the journal of default")
    let_go.set()
    await accepting


async def test_a_full_disk_is_no_reason(start, tmp_path: Path) -> None:
    """The thread goes on trying: a restart would find the same disk."""
    import sqlite3

    options = {"folder": str(tmp_path)}
    pipeline = await start(HANDLER + "Note", options=options, batch={"records_max": 1})
    store = pipeline.journal._store
    write, full = store.write, True

    def no_space(order: Any, **more: Any) -> Any:
        if full and not order.chunks:
            error = sqlite3.OperationalError("full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return write(order, **more)

    store.write = no_space
    await pipeline.accept(Append(Records.lines([b"%d" % number for number in range(20)])))
    await until(lambda: pipeline.dispatcher.running and pipeline.dispatcher.queue.could_give(0.0))
    seen = pipeline.journal.status().commits
    await until(lambda: pipeline.journal.status().commits > seen + 3)
    assert "the dispatcher of default" not in free_to_go(pipeline)
    full = False
    await until(lambda: pipeline.journal.ledger.processed == 20)
