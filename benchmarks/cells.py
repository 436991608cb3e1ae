"""The plan's cells: a peer in a scenario or in a probe; chosen, put in order, measured."""

from __future__ import annotations

import shutil
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import SCENARIOS, Scenario, measure
from benchmarks.peers import all_peers
from benchmarks.probes import PROBES, Probe, probe
from benchmarks.processes import Failed
from benchmarks.results import Result

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.measure import Plan
    from benchmarks.peers.base import Peer

    Cell = tuple[Scenario | Probe, Peer]


def cells_of(peers: Sequence[Peer]) -> list[Cell]:
    """Everything that can be measured here."""
    return [
        (what, peer)
        for what in (*SCENARIOS, *PROBES)
        for peer in peers
        if any(fnmatch(what.name, pattern) for pattern in peer.scenarios) and not peer.missing()
    ]


def choose(patterns: Sequence[str], peers: Sequence[Peer] | None = None) -> list[Cell]:
    """The cells that a pattern names by scenario, by peer or by `scenario/peer`; else all."""

    def chosen(what: str, peer: str) -> bool:
        names = (what, peer, f"{what}/{peer}")
        return any(fnmatch(name, pattern) for name in names for pattern in patterns)

    cells = cells_of(all_peers() if peers is None else peers)
    return [(what, peer) for what, peer in cells if not patterns or chosen(what.name, peer.name)]


def rotated(cells: Sequence[Cell], round_number: int) -> Iterator[Cell]:
    """The cells in a round's order: in each scenario another peer begins."""
    for what in dict.fromkeys(what for what, _ in cells):
        peers = [peer for each, peer in cells if each == what]
        start = (round_number - 1) % len(peers)
        for peer in peers[start:] + peers[:start]:
            yield what, peer


def measure_all(cells: Sequence[Cell], plan: Plan, folder: Path) -> Iterator[Result]:
    """Round by round; each cell in a folder of its own, which goes after it."""
    for number in range(1, plan.rounds + 1):
        for what, peer in rotated(cells, number):
            label = f"round {number}/{plan.rounds}  {what.name}  {peer.name}"
            print(f"{label} …", file=sys.stderr, flush=True)
            own = Path(tempfile.mkdtemp(dir=folder))
            try:
                result, said = _measure(what, peer, plan, own, number)
            except Failed as failed:
                result = Result(number, what.name, peer.name, None, str(failed))
                said = f"does not count: {failed}"
            finally:
                shutil.rmtree(own)
            print(f"{label}  {said}", file=sys.stderr, flush=True)
            yield result


def _measure(
    what: Scenario | Probe, peer: Peer, plan: Plan, folder: Path, number: int
) -> tuple[Result, str]:
    """A result, and what is said of it while the others are measured."""
    if isinstance(what, Scenario):
        run = measure(peer, what, plan, folder)
        return Result(number, what.name, peer.name, run), f"{run.rate:,.0f} records/s"
    figures = probe(what, peer, plan, folder)
    said = [f"{what.figures[name].say(value)}" for name, value in figures.items()]
    return Result(number, what.name, peer.name, None, figures=figures), ", ".join(said)
