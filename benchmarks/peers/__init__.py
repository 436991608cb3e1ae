"""Who is measured. `base.py` says what a peer is; each of the other files has some of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.peers.agents import FluentBit, Vector
from benchmarks.peers.baselines import FastAPI, PlainLoop
from benchmarks.peers.logprep import Logprep
from benchmarks.peers.ours import Ingestd, IngestdPair
from benchmarks.peers.syslog import Rsyslog, SyslogNg

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.peers.base import Peer, Program

PROGRAMS: tuple[type[Program], ...] = (Logprep, SyslogNg, Rsyslog, FluentBit, Vector)
"""What somebody else wrote: measured where it is found."""


def all_peers(given: Mapping[str, str | None] | None = None) -> list[Peer]:
    """The daemon first, then what it is compared with.

    Args:
        given: the path of a program, by its peer's name; without one it is looked for.
    """
    paths = given or {}
    programs = [program(paths.get(program.name)) for program in PROGRAMS]
    return [Ingestd(), PlainLoop(), FastAPI(), *programs, IngestdPair()]
