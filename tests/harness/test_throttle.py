"""A throttle holds batches and records to a rate, every try of every batch, and starves none."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestd.base.errors import ConfigError
from ingestd.execution.dispatch_control import BURST_SECONDS, Throttle
from ingestd.execution.settings import ExecutorSettings

BATCHES = {"executor.batches_per_second": 2}
SMALL = {"batch.records_max": 2}


def numbers(count: int) -> list[dict[str, int]]:
    return [{"n": n} for n in range(count)]


def nothing(batch: list[Any]) -> None:
    pass


async def nothing_async(batch: list[Any]) -> None:
    await asyncio.sleep(0)


def seconds(harness: Any) -> list[float]:
    """When each call began, seconds after the first."""
    return [(call.at - harness.batches[0].at) / timedelta(seconds=1) for call in harness.batches]


@pytest.mark.parametrize("handler", [nothing, nothing_async])
@pytest.mark.parametrize("workers", [1, 4])
def test_batches_begin_at_the_rate_whatever_runs_them(ingestd_harness, handler, workers) -> None:
    harness = ingestd_harness(handler, **SMALL, **BATCHES, **{"executor.workers": workers})
    harness.send(numbers(10))
    harness.run()
    assert sorted(one["n"] for one in harness.processed) == list(range(10))
    # The burst is less than a batch: it shortens the first wait alone.
    assert seconds(harness) == pytest.approx([0, 0.45, 0.95, 1.45, 1.95], abs=0.001)


def test_records_are_charged_as_they_go_and_a_large_batch_goes_whole(ingestd_harness) -> None:
    rate = {"executor.records_per_second": 10, "batch.records_max": 40}
    harness = ingestd_harness(nothing, **rate)
    harness.send(numbers(90))
    harness.run()
    assert [len(call.records) for call in harness.batches] == [40, 40, 10]
    assert seconds(harness) == pytest.approx([0, 3.95, 7.95], abs=0.001)


def test_what_was_not_used_is_not_saved(ingestd_harness) -> None:
    harness = ingestd_harness(nothing, **SMALL, **BATCHES)
    harness.run(3600)
    harness.send(numbers(4))
    harness.run()
    assert seconds(harness) == pytest.approx([0, 0.45], abs=0.001)


def test_retries_and_the_parts_of_a_batch_count_and_starve_nothing(ingestd_harness) -> None:
    """A bad record is found by splitting, while new batches go on, and no call is beyond it."""

    def fails(batch: list[Any]) -> None:
        if any(one["n"] == 5 for one in batch):
            raise ValueError("5 is bad")

    fast = {"retry.backoff": "1ms", "retry.backoff_max": "10ms", "retry.attempts_max": 3}
    harness = ingestd_harness(fails, **{"batch.records_max": 8}, **fast, **BATCHES)
    harness.send(numbers(80))
    harness.run()
    assert [one.record["n"] for one in harness.dead] == [5]
    assert sorted(one["n"] for one in harness.processed) == [n for n in range(80) if n != 5]
    began = seconds(harness)
    assert len(began) > 10 + 3
    for n, at in enumerate(began):
        assert at >= n / 2 - BURST_SECONDS - 0.001
    assert began[-1] == pytest.approx((len(began) - 1) / 2 - BURST_SECONDS, abs=0.01)


@settings(max_examples=40)
@given(
    st.floats(0.1, 1e4),
    st.floats(0, 1e4),
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 999)), max_size=40),
)
def test_no_more_is_given_than_rate_burst_and_one_batch(batches, records, steps) -> None:
    executor = ExecutorSettings(batches_per_second=batches, records_per_second=records)
    throttle, now, given_batches, given_records = Throttle(executor, 0.0), 0.0, 0, 0
    for pause, count in steps:
        now += pause
        wait, setting = throttle.wait(now)
        assert setting.startswith("executor.")
        if wait > 0:
            continue
        throttle.charge(count, now)
        assert given_batches <= batches * (now + BURST_SECONDS) + 1e-6
        given_batches += 1
        if records:
            assert given_records <= records * (now + BURST_SECONDS) + 1e-6
            given_records += count


@pytest.mark.parametrize("written", ["-1", "fast", True, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(ingestd_harness, written: object) -> None:
    with pytest.raises(ConfigError, match=r"executor\.batches_per_second"):
        ingestd_harness(nothing, **{"executor.batches_per_second": written})
