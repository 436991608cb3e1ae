"""argv → plan → rounds → tables, a picture, JSON."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import machine, picture, report
from benchmarks.bars import ROUNDS_WANTED, judge
from benchmarks.cells import cells_of, choose, measure_all
from benchmarks.load import CONNECTIONS, wrk_fits
from benchmarks.loop import RECORDS_MAX
from benchmarks.measure import Plan
from benchmarks.peers import PROGRAMS, all_peers
from benchmarks.processes import ROOT
from benchmarks.records import write_lines
from benchmarks.results import problems

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.cells import Cell
    from benchmarks.peers.base import Peer
    from benchmarks.results import Result

MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
"""Where a sync costs nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; the exit code says whether every run counted."""
    arguments = _parser().parse_args(argv)
    if arguments.load == "wrk" and not wrk_fits(arguments.seconds):
        _parser().error("--load wrk needs wrk, and whole --seconds")
    peers = all_peers({one.name: getattr(arguments, _word(one.name)) for one in PROGRAMS})
    cells = choose(arguments.only, peers)
    if not cells:
        names = " ".join(f"{what.name}/{peer.name}" for what, peer in cells_of(peers))
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
        facts = _facts(plan, cells, folder)
        if any(what.name.startswith("stdin") for what, _ in cells):
            write_lines(plan.input, plan.lines)
        results = list(measure_all(cells, plan, folder))
    finally:
        shutil.rmtree(folder)
    print(_text(results, peers, plan, facts))
    if arguments.json:
        whole = report.as_json(results, facts, judge(results))
        arguments.json.write_text(json.dumps(whole, indent=2) + "\n")
    if arguments.picture:
        note = f"{facts['machine']['CPU']}, load generator included; medians, rounds: {plan.rounds}"
        arguments.picture.write_text(picture.draw(results, _durable(peers), note))
    return 1 if problems(results) else 0


def _facts(plan: Plan, cells: Sequence[Cell], folder: Path) -> dict[str, dict[str, str]]:
    measured = list({peer.name: peer for _, peer in cells}.values())
    versions = {peer.name: peer.version() for peer in measured}
    return {
        "machine": machine.facts(folder),
        "versions": machine.versions(plan.tool) | {k: v for k, v in versions.items() if v},
        "settings": {
            "rounds": f"{plan.rounds}, another peer begins each",
            "load": f"{plan.tool}, {CONNECTIONS} connections, {plan.seconds:g} s a run",
            "stdin": f"{plan.lines:,} lines a run",
            "batches": f"{RECORDS_MAX:,} records or {plan.age:g} s, one worker, at every peer "
            "that makes batches",
            **{peer.name: peer.settings(plan.age) for peer in measured},
        },
    }


def _text(
    results: Sequence[Result],
    peers: Sequence[Peer],
    plan: Plan,
    facts: dict[str, dict[str, str]],
) -> str:
    legend = (
        "Median (lowest to highest) of the rounds; the lower of accepted and processed a second. "
        "Ratios are medians of the rounds' own."
    )
    parts = []
    if any(result.run for result in results):
        rates = report.rate_table(results, _durable(peers))
        parts += [rates, legend, report.detail_table(results)]
    parts += report.probe_sections(results)
    few = "" if plan.rounds >= ROUNDS_WANTED else f", where {ROUNDS_WANTED} are wanted"
    parts.append(f"Bars, by the medians (rounds: {plan.rounds}{few}):")
    parts.append(report.bar_table(judge(results)))
    parts.append(_peer_table(peers))
    notes = [f"does not count: {problem}" for problem in problems(results)]
    if facts["machine"]["file system"] in MEMORY_FILE_SYSTEMS:
        notes.append("this is no disk: a sync costs nothing here (see --directory)")
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join([*parts, report.facts_list(facts)])


def _peer_table(peers: Sequence[Peer]) -> str:
    """Who there is, what a yes of each means, and who could not be measured."""
    rows = []
    for peer in peers:
        state = f"no: {peer.missing()}" if peer.missing() else "yes"
        untested = "" if peer.tested else "; written after its documentation, not run by us"
        rows.append([peer.name, peer.accepted, state + untested])
    return report.table(["peer", "accepted: the record is", "found"], rows)


def _durable(peers: Sequence[Peer]) -> list[str]:
    return [peer.name for peer in peers if peer.durable]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures ingestd beside its peers; prints tables in Markdown.",
    )
    parser.add_argument("--rounds", type=_count, default=3, help="how often [3]")
    parser.add_argument("--seconds", type=_seconds, default=2.0, help="of load a run [2]")
    parser.add_argument("--lines", type=_count, default=2_000_000, help="of stdin [2000000]")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="scenario, probe, peer or scenario/peer, like 'http-*' or stdin-file/ingestd or "
        "latency-1; again for more",
    )
    parser.add_argument("--age", type=_seconds, default=1.0, help="of a batch, seconds [1]")
    parser.add_argument(
        "--load", choices=("wrk", "python"), help="[wrk where it is installed, else python]"
    )
    for program in PROGRAMS:
        parser.add_argument(
            f"--{program.name}", metavar="PATH", help=f"[{program.program}, if it is found]"
        )
    parser.add_argument(
        "--directory",
        type=Path,
        default=ROOT / "build",
        help="where journals and input are written for the time being [build/ in the checkout]",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the rates there, as SVG")
    return parser


def _word(name: str) -> str:
    """An option's name as argparse keeps it."""
    return name.replace("-", "_")


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
