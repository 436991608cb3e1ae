"""`raise Retry`, not now: the pipeline gets the wait, and nothing that could break it."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest

import ingestd
from ingestd.base.record import Records, Span
from ingestd.handlers.call import failure_from
from ingestd.handlers.outcome import POSTPONED, UNAVAILABLE, Failure, Job, Result, flaw_of
from ingestd.handlers.runner import HandlerConfig, Runner

JOB = Job("j-1", 1, Records.lines([b"1", b"2"]), [Span(1, 0, 2)], "j")
MADE: list[Any] = []


class Limited:
    """Marks a record and says not now."""

    def __init__(self) -> None:
        MADE.append(self)

    def __call__(self, batch: ingestd.Batch[Any]) -> None:
        batch.reject(0, "said before it raised")
        raise ingestd.Retry("a rate limit", after=timedelta(minutes=1))


class Overloaded:
    def __init__(self) -> None:
        MADE.append(self)

    def __call__(self, batch: list[Any]) -> None:
        raise ingestd.Unavailable("429", after=timedelta(minutes=1))


class NotYet:
    def __init__(self) -> None:
        raise ingestd.Retry("the database is being upgraded", after=5)

    def __call__(self, batch: list[Any]) -> None: ...


class Bare(ingestd.Retry):
    def __init__(self) -> None: ...


class Says(ingestd.Retry):
    def __init__(self, after: Any) -> None:
        self.after = after


class Trap(ingestd.Retry):
    @property
    def after(self) -> float:  # type: ignore[override]
        raise RuntimeError("trap")

    def __init__(self) -> None: ...


def run(name: str, executor: str = "thread") -> tuple[Runner, Any]:
    runner = Runner(HandlerConfig(f"{__name__}:{name}", {}, "json", executor, "p", "/nowhere"))
    runner.prepare()
    return runner, runner.run(JOB)


def test_it_is_a_failure_with_a_wait_and_the_instance_stays() -> None:
    MADE.clear()
    runner, result = run("Limited")
    assert result.failure == Failure(POSTPONED, "a rate limit", "", 60.0)
    assert not result.rejections
    assert runner.run(JOB).failure == result.failure
    assert len(MADE) == 1
    runner.close()


def test_so_it_is_with_a_sink_that_says_for_how_long_it_is_unavailable() -> None:
    MADE.clear()
    runner, result = run("Overloaded")
    assert result.failure is not None
    assert (result.failure.reason, result.failure.after) == (UNAVAILABLE, 60.0)
    runner.run(JOB)
    assert len(MADE) == 1
    runner.close()


def test_a_constructor_may_say_it_too() -> None:
    _, result = run("NotYet")
    assert result.failure == Failure(POSTPONED, "the database is being upgraded", "", 5.0)


EPOCH = 1.8e9  # a time of day, as many rate limits give it


@pytest.mark.parametrize(
    "after", [-1, math.nan, math.inf, "soon", timedelta(seconds=-1), timedelta.max, EPOCH]
)
def test_a_wait_that_is_none_is_an_error_of_the_handler(after: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        ingestd.Retry("x", after=after)


@pytest.mark.parametrize(
    ("raised", "after"),
    [(Bare(), None), (Says(None), None), (Says(3), 3.0), (Says(timedelta(1)), 86400.0)],
)
def test_a_subclass_need_not_call_our_constructor(raised: Any, after: float | None) -> None:
    failure = failure_from(raised)
    assert (failure.reason, failure.after) == (POSTPONED, after)
    assert failure.error


@pytest.mark.parametrize("raised", [Says("soon"), Says(-1), Says(math.nan), Says(EPOCH), Trap()])
def test_a_subclass_that_can_not_say_when_ends_nothing(raised: Any) -> None:
    try:
        failure = failure_from(raised)
    except Exception as error:
        failure = failure_from(error)
    assert failure.reason in {"raised", POSTPONED}
    assert failure.after is None


def test_a_workers_answer_is_looked_at() -> None:
    assert flaw_of(Result(failure=Failure(POSTPONED, "x", "", 3.0)), 2) == ""
    for after in (-1.0, math.nan, math.inf, EPOCH):
        assert "after" in flaw_of(Result(failure=Failure(POSTPONED, "x", "", after)), 2)
