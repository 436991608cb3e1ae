"""The benchmark of endpoints sends what it says, and its table says what was measured."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks.bars import TIMES
from benchmarks.endpoints import ENDPOINTS, EVENT_BYTES, EVENTS, RECORDS, Taker, events, report
from benchmarks.measure import Run
from benchmarks.results import Result

pytestmark = pytest.mark.slow


def test_the_events_are_as_large_as_they_should_be_and_the_same_at_every_run() -> None:
    batch = events(3)
    assert len(batch) == EVENTS
    assert {len(event.as_json()) for event in batch} == {EVENT_BYTES}
    assert batch == events(3)
    assert batch[0] != events(4)[0]
    assert msgspec.json.decode(batch[0].as_json())["at"] == batch[0].at


@pytest.mark.parametrize("case", ENDPOINTS, ids=lambda case: case.name)
def test_each_endpoint_gets_a_body_of_its_own(case, tmp_path) -> None:
    taker = Taker(case)
    if missing := taker.missing():
        pytest.skip(missing)
    paths = taker.bodies(tmp_path, EVENTS)
    bodies = [path.read_bytes() for path in paths]
    assert len(set(bodies)) == len(paths) > 1


def test_the_table_judges_each_share_by_the_rounds_own_ratios() -> None:
    first = ENDPOINTS[0]
    fast, slow = (first._replace(name=name, bar=0.5) for name in ("fast", "slow"))
    results = [
        Result(number, "endpoints", name, Run(rate, rate * 2, 1.0))
        for number in (1, 2)
        for name, rate in ((RECORDS, 1000.0 * number), ("fast", 600.0 * number), ("slow", 400.0))
    ]
    lines = report(results, [first, fast, slow]).splitlines()
    cells = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:6]] for line in lines
    }
    assert cells["fast"] == ["0.9 (0.6 to 1.2)", "0.60", f"≥ 0.5 {TIMES}", "yes"]
    assert cells["slow"] == ["0.4", "0.30 (0.20 to 0.40)", f"≥ 0.5 {TIMES}", "**no**"]
    assert cells[RECORDS][1:] == ["1.00", "", ""]
