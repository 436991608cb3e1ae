"""From runs to a picture: bars for each scenario, as SVG. Pure: no I/O, no clock.

The picture has a background of its own and follows `prefers-color-scheme`, so it can be read on a
white page and on a dark one, also where the page and the system disagree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from xml.sax.saxutils import escape

from benchmarks.bars import TIMES
from benchmarks.results import FIRST, Spread, in_order, rates, ratio, spread

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.results import Result

WIDTH = 860
MARGIN = 28
BAR_LEFT = 128
BAR_RIGHT = 590
"""The longest whisker ends here; its number comes behind it."""
ROW = 24
BAR = 14
PANEL_HEAD = 34
PANEL_GAP = 14
HEAD = 78
FOOT = 34
TICK = 4
SHORT_FROM = 10
"""Ratios from here on are given with one digit less."""
TITLES = {
    "http-1": "HTTP, 1 record a request",
    "http-100": "HTTP, 100 records a request",
    "http-1000": "HTTP, 1,000 records a request",
    "stdin-file": "Standard input, a file",
    "stdin-pipe": "Standard input, a pipe",
}

_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328 }
.title { font-size: 17px; font-weight: 600 }
.panel { font-size: 13.5px; font-weight: 600 }
.small { font-size: 12px; fill: #59636e }
.first { font-weight: 600 }
.page { fill: #ffffff; stroke: #d1d9e0 }
.track { stroke: #d1d9e0 }
.disk { fill: #0f7b6c }
.memory { fill: #a8b1bb }
.whisker { stroke: #1f2328; stroke-width: 1.4; fill: none }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc }
.small { fill: #9198a1 }
.page { fill: #0d1117; stroke: #3d444d }
.track { stroke: #3d444d }
.disk { fill: #2fb39f }
.memory { fill: #656c76 }
.whisker { stroke: #f0f6fc }
}
"""


class _Line(NamedTuple):
    """One bar."""

    peer: str
    rate: Spread
    times: Spread | None


def draw(
    results: Sequence[Result], durable: Sequence[str], note: str, titles: Mapping[str, str] = TITLES
) -> str:
    """The picture.

    Args:
        results: those of scenarios that have a title are drawn.
        durable: the names of the peers whose yes means that the record is on disk.
        note: the last line: the machine, the rounds.
        titles: what the scenarios are called.
    """
    panels = {name: _lines(results, name) for name in titles}
    panels = {name: lines for name, lines in panels.items() if lines}
    body: list[str] = []
    top = HEAD
    for name, lines in panels.items():
        body += _panel(top, titles[name], lines, durable)
        top += PANEL_HEAD + ROW * len(lines) + PANEL_GAP
    height = top + FOOT
    size = f'width="{WIDTH}" height="{height}"'
    view = f'viewBox="0 0 {WIDTH} {height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size} {view}>',
        "<title>Records a second, accepted and processed</title>",
        f"<desc>{escape(_description(panels))}</desc>",
        f"<style>{_STYLE}</style>",
        _rect("page", 0.5, 0.5, WIDTH - 1, height - 1),
        *_head(),
        *body,
        _text(MARGIN, height - 16, note, "small"),
        "</svg>\n",
    ]
    return "\n".join(parts)


def _lines(results: Sequence[Result], scenario: str) -> list[_Line]:
    """Those who were measured, ingestd first, then from the fastest down."""
    ours = rates(results, scenario, FIRST)
    lines = []
    for peer in in_order(result.peer for result in results if result.scenario == scenario):
        runs = rates(results, scenario, peer)
        if (rate := spread(runs, lambda run: run.rate)) is not None:
            lines.append(_Line(peer, rate, ratio(ours, runs) if peer != FIRST else None))
    return sorted(lines, key=lambda line: (line.peer != FIRST, -line.rate.median))


def _head() -> list[str]:
    legend = 58
    return [
        _text(MARGIN, 32, "Records a second, accepted and processed", "title"),
        _rect("disk", MARGIN, legend - 10, 12, 12),
        _text(MARGIN + 18, legend, "on disk and synced before the yes", "small"),
        _rect("memory", MARGIN + 244, legend - 10, 12, 12),
        _text(MARGIN + 262, legend, "yes before it is on disk", "small"),
        _whisker(MARGIN + 424, MARGIN + 448, legend - 4),
        _text(MARGIN + 456, legend, "slowest to fastest round", "small"),
        _text(WIDTH - MARGIN, legend, f"{FIRST} ÷ it", "small", "end"),
    ]


def _panel(top: int, title: str, lines: Sequence[_Line], durable: Sequence[str]) -> list[str]:
    longest = max(line.rate.high for line in lines)
    bottom = top + PANEL_HEAD + ROW * len(lines)
    parts = [
        f'<path class="track" d="M{MARGIN} {top}H{WIDTH - MARGIN}"/>',
        _text(MARGIN, top + 22, title, "panel"),
        f'<path class="track" d="M{BAR_LEFT} {top + PANEL_HEAD - 2}V{bottom - 2}"/>',
    ]
    for number, line in enumerate(lines):
        middle = top + PANEL_HEAD + ROW * number + ROW / 2 - 2
        median, low, high = (
            BAR_LEFT + (BAR_RIGHT - BAR_LEFT) * value / longest for value in line.rate
        )
        kind = "disk" if line.peer in durable else "memory"
        weight = "first" if line.peer == FIRST else ""
        parts += [
            _text(BAR_LEFT - 10, middle + 4.5, line.peer, weight, "end"),
            _rect(kind, BAR_LEFT, middle - BAR / 2, max(1.0, median - BAR_LEFT), BAR),
            _whisker(low, high, middle) if low != high else "",
            _text(max(median, high) + 10, middle + 4.5, f"{line.rate.median:,.0f}", weight),
        ]
        if line.times is not None:
            digits = 1 if line.times.median >= SHORT_FROM else 2
            times = f"{line.times.median:,.{digits}f} {TIMES}"
            parts.append(_text(WIDTH - MARGIN, middle + 4.5, times, "", "end"))
    return [part for part in parts if part]


def _whisker(low: float, high: float, middle: float) -> str:
    ends = "".join(f"M{x:.1f} {middle - TICK:g}v{2 * TICK}" for x in (low, high))
    return f'<path class="whisker" d="M{low:.1f} {middle:g}H{high:.1f}{ends}"/>'


def _rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    corner = 8 if kind == "page" else 2
    place = f'x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}" rx="{corner}"'
    return f'<rect class="{kind}" {place}/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    attributes = f' class="{kind}"' if kind else ""
    if anchor != "start":
        attributes += f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:g}"{attributes}>{escape(text)}</text>'


def _description(panels: Mapping[str, Sequence[_Line]]) -> str:
    """The same for who can't see it."""
    return ". ".join(
        f"{name}: " + ", ".join(f"{line.peer} {line.rate.median:,.0f}" for line in lines)
        for name, lines in panels.items()
    )
