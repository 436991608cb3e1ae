"""From runs to tables. Pure: no I/O, no clock."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from benchmarks.probes import PROBES
from benchmarks.results import FIRST, figure, in_order, rates, ratio, spread

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.bars import Verdict
    from benchmarks.probes import Probe
    from benchmarks.results import Result


def rate_table(results: Sequence[Result], durable: Sequence[str] = (FIRST,)) -> str:
    """One line a cell: how fast, and how many times as fast ingestd is.

    Args:
        results: scenarios, and probes, which are left out.
        durable: the names of the peers whose yes means that the record is on disk.
    """
    head = ["scenario", "peer", "on disk before the yes", "records/s", f"{FIRST} ÷ it"]
    rows = []
    for scenario, peer in in_order((r.scenario, r.peer) for r in _of_scenarios(results)):
        runs = rates(results, scenario, peer)
        versus = ratio(rates(results, scenario, FIRST), runs) if peer != FIRST else None
        rate = spread(runs, lambda run: run.rate)
        on_disk = "yes" if peer in durable else "no"
        times = "" if versus is None else f"{versus.median:.2f}"
        rows.append([scenario, peer, on_disk, _text(rate), times])
    return table(head, rows)


def detail_table(results: Sequence[Result]) -> str:
    """What the first table is the lower of, one line a cell; medians."""
    head = ["scenario", "peer", "accepted/s", "processed/s", "drained after", "refused", "runs"]
    rows = []
    for scenario, peer in in_order((r.scenario, r.peer) for r in _of_scenarios(results)):
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
    return table(head, rows)


def probe_table(results: Sequence[Result], probe: Probe) -> str:
    """Peers down, figures across."""
    titles = [f"{f.title} ({f.unit})" if f.unit else f.title for f in probe.figures.values()]
    rows = []
    for peer in in_order(r.peer for r in results if r.scenario == probe.name):
        spreads = [figure(results, probe.name, peer, name) for name in probe.figures]
        digits = [one.digits for one in probe.figures.values()]
        rows.append(
            [peer, *("" if s is None else s.text(d) for s, d in zip(spreads, digits, strict=True))]
        )
    return table([probe.name, *titles], rows)


def probe_sections(results: Sequence[Result]) -> list[str]:
    """A sentence and a table for each probe that was measured."""
    measured = {result.scenario for result in results}
    return [
        f"`{probe.name}`: {probe.about}.\n\n{probe_table(results, probe)}"
        for probe in PROBES
        if probe.name in measured
    ]


def bar_table(verdicts: Sequence[Verdict]) -> str:
    """What ingestd has to reach, and whether it does."""
    head = ["bar", "wanted", "measured", "met"]
    rows = [[v.bar, v.wanted, v.measured or "not measured", v.met_text] for v in verdicts]
    return table(head, rows)


def facts_list(groups: Mapping[str, Mapping[str, str]]) -> str:
    """Machine, versions, settings."""
    lines = []
    for title, group in groups.items():
        lines += [f"{title.capitalize()}:", ""]
        lines += [f"- {name}: {value}" for name, value in group.items()]
        lines.append("")
    return "\n".join(lines[:-1])


def as_json(
    results: Sequence[Result],
    facts: Mapping[str, Mapping[str, str]],
    verdicts: Sequence[Verdict] = (),
) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        **facts,
        "summary": _summary(results),
        "bars": [verdict.as_json() for verdict in verdicts],
        "runs": [
            {**asdict(result), "rate": result.run.rate if result.run else None}
            for result in results
        ],
    }


def _summary(results: Sequence[Result]) -> list[dict[str, Any]]:
    summary = []
    for scenario, peer in in_order((r.scenario, r.peer) for r in _of_scenarios(results)):
        runs = rates(results, scenario, peer)
        rate = spread(runs, lambda run: run.rate)
        versus = ratio(rates(results, scenario, FIRST), runs)
        summary.append(
            {
                "scenario": scenario,
                "peer": peer,
                "runs": len(runs),
                "rate": rate._asdict() if rate else None,
                f"{FIRST}_times_as_fast": versus.median if versus and peer != FIRST else None,
            }
        )
    return summary


def _of_scenarios(results: Sequence[Result]) -> list[Result]:
    """Those that are no probes: records a second."""
    probes = {probe.name for probe in PROBES}
    return [result for result in results if result.scenario not in probes]


def _text(value: object) -> str:
    return "" if value is None else str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
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
