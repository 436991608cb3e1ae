"""`ReplicatedLog`: all that an engine has to offer for a journal beyond one machine.

A log is a sequence of messages under a name. Each is appended with a compare-and-set on the number
of the last one, which is all the fencing there is: a daemon that was paused, cut off or replaced
cannot append any more, whatever its clock says. The lease beside it decides only when another
daemon may try. Methods are coroutines of the event loop that `open` was called on.

An append ends in one of six ways. It returns: the message is durable. `LogUnreachable`, `LogFull`:
it is certain that it was not appended. `LogAmbiguous`: it may have been, now or later; the caller
gives the same message again until it knows. `LogFenced`: the last message is another one.
`LogRefused`: the engine was set up anew, and takes no message like this one.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from ingestd.base.errors import IngestdError, Overloaded
from ingestd.base.rate import SHORTEST

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from ingestd.journal.log.messages import LogEnd


def retry_after() -> float:
    """Seconds after which a refused client should come again, not all at once."""
    return SHORTEST + 4 * random.random()  # noqa: S311


class LogUnreachable(Overloaded):
    """The engine takes nothing at present; nothing was appended."""

    message = "the journal's log takes nothing: {problem}"


class LogFull(LogUnreachable):
    """The log is at its engine's bound; nothing was appended."""


class LogAmbiguous(IngestdError):
    """An append has no answer: its message may be in the log, now or later."""

    message = "the journal's log did not answer: {problem}"


class LogRefused(LogAmbiguous):
    """The engine's settings refuse the message, each time; an earlier try of it may still come."""

    message = "the journal's log refuses a message: {problem}"


class LogFenced(IngestdError):
    """The last message of the log, or a key, is not the expected one: another daemon has it."""

    message = "another daemon has taken over the journal's log"


class LogMessage(NamedTuple):
    """A message of a log.

    Attributes:
        number: grows with each message of the log, not by one.
        data: as it was appended.
    """

    number: int
    data: bytes


class LogKey(NamedTuple):
    """An idempotency key that all daemons of a group know, beside the logs of its pipeline.

    Attributes:
        name: of it, in hexadecimal digits.
        data: what is remembered, packed by the journal.
        ttl: seconds after which it goes, by the engine's clock; at least 1.
        replaces: the number of the one that is there; 0 if there is none.
    """

    name: str
    data: bytes
    ttl: int
    replaces: int


class Snapshot(msgspec.Struct, array_like=True, frozen=True):
    """The last snapshot of a log; its parts lie beside it.

    Attributes:
        at: it is the state after the message of this number.
        first: the message that reading begins with: chunks that it names lie from there on.
        parts: how many.
        size: bytes of all parts.
        state: the numbers that are no rows, packed by the journal.
        number: of itself in its engine; 0 before it was saved.
    """

    at: int
    first: int
    parts: int
    size: int
    state: bytes
    number: int = 0


class LogLease(NamedTuple):
    """The lease of a log.

    Attributes:
        owner: that has it; empty if it has lapsed or was given up.
        wanted: the daemon whose log it is waits for it.
    """

    owner: str
    wanted: bool = False


class RetiredLogs(msgspec.Struct, array_like=True, frozen=True):
    """The sum of the logs of one pipeline that have ended.

    Attributes:
        logs: how many.
        accepted: see `Ledger`.
        processed: see there, and so on.
        journals: ids of the last ones, so that none counts twice.
    """

    logs: int = 0
    accepted: int = 0
    processed: int = 0
    dead: int = 0
    invalid: int = 0
    journals: tuple[str, ...] = ()


