"""Compares the accepted records with the rows of the sink, and makes the report."""

from __future__ import annotations

import sqlite3
from collections import Counter
from contextlib import closing
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from ingestd.prove.progress import GroupState, ProofState, Sent

_LEDGER = ("accepted", "processed", "dead", "pending", "invalid", "balanced")


class FoundRows(msgspec.Struct, frozen=True):
    """Counts of sent and of delivered records.

    Attributes:
        accepted: numbers for which a 202 was seen.
        delivered: rows.
        missing: accepted, and there is no row.
        duplicated: numbers with more than one row.
        unknown: in flight when the daemon died: may be there or not.
        unknown_delivered: of these, are there.
        strange: rows that were never sent.
    """

    accepted: int
    delivered: int
    missing: int
    duplicated: int
    unknown: int
    unknown_delivered: int
    strange: int


class GroupReport(msgspec.Struct, frozen=True):
    """The part of a result that is of several daemons and of servers.

    Attributes:
        daemons: each had a log.
        killed: daemons.
        paused: daemons, for less than their lease.
        replaced: daemons, paused until a successor had their log.
        refused: of these, left by themselves when they went on.
        servers: nodes.
        servers_killed: times.
        servers_paused: times.
        restarts: starts of daemons that the servers were not up for.
        sent_again: requests without an answer that another daemon was asked for.
        replayed: of these, had been accepted.
        ledgers: each daemon's own account of its log.
    """

    daemons: int
    killed: int
    paused: int
    replaced: int
    refused: int
    servers: int
    servers_killed: int
    servers_paused: int
    restarts: int
    sent_again: int
    replayed: int
    ledgers: list[dict[str, Any]]


class ProofReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """Result of a run.

    Attributes:
        proved: nothing missing, doubled or strange, the ledger balances, the daemon left well.
        seed: of the run.
        kills: that were done.
        kills_asked: that were asked for.
        early: kills while the daemon started.
        requests: that were accepted.
        requests_unknown: without an answer.
        found: see there.
        recovery_median: seconds from the start of a process to its readiness, after a kill.
        recovery_max: the longest of them.
        ledger: the daemon's own account, over all its lives.
        exit_code: the daemon's, at its end.
        group: of several daemons; their ledgers are summed in `ledger`.
    """

    proved: bool
    seed: int
    kills: int
    kills_asked: int
    early: int
    requests: int
    requests_unknown: int
    found: FoundRows
    recovery_median: float
    recovery_max: float
    ledger: dict[str, Any]
    exit_code: int
    group: GroupReport | None = None


def rows_in(file: Path) -> Iterator[tuple[Any, Any]]:
    """Client and number of each row; nothing, if nothing was ever delivered."""
    if not file.exists():
        return
    with closing(sqlite3.connect(file)) as db:
        if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'records'").fetchone():
            yield from db.execute("SELECT client, n FROM records")


def compare(rows: Iterable[tuple[Any, Any]], sent: Sequence[Sent]) -> FoundRows:
    """Compares rows with the numbers that were sent.

    Args:
        rows: client and number of each row.
        sent: by client; nothing is in flight any more.
    """
    seen = [bytearray(one.next) for one in sent]
    delivered = strange = 0
    doubled: Counter[tuple[int, int]] = Counter()
    for client, n in rows:
        delivered += 1
        if not (_is_in(client, len(sent)) and _is_in(n, sent[client].next)):
            strange += 1
        elif seen[client][n]:
            doubled[client, n] += 1
        else:
            seen[client][n] = 1
    unknown = sum(one.records_unknown for one in sent)
    unknown_delivered = sum(
        seen[client].count(1, first, first + count)
        for client, one in enumerate(sent)
        for first, count in one.unknown
    )
    absent = sum(numbers.count(0) for numbers in seen)
    return FoundRows(
        accepted=sum(one.accepted for one in sent),
        delivered=delivered,
        missing=absent - (unknown - unknown_delivered),
        duplicated=len(doubled),
        unknown=unknown,
        unknown_delivered=unknown_delivered,
        strange=strange,
    )


def _is_in(value: object, end: int) -> bool:
    return type(value) is int and 0 <= value < end


