"""Ages by a wall clock that jumps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.clock import PLAUSIBLE, Ages

YEAR_2026 = 1_790_000_000.0


class Hands:
    """Two clocks that are set by hand."""

    def __init__(self, wall: float) -> None:
        self.wall, self.passed = wall, 500.0

    def now(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.passed

    def pass_(self, seconds: float, jump: float = 0.0) -> None:
        self.passed += seconds
        self.wall += seconds + jump


def test_what_was_stamped_in_1970_is_as_old_as_it_is() -> None:
    clock = Hands(100.0)
    ages = Ages(clock)
    stamp = clock.now()
    clock.pass_(10, jump=YEAR_2026)
    assert ages.before(60) < stamp
    assert ages.since(60) == PLAUSIBLE
    clock.pass_(51)
    assert ages.before(60) >= stamp
    assert ages.since(60) == 0.0


def test_a_stamp_of_an_earlier_life_in_1970_counts_from_this_one() -> None:
    clock = Hands(YEAR_2026)
    ages = Ages(clock)
    assert ages.since(60) == PLAUSIBLE
    assert ages.before(60) == YEAR_2026 - 60  # what is older by a clock that was set is older
    clock.pass_(61)
    assert ages.since(60) == 0.0


@given(
    st.lists(
        st.tuples(st.floats(0, 1000), st.one_of(st.just(0.0), st.floats(100, 1e9))),
        min_size=1, max_size=12,
    ),
    st.floats(1, 2000),
)  # fmt: skip
def test_nothing_expires_before_its_time_whatever_the_clock_does(
    steps: list[tuple[float, float]], age: float
) -> None:
    clock = Hands(YEAR_2026)
    ages = Ages(clock)
    stamps = [(clock.now(), clock.monotonic())]
    for seconds, jump in steps:
        clock.pass_(seconds)
        ages.observe()
        clock.pass_(0, jump)
        stamps.append((clock.now(), clock.monotonic()))
        bound = ages.before(age)
        for stamp, made in stamps:
            real = clock.monotonic() - made
            if real < age - 1e-3:
                assert stamp > bound
            elif real > age + 1e-3:
                assert stamp <= bound
