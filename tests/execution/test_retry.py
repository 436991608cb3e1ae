"""What a result means, decided without I/O."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ingestd.execution.retry import Again, GivenUp, Postponed, RetryRule, Settled, backoff, decide
from ingestd.handlers.outcome import Failure, Rejection, Result, Retry

RULE = RetryRule(attempts_max=3, backoff=0.5, backoff_max=60.0)


def half() -> float:
    return 0.5


def test_full_jitter_doubles_up_to_its_bound() -> None:
    waits = [backoff(n, RULE, half) for n in (1, 2, 3, 8, 9, 1000)]
    assert waits == [0.25, 0.5, 1.0, 30.0, 30.0, 30.0]
    assert backoff(5, RULE, lambda: 0.0) == 0.0


def test_all_done_settles_with_nothing_left() -> None:
    assert decide(Result(), count=5, attempts=1, rule=RULE, random=half) == Settled((), ())


def test_a_failure_is_postponed_until_the_last_attempt() -> None:
    failure = Failure("raised", "ValueError: no", "Traceback")
    result = Result(failure=failure)
    assert decide(result, count=2, attempts=2, rule=RULE, random=half) == Postponed(0.5, failure)
    over = decide(result, count=2, attempts=3, rule=RULE, random=half)
    assert over == Settled(
        tuple(GivenUp(i, "failed", "ValueError: no", "Traceback") for i in (0, 1)), ()
    )


def test_a_failure_hides_what_the_handler_marked_before_it_raised() -> None:
    result = Result([Rejection(0, "rejected", "x")], [], Failure("raised", "e"))
    assert isinstance(decide(result, count=2, attempts=1, rule=RULE, random=half), Postponed)


def test_records_to_be_tried_again_go_together_by_their_wait() -> None:
    result = Result(
        [Rejection(4, "rejected", "no")],
        [Retry(0, None, ""), Retry(1, 9.0, ""), Retry(2, None, ""), Retry(3, 9.0, "")],
    )
    verdict = decide(result, count=6, attempts=1, rule=RULE, random=half)
    assert verdict == Settled(
        (GivenUp(4, "rejected", "no"),), (Again((0, 2), 0.25), Again((1, 3), 9.0))
    )


def test_a_record_is_not_tried_beyond_the_last_attempt() -> None:
    result = Result([], [Retry(1, 5.0, "busy")])
    verdict = decide(result, count=2, attempts=3, rule=RULE, random=half)
    assert verdict == Settled((GivenUp(1, "failed", "busy"),), ())


@given(
    marks=st.lists(st.sampled_from(["done", "reject", "retry"]), min_size=1, max_size=30),
    attempts=st.integers(1, 5),
)
def test_every_record_has_exactly_one_outcome(marks: list[str], attempts: int) -> None:
    result = Result(
        [Rejection(i, "rejected", "") for i, mark in enumerate(marks) if mark == "reject"],
        [Retry(i, None, "") for i, mark in enumerate(marks) if mark == "retry"],
    )
    verdict = decide(result, count=len(marks), attempts=attempts, rule=RULE, random=half)
    assert isinstance(verdict, Settled)
    touched = [one.index for one in verdict.given_up]
    touched += [i for again in verdict.again for i in again.indices]
    assert sorted(touched) == [i for i, mark in enumerate(marks) if mark != "done"]
