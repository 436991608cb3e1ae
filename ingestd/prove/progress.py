"""State of a run: the records sent and their outcomes, kept in a file so that it can be resumed.

A client's numbers grow without gaps, so only the next one is kept, and the ranges whose outcome is
unknown: everything else below it was accepted. The file is written when a kill
was survived, and before a client comes to the end of the numbers that the file reserves for it:
whatever happens to this process, no number is sent twice.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import msgspec

from ingestd.base.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

RESERVED = 100_000
"""Numbers of a client that one write of the file reserves."""
STATE = "prove.json"


class Sent(msgspec.Struct):
    """One client's numbers.

    Attributes:
        next: the first that has no outcome.
        reserved: below it, numbers may have been sent; equal to `next` once nothing is in flight.
        requests: that were accepted.
        unknown: ranges (first, count) of requests that were in flight when the daemon died.
    """

    next: int = 0
    reserved: int = 0
    requests: int = 0
    unknown: list[tuple[int, int]] = []

    @property
    def records_unknown(self) -> int:
        """Records without a known outcome."""
        return sum(count for _, count in self.unknown)

    @property
    def accepted(self) -> int:
        """Records for which a 202 was seen."""
        return self.next - self.records_unknown


class GroupState(msgspec.Struct):
    """The part of a run that is of several daemons and of servers.

    Attributes:
        daemons: how many.
        nodes: servers.
        server_kills: faults of servers to be done.
        paused: daemons, for less than their lease.
        replaced: daemons, paused until a successor had their log.
        refused: of these, left by themselves when they went on.
        server_faults: done.
        servers_killed: in these.
        servers_paused: in these.
        restarts: starts that the servers were not up for.
        sent_again: requests without an answer, to another daemon, until that said what they were.
        replayed: of these, had been accepted.
    """

    daemons: int
    nodes: int
    server_kills: int
    paused: int = 0
    replaced: int = 0
    refused: int = 0
    server_faults: int = 0
    servers_killed: int = 0
    servers_paused: int = 0
    restarts: int = 0
    sent_again: int = 0
    replayed: int = 0


class ProofState(msgspec.Struct):
    """A run.

    Attributes:
        seed: decides everything that is random.
        kills: to be done.
        killed: done.
        early: of these, while the daemon started.
        starts: seconds to readiness of every start after a kill.
        first_start: seconds to readiness of the first start; 0 before it.
        sent: by client.
        group: of several daemons, whose pauses count as kills; `None`: there is one.
    """

    seed: int
    kills: int
    sent: list[Sent]
    killed: int = 0
    early: int = 0
    starts: list[float] = []
    first_start: float = 0.0
    group: GroupState | None = None


class ProofProgress:
    """Keeps a run's state, shared by the clients, and its file.

    Args:
        state: as it is now.
        file: where it is written.
    """

    def __init__(self, state: ProofState, file: Path) -> None:
        self.state = state
        self._file = file
        self._lock = threading.Lock()

    def numbers(self, client: int, count: int) -> int:
        """The first of some numbers that the client may send now; the same until they end."""
        with self._lock:
            sent = self.state.sent[client]
            if sent.next + count > sent.reserved:
                sent.reserved = sent.next + max(count, RESERVED)
                self._write()
            return sent.next

    def accepted(self, client: int, count: int) -> None:
        """Counts records for which the 202 was seen."""
        with self._lock:
            sent = self.state.sent[client]
            sent.next += count
            sent.requests += 1

    def learned(self, replayed: bool) -> None:
        """Counts a request that was sent again to another daemon, and whether that knew it."""
        with self._lock:
            if self.state.group is not None:
                self.state.group.sent_again += 1
                self.state.group.replayed += replayed

    def unknown(self, client: int, count: int) -> None:
        """Keeps the range of a request that was sent, perhaps in part, and got no answer."""
        with self._lock:
            sent = self.state.sent[client]
            sent.unknown.append((sent.next, count))
            sent.next += count

    def save(self, *, idle: bool = False) -> None:
        """Writes the file.

        Args:
            idle: nothing is in flight: what is reserved was not sent.
        """
        with self._lock:
            for sent in self.state.sent:
                sent.reserved = sent.next if idle else max(sent.reserved, sent.next)
            self._write()

    def totals(self) -> tuple[int, int]:
        """Records accepted, and of unknown outcome."""
        with self._lock:
            sent = self.state.sent
            return sum(s.accepted for s in sent), sum(s.records_unknown for s in sent)

    def _write(self) -> None:
        new = self._file.with_suffix(".new")
        with new.open("wb") as out:
            out.write(msgspec.json.encode(self.state))
            out.flush()
            os.fsync(out.fileno())
        new.replace(self._file)


def resumed(folder: Path) -> ProofState:
    """The state of a run that was interrupted, however that happened.

    Raises:
        ConfigError: there is none in the folder.
    """
    try:
        state = msgspec.json.decode((folder / STATE).read_bytes(), type=ProofState)
    except OSError as error:
        problem = f"--resume {folder}: {error.strerror}: {STATE}; that is no folder of a run"
        raise ConfigError(problem=problem) from error
    except msgspec.DecodeError as error:
        raise ConfigError(problem=f"--resume {folder}: {STATE}: {error}") from error
    for sent in state.sent:
        if sent.reserved > sent.next:  # the run did not save its end
            sent.unknown.append((sent.next, sent.reserved - sent.next))
            sent.next = sent.reserved
    return state
