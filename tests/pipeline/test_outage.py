"""A sink that is down, with the real pipeline: nothing is given up, and all comes in later."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

import ingestd
from ingestd.admin.status import status_of
from ingestd.base.append import Append
from ingestd.base.batch import SealedBatch
from ingestd.base.clock import SystemClock
from ingestd.base.record import Span
from ingestd.execution.outage import Outage
from ingestd.execution.retry import BatchSplitter
from ingestd.handlers.outcome import Failure, Rejection, Result, RetryRequest
from tests.pipeline import recording
from tests.pipeline.test_pipeline import HANDLER, dead, drained, numbers, records_of, until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

HERE = "tests.pipeline.test_outage:"
# Waits that would keep what was tried from coming in within the time of a test.
PATIENT = {"attempts_max": 2, "backoff": "1h", "backoff_max": "1h"}


class Flagged(recording.Note):
    """Raises in the way that `how` says while the file `down` is there; counts its calls."""

    def __init__(self, folder: str, how: str = "raise") -> None:
        super().__init__(folder)
        self.how = how

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        with Path(self.folder, "tries").open("a") as tries:
            tries.write("x")
        if Path(self.folder, "down").exists():
            if self.how == "retry":
                raise ingestd.Retry("not now")
            raise ConnectionError(f"no answer for {batch.id}")
        super().__call__(batch)


class AsksToWait(recording.Note):
    """Says "not now" to each batch with a negative number, for as long as that says."""

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        super().__call__(batch)
        waits = [-n for n in batch if n < 0]
        if waits and not Path(self.folder, "up").exists():
            raise ingestd.Retry("a rate limit", after=max(waits))


class SetClock(SystemClock):
    offset = 0.0

    def now(self) -> float:
        return super().now() + self.offset


def each_waits(batch: ingestd.Batch[Any]) -> None:
    """Asks for each record of the first batch again, each after another time."""
    for i, number in enumerate(batch):
        if number < 70 and batch.attempt == 1:
            batch.retry(i, after=3600 + number * 20)


class Picky(Flagged):
    """Rejects negative numbers by itself, and while `no` is there all others, too."""

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        if all(number < 0 for number in batch):
            raise ingestd.Reject("negative")
        super().__call__(batch)
        if Path(self.folder, "no").exists():
            raise ingestd.Reject("the table is gone")


def tries(folder: Path) -> int:
    path = folder / "tries"
    return path.stat().st_size if path.exists() else 0


@pytest.fixture
def logs() -> Iterator[list[dict[str, Any]]]:
    with capture_logs() as lines:
        yield lines


def events(lines: list[Any], name: str) -> list[Any]:
    return [line for line in lines if line["event"] == name]


@pytest.mark.parametrize("how", ["raise", "retry"])
async def test_all_that_waits_comes_in_when_the_sink_is_back(start, tmp_path, how) -> None:
    """The waits of each batch are an hour: the first success ends them all."""
    (tmp_path / "down").touch()
    pipeline = await start(
        HERE + "Flagged",
        retry=PATIENT | {"backoff_max": "1h", "backoff": "1h"},
        batch={"records_max": 100},
        executor={"kind": "thread", "workers": 2},
        options={"folder": str(tmp_path), "how": how},
    )
    for n in range(30):
        await pipeline.accept(Append(numbers(n * 1000, 1000)))
    await until(lambda: pipeline.dispatcher.failures.down_since)
    waiting = pipeline.dispatcher.queue.waiting
    assert waiting >= 3
    (tmp_path / "down").unlink()
    async with asyncio.timeout(60):
        report = await drained(pipeline)
    assert report.ledger[:3] == (30_000, 30_000, 0)
    assert sorted(records_of(tmp_path)) == list(range(30_000))
    assert tries(tmp_path) - len(recording.calls(tmp_path)) < 100  # of 300 batches


@pytest.mark.slow
async def test_little_is_tried_and_little_is_said_while_it_is_down(start, tmp_path, logs) -> None:
    (tmp_path / "down").touch()
    pipeline = await start(
        HERE + "Flagged",
        retry={"attempts_max": 2, "backoff": "1ms", "backoff_max": "50ms"},
        batch={"records_max": 1},
        executor={"kind": "thread", "workers": 2},
        options={"folder": str(tmp_path)},
    )
    began = pipeline._clock.now()
    await pipeline.accept(Append(numbers(0, 1000)))
    await until(lambda: pipeline.dispatcher.failures.down_since)
    pipeline.dispatcher.failures.sum_up(asyncio.get_running_loop().time())
    await until(lambda: tries(tmp_path) > 60)
    status = status_of(pipeline)
    assert status.handler.state == "down"
    assert status.handler.down_since.endswith("Z")
    assert status.handler.error.startswith("ConnectionError: no answer")
    assert began - 1 < status.handler.down_since_seconds < pipeline._clock.now()
    (tmp_path / "down").unlink()
    report = await drained(pipeline)
    assert report.ledger[:3] == (1000, 1000, 0)
    assert status_of(pipeline).handler.state == "up"
    assert status_of(pipeline).handler.down_since_seconds == 0
    loud = [line for line in logs if line["log_level"] != "debug" and line["event"] != "journal"]
    first, down, stayed, back = (
        events(loud, name)
        for name in (
            "batch_failed",
            "handler_went_down",
            "handler_still_down",
            "handler_came_back",
        )
    )
    assert [len(one) for one in (first, down, stayed, back)] == [1, 1, 1, 1]
    assert len(loud) < 10
    for line in (first[0], down[0]):
        assert line["error"].startswith("ConnectionError: no answer for")
        assert "in __call__" in line["exception"]
    assert stayed[0]["pending"] == 1000
    assert back[0]["down_seconds"] >= 1
    assert back[0]["pending"] >= 900


ONE_BY_ONE: dict[str, Any] = {
    "batch": {"records_max": 1},
    "executor": {"kind": "thread", "workers": 2},
}


async def test_a_sink_that_is_back_and_rejects_everything_is_up(start, tmp_path, logs) -> None:
    (tmp_path / "down").touch()
    pipeline = await start(
        HERE + "Picky", retry=PATIENT, options={"folder": str(tmp_path)}, **ONE_BY_ONE
    )
    await pipeline.accept(Append(numbers(0, 30)))
    await until(lambda: pipeline.dispatcher.failures.down_since)
    (tmp_path / "no").touch()
    (tmp_path / "down").unlink()
    report = await drained(pipeline)
    assert report.ledger[:3] == (30, 0, 30)
    assert {row[0] for row in dead(tmp_path)} == {"rejected"}
    assert status_of(pipeline).handler.state == "up"
    assert len(events(logs, "handler_came_back")) == 1
    assert pipeline.dispatcher.outage.successes == 0  # no evidence against anything that fails


async def test_what_is_rejected_before_the_sink_is_asked_ends_no_outage(start, tmp_path) -> None:
    (tmp_path / "down").touch()
    pipeline = await start(
        HERE + "Picky", retry=PATIENT, options={"folder": str(tmp_path)}, **ONE_BY_ONE
    )
    await pipeline.accept(Append(numbers(0, 5)))
    await until(lambda: pipeline.dispatcher.failures.down_since)
    since = pipeline.dispatcher.failures.down_since
    await pipeline.accept(Append(numbers(-3, 3)))
    await until(lambda: pipeline.journal.ledger.dead == 3)
    assert pipeline.dispatcher.failures.down_since == since
    (tmp_path / "down").unlink()
    report = await drained(pipeline)
    assert report.ledger[:3] == (8, 5, 3)
    assert status_of(pipeline).handler.state == "up"


async def test_when_all_that_failed_is_given_up_a_rejection_says_that_it_works(
    start, tmp_path
) -> None:
    (tmp_path / "down").touch()
    pipeline = await start(
        HERE + "Picky",
        retry={"backoff": "100ms", "backoff_max": "100ms", "give_up_after": "1200ms"},
        options={"folder": str(tmp_path)},
        **ONE_BY_ONE,
    )
    await pipeline.accept(Append(numbers(0, 3)))
    await until(lambda: pipeline.journal.ledger.dead == 3)
    assert status_of(pipeline).handler.state == "down"
    await pipeline.accept(Append(numbers(-1, 1)))
    await until(lambda: pipeline.journal.ledger.dead == 4)
    assert status_of(pipeline).handler.state == "up"


@pytest.mark.parametrize("how", ["part", "retried", "undecodable"])
def test_what_may_be_said_without_the_sink_ends_no_outage(how: str) -> None:
    outage = Outage(60.0, lambda: 0.5)
    isolation = BatchSplitter(outage, 8)
    batches = [
        SealedBatch(number, (Span(number, 0, 2),), 2, accepted_at=1.0) for number in range(4)
    ]
    for now, batch in enumerate(batches):
        isolation.retry_context(batch, Result(failure=Failure("raised", "no")), float(now))
    assert outage.is_outage
    first = batches[0]
    result = Result([Rejection(i, "rejected", "no") for i in range(2)])
    if how == "part":
        part = first.part(9, (Span(0, 0, 1),), 1, split=True)
        isolation.split(first, [part])
        isolation.settled(first)
        first, result = part, Result([Rejection(0, "rejected", "no")])
    elif how == "retried":
        result = Result([Rejection(0, "rejected", "no")], [RetryRequest(1, None, "")])
    else:
        result = Result([Rejection(i, "undecodable", "no") for i in range(2)])
    isolation.retry_context(first, result, 5.0)
    assert outage.is_outage
    isolation.retry_context(
        batches[1], Result([Rejection(i, "rejected", "") for i in range(2)]), 6.0
    )
    assert outage.down_since is None


async def test_a_probe_that_turns_out_damaged_keeps_nobody_waiting(start, tmp_path) -> None:
    (tmp_path / "down").touch()
    pipeline = await start(
        HERE + "Flagged", retry=PATIENT, options={"folder": str(tmp_path)}, **ONE_BY_ONE
    )
    for number in range(40):
        await pipeline.accept(Append(numbers(number, 1)))
    await until(lambda: pipeline.dispatcher.failures.down_since)
    pipeline.dispatcher.outage._next_at += 3600  # until all that waits is damaged
    await until(lambda: not pipeline.dispatcher.running)
    waiting = pipeline.dispatcher.queue.waiting
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db, db:
        db.execute(
            "UPDATE chunks SET payload = x'00' WHERE id IN"
            " (SELECT id FROM chunks ORDER BY id LIMIT ?)",
            (waiting,),
        )

    def dead_by_probes() -> int:
        pipeline.dispatcher.outage._next_at = 0.0  # the next one is due
        pipeline.dispatcher.outage.on_change()
        return pipeline.journal.ledger.dead

    # Batches that were not tried yet come first, two probes each.
    await until(dead_by_probes)
    (tmp_path / "down").unlink()
    async with asyncio.timeout(60):
        report = await drained(pipeline)
    assert report.ledger[:3] == (40, 40 - waiting, waiting)
    assert {row[0] for row in dead(tmp_path)} == {"damaged"}


async def test_what_is_given_up_is_told_once_and_summed_up(start, tmp_path, logs) -> None:
    (tmp_path / "no").touch()
    pipeline = await start(HERE + "Picky", options={"folder": str(tmp_path)}, **ONE_BY_ONE)
    await pipeline.accept(Append(numbers(0, 50)))
    await until(lambda: pipeline.journal.ledger.dead == 50)

    def told() -> list[int]:
        lines = events(logs, "records_given_up")
        return [line["records"] for line in lines if line["log_level"] != "debug"]

    assert told() == [1]
    pipeline.dispatcher.failures.sum_up_given_up()
    assert told() == [1, 49]
    pipeline.dispatcher.failures.sum_up_given_up()  # nothing came: the next one is told at once
    await pipeline.accept(Append(numbers(50, 2)))
    report = await drained(pipeline)
    assert told() == [1, 49, 1, 1]
    assert report.ledger[:3] == (52, 0, 52)


async def test_the_age_of_the_oldest_follows_no_clock_that_is_set(start, tmp_path) -> None:
    pipeline = await start(HERE + "Flagged", options={"folder": str(tmp_path)}, **ONE_BY_ONE)
    (tmp_path / "down").touch()
    clock = pipeline._clock = SetClock()
    await pipeline.accept(Append(numbers(0, 2)))
    await until(lambda: len(pipeline.unsettled))
    for step in (-7200, 3600, -1e9):
        clock.offset = step
        assert 0 <= status_of(pipeline).oldest_pending_seconds < 1800


async def test_a_bad_record_does_not_keep_a_new_one_waiting(start, tmp_path) -> None:
    """One record now and then: what fails alone is no outage, whatever its backoff has become."""
    pipeline = await start(
        HANDLER + "Poison",
        retry={"attempts_max": 3, "backoff": "1ms", "backoff_max": "20ms"},
        options={"folder": str(tmp_path), "bad": [0]},
        batch={"records_max": 1},
    )
    await pipeline.accept(Append(numbers(0, 1)))
    await until(lambda: len(recording.calls(tmp_path)) > 5)
    for n in range(1, 10):
        await pipeline.accept(Append(numbers(n, 1)))
        await until(lambda n=n: pipeline.journal.ledger.processed == n)
    report = await drained(pipeline)
    assert report.ledger[:3] == (10, 9, 1)


async def test_what_stands_behind_more_bad_records_than_may_wait_is_found(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "Poison",
        retry={"attempts_max": 3, "backoff": "1ms", "backoff_max": "5ms", "waiting_records_max": 5},
        options={"folder": str(tmp_path), "bad": list(range(20))},
        **ONE_BY_ONE,
    )
    await pipeline.accept(Append(numbers(0, 40)))
    report = await drained(pipeline)
    assert report.ledger[:3] == (40, 20, 20)


async def test_two_bad_records_that_are_left_over_come_to_their_end(start, tmp_path) -> None:
    """Nothing new comes, as at the end of standard input: what succeeded before is evidence."""
    pipeline = await start(
        HANDLER + "Poison",
        retry={"attempts_max": 4, "backoff": "200ms", "backoff_max": "400ms"},
        options={"folder": str(tmp_path), "bad": [0, 1, 2]},
        batch={"records_max": 1},
        executor={"workers": 1},
    )
    await pipeline.accept(Append(numbers(0, 20)))
    report = await drained(pipeline)
    assert report.ledger[:3] == (20, 17, 3)


async def test_an_outage_does_not_count_against_what_failed_before_it(start, tmp_path) -> None:
    """A record that has failed beside successes, and then waits through an outage, is not dead."""
    pipeline = await start(
        HERE + "Flagged",
        retry={"attempts_max": 8, "backoff": "100ms", "backoff_max": "1s"},
        batch={"records_max": 1},
        executor={"kind": "thread", "workers": 2},
        options={"folder": str(tmp_path)},
    )
    for life in range(3):
        (tmp_path / "down").touch()
        await pipeline.accept(Append(numbers(life * 50, 50)))
        await until(lambda: pipeline.dispatcher.failures.down_since)
        (tmp_path / "down").unlink()
        await until(lambda life=life: pipeline.journal.ledger.processed >= life * 50 + 20)
    report = await drained(pipeline)
    assert report.ledger[:3] == (150, 150, 0)


async def test_not_now_spends_no_attempt_and_is_kept(start, tmp_path) -> None:
    pipeline = await start(
        HERE + "AsksToWait",
        retry={"attempts_max": 1, "backoff": "1ms", "backoff_max": "2ms"},
        options={"folder": str(tmp_path)},
        batch={"records_max": 1},
    )
    await pipeline.accept(Append(numbers(-3600, 1)))
    await until(lambda: pipeline.dispatcher.queue.waiting == 1)
    await pipeline.accept(
        Append(numbers(1, 5))
    )  # others go on, and their success does not end the wait
    await until(lambda: pipeline.journal.ledger.processed == 5)
    assert pipeline.dispatcher.queue.ready_at - asyncio.get_running_loop().time() > 3000
    assert pipeline.dispatcher.queue.waiting == 1
    report = await pipeline.close()
    assert report.ledger[:3] == (6, 5, 0)
    with sqlite3.connect(tmp_path / "journal.db") as db:
        assert db.execute("SELECT attempts FROM batches").fetchall() == [(0,)]
    db.close()


async def test_not_now_comes_again_under_the_same_attempt(start, tmp_path) -> None:
    pipeline = await start(
        HERE + "AsksToWait",
        retry={"attempts_max": 1, "backoff": "1ms", "backoff_max": "2ms"},
        options={"folder": str(tmp_path)},
        batch={"records_max": 1},
    )
    await pipeline.accept(Append(numbers(0, 3)))
    await until(lambda: pipeline.journal.ledger.processed == 3)
    (tmp_path / "calls.ndjson").unlink()

    await pipeline.accept(Append(numbers(-1, 1)))  # in a second
    await until(lambda: len(recording.calls(tmp_path)) >= 2)
    (tmp_path / "up").touch()
    report = await drained(pipeline)
    calls = recording.calls(tmp_path)
    assert {call["attempt"] for call in calls} == {1}
    assert len({call["id"] for call in calls}) == 1
    assert report.ledger[:3] == (4, 4, 0)


async def test_seventy_records_with_waits_of_their_own_stop_nobody(start, tmp_path) -> None:
    pipeline = await start(
        HERE + "each_waits", batch={"records_max": 70, "age_max": "20ms"}, executor={"workers": 1}
    )
    await pipeline.accept(Append(numbers(0, 70)))
    await until(lambda: pipeline.dispatcher.queue.waiting_load.records == 70)
    assert pipeline.dispatcher.queue.waiting <= 10  # they share batches
    assert pipeline.budget.bytes == 0  # and hold no payload
    await pipeline.accept(Append(numbers(100, 1000)))
    await until(lambda: pipeline.journal.ledger.processed == 1000)
    assert pipeline.dispatcher.queue.waiting_load.records == 70
    await pipeline.close()


async def test_how_long_it_has_been_failing_survives_a_restart(start, tmp_path) -> None:
    def failing() -> list[float]:
        """For how long each batch has been failing, by the journal."""
        with closing(sqlite3.connect(tmp_path / "journal.db")) as db:
            return [seconds for (seconds,) in db.execute("SELECT seconds FROM failing")]

    (tmp_path / "down").touch()
    retry = {"attempts_max": 2, "backoff": "1ms", "backoff_max": "10ms", "give_up_after": "1h"}
    common = {"retry": retry, "options": {"folder": str(tmp_path)}, "batch": {"records_max": 1}}
    first = await start(HERE + "Flagged", **common)
    began = asyncio.get_running_loop().time()
    await first.accept(Append(numbers(0, 1)))
    await until(lambda: sum(failing()) > 0.7)
    assert first.journal.ledger.dead == 0
    await first.close()
    (seconds,) = failing()
    assert 0.7 < seconds < asyncio.get_running_loop().time() - began
    retry["give_up_after"] = f"{seconds + 0.05:.3f}s"
    second = await start(HERE + "Flagged", **common)
    report = await drained(second)
    assert report.ledger[:3] == (1, 0, 1)
    assert dead(tmp_path)[0][0] == "failed"
    assert failing() == []


async def test_a_drain_does_not_wait_for_a_probe_beyond_its_deadline(start, tmp_path) -> None:
    (tmp_path / "down").touch()
    pipeline = await start(
        HERE + "Flagged",
        retry=PATIENT,
        batch={"records_max": 1},
        executor={"kind": "thread", "workers": 2},
        options={"folder": str(tmp_path)},
    )
    await pipeline.accept(Append(numbers(0, 500)))
    await until(lambda: pipeline.dispatcher.failures.down_since)
    pipeline.dispatcher.outage._next_at += 3600
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 120
    async with asyncio.timeout_at(deadline - 60):
        await pipeline.drain(deadline)
    report = await pipeline.close()
    assert report.ledger[:3] == (500, 0, 0)
    assert report.balanced


async def test_tries_are_counted_as_what_they_were(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "Poison",
        retry={"attempts_max": 2, "backoff": "1ms", "backoff_max": "2ms"},
        batch={"records_max": 64},
        executor={"kind": "thread", "workers": 1},
        options={"folder": str(tmp_path), "bad": [5]},
    )
    await pipeline.accept(Append(numbers(0, 64)))
    report = await drained(pipeline)
    assert report.ledger[:3] == (64, 63, 1)
    counted = pipeline._metrics.labeled["batches_total"]
    calls = recording.calls(tmp_path)
    assert counted["done"] == len([call for call in calls if 5 not in call["records"]])
    assert counted["split"] == 6  # 64, 32, 16, 8, 4, 2
    assert counted["failed"] == 1
    assert sum(counted.values()) == len(calls)