class ReplicatedLog(Protocol):
    """A replicated log of one name.

    Attributes:
        message_bytes_max: bound of a message.
        keys_max: so many keys go with one message.
    """

    message_bytes_max: int
    keys_max: int

    @property
    def name(self) -> str:
        """Names the log for people."""
        ...

    @property
    def silence(self) -> str:
        """Tells why no answer should be waited for now; empty if one comes."""
        ...

    @property
    def refusal(self) -> str:
        """Tells why no records should be accepted now, `silence` or another reason."""
        ...

    async def open(self) -> None:
        """Connects, and checks that the engine keeps what is appended.

        Raises:
            ConfigError: it does not, as it is set up.
            LogUnreachable: it does not answer.
        """
        ...

    async def acquire(self, owner: str, ttl: float) -> str:
        """Takes or renews the lease; returns the owner that has it.

        Args:
            owner: of this life of the daemon.
            ttl: seconds after which a lease that is not renewed lapses, by the engine's clock.

        Raises:
            LogUnreachable: no answer.
        """
        ...

    async def release(self, owner: str) -> None:
        """Gives the lease up, so that another daemon need not wait."""
        ...

    async def want(self) -> None:
        """Asks a daemon that has adopted the log to give it back; lapses as a lease does."""
        ...

    async def append(self, data: bytes, *, after: int, keys: Sequence[LogKey] = ()) -> int:
        """Appends a message if the last one has the number `after`; 0 if there is none.

        Args:
            data: the message.
            after: the number of the last one.
            keys: become durable with it, all or nothing; each if it is there as it says.

        Returns:
            Its number, once a majority has all of it on disk.

        Raises:
            LogUnreachable, LogFull: it was not appended.
            LogAmbiguous: it may have been, now or later.
            LogRefused: it was not appended; what an earlier call of it did is as open as before.
            LogFenced: the last message has another number, or a key has; or something that
                would change that is on its way. It was not appended.
        """
        ...

    async def find_keys(
        self, names: Collection[str], *, from_leader: bool = False
    ) -> Mapping[str, LogMessage]:
        """Reads the keys of some names, as far as they are there.

        A replica that lags may leave out the newest ones; the leader takes longer.

        Raises:
            LogUnreachable: no answer.
        """
        ...

    async def last(self) -> LogMessage | None:
        """Reads the last message, from the leader.

        Raises:
            LogUnreachable: no answer.
        """
        ...

    async def read(self, first: int, bytes_max: int) -> Sequence[LogMessage]:
        """Reads messages from the number `first` on: one, if there is one, then up to the bound.

        A replica that lags may leave out the newest ones.

        Raises:
            LogUnreachable: no answer.
        """
        ...

    async def trim(self, before: int) -> None:
        """Deletes the messages before a number.

        Raises:
            LogUnreachable: no answer.
        """
        ...

    async def save_part(self, at: int, part: int, data: bytes) -> None:
        """Stores a part of the snapshot at a number; parts count from 0.

        Raises:
            LogUnreachable, LogFull, LogAmbiguous: it may be missing.
        """
        ...

    async def drop_parts(self, at: int) -> None:
        """Deletes the parts of a snapshot at a number that will not be saved.

        Raises:
            LogUnreachable: no answer.
        """
        ...

    async def save(self, snapshot: Snapshot, *, after: int) -> int:
        """Makes a snapshot the last one, if the last one so far is `after`; returns its number.

        The parts of earlier ones go.

        Raises:
            LogFenced: the last one has another number.
            LogUnreachable, LogFull, LogAmbiguous: it may not have been saved.
        """
        ...

    async def snapshot(self) -> Snapshot | None:
        """Reads the last snapshot.

        Raises:
            LogUnreachable: no answer.
        """
        ...

    async def load_part(self, at: int, part: int) -> bytes | None:
        """Reads a part of a snapshot; `None` if it has gone.

        Raises:
            LogUnreachable: no answer.
        """
        ...

    async def retire(self, number: int, end: LogEnd) -> None:
        """Deletes the log up to its last message, once its numbers are in the sum of the retired.

        It may be called again, by several daemons at once, and when another log has begun under
        the name.

        Args:
            number: of the last message.
            end: the log's numbers.

        Raises:
            LogUnreachable, LogFull, LogAmbiguous: it may not be done.
        """
        ...

    async def close(self) -> None:
        """Ends the connection."""
        ...


class GroupedLog(ReplicatedLog, Protocol):
    """A log with the others of its engine.

    Attributes:
        place: `NAME.PIPELINE`, which tells it from them.
    """

    place: str

    async def logs(self) -> Mapping[str, LogLease]:
        """The leases of all logs that have a message, by their places.

        Raises:
            LogUnreachable: no answer.
        """
        ...

    def sibling(self, place: str) -> GroupedLog:
        """Another log, over the connection of this one."""
        ...

    async def retired(self) -> Mapping[str, RetiredLogs]:
        """The sums of the logs that have ended, by their pipelines.

        Raises:
            LogUnreachable: no answer.
        """
        ...
