"""argv → plan → rounds → tables."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import machine, report
from benchmarks.load import CONNECTIONS, wrk_fits
from benchmarks.loop import RECORDS_MAX
from benchmarks.measure import SCENARIOS, Plan, Scenario, measure
from benchmarks.peers import PEERS, Ingestd, Peer, missing
from benchmarks.processes import ROOT, Failed
from benchmarks.records import write_lines
from benchmarks.report import Result

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
"""Where a sync costs nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; the exit code says whether every run counted."""
    arguments = _parser().parse_args(argv)
    if arguments.load == "wrk" and not wrk_fits(arguments.seconds):
        _parser().error("--load wrk needs wrk, and whole --seconds")
    cells = choose(arguments.only)
    if not cells:
        names = " ".join(f"{s.name}/{p.name}" for s, p in _cells())
        _parser().error(f"nothing to measure; there are: {names}")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir=arguments.directory))
    try:
        plan = Plan(
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            lines=max(1, round(arguments.lines / RECORDS_MAX)) * RECORDS_MAX,
            age=arguments.age,
            tool=arguments.load or ("wrk" if wrk_fits(arguments.seconds) else "python"),
            input=folder / "lines.ndjson",
        )
        facts = _facts(plan, folder)
        if any(scenario.source == "stdin" for scenario, _ in cells):
            write_lines(plan.input, plan.lines)
        results = list(_measure_all(cells, plan, folder))
    finally:
        shutil.rmtree(folder)
    print(_text(results, facts))
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_json(results, facts), indent=2) + "\n")
    return 1 if report.problems(results) else 0


def choose(patterns: Sequence[str]) -> list[tuple[Scenario, Peer]]:
    """The cells that a pattern names by scenario, by peer or by `scenario/peer`; else all."""

    def chosen(scenario: str, peer: str) -> bool:
        names = (scenario, peer, f"{scenario}/{peer}")
        return any(fnmatch(name, pattern) for name in names for pattern in patterns)

    return [(s, p) for s, p in _cells() if not patterns or chosen(s.name, p.name)]


def rotated(
    cells: Sequence[tuple[Scenario, Peer]], round_number: int
) -> Iterator[tuple[Scenario, Peer]]:
    """The cells in a round's order: in each scenario another peer begins."""
    for scenario in dict.fromkeys(scenario for scenario, _ in cells):
        peers = [peer for each, peer in cells if each == scenario]
        start = (round_number - 1) % len(peers)
        for peer in peers[start:] + peers[:start]:
            yield scenario, peer


def _cells() -> list[tuple[Scenario, Peer]]:
    return [(s, p) for s in SCENARIOS for p in PEERS if s.source in p.sources and not missing(p)]


def _measure_all(
    cells: Sequence[tuple[Scenario, Peer]], plan: Plan, folder: Path
) -> Iterator[Result]:
    for number in range(1, plan.rounds + 1):
        for scenario, peer in rotated(cells, number):
            label = f"round {number}/{plan.rounds}  {scenario.name}  {peer.name}"
            print(f"{label} …", file=sys.stderr, flush=True)
            own = Path(tempfile.mkdtemp(dir=folder))
            try:
                run = measure(peer, scenario, plan, own)
            except Failed as failed:
                result = Result(number, scenario.name, peer.name, None, str(failed))
                said = f"does not count: {failed}"
            else:
                result = Result(number, scenario.name, peer.name, run)
                said = f"{run.rate:,.0f} records/s"
            finally:
                shutil.rmtree(own)
            print(f"{label}  {said}", file=sys.stderr, flush=True)
            yield result


def _facts(plan: Plan, folder: Path) -> dict[str, dict[str, str]]:
    command = Ingestd().command(Path("TEMPORARY"), plan.age)[1:]
    return {
        "machine": machine.facts(folder),
        "versions": machine.versions(plan.tool),
        "settings": {
            "rounds": f"{plan.rounds}, another peer begins each",
            "load": f"{plan.tool}, {CONNECTIONS} connections, {plan.seconds:g} s a run",
            "stdin": f"{plan.lines:,} lines a run",
            "batches": f"{RECORDS_MAX:,} records or {plan.age:g} s, one worker, at every peer",
            "ingestd": f"`python {' '.join(command)}`",
        },
    }


def _text(results: Sequence[Result], facts: dict[str, dict[str, str]]) -> str:
    not_durable = ", ".join(peer.name for peer in PEERS if not peer.durable)
    legend = (
        "Median (lowest to highest) of the rounds; the lower of accepted and processed a second. "
        f"Durable before the yes: {report.FIRST}. Lost with the process: {not_durable}."
    )
    parts = [report.rate_table(results), legend, report.detail_table(results)]
    notes = [f"does not count: {problem}" for problem in report.problems(results)]
    notes += [
        f"not measured: {peer.name}, needs {' '.join(missing(peer))}"
        for peer in PEERS
        if missing(peer)
    ]
    if facts["machine"]["file system"] in MEMORY_FILE_SYSTEMS:
        notes.append("this is no disk: a sync costs nothing here (see --directory)")
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join([*parts, report.facts_list(facts)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures ingestd beside two baselines and prints tables in Markdown.",
    )
    parser.add_argument("--rounds", type=_count, default=3, help="how often [3]")
    parser.add_argument("--seconds", type=_seconds, default=5.0, help="of load a run [5]")
    parser.add_argument("--lines", type=_count, default=2_000_000, help="of stdin [2000000]")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="scenario, peer or scenario/peer, like 'http-*' or stdin-file/ingestd; again for more",
    )
    parser.add_argument("--age", type=_seconds, default=1.0, help="of a batch, seconds [1]")
    parser.add_argument(
        "--load", choices=("wrk", "python"), help="[wrk where it is installed, else python]"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=ROOT / "build",
        help="where journals and input are written for the time being [build/ in the checkout]",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")
    return parser


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _seconds(text: str) -> float:
    if not 0 < (number := float(text)) <= 600:
        raise argparse.ArgumentTypeError("more than 0, at most 600")
    return number


def _leave(number: int, _: object) -> None:
    """Unwinds, so that every child is ended; a second signal does not disturb that."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)
    sys.exit(main())
