"""What a result means, decided without I/O."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ingestd.execution.retry import (
    Again,
    GivenUp,
    Postponed,
    RetryRule,
    Settled,
    Standing,
    backoff,
    decide,
)
from ingestd.handlers.outcome import Failure, Rejection, Result, Retry

RULE = RetryRule(attempts_max=3, backoff=0.5, backoff_max=60.0)


def half() -> float:
    return 0.5


def test_full_jitter_doubles_up_to_its_bound() -> None:
    waits = [backoff(n, RULE, half) for n in (1, 2, 3, 8, 9, 1000)]
    assert waits == [0.25, 0.5, 1.0, 30.0, 30.0, 30.0]
    assert backoff(5, RULE, lambda: 0.0) == 0.0


def test_all_done_settles_with_nothing_left() -> None:
    assert decide(Result(), Standing(5, 1), rule=RULE, random=half) == Settled((), ())


def test_a_failure_is_postponed_until_the_last_attempt() -> None:
    failure = Failure("raised", "ValueError: no", "Traceback")
    result = Result(failure=failure)
    assert decide(result, Standing(1, 2), rule=RULE, random=half) == Postponed(0.5, failure)
    over = decide(result, Standing(1, 3), rule=RULE, random=half)
    assert over == Settled((GivenUp(0, "failed", "ValueError: no", "Traceback"),), ())


def test_a_batch_at_its_end_is_split_into_halves() -> None:
    result = Result(failure=Failure("crashed", "SIGSEGV"))
    assert decide(result, Standing(5, 3), rule=RULE, random=half) == Settled(
        (), (Again((0, 1), 0.0), Again((2, 3, 4), 0.0))
    )


def test_without_evidence_only_one_batch_is_split_and_records_have_tries_of_their_own() -> None:
    failure = Failure("raised", "down")
    result = Result(failure=failure)
    other = Standing(5, 9, proven=False, may_split=False)
    assert decide(result, other, rule=RULE, random=half) == Postponed(30.0, failure)
    first = Standing(5, 9, proven=False, may_split=True)
    assert isinstance(decide(result, first, rule=RULE, random=half), Settled)
    young = Standing(1, 9, alone=2, proven=False)
    assert isinstance(decide(result, young, rule=RULE, random=half), Postponed)
    old = Standing(1, 9, alone=3, proven=False)
    assert isinstance(decide(result, old, rule=RULE, random=half), Settled)


def test_a_failure_hides_what_the_handler_marked_before_it_raised() -> None:
    result = Result([Rejection(0, "rejected", "x")], [], Failure("raised", "e"))
    assert isinstance(decide(result, Standing(2, 1), rule=RULE, random=half), Postponed)


def test_records_to_be_tried_again_go_together_by_their_wait() -> None:
    result = Result(
        [Rejection(4, "rejected", "no")],
        [Retry(0, None, ""), Retry(1, 9.0, ""), Retry(2, None, ""), Retry(3, 9.0, "")],
    )
    verdict = decide(result, Standing(6, 1), rule=RULE, random=half)
    assert verdict == Settled(
        (GivenUp(4, "rejected", "no"),), (Again((0, 2), 0.25), Again((1, 3), 9.0))
    )


def test_a_record_is_not_tried_beyond_the_last_attempt() -> None:
    result = Result([], [Retry(1, 5.0, "busy")])
    verdict = decide(result, Standing(2, 3), rule=RULE, random=half)
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
    verdict = decide(result, Standing(len(marks), attempts), rule=RULE, random=half)
    assert isinstance(verdict, Settled)
    touched = [one.index for one in verdict.given_up]
    touched += [i for again in verdict.again for i in again.indices]
    assert sorted(touched) == [i for i, mark in enumerate(marks) if mark != "done"]
