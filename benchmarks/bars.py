"""What ingestd has to reach, and whether it does. Pure: no I/O, no clock.

A bar is judged by the median of the rounds. What could not be measured is not met and not missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.results import FIRST, figure, rates, ratio, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.results import Result, Spread

TIMES = "\N{MULTIPLICATION SIGN}"
ROUNDS_WANTED = 5
"""Fewer do not settle anything."""


@dataclass(frozen=True)
class Bar:
    """One of them.

    Attributes:
        name: what has to be reached.
        bound: the number.
        at_most: the number must not be exceeded; else it is the least.
        unit: of the number.
        digits: behind the point.
        measured: takes the number from the results.
    """

    name: str
    bound: float
    at_most: bool
    unit: str
    digits: int
    measured: Callable[[Sequence[Result]], Spread | None]


@dataclass(frozen=True)
class Verdict:
    """What became of a bar.

    Attributes:
        bar: its name.
        wanted: its bound, as text.
        measured: the median and the spread, as text; empty if there is none.
        median: the number that was judged.
        met: whether it is reached; `None` if that was not measured.
    """

    bar: str
    wanted: str
    measured: str
    median: float | None
    met: bool | None

    @property
    def met_text(self) -> str:
        """For people."""
        return {True: "yes", False: "**no**", None: ""}[self.met]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {"bar": self.bar, "wanted": self.wanted, "median": self.median, "met": self.met}


def _rate(scenario: str, bound: float, name: str, unit: str = "records/s") -> Bar:
    return Bar(
        name,
        bound,
        at_most=False,
        unit=unit,
        digits=0,
        measured=lambda results: spread(rates(results, scenario, FIRST), lambda run: run.rate),
    )


def _times(scenario: str, other: str, bound: float, name: str, first: str = FIRST) -> Bar:
    def measured(results: Sequence[Result]) -> Spread | None:
        return ratio(rates(results, scenario, first), rates(results, scenario, other))

    return Bar(f"{name} ÷ {other}", bound, at_most=False, unit=TIMES, digits=1, measured=measured)


def _figure(probe: str, key: str, bound: float, name: str, unit: str, *, digits: int = 0) -> Bar:
    return Bar(
        name,
        bound,
        at_most=True,
        unit=unit,
        digits=digits,
        measured=lambda results: figure(results, probe, FIRST, key),
    )


def _p99(records: int) -> Bar:
    name = f"p99 of the 202 at half of the highest rate, bodies of {records}"
    return _figure(f"latency-{records}", "p99", 10, name, "ms", digits=1)


def _journal(results: Sequence[Result]) -> Spread | None:
    return figure(results, "journal", FIRST, "share")


BARS = (
    _times("http-1", "fluent-bit", 1.0, "single records"),
    _times("http-1", "fastapi", 3.0, "single records, or"),
    _times("http-100", "fluent-bit", 2.0, "bodies of 100"),
    _times("http-100", "fastapi", 4.0, "bodies of 100"),
    _times("http-1000", "fluent-bit", 2.5, "bodies of 1,000"),
    _times("http-1000", "fastapi", 5.0, "bodies of 1,000"),
    _rate("http-1000", 1_200_000, "bodies of 1,000, durable, decoded in a process worker"),
    _rate("http-100", 700_000, "bodies of 100"),
    _times("stdin-pipe", "syslog-ng", 1.0, "a pipe as standard input"),
    _times("stdin-pipe", "loop", 4.0, "a pipe as standard input"),
    _times("stdin-file", "loop", 4.0, "a file as standard input"),
    _rate("stdin-file", 1_200_000, "a file as standard input, durable", "lines/s"),
    _p99(1),
    _p99(100),
    _figure("start", "ready", 0.35, "exec to ready, a thread for the handler", "s", digits=2),
    _figure("memory", "idle_rss", 55, "idle, the daemon's RSS", "MB"),
    _figure("memory", "load_daemon", 250, "full load, the daemon's highest RSS", "MB"),
    _figure("memory", "load_worker", 100, "full load, a worker's highest RSS", "MB"),
    Bar(
        "journal ÷ plain append and fdatasync, chunks of 1 MB",
        0.5,
        at_most=False,
        unit=TIMES,
        digits=2,
        measured=_journal,
    ),
)


def judge(results: Sequence[Result]) -> list[Verdict]:
    """Every bar."""
    return [_judge(bar, bar.measured(results)) for bar in BARS]


def _judge(bar: Bar, measured: Spread | None) -> Verdict:
    sign = "≤" if bar.at_most else "≥"
    bound = f"{bar.bound:,.{0 if float(bar.bound).is_integer() else bar.digits}f}"
    wanted = f"{sign} {bound} {bar.unit}"
    if measured is None:
        return Verdict(bar.name, wanted, "", None, None)
    met = measured.median <= bar.bound if bar.at_most else measured.median >= bar.bound
    return Verdict(bar.name, wanted, measured.text(bar.digits), measured.median, met)
