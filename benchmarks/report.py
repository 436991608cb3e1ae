"""From runs to tables. Pure: no I/O, no clock."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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
        scenario: its name.
        peer: its name.
        run: what was measured; `None` if it does not count.
        problem: why it does not count.
    """

    round: int
    scenario: str
    peer: str
    run: Run | None
    problem: str = ""


class Spread(NamedTuple):
    """Numbers of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """At least one number."""
        return cls(statistics.median(numbers), min(numbers), max(numbers))

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:,.0f}"
        return f"{self.median:,.0f} ({self.low:,.0f} to {self.high:,.0f})"


def rates(results: Iterable[Result], scenario: str, peer: str) -> dict[int, Run]:
    """The runs of one cell that count, by round."""
    return {
        result.round: result.run
        for result in results
        if (result.scenario, result.peer) == (scenario, peer) and result.run is not None
    }


def spread(runs: Mapping[int, Run], number: Callable[[Run], float]) -> Spread | None:
    """One number of each run; nothing without runs."""
    return Spread.of([number(run) for run in runs.values()]) if runs else None


def ratio(runs: Mapping[int, Run], others: Mapping[int, Run]) -> float | None:
    """How many times as fast: the median over rounds that both have, each round by itself."""
    common = runs.keys() & others.keys()
    if not common:
        return None
    return statistics.median(runs[number].rate / others[number].rate for number in common)


def rate_table(results: Sequence[Result]) -> str:
    """Scenarios down, peers across, then how many times as fast as each baseline."""
    peers = _in_order(result.peer for result in results)
    baselines = [peer for peer in peers if peer != FIRST] if FIRST in peers else []
    head = ["records/s", *peers, *(f"{FIRST} ÷ {baseline}" for baseline in baselines)]
    rows = []
    for scenario in _in_order(result.scenario for result in results):
        runs = {peer: rates(results, scenario, peer) for peer in peers}
        ratios = [ratio(runs[FIRST], runs[baseline]) for baseline in baselines]
        row = [_text(spread(runs[peer], lambda run: run.rate)) for peer in peers]
        rows.append([scenario, *row, *("" if r is None else f"{r:.2f}" for r in ratios)])
    return _table(head, rows)


def detail_table(results: Sequence[Result]) -> str:
    """What the first table is the lower of, one line a cell; medians."""
    head = ["scenario", "peer", "accepted/s", "processed/s", "drained after", "refused", "runs"]
    rows = []
    for scenario, peer in _in_order((result.scenario, result.peer) for result in results):
        runs = rates(results, scenario, peer)
        tried = sum((result.scenario, result.peer) == (scenario, peer) for result in results)
        cells = ["", "", "", ""]
        if runs:
            drain = statistics.median(run.drain_seconds for run in runs.values())
            cells = [
                f"{statistics.median(run.accepted for run in runs.values()):,.0f}",
                f"{statistics.median(run.processed for run in runs.values()):,.0f}",
                f"{drain:.2f} s" if scenario.startswith("http") else "",
                f"{sum(run.refused for run in runs.values()):,}",
            ]
        rows.append([scenario, peer, *cells, f"{len(runs)} of {tried}"])
    return _table(head, rows)


def problems(results: Iterable[Result]) -> list[str]:
    """One line for each run that does not count."""
    return [
        f"round {result.round}, {result.scenario}, {result.peer}: {result.problem}"
        for result in results
        if result.run is None
    ]


def facts_list(groups: Mapping[str, Mapping[str, str]]) -> str:
    """Machine, versions, settings."""
    lines = []
    for title, group in groups.items():
        lines += [f"{title.capitalize()}:", ""]
        lines += [f"- {name}: {value}" for name, value in group.items()]
        lines.append("")
    return "\n".join(lines[:-1])


def as_json(results: Sequence[Result], facts: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Everything, for programs."""
    summary = []
    for scenario, peer in _in_order((result.scenario, result.peer) for result in results):
        runs = rates(results, scenario, peer)
        rate = spread(runs, lambda run: run.rate)
        versus = ratio(rates(results, scenario, FIRST), runs)
        summary.append(
            {
                "scenario": scenario,
                "peer": peer,
                "runs": len(runs),
                "rate": rate._asdict() if rate else None,
                f"{FIRST}_times_as_fast": None if peer == FIRST else versus,
            }
        )
    return {
        **facts,
        "summary": summary,
        "runs": [
            {**asdict(result), "rate": result.run.rate if result.run else None}
            for result in results
        ],
    }


def _in_order(items: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(items))


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    right = [any(_is_number(row[i]) for row in rows) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        ]
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * (max(width, 2) - 1) + (":" if to_right else "-")
        for width, to_right in zip(widths, right, strict=True)
    ]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit()
