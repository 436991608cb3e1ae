"""A record's whole way, with the real journal, the real executors and real handlers."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock

import pytest

from ingestd import Batch
from ingestd.admin.status import status_of
from ingestd.base.append import Append
from ingestd.base.errors import JournalFailed
from ingestd.base.record import InvalidRecord, Records
from ingestd.journal.dead_letters import LetterFilter
from ingestd.journal.sqlite.dead_letters import letters as letters_of
from ingestd.journal.sqlite.offline import opened as opened_beside
from ingestd.settlement import SettlementWriter
from tests.pipeline import recording

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HANDLER = "tests.pipeline.recording:"


def numbers(start: int, count: int) -> Records:
    return Records.lines([b"%d" % n for n in range(start, start + count)])


async def until(true: Callable[[], Any], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.002)


async def drained(pipeline: Any) -> Any:
    async with asyncio.timeout(120):
        await pipeline.drain(None)
        return await pipeline.close()


def records_of(folder: Path) -> list[Any]:
    return [record for call in recording.calls(folder) for record in call["records"]]


def dead(folder: Path) -> list[tuple[Any, ...]]:
    with opened_beside(folder / "journal.db") as db:
        kept = [one.letter for one in letters_of(db, LetterFilter(), whole=True)]
    return sorted(
        ((one.reason, one.payload, one.attempts, one.error) for one in kept), key=lambda row: row[1]
    )


KINDS = [("thread", "Note"), ("process", "Note"), ("async", "AsyncNote")]


@pytest.mark.parametrize(("kind", "handler"), KINDS)
async def test_every_record_reaches_the_handler_once(start, tmp_path, kind, handler) -> None:
    pipeline = await start(
        HANDLER + handler,
        executor={"kind": kind, "workers": 2},
        batch={"records_max": 10, "age_max": "1h"},
        options={"folder": str(tmp_path)},
    )
    await asyncio.gather(*(pipeline.accept(Append(numbers(n * 7, 7))) for n in range(30)))
    report = await drained(pipeline)
    assert sorted(records_of(tmp_path)) == list(range(210))
    calls = recording.calls(tmp_path)
    assert [len(call["records"]) for call in calls] == [10] * 21
    assert len({call["id"] for call in calls}) == 21
    assert len({one for call in calls for one in call["ids"]}) == 210
    assert report.ledger.accepted == report.ledger.processed == 210
    assert report.counted == 0
    assert report.balanced
    assert report.workers_gone


@pytest.mark.parametrize("kind", ["thread", "process"])
async def test_a_class_is_made_once_a_worker_and_closed(start, tmp_path, kind) -> None:
    pipeline = await start(
        HANDLER + "Note",
        executor={"kind": kind, "workers": 3},
        batch={"records_max": 1},
        options={"folder": str(tmp_path)},
    )
    while kind == "process" and not all(  # the first one is enough for a pipeline to be open
        worker._child and worker._child.is_ready for worker in pipeline.dispatcher.pool.workers
    ):
        await asyncio.sleep(0.01)
    await pipeline.accept(Append(numbers(0, 60)))
    await drained(pipeline)
    made = {call["made"] for call in recording.calls(tmp_path)}
    assert 1 <= len(made) <= 3
    assert len(list(tmp_path.glob("closed-*"))) == 3


async def test_a_chunk_of_100_000_records_makes_100_batches_of_1_000(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "Note", batch={"age_max": "1h"}, options={"folder": str(tmp_path)}
    )
    await pipeline.accept(Append(numbers(0, 100_000)))
    await drained(pipeline)
    calls = recording.calls(tmp_path)
    assert [len(call["records"]) for call in calls] == [1000] * 100
    assert sorted(records_of(tmp_path)) == list(range(100_000))


async def test_a_batch_goes_by_its_age(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "Note", batch={"age_max": "20ms"}, options={"folder": str(tmp_path)}
    )
    await pipeline.accept(Append(numbers(0, 3)))
    await until(lambda: pipeline.journal.ledger.processed == 3)
    assert [call["records"] for call in recording.calls(tmp_path)] == [[0, 1, 2]]


async def test_a_drain_sends_a_partly_filled_batch_at_once(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "Note", batch={"age_max": "1h"}, options={"folder": str(tmp_path)}
    )
    await pipeline.accept(Append(numbers(0, 3)))
    await until(lambda: pipeline.batcher.open)
    assert recording.calls(tmp_path) == []
    report = await drained(pipeline)
    assert records_of(tmp_path) == [0, 1, 2]
    assert report.ledger.pending == 0


async def test_while_the_workers_are_busy_a_batch_keeps_filling(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "Gate",
        executor={"workers": 1},
        batch={"age_max": "1ms"},
        options={"folder": str(tmp_path)},
    )
    await pipeline.accept(Append(numbers(0, 1)))
    await until(lambda: recording.calls(tmp_path))
    await pipeline.accept(Append(numbers(1, 1)))
    await until(lambda: pipeline.dispatcher.running == 2)  # one runs, one is prepared ...
    for n in range(2, 12):
        await pipeline.accept(Append(numbers(n, 1)))
    await until(lambda: pipeline.reader.waiting == 0 and pipeline.queue.empty())
    assert pipeline.dispatcher.queue.empty  # ... and only one
    assert pipeline.dispatcher.running == 2
    (tmp_path / "open").touch()
    await drained(pipeline)
    assert [len(call["records"]) for call in recording.calls(tmp_path)] == [1, 1, 10]


async def test_a_batch_that_fails_comes_again_under_its_id(start, tmp_path) -> None:
    pipeline = await start(HANDLER + "Fails", options={"folder": str(tmp_path), "times": 3})
    await pipeline.accept(Append(numbers(0, 5)))
    report = await drained(pipeline)
    calls = recording.calls(tmp_path)
    assert [call["attempt"] for call in calls] == [1, 2, 3, 4]
    assert len({call["id"] for call in calls}) == 1
    assert all(call["records"] == [0, 1, 2, 3, 4] for call in calls)
    assert report.ledger.processed == 5
    (sink,) = pipeline.dispatcher.sinks.values()
    assert (sink.batches, sink.records) == (4, 5)
    assert list(sink.errors.values()) == [3]


def test_a_batch_that_never_succeeds_becomes_dead_letters_in_the_end(ingestd_harness) -> None:
    def fails(batch: Batch[int]) -> None:
        raise RuntimeError(f"attempt {batch.attempt} fails")

    harness = ingestd_harness(
        fails,
        **{"retry.attempts_max": 2, "retry.backoff": "1ms", "retry.backoff_max": "5ms",
           "retry.give_up_after": "300ms"},
    )  # fmt: skip
    harness.send([0, 1])
    harness.run()
    ledger = harness._pipeline.ledger
    assert (ledger.accepted, ledger.dead, ledger.pending) == (2, 2, 0)
    letters = sorted(harness.dead, key=lambda one: one.record)
    assert [(one.reason, one.record) for one in letters] == [("failed", 0), ("failed", 1)]
    # Nothing else succeeded: the tries do not matter, only how long it has been failing.
    assert all(one.attempts > 4 for one in letters)
    assert all(one.error == f"RuntimeError: attempt {one.attempts} fails" for one in letters)


@pytest.mark.parametrize("kind", ["thread", "process"])
async def test_each_record_has_its_own_outcome(start, tmp_path, kind) -> None:
    pipeline = await start(
        HANDLER + "Outcomes",
        executor={"kind": kind, "workers": 1},
        options={"folder": str(tmp_path)},
    )
    await pipeline.accept(Append(Records.lines([b"2", b'"bad"', b"3", b"4", b"5"])))
    report = await drained(pipeline)
    first, second = recording.calls(tmp_path)
    assert first["records"] == [2, "bad", 3, 4, 5]
    assert second["records"] == [3, 5]
    assert second["id"] != first["id"]
    assert second["attempt"] == 2
    assert second["ids"] == [first["ids"][2], first["ids"][4]]
    assert report.ledger[:3] == (5, 4, 1)
    assert dead(tmp_path) == [("rejected", b'"bad"', 1, "bad is a string")]


async def test_what_does_not_fit_the_annotation_is_dead_and_its_neighbours_go_on(
    start, tmp_path
) -> None:
    pipeline = await start("tests.pipeline.recording_typed:store")
    await pipeline.accept(Append(Records.lines([b'{"n":1}', b'{"n":"x"}', b"[]", b'{"n":2}'])))
    report = await drained(pipeline)
    assert report.ledger[:3] == (4, 2, 2)
    assert [(row[0], row[1]) for row in dead(tmp_path)] == [
        ("undecodable", b"[]"),
        ("undecodable", b'{"n":"x"}'),
    ]


async def test_refused_records_are_kept_with_the_good_ones(start, tmp_path) -> None:
    pipeline = await start(HANDLER + "Note", options={"folder": str(tmp_path)})
    await pipeline.accept(Append(numbers(0, 1), [InvalidRecord(1, "malformed", "line 2", b"{")]))
    report = await drained(pipeline)
    assert dead(tmp_path) == [("malformed", b"{", 0, "line 2")]
    assert report.ledger == (1, 1, 0, 1)


async def test_a_restart_feeds_sealed_batches_under_their_ids_and_then_the_rest(
    start, tmp_path
) -> None:
    options = {"folder": str(tmp_path)}
    common = {"options": options, "batch": {"records_max": 4, "age_max": "1h"}}
    first = await start(HANDLER + "Gate", executor={"kind": "thread", "workers": 1}, **common)
    await first.accept(Append(numbers(0, 10)))
    await until(lambda: recording.calls(tmp_path) and first.dispatcher.running == 2)
    (before,) = recording.calls(tmp_path)
    loop = asyncio.get_running_loop()
    leaving = asyncio.ensure_future(first.close(loop.time() + 0.05))
    await asyncio.sleep(0)
    report = await leaving
    assert not report.workers_gone  # the gate holds the thread
    assert report.ledger.pending == report.counted == 10
    (tmp_path / "calls.ndjson").unlink()
    (tmp_path / "open").touch()

    second = await start(HANDLER + "Note", **common)
    report = await drained(second)
    calls = recording.calls(tmp_path)
    assert sorted(records_of(tmp_path)) == list(range(10))
    assert {tuple(call["records"]): call["id"] for call in calls}[(0, 1, 2, 3)] == before["id"]
    assert sorted(len(call["records"]) for call in calls) == [2, 4, 4]
    assert report.ledger[:2] == (10, 10)


async def test_more_than_fits_into_memory_goes_through_the_disk(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "Gate",
        executor={"workers": 1},
        batch={"records_max": 50, "bytes_max": "4KiB"},
        queue={"bytes_max": "8KiB"},
        options={"folder": str(tmp_path)},
    )
    for n in range(40):
        await pipeline.accept(Append(numbers(n * 100, 100)))
    assert pipeline.budget.bytes <= 8 << 10
    assert pipeline.reader.waiting > 20
    (tmp_path / "open").touch()
    report = await drained(pipeline)
    assert sorted(records_of(tmp_path)) == list(range(4000))
    assert report.ledger.processed == 4000
    assert pipeline.budget.bytes == 0


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("exit", "exited with code 7"),
        (str(int(signal.SIGKILL)), "killed by SIGKILL"),
        (str(int(signal.SIGSEGV)), "killed by SIGSEGV"),
        ("hang", "killed after"),
        ("sys.exit", "SystemExit"),
    ],
)
async def test_a_worker_that_dies_costs_one_attempt(start, tmp_path, how, reason) -> None:
    pipeline = await start(
        HANDLER + "Dies",
        executor={"kind": "process", "workers": 1, "timeout": "1s" if how == "hang" else "30s"},
        options={"folder": str(tmp_path), "how": how},
        batch={"records_max": 2},
    )
    await pipeline.accept(Append(numbers(0, 4)))
    report = await drained(pipeline)
    calls = recording.calls(tmp_path)
    assert sorted((c["records"][0], c["attempt"]) for c in calls) == [
        (0, 1),
        (0, 2),
        (2, 1),
        (2, 2),
    ]
    assert report.ledger.processed == 4
    assert report.workers_gone
    assert len({c["pid"] for c in calls}) == (1 if how == "sys.exit" else 3), reason


async def test_an_async_handler_that_hangs_is_cancelled(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "AsyncHang",
        executor={"kind": "async", "timeout": "1s"},
        options={"folder": str(tmp_path)},
    )
    await pipeline.accept(Append(numbers(0, 2)))
    report = await drained(pipeline)
    assert [call["attempt"] for call in recording.calls(tmp_path)] == [1, 2]
    assert report.ledger.processed == 2


@pytest.mark.parametrize("kind", ["thread", "process"])
async def test_a_constructor_that_fails_is_tried_again(start, tmp_path, kind) -> None:
    pipeline = await start(
        HANDLER + "DownAtFirst",
        executor={"kind": kind, "workers": 1},
        retry={"attempts_max": 1000, "backoff": "5ms", "backoff_max": "5ms"},
        options={"folder": str(tmp_path)},
    )
    await pipeline.accept(Append(numbers(0, 2)))
    await until(lambda: pipeline.dispatcher.queue.waiting)
    (tmp_path / "up").touch()
    report = await drained(pipeline)
    assert report.ledger.processed == 2


def recording_soon(pipeline: Any) -> bool:
    """Whether a worker has a job; the dispatcher itself may wait for one with a free worker."""
    return pipeline.dispatcher.running > 0


@pytest.mark.parametrize("kind", ["thread", "process"])
async def test_what_lies_ready_before_the_lanes_is_not_with_a_worker(start, tmp_path, kind) -> None:
    pipeline = await start(
        HANDLER + "Gate",
        executor={"kind": kind, "workers": 1},
        batch={"records_max": 1},
        options={"folder": str(tmp_path)},
    )
    await pipeline.accept(Append(numbers(0, 5)))
    await until(lambda: pipeline.dispatcher.running > 1)
    assert status_of(pipeline).batches.running == 1
    (tmp_path / "open").touch()


async def test_a_sink_that_is_down_stops_new_batches(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "Fails",
        executor={"workers": 2},
        batch={"records_max": 1},
        retry={"attempts_max": 3, "backoff": "1d", "backoff_max": "1d", "waiting_records_max": 4},
        options={"folder": str(tmp_path), "times": 99},
    )
    await pipeline.accept(Append(numbers(0, 50)))
    await until(lambda: pipeline.dispatcher.queue.waiting >= 4 and not recording_soon(pipeline))
    seen = len(recording.calls(tmp_path))
    await until(lambda: pipeline.dispatcher.queue.ahead >= 40)
    assert len(recording.calls(tmp_path)) == seen <= 4 + 2 * 2  # each worker holds two
    # What waits for longer than the deadline does not hold the drain up.
    loop = asyncio.get_running_loop()
    report = await pipeline.close(loop.time() + 5)
    assert report.ledger.pending == report.counted == 50


async def test_a_drain_does_not_wait_for_a_retry_beyond_its_deadline(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "Fails",
        retry={"backoff": "1d", "backoff_max": "1d"},
        options={"folder": str(tmp_path), "times": 99},
    )
    await pipeline.accept(Append(numbers(0, 1)))
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 120
    async with asyncio.timeout_at(deadline - 60):
        await pipeline.drain(deadline)
    report = await pipeline.close()
    assert report.ledger.pending == 1


async def test_damage_costs_only_the_damaged_chunk(start, tmp_path: Path) -> None:
    folder = tmp_path / "handler"
    folder.mkdir()
    first = await start(HANDLER + "Gate", batch={"age_max": "1h"}, options={"folder": str(folder)})
    await first.accept(Append(Records.lines([b'"' + b"x" * 70_000 + b'"'])))
    await first.accept(Append(numbers(1, 3)))
    await first.close()
    path = tmp_path / "journal.db"
    raw = path.read_bytes()
    at = raw.index(b"x" * 10_000) + 5_000
    path.write_bytes(raw[:at] + b"y" + raw[at + 1 :])
    (folder / "open").touch()

    second = await start(HANDLER + "Note", options={"folder": str(folder)})
    report = await drained(second)
    assert records_of(folder) == [1, 2, 3]
    assert report.ledger[:3] == (4, 3, 1)
    assert report.counted == 0
    assert [row[0] for row in dead(tmp_path)] == ["damaged"]


async def test_a_sealed_batch_loses_only_what_lies_in_a_damaged_chunk(start, tmp_path) -> None:
    folder = tmp_path / "handler"
    folder.mkdir()
    first = await start(
        HANDLER + "Gate", executor={"workers": 1}, batch={"records_max": 4, "age_max": "1h"},
        options={"folder": str(folder)},
    )  # fmt: skip
    await first.accept(Append(numbers(0, 2)))
    await first.accept(Append(Records.lines([b'"' + b"x" * 70_000 + b'"'])))
    await first.accept(Append(numbers(3, 1)))
    await until(lambda: recording.calls(folder))
    loop = asyncio.get_running_loop()
    await first.close(loop.time() + 0.05)
    path = tmp_path / "journal.db"
    raw = path.read_bytes()
    at = raw.index(b"x" * 10_000) + 5_000
    path.write_bytes(raw[:at] + b"y" + raw[at + 1 :])
    (folder / "calls.ndjson").unlink()
    (folder / "open").touch()

    second = await start(HANDLER + "Note", options={"folder": str(folder)})
    report = await drained(second)
    assert sorted(records_of(folder)) == [0, 1, 3]
    assert report.ledger[:3] == (4, 3, 1)
    assert report.counted == 0


async def test_a_dead_consumer_ends_the_wait(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "Note", batch={"age_max": "1h"}, options={"folder": str(tmp_path)}
    )
    await pipeline.accept(Append(numbers(0, 3)))
    await until(lambda: pipeline.batcher.open)
    pipeline.batcher.close = None  # what a bug in the consumer would do
    async with asyncio.timeout(60):
        await pipeline.drain(None)
    assert isinstance(pipeline.broken.exception(), TypeError)
    report = await pipeline.close()
    assert report.counted == 3


async def test_a_pipeline_is_broken_also_if_nothing_can_be_logged(
    start, tmp_path, monkeypatch
) -> None:
    class Mute:
        def __getattr__(self, level: str) -> Any:
            raise OSError(f"no {level}")

    pipeline = await start(
        HANDLER + "Note", batch={"age_max": "1h"}, options={"folder": str(tmp_path)}
    )
    await pipeline.accept(Append(numbers(0, 3)))
    await until(lambda: pipeline.batcher.open)
    monkeypatch.setattr("ingestd.base.tasks.log", Mute())
    pipeline.batcher.close = None
    async with asyncio.timeout(60):
        await pipeline.drain(None)
    assert isinstance(pipeline.broken.exception(), TypeError)


async def test_memory_journal_goes_the_same_way(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "Note", journal={"kind": "memory"}, options={"folder": str(tmp_path)}
    )
    await pipeline.accept(Append(numbers(0, 2500)))
    report = await drained(pipeline)
    assert sorted(records_of(tmp_path)) == list(range(2500))
    assert not report.durable
    assert report.ledger[:2] == (2500, 2500)


async def test_a_start_that_fails_behind_the_journal_gives_all_back(start, tmp_path) -> None:
    pipeline = await start(HANDLER + "Note", options={"folder": str(tmp_path)})
    await pipeline.close()
    running = set(threading.enumerate())
    failed = JournalFailed(path="journal.db", problem="as it is read")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SettlementWriter, "recover", AsyncMock(side_effect=failed))
        with pytest.raises(JournalFailed, match="as it is read"):
            await start(HANDLER + "Note", options={"folder": str(tmp_path)})
    await until(lambda: set(threading.enumerate()) <= running)
    pipeline = await start(HANDLER + "Note", options={"folder": str(tmp_path)})  # it is not locked
    assert (await drained(pipeline)).balanced
