"""What was measured, round by round, and what follows from it. Pure: no I/O, no clock."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from benchmarks.measure import Run

FIRST = "ingestd"
T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """One run of the plan.

    Attributes:
        round: from 1.
        scenario: its name; the probe's, if it is one.
        peer: its name.
        run: what was measured; `None` if it does not count, or is a probe.
        problem: why it does not count.
        figures: what a probe measured.
    """

    round: int
    scenario: str
    peer: str
    run: Run | None
    problem: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


class Spread(NamedTuple):
    """Numbers of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """At least one number."""
        return cls(statistics.median(numbers), min(numbers), max(numbers))

    def text(self, digits: int = 0) -> str:
        """The median and, if there is one, the spread."""
        median, low, high = (f"{number:,.{digits}f}" for number in self)
        return median if low == high else f"{median} ({low} to {high})"

    def __str__(self) -> str:
        return self.text()


def rates(results: Iterable[Result], scenario: str, peer: str) -> dict[int, Run]:
    """The runs of one cell that count, by round."""
    return {
        result.round: result.run
        for result in results
        if (result.scenario, result.peer) == (scenario, peer) and result.run is not None
    }


def figure(results: Iterable[Result], probe: str, peer: str, name: str) -> Spread | None:
    """One number of a probe; nothing without runs."""
    numbers = [
        result.figures[name]
        for result in results
        if (result.scenario, result.peer) == (probe, peer) and name in result.figures
    ]
    return Spread.of(numbers) if numbers else None


def spread(runs: Mapping[int, Run], number: Callable[[Run], float]) -> Spread | None:
    """One number of each run; nothing without runs."""
    return Spread.of([number(run) for run in runs.values()]) if runs else None


def ratio(runs: Mapping[int, Run], others: Mapping[int, Run]) -> Spread | None:
    """How many times as fast, over the rounds that both have, each round by itself."""
    common = runs.keys() & others.keys()
    if not common:
        return None
    return Spread.of([runs[number].rate / others[number].rate for number in common])


def problems(results: Iterable[Result]) -> list[str]:
    """One line for each run that does not count."""
    return [
        f"round {result.round}, {result.scenario}, {result.peer}: {result.problem}"
        for result in results
        if result.problem
    ]


def in_order(items: Iterable[T]) -> list[T]:
    """Each item once, where it came first."""
    return list(dict.fromkeys(items))
