"""What a result means, decided without I/O."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from ingestd.execution.retry import (
    PART_TRIES,
    DeadLettered,
    Resolve,
    RetryBatch,
    RetryContext,
    RetryRecords,
    RetryRule,
    backoff,
    decide,
    rank,
    rounded,
    spends_try,
)
from ingestd.handlers.outcome import POSTPONED, Failure, Rejection, Result, RetryRequest

RULE = RetryRule(attempts_max=3, backoff=0.5, backoff_max=60.0, give_up_after=3600.0)


def tried(count: int, attempts: int) -> RetryContext:
    """A batch all of whose tries count."""
    return RetryContext(count, attempts, attempts)


def half() -> float:
    return 0.5


def test_full_jitter_doubles_up_to_its_bound() -> None:
    waits = [backoff(n, RULE, half) for n in (1, 2, 3, 8, 9, 1000)]
    assert waits == [0.25, 0.5, 1.0, 30.0, 30.0, 30.0]
    assert backoff(5, RULE, lambda: 0.0) == 0.0


def test_all_done_settles_with_nothing_left() -> None:
    assert decide(Result(), tried(5, 1), rule=RULE, random=half) == Resolve((), ())


def test_a_failure_is_postponed_until_the_last_attempt() -> None:
    failure = Failure("raised", "ValueError: no", "Traceback")
    result = Result(failure=failure)
    assert decide(result, tried(1, 2), rule=RULE, random=half) == RetryBatch(0.5, failure)
    over = decide(result, tried(1, 3), rule=RULE, random=half)
    assert over == Resolve((DeadLettered(0, "failed", "ValueError: no", "Traceback"),), ())


def test_a_batch_at_its_end_is_split_into_halves() -> None:
    result = Result(failure=Failure("crashed", "SIGSEGV"))
    assert decide(result, tried(5, 3), rule=RULE, random=half) == Resolve(
        (), (RetryRecords((0, 1), 0.0), RetryRecords((2, 3, 4), 0.0))
    )


def test_without_evidence_a_batch_is_split_only_if_it_may_and_no_record_is_given_up() -> None:
    failure = Failure("raised", "down")
    result = Result(failure=failure)
    other = RetryContext(5, 9, 9, proven=False, may_split=False)
    assert decide(result, other, rule=RULE, random=half) == RetryBatch(30.0, failure)
    first = RetryContext(5, 9, 9, proven=False, may_split=True)
    assert isinstance(decide(result, first, rule=RULE, random=half), Resolve)
    alone = RetryContext(1, 999, 999, proven=False)
    assert decide(result, alone, rule=RULE, random=half) == RetryBatch(30.0, failure)


def test_in_a_pause_no_record_is_given_up_whatever_was_proven_before() -> None:
    failure = Failure("raised", "down")
    known = RetryContext(1, 9, 9, proven=True, paused=True)
    assert isinstance(decide(Result(failure=failure), known, rule=RULE, random=half), RetryBatch)
    marked = Result([], [RetryRequest(0, None, "503")])
    assert decide(marked, known, rule=RULE, random=half) == Resolve((), (RetryRecords((0,), 30.0),))


def test_in_the_end_all_of_a_batch_is_given_up() -> None:
    result = Result(failure=Failure("timeout", "too slow"))
    old = RetryContext(2, 9, 0, age=3600.0, proven=False, paused=True)
    assert decide(result, old, rule=RULE, random=half) == Resolve(
        (DeadLettered(0, "timeout", "too slow"), DeadLettered(1, "timeout", "too slow")), ()
    )
    # Where others succeed the guilty one can be found.
    guilty = RetryContext(2, 9, 9, age=3600.0)
    assert isinstance(decide(result, guilty, rule=RULE, random=half), Resolve)
    assert decide(result, guilty, rule=RULE, random=half).given_up == ()  # type: ignore[union-attr]


def test_beside_successes_tries_decide_and_the_age_does_not() -> None:
    failure = Failure("raised", "no")
    old = RetryContext(1, 2, 2, age=9999.0)
    assert decide(Result(failure=failure), old, rule=RULE, random=half) == RetryBatch(0.5, failure)
    marked = Result([], [RetryRequest(0, 7200.0, "tomorrow")])
    assert decide(marked, old, rule=RULE, random=half) == Resolve((), (RetryRecords((0,), 7680.0),))


def test_an_old_batch_that_fails_alone_is_split_and_not_given_up() -> None:
    result = Result(failure=Failure("raised", "no"))
    alone = RetryContext(4, 1, 1, age=3600.0, proven=False, may_split=False)
    verdict = decide(result, alone, rule=RULE, random=half)
    assert verdict == Resolve((), (RetryRecords((0, 1), 0.0), RetryRecords((2, 3), 0.0)))


def test_not_now_waits_as_long_as_it_says_and_ends_only_by_its_age() -> None:
    failure = Failure(POSTPONED, "rate limit", "", 90.0)
    result = Result(failure=failure)
    for standing in (tried(1, 99), tried(5, 99)):
        verdict = decide(result, standing, rule=RULE, random=half)
        assert verdict == RetryBatch(90.0, failure, asked=True)
    whenever = Result(failure=Failure(POSTPONED, "not now"))
    assert decide(whenever, tried(1, 1), rule=RULE, random=half).after == 0.25  # type: ignore[union-attr]
    old = RetryContext(1, 1, 0, age=3600.0)
    assert decide(result, old, rule=RULE, random=half) == Resolve(
        (DeadLettered(0, "failed", "rate limit"),), ()
    )


def test_waits_are_rounded_up_by_an_eighth_at_most_so_that_few_batches_come_of_them() -> None:
    waits = {rounded(n * 20.0 / 70) for n in range(70)}
    assert len(waits) <= 40
    assert rounded(0.0) == 0.0
    assert [rounded(n) for n in (1.0, 9.0, 60.0, 61.0)] == [1.0, 9.0, 60.0, 64.0]
    hour = {rounded(n / 10) for n in range(36_000)}
    assert len(hour) <= 8 * 13


@given(st.floats(0, 30 * 86400))
def test_no_wait_is_shorter_than_what_was_asked_for(after: float) -> None:
    assert after <= rounded(after) <= max(after * 1.125, after + 0.125)


def test_a_failure_hides_what_the_handler_marked_before_it_raised() -> None:
    result = Result([Rejection(0, "rejected", "x")], [], Failure("raised", "e"))
    assert isinstance(decide(result, tried(2, 1), rule=RULE, random=half), RetryBatch)


def test_records_to_be_tried_again_go_together_by_their_wait() -> None:
    result = Result(
        [Rejection(4, "rejected", "no")],
        [
            RetryRequest(0, None, ""),
            RetryRequest(1, 9.0, ""),
            RetryRequest(2, None, ""),
            RetryRequest(3, 9.0, ""),
        ],
    )
    verdict = decide(result, tried(6, 1), rule=RULE, random=half)
    assert verdict == Resolve(
        (DeadLettered(4, "rejected", "no"),),
        (RetryRecords((0, 2), 0.25), RetryRecords((1, 3), 9.0)),
    )


def test_a_record_is_not_tried_beyond_the_last_attempt() -> None:
    result = Result([], [RetryRequest(1, 5.0, "busy")])
    verdict = decide(result, tried(2, 3), rule=RULE, random=half)
    assert verdict == Resolve((DeadLettered(1, "failed", "busy"),), ())


@given(
    marks=st.lists(st.sampled_from(["done", "reject", "retry"]), min_size=1, max_size=30),
    attempts=st.integers(1, 5),
)
def test_every_record_has_exactly_one_outcome(marks: list[str], attempts: int) -> None:
    result = Result(
        [Rejection(i, "rejected", "") for i, mark in enumerate(marks) if mark == "reject"],
        [RetryRequest(i, None, "") for i, mark in enumerate(marks) if mark == "retry"],
    )
    verdict = decide(result, tried(len(marks), attempts), rule=RULE, random=half)
    assert isinstance(verdict, Resolve)
    touched = [one.index for one in verdict.given_up]
    touched += [i for again in verdict.again for i in again.indices]
    assert sorted(touched) == [i for i, mark in enumerate(marks) if mark != "done"]


def test_while_nothing_succeeds_a_part_is_split_after_fewer_tries_and_a_batch_is_not() -> None:
    part = RetryContext(4, PART_TRIES, 0, proven=False, paused=True, is_part=True)
    halves = (RetryRecords((0, 1), 0.0), RetryRecords((2, 3), 0.0))
    rule = RetryRule(8, 0.5, 60.0)
    raised = Result(failure=Failure("raised", "no", ""))
    whole = part._replace(attempts=8, is_part=False)
    for now in (part, part._replace(paused=False), whole, whole._replace(paused=False)):
        assert decide(raised, now, rule=rule, random=lambda: 0.5) == Resolve((), halves)
    for later in (
        part._replace(attempts=PART_TRIES - 1),
        part._replace(may_split=False),
        whole._replace(attempts=7),
        whole._replace(may_split=False),
    ):
        assert isinstance(decide(raised, later, rule=rule, random=lambda: 0.5), RetryBatch)


def test_while_paused_parts_come_first_and_then_the_batch_that_is_nearest_to_be_split() -> None:
    places = [
        rank(2, 1, 8, is_part=True),
        rank(9, 7, 8, is_part=False),
        rank(9, 1, 8, is_part=False),
        rank(9, 8, 8, is_part=False),
    ]
    assert places == sorted(places)
    assert len(set(places)) == len(places)
    assert rank(1, 1, 8, is_part=True) == places[-1]


def test_a_sink_that_says_that_it_is_down_is_no_reason_to_give_up_by_age() -> None:
    down = Result(failure=Failure("unavailable", "connection refused"))
    for context in (
        RetryContext(1, 99, 0, age=1e9, proven=False, paused=True),
        RetryContext(1, 99, 0, age=1e9, proven=True, paused=True),
        RetryContext(5, 1, 1, age=1e9, proven=False, may_split=False),
    ):
        assert isinstance(decide(down, context, rule=RULE, random=half), RetryBatch)
    # Beside successes it is the record's own after all: one that ends each connection, say.
    guilty = RetryContext(1, 99, 99, age=RULE.give_up_after)
    assert decide(down, guilty, rule=RULE, random=half) == Resolve(
        (DeadLettered(0, "failed", "connection refused"),), ()
    )


def test_a_sink_that_restarts_often_costs_no_record_but_a_batch_is_split() -> None:
    down = Result(failure=Failure("unavailable", "connection lost"))
    assert isinstance(decide(down, tried(1, 99), rule=RULE, random=half), RetryBatch)
    assert isinstance(decide(down, tried(4, 99), rule=RULE, random=half), Resolve)


def test_a_record_that_its_sink_postpones_beside_others_is_given_up_by_age_alone() -> None:
    busy = Result([], [RetryRequest(1, 5.0, "429", True), RetryRequest(2, None, "500")])
    verdict = decide(busy, tried(3, 99), rule=RULE, random=half)
    assert isinstance(verdict, Resolve)
    assert [one.index for one in verdict.given_up] == [2]
    assert [one.indices for one in verdict.again] == [(1,)]
    old = RetryContext(3, 99, 99, age=RULE.give_up_after)
    assert isinstance(again := decide(busy, old, rule=RULE, random=half), Resolve)
    assert [one.index for one in again.given_up] == [1, 2]


def test_a_sink_that_says_for_how_long_costs_no_try_and_no_record_however_old_it_is() -> None:
    later = Result(failure=Failure("unavailable", "429", after=30.0))
    assert not spends_try(later)
    for count in (1, 5):
        for proven, paused in itertools.product((False, True), repeat=2):
            context = RetryContext(count, 99, 99, age=1e9, proven=proven, paused=paused)
            assert decide(later, context, rule=RULE, random=half) == RetryBatch(
                30.0, later.failure, asked=True
            )
    at_once = Result(failure=Failure("unavailable", "429", after=0.0))
    again = decide(at_once, tried(1, 3), rule=RULE, random=half)
    assert isinstance(again, RetryBatch)
    assert again.after > 0


def test_what_is_blocked_is_neither_split_nor_given_up_while_nothing_succeeds() -> None:
    blocked = Result(failure=Failure("blocked", "no table"))
    for count in (1, 5):
        context = RetryContext(count, 99, 99, age=1e9, proven=False)
        assert isinstance(decide(blocked, context, rule=RULE, random=half), RetryBatch)
    assert decide(blocked, tried(1, 3), rule=RULE, random=half) == Resolve(
        (DeadLettered(0, "failed", "no table"),), ()
    )