def report(
    state: ProofState, found: FoundRows, drained: dict[str, Any], exit_code: int
) -> ProofReport:
    """Makes the report; `drained` is the daemon's drain report."""
    ledger = {key: drained.get(key) for key in _LEDGER}
    flaws = found.missing or found.duplicated or found.strange or exit_code
    return ProofReport(
        proved=not flaws and ledger["balanced"] is True and ledger["pending"] == 0,
        seed=state.seed,
        kills=state.killed,
        kills_asked=state.kills,
        early=state.early,
        requests=sum(one.requests for one in state.sent),
        requests_unknown=sum(len(one.unknown) for one in state.sent),
        found=found,
        recovery_median=round(median(state.starts), 3) if state.starts else 0.0,
        recovery_max=round(max(state.starts), 3) if state.starts else 0.0,
        ledger=ledger,
        exit_code=exit_code,
    )


def report_of_group(
    state: ProofState,
    group: GroupState,
    found: FoundRows,
    ends: Sequence[tuple[int, dict[str, Any]]],
) -> ProofReport:
    """Makes the report of several daemons.

    Args:
        state: of the run.
        group: its part that is of several daemons.
        found: see there.
        ends: exit code and drain report of each.
    """
    ledgers = [{key: said.get(key) for key in _LEDGER} for _, said in ends]
    total: dict[str, Any] = {
        key: sum(one[key] or 0 for one in ledgers) for key in _LEDGER if key != "balanced"
    }
    adds_up = total["accepted"] == total["processed"] + total["dead"] + total["pending"]
    balanced = adds_up and all(one["balanced"] is True for one in ledgers)
    code = next((code for code, _ in ends if code), 0)
    result = report(state, found, total | {"balanced": balanced}, code)
    return msgspec.structs.replace(
        result,
        # What was processed is there, and nothing else.
        proved=result.proved and total["processed"] == found.delivered,
        group=GroupReport(
            daemons=group.daemons,
            killed=state.killed - group.paused - group.replaced,
            paused=group.paused,
            replaced=group.replaced,
            refused=group.refused,
            servers=group.nodes,
            servers_killed=group.servers_killed,
            servers_paused=group.servers_paused,
            restarts=group.restarts,
            sent_again=group.sent_again,
            replayed=group.replayed,
            ledgers=ledgers,
        ),
    )


def lines(result: ProofReport) -> list[str]:
    """Renders the report as text."""
    found, ledger = result.found, result.ledger
    doubt = f"{found.unknown:,} records in {result.requests_unknown:,} requests without an answer"
    told = [
        *_faults(result),
        f"accepted    {found.accepted:,} records in {result.requests:,} requests",
        f"delivered   {found.delivered:,}",
        f"missing     {found.missing:,}",
        f"duplicated  {found.duplicated:,}",
        f"unknown     {doubt}; {found.unknown_delivered:,} of them are there",
        f"recovery    median {result.recovery_median:.2f} s, longest {result.recovery_max:.2f} s",
        *(
            _account(f"log {number}", one)
            for number, one in enumerate(result.group.ledgers if result.group else (), 1)
        ),
        _account("ledger", ledger),
    ]
    if found.strange:
        told.append(f"strange     {found.strange:,} rows that were never sent")
    if result.exit_code:
        told.append(f"exit code   {result.exit_code} of the daemon at its end")
    told.append(_conclusion(result))
    return told


def _faults(result: ProofReport) -> list[str]:
    group = result.group
    if group is None:
        return [
            f"kills       {result.kills} of {result.kills_asked}, {result.early} while it started"
        ]
    return [
        f"faults      {result.kills} of {result.kills_asked} of {group.daemons} daemons",
        (
            f"killed      {group.killed}, {result.early} while they started;"
            f" {group.restarts} starts found no servers"
        ),
        (
            f"paused      {group.paused}, and {group.replaced} past the lease, until a successor"
            f" served; {group.refused} of these left by themselves"
        ),
        (
            f"servers     {group.servers}; killed {group.servers_killed},"
            f" paused {group.servers_paused}"
        ),
        (
            f"sent again  {group.sent_again:,} requests without an answer, to the next daemon;"
            f" {group.replayed:,} of them had been accepted"
        ),
    ]


def _account(name: str, ledger: dict[str, Any]) -> str:
    text = "{:<11} accepted {accepted} = processed {processed} + dead {dead} + pending {pending}"
    return text.format(name, **ledger) + ("" if ledger["balanced"] else "  DOES NOT BALANCE")


def _conclusion(result: ProofReport) -> str:
    if not result.proved:
        return "FAILED"
    if result.kills < result.kills_asked:
        return "proved as far as it went: nothing is missing, nothing is there twice"
    return "proved: nothing is missing, nothing is there twice"
