"""When a handler counts as down, and when it may be tried meanwhile."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ingestd.execution.outage import (
    DOWN_SECONDS,
    DOWN_TRIES,
    KNOWN_SECONDS,
    PROBE_SECONDS,
    Outage,
    wait,
)

LONGEST = 60.0


def half() -> float:
    return 0.5


def failing(*families: int, at: float = 100.0) -> Outage:
    outage = Outage(LONGEST, half)
    for family in families:
        outage.failed(family, family, at, fresh=True)
    return outage


def test_one_bad_batch_holds_nobody_up_however_often_it_fails() -> None:
    outage = failing(*[7] * 50)
    assert not outage.paused
    assert outage.next_at is None
    assert not outage.is_outage


def test_a_second_one_pauses_and_a_success_ends_it() -> None:
    outage = failing(1, 2)
    assert outage.paused
    outage.succeeded()
    assert not outage.paused
    assert outage.next_at is None


def test_batches_that_failed_while_others_succeeded_say_nothing_about_the_sink() -> None:
    outage = failing(1, 2)
    outage.succeeded()
    for number in range(100):
        outage.failed(number, number, 200.0 + number, fresh=False)
    assert not outage.paused
    assert outage.down_since is None


def test_it_is_down_after_some_tries_and_some_time() -> None:
    outage = failing(1, 2, 1, 2)
    assert outage.down_since is None
    outage.failed(1, 1, 100.0 + DOWN_SECONDS, fresh=True)
    assert outage.down_since == 100.0
    assert outage.is_outage
    outage.succeeded()
    assert outage.down_since is None


def test_a_probe_that_hangs_does_not_keep_a_handler_down() -> None:
    outage = failing(1, 2)
    outage.started(3, 101.0)
    assert outage.next_at == 101.0 + LONGEST
    quick = Outage(0.0, half)
    quick.failed(1, 1, 1.0, fresh=True)
    quick.failed(2, 2, 1.0, fresh=True)
    quick.started(3, 1.0)
    assert quick.next_at == 1.0 + PROBE_SECONDS


def test_who_was_running_before_the_pause_does_not_end_the_wait_for_the_probe() -> None:
    outage = failing(1, 2)
    outage.started(3, 101.0)
    outage.failed(4, 4, 102.0, fresh=True)
    outage.answered(5)
    assert outage.next_at == 101.0 + LONGEST
    outage.answered(3)  # all its records were rejected: that tells nothing, so another one
    assert outage.next_at == 0.0


def test_the_handler_may_ask_to_be_left_alone() -> None:
    outage = failing(1, 2)
    outage.failed(3, 3, 100.0, fresh=True, after=20.0)
    assert outage.next_at == 120.0
    outage.started(4, 120.0)
    outage.failed(4, 4, 120.0, fresh=True, after=7200.0)  # its own batch waits so long, not all
    assert outage.next_at == 120.0 + LONGEST


def test_when_nothing_fails_any_more_everything_may_start() -> None:
    outage = failing(1, 2)
    outage.failed(2, 2, 100.0 + DOWN_SECONDS, fresh=True)
    outage.nothing_fails()
    assert not outage.paused
    assert outage.down_since == 100.0  # still nothing has succeeded


@given(st.floats(0, 10**6), st.floats(0, 3600), st.floats(0, 1, exclude_max=True))
def test_a_sink_that_is_back_is_noticed_within_an_eighth_of_its_outage(
    elapsed: float, longest: float, random: float
) -> None:
    seconds = wait(elapsed, longest, lambda: random)
    assert 0 <= seconds <= min(longest, max(0.01, elapsed / 8))


def test_an_outage_of_eight_minutes_costs_few_probes() -> None:
    outage, now, probes = failing(1, 2, at=0.0), 0.0, 0
    while now < 480:
        assert outage.next_at is not None
        now = max(now, outage.next_at) + 0.002  # the call
        outage.started(probes, now)
        outage.failed(probes, probes, now, fresh=True)
        probes += 1
    assert probes < 150


class Outages(RuleBasedStateMachine):
    """Tries start and end in any order; the model remembers what came since it worked last."""

    def __init__(self) -> None:
        super().__init__()
        self.outage = Outage(LONGEST, half)
        self.now = 0.0
        self.running: dict[int, float] = {}  # when each started
        self.fresh: list[tuple[float, int]] = []
        self.number = 0

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.5, 1.0, 10.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: len(self.running) < 8)
    @rule()
    def start(self) -> None:
        at = self.outage.next_at
        if at is not None and at > self.now:
            return
        if self.outage.paused and self.paused_at is not None:
            # No other try that was started in the pause runs, unless it hangs.
            for began in self.running.values():
                assert began <= self.paused_at or self.now - began >= LONGEST - 1e-6
        self.number += 1
        self.running[self.number] = self.now
        self.outage.started(self.number, self.now)

    paused_at: float | None = None

    def note(self) -> None:
        if not self.outage.paused:
            self.paused_at = None
        elif self.paused_at is None:
            self.paused_at = self.now

    @precondition(lambda self: self.running)
    @rule(data=st.data(), fresh=st.booleans(), after=st.sampled_from([None, 0.0, 30.0, 9999.0]))
    def fail(self, data: st.DataObject, fresh: bool, after: float | None) -> None:
        number = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[number]
        self.outage.failed(number, number // 3, self.now, fresh=fresh, after=after)
        if fresh:
            self.fresh.append((self.now, number // 3))
        self.note()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["done", "rejected", "nothing"]))
    def end(self, data: st.DataObject, how: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[number]
        if how != "nothing":
            successes = self.outage.successes
            (self.outage.succeeded if how == "done" else self.outage.recovered)()
            assert self.outage.successes - successes == (how == "done")
            self.fresh.clear()
            assert not self.outage.paused
            assert self.outage.down_since is None
        else:
            self.outage.answered(number)
        self.note()

    @invariant()
    def it_is_what_came_since_it_worked(self) -> None:
        assert self.outage.paused == (len({family for _, family in self.fresh}) > 1)
        if self.outage.down_since is not None:
            assert self.outage.down_since == self.fresh[0][0]
            assert len(self.fresh) >= DOWN_TRIES
            assert self.fresh[-1][0] - self.fresh[0][0] >= DOWN_SECONDS

    @invariant()
    def a_try_may_start_in_time(self) -> None:
        at = self.outage.next_at
        if at is not None:
            assert at < math.inf
            assert at - self.now <= LONGEST + 1e-6


TestOutages = Outages.TestCase


def test_what_is_blocked_pauses_at_once_and_alone_and_is_asked_every_few_seconds() -> None:
    outage = Outage(LONGEST, half)
    outage.failed(1, 1, 100.0, fresh=True, reason="blocked")
    assert (outage.paused, outage.blocked, outage.down_since) == (True, True, 100.0)
    for now in (1000.0, 5000.0):
        assert outage.next_at is not None
        outage.started(1, now)
        outage.failed(1, 1, now, fresh=True, reason="blocked")
        assert outage.next_at <= now + KNOWN_SECONDS
    outage.succeeded()
    assert (outage.paused, outage.blocked, outage.down_since) == (False, False, None)


def test_a_sink_that_is_no_longer_blocked_and_down_stays_paused() -> None:
    outage = Outage(LONGEST, half)
    for reason in ("blocked", "unavailable"):
        outage.started(1, 100.0)
        outage.failed(1, 1, 100.0, fresh=True, reason=reason)
        outage.failed(2, 2, 100.0, fresh=True, reason=reason)
    assert (outage.paused, outage.blocked, outage.down_since) == (True, False, 100.0)
    outage.nothing_fails()
    assert not outage.paused


def test_one_batch_that_is_refused_beside_successes_blocks_nothing() -> None:
    outage = Outage(LONGEST, half)
    outage.failed(1, 1, 100.0, fresh=False, reason="blocked")
    assert (outage.paused, outage.blocked) == (False, False)
