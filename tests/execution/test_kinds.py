"""The first failure of a kind is told from its repetitions."""

from __future__ import annotations

from ingestd.execution.failure_log import KIND_SECONDS, KINDS_MAX, FailureKinds, kind_of
from ingestd.handlers.failure import failure_of
from ingestd.handlers.outcome import Failure


def look_up(key: object) -> None:
    {}[key]


def look_up_elsewhere(key: object) -> None:
    {}[key]


def raised(key: object, *, elsewhere: bool = False) -> Failure:
    try:
        (look_up_elsewhere if elsewhere else look_up)(key)
    except KeyError as error:
        return failure_of(error)
    raise AssertionError("it is there")


def test_the_type_and_the_line_make_a_kind_and_the_message_does_not() -> None:
    assert kind_of(raised("a")) == kind_of(raised("b"))
    assert kind_of(raised("a")) != kind_of(raised("a", elsewhere=True))
    assert kind_of(raised("a")).type == "KeyError"
    assert "test_kinds.py" in kind_of(raised("a")).where
    killed, timed_out = Failure("crashed", "killed by SIGKILL"), Failure("timeout", "killed after")
    assert kind_of(killed) != kind_of(timed_out)


def test_repetitions_are_counted_until_somebody_asks() -> None:
    kinds = FailureKinds()
    assert kinds.note(raised("a"), 0.0)
    assert kinds.repeated() == []
    assert [kinds.note(raised(n), 1.0) for n in range(5)] == [False] * 5
    assert kinds.note(raised("x", elsewhere=True), 2.0)
    (one,) = kinds.repeated()
    assert (one.times, one.error) == (5, "KeyError: 4")
    assert kinds.repeated() == []
    assert not kinds.note(raised("a"), 3.0)


def test_a_kind_that_was_not_seen_for_long_is_new() -> None:
    kinds = FailureKinds()
    assert kinds.note(raised("a"), 0.0)
    assert not kinds.note(raised("a"), KIND_SECONDS)
    assert kinds.note(raised("a"), 2 * KIND_SECONDS + 1)


def test_the_table_is_bounded_by_number_and_size() -> None:
    kinds = FailureKinds()
    for number in range(10 * KINDS_MAX):
        assert kinds.note(Failure("raised", f"E{number}{'x' * 9999}: no", 'File "x"' * 9999), 0.0)
    assert len(kinds._seen) == KINDS_MAX
    assert all(sum(map(len, kind)) < 500 for kind in kinds._seen)
