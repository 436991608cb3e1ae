from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.rate import TokenBucket
from ingestd.http.admission import (
    BURST_SECONDS,
    SPARE_REQUESTS,
    AdmissionController,
    RateLimiter,
)
from ingestd.http.problem import Problem


def test_a_bucket_is_full_in_the_beginning_and_then_in_debt() -> None:
    bucket = TokenBucket(10, 100.0, BURST_SECONDS)
    assert bucket.wait(100.0) == 0
    bucket.charge(10 * BURST_SECONDS, 100.0)
    assert bucket.wait(100.0) == 0
    bucket.charge(20, 100.0)
    assert bucket.wait(100.0) == pytest.approx(2.0)
    assert bucket.wait(101.5) == pytest.approx(0.5)
    assert bucket.wait(102.0) == 0


def test_what_is_saved_is_bounded() -> None:
    bucket = TokenBucket(10, 0.0, BURST_SECONDS)
    bucket.charge(10 * BURST_SECONDS + 10, 1e6)
    assert bucket.wait(1e6) == pytest.approx(1.0)


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 1000)), max_size=60))
def test_nobody_gets_beyond_the_rate_by_more_than_the_burst_and_one_request(
    steps: list[tuple[float, int]],
) -> None:
    bucket, now, sent = TokenBucket(50, 0.0, BURST_SECONDS), 0.0, 0
    for pause, amount in steps:
        now += pause
        if bucket.wait(now) == 0:
            sent += amount
            bucket.charge(amount, now)
            assert sent <= 50 * (now + BURST_SECONDS) + amount + 1e-6


def test_the_longer_of_two_waits_counts() -> None:
    limits = RateLimiter(10, 1000, 0.0)
    limits.charge(int(10 * BURST_SECONDS) + 10, int(1000 * BURST_SECONDS) + 3000, 0.0)
    assert limits.wait(0.0) == (pytest.approx(3.0), "bytes_per_second")
    assert limits.wait(2.9)[1] == "bytes_per_second"
    assert limits.wait(3.1)[0] == 0
    assert RateLimiter(0, 0, 0.0).wait(0.0) == (0.0, "")


def test_a_client_that_comes_again_finds_a_place_while_its_last_request_is_there_still() -> None:
    room = AdmissionController(10**6, requests_max=64, share=1)
    for _ in range(64):
        room.enter("127.0.1.1")
    for _ in range(SPARE_REQUESTS):
        room.enter("127.0.2.1")
    with pytest.raises(Problem) as refusal:
        room.enter("127.0.2.1")
    assert refusal.value.kind.slug == "busy"
    room.enter("127.0.3.1")
