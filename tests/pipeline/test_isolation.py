"""One bad record costs one record, whatever it does to the handler."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

import pytest

from ingestd.base.append import Append
from tests.pipeline import recording
from tests.pipeline.test_pipeline import HANDLER, dead, drained, numbers, records_of, until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

QUICK = {"attempts_max": 2, "backoff": "1ms", "backoff_max": "2ms"}


def succeeded(folder: Path, bad: set[int]) -> list[int]:
    return sorted(
        record
        for call in recording.calls(folder)
        if not bad.intersection(call["records"])
        for record in call["records"]
    )


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param({2345}, id="in the middle"),
        pytest.param({0}, id="first"),
        pytest.param({4999}, id="last"),
        pytest.param({0, 4999}, id="both ends"),
        pytest.param({7, 8, 9}, id="neighbours"),
        pytest.param(set(range(0, 5000, 500)), id="every 500th"),
        pytest.param(set(range(0, 5000, 10)), id="every tenth", marks=pytest.mark.slow),
    ],
)
async def test_poison_among_5000(start, tmp_path, bad: set[int]) -> None:
    pipeline = await start(
        HANDLER + "Poison",
        retry=QUICK,
        batch={"records_max": 5000},
        options={"folder": str(tmp_path), "bad": sorted(bad)},
    )
    await pipeline.accept(Append(numbers(0, 5000)))
    report = await drained(pipeline)
    assert succeeded(tmp_path, bad) == [n for n in range(5000) if n not in bad]
    assert sorted(int(row[1]) for row in dead(tmp_path)) == sorted(bad)
    assert {row[0] for row in dead(tmp_path)} == {"failed"}
    assert all("ValueError: poison" in row[3] for row in dead(tmp_path))
    assert report.ledger[:3] == (5000, 5000 - len(bad), len(bad))
    assert report.balanced
    assert pipeline.dispatcher.splitter.families == 0
    # O(bad * log n) calls, and a few tries before the first split.
    calls = len(recording.calls(tmp_path))
    assert calls <= 2 * QUICK["attempts_max"] + 2 * len(bad) * (math.ceil(math.log2(5000)) + 1)


@pytest.mark.slow
async def test_a_bad_record_in_each_batch_is_no_outage(start, tmp_path) -> None:
    """No batch succeeds as it is; with the default waits a part of one soon does."""
    pipeline = await start(
        HANDLER + "Poison",
        batch={"records_max": 20},
        retry={"attempts_max": 8, "backoff": "500ms", "backoff_max": "60s"},
        options={"folder": str(tmp_path), "bad": list(range(7, 1200, 20))},
    )
    await pipeline.accept(Append(numbers(0, 1200)))
    await until(lambda: pipeline.journal.ledger.processed >= 600, 300)


async def test_poison_alone_comes_to_an_end_when_something_else_succeeds(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "Poison", retry=QUICK, options={"folder": str(tmp_path), "bad": [1]}
    )
    await pipeline.accept(Append(numbers(1, 1)))
    await until(lambda: len(recording.calls(tmp_path)) > 10)
    assert pipeline.journal.ledger.dead == 0  # who knows whether it is the record?
    await pipeline.accept(Append(numbers(2, 1)))
    report = await drained(pipeline)
    assert report.ledger[:3] == (2, 1, 1)


def test_poison_alone_comes_to_an_end_when_its_time_is_over(ingestd_harness, tmp_path) -> None:
    retry = {f"retry.{name}": value for name, value in QUICK.items()}
    options = {"folder": str(tmp_path), "bad": [1]}
    harness = ingestd_harness(
        HANDLER + "Poison", options=options, **retry, **{"retry.give_up_after": "300ms"}
    )
    harness.send([1])
    harness.run()
    assert harness._pipeline.ledger[:3] == (1, 0, 1)
    assert len(recording.calls(tmp_path)) > 2


@pytest.mark.parametrize("bad", [[7], [1, 98]])
async def test_poison_costs_no_neighbour_when_nothing_is_waited_for(start, tmp_path, bad) -> None:
    pipeline = await start(
        HANDLER + "Poison",
        retry=QUICK | {"give_up_after": 0},
        options={"folder": str(tmp_path), "bad": bad},
    )
    await pipeline.accept(Append(numbers(0, 100)))
    report = await drained(pipeline)
    assert report.ledger[:3] == (100, 100 - len(bad), len(bad))


async def test_nothing_but_poison_comes_to_an_end(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "Poison",
        retry=QUICK | {"give_up_after": "500ms"},
        options={"folder": str(tmp_path), "bad": list(range(20))},
    )
    await pipeline.accept(Append(numbers(0, 20)))
    report = await drained(pipeline)
    assert report.ledger[:3] == (20, 0, 20)


@pytest.mark.parametrize(("how", "reason"), [("exit", "crashed"), ("hang", "timeout")])
async def test_a_record_that_kills_or_hangs_its_worker(start, tmp_path, how, reason) -> None:
    pipeline = await start(
        HANDLER + "Poison",
        retry=QUICK,
        executor={"kind": "process", "workers": 2, "timeout": "1s" if how == "hang" else "30s"},
        batch={"records_max": 8},
        options={"folder": str(tmp_path), "bad": [5], "how": how},
    )
    await pipeline.accept(Append(numbers(0, 16)))
    report = await drained(pipeline)
    assert [(row[0], row[1]) for row in dead(tmp_path)] == [(reason, b"5")]
    assert succeeded(tmp_path, {5}) == [n for n in range(16) if n != 5]
    assert report.balanced


async def test_the_parts_are_sealed_and_survive_a_restart(start, tmp_path) -> None:
    options = {"folder": str(tmp_path), "bad": [3]}
    slow = {"attempts_max": 1, "backoff": "1d", "backoff_max": "1d"}
    first = await start(HANDLER + "Poison", retry=slow, options=options)
    await first.accept(Append(numbers(0, 8)))
    await until(lambda: first.journal.ledger.dead == 1)
    await first.close()
    second = await start(HANDLER + "Poison", retry=slow, options=options)
    report = await drained(second)
    assert succeeded(tmp_path, {3}) == [0, 1, 2, 4, 5, 6, 7]
    ids = [call["id"] for call in recording.calls(tmp_path)]
    assert len(set(ids)) == len(ids)
    assert report.ledger[:3] == (8, 7, 1)


async def test_an_outage_does_not_use_the_journal_up(start, tmp_path) -> None:
    """While nothing succeeds, at most one batch is split; when the sink is back, all goes in."""
    pipeline = await start(
        HANDLER + "DownUntil",
        retry={
            "attempts_max": 3,
            "backoff": "1ms",
            "backoff_max": "2ms",
            "waiting_records_max": 80,
        },
        executor={"workers": 2},
        batch={"records_max": 10},
        options={"folder": str(tmp_path)},
    )
    await pipeline.accept(Append(numbers(0, 1000)))
    await until(
        lambda: pipeline.dispatcher.splitter.families and pipeline.dispatcher.failures.down_since
    )
    assert pipeline.dispatcher.splitter.families == 1
    (tmp_path / "up").touch()
    report = await drained(pipeline)
    assert report.ledger[:3] == (1000, 1000, 0)
    assert sorted(records_of(tmp_path)) == list(range(1000))


async def test_a_successful_neighbour_is_evidence(start, tmp_path) -> None:
    pipeline = await start(
        HANDLER + "Poison",
        retry={"attempts_max": 2, "backoff": "1ms"},
        executor={"workers": 1},
        batch={"records_max": 1},
        options={"folder": str(tmp_path), "bad": [0]},
    )
    await pipeline.accept(Append(numbers(0, 5)))
    report = await drained(pipeline)
    assert report.ledger[:3] == (5, 4, 1)
    attempts = [c["attempt"] for c in recording.calls(tmp_path) if c["records"] == [0]]
    assert attempts == [1, 2]
    await asyncio.sleep(0)
