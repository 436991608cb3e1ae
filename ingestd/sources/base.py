"""Interfaces of sources: `Intake` accepts their records, `Source` is their life cycle."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TextIO

from ingestd.base.errors import KeyTaken, Overloaded
from ingestd.config.sections import Section

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
    from socket import socket

    from ingestd.base.append import (
        Append,
        AppendCounts,
        DeliveryWaiter,
        IdempotencyClaim,
        RecentIds,
        SourceOffset,
    )
    from ingestd.base.clock import Clock
    from ingestd.base.record import Format
    from ingestd.handlers.outcome import SinkFinding
    from ingestd.sources.http.headers import RequestTracer
    from ingestd.sources.screening import ScreenedIntake


class Intake(Protocol):
    """Accepts records for one pipeline.

    Attributes:
        name: the pipeline's.
        format: what its records are.
        record_bytes_max: a longer record is refused.
        json_depth_max: JSON that is nested deeper is refused.
        recent_ids: that senders gave the last records.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - see the class
    @property
    def format(self) -> Format: ...  # noqa: D102
    @property
    def record_bytes_max(self) -> int: ...  # noqa: D102
    @property
    def json_depth_max(self) -> int: ...  # noqa: D102
    @property
    def recent_ids(self) -> RecentIds: ...  # noqa: D102

    async def begin(self, key: str, fingerprint: bytes) -> IdempotencyClaim | bytes:
        """Returns the stored answer of a request that was accepted before, else claims its key.

        The holder of a claim sets its answer, hands it to `accept`, and calls `forget` in any case.

        Args:
            key: what the client calls the request.
            fingerprint: tells whether it is the same one.

        Raises:
            KeyInFlight: the same request is in progress.
            KeyReused: the key belongs to another request.
            KeysUnsupported: the journal keeps none.
            KeysFull: no more keys can be remembered.
            Overloaded: it cannot be told now.
        """
        ...

    def forget(self, claim: IdempotencyClaim) -> None:
        """Ends a claim, unless records that came with it are on their way into the journal."""
        ...

    def stop_waiting(self, waiter: DeliveryWaiter) -> None:
        """Stops reporting outcomes to a waiter."""
        ...

    async def offset(self, key: str) -> SourceOffset | None:
        """The last accepted offset of that key.

        Raises:
            JournalFailed: it can't be read.
        """
        ...

    async def accept(self, append: Append) -> None:
        """Makes records durable, all or none, and returns after the commit.

        Raises:
            Overloaded: at a bound; nothing was accepted.
            KeyTaken: another daemon took the key of its claim; nothing was accepted.
            NeverFits: at a bound, and it always would be.
            Draining: nothing is accepted any more.
            JournalFailed: nothing can be stored any more.
        """
        ...


class InputCounts(NamedTuple):
    """The numbers of an input that is read, in this run.

    Attributes:
        records: accepted.
        invalid: never accepted, because they cannot be records.
        bytes: read.
        urls_done: of these URLs, how many will not be asked again.
        urls_total: URLs, of a source that reads some.
        bytes_left: still to be read, about, if that is known.
    """

    records: int
    invalid: int
    bytes: int
    urls_done: int | None = None
    urls_total: int | None = None
    bytes_left: float | None = None


class Source:
    """Base class of sources. `start` comes first, `stop_taking` before `close`, each once.

    A source overrides `start`, `stop_taking` and `close`, an input that is read also
    `wait_finished` and `counts`.

    Attributes:
        addresses: of a server: where it listens, after `start`.
        tracer: traces requests, if it is set before `start`.
    """

    addresses: Sequence[str] = ()
    tracer: RequestTracer | None = None

    @classmethod
    def of(cls, settings: Any, context: SourceContext) -> Source:
        """Builds one with the settings of its kind; see `SourceKind.build`."""
        make: Callable[[Any, SourceContext], Source] = cls
        return make(settings, context)

    @classmethod
    def findings(cls, settings: Any) -> Iterable[SinkFinding]:  # noqa: ARG003
        """Asks what a source with these settings reads from; bounded in time.

        Raises:
            ConfigError: it cannot be asked.
        """
        return ()

    async def start(self) -> None:
        """Begins to accept records.

        Raises:
            AddressError: it cannot listen where it should.
            ConfigError: its input cannot be had.
        """
        raise NotImplementedError

    def facts(self) -> dict[str, object]:
        """Facts for the log line of a start, such as addresses; valid after `start`."""
        return {}

    def counts(self) -> InputCounts | None:
        """The numbers so far; `None` for a server."""
        return None

    def numbers(self) -> Mapping[str, float]:
        """The numbers for metrics beside `counts`, by the names in `ingestd.base.scraped`."""
        return {}

    def endpoints(self) -> Mapping[str, AppendCounts]:
        """The counts of each endpoint of a server, by name."""
        return {}

    async def wait_finished(self) -> None:
        """Returns when there is no more input and all of it is accepted; never for a server.

        Raises:
            InputIncomplete: some of it was given up; the rest is accepted.
            IngestdError: the input could not be stored, and why.
        """
        await asyncio.get_running_loop().create_future()

    async def prepare(self, settings: Any) -> Callable[[], None]:  # noqa: ARG002
        """Prepares a reload: reads the files that the settings name.

        Args:
            settings: this source's new ones; what is not marked `Reloadable` is as it was.

        Returns:
            A call that changes everything and cannot fail.

        Raises:
            ConfigError: something is wrong; nothing changes.
        """
        return _change_nothing

    async def stop_taking(self, deadline: float) -> None:
        """Accepts no new input, and waits until received records are accepted and answered.

        Args:
            deadline: in the event loop's time.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Ends all connections, tasks, threads and descriptors that are left."""
        raise NotImplementedError

    def report(self) -> None:
        """Logs where to go on if the input was left before its end; after `close`."""


def _change_nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class SourceContext:
    """The surroundings that a source is built with, beside its settings.

    Attributes:
        name: of the source.
        pipelines: by name.
        pipeline: the name of the one for records that name none.
        clock: gives the time.
        input_fd: standard input, for a source that reads it.
        stderr: of the process, for hints to a person at a terminal.
        sockets: listening ones that a service manager passed, for a source that listens.
        is_interrupted: tells if a signal has asked the process to leave.
        on_request: called for each answer of a server with (the template of its route, pipeline or
            "", status, seconds, problem or "").
        screens: of the pipelines, those that do not take every record: their `accept` leaves some
            out. A source that tells its clients screens for itself.
    """

    name: str
    pipelines: Mapping[str, Intake]
    pipeline: str
    clock: Clock
    input_fd: int
    stderr: TextIO
    sockets: Sequence[socket]
    is_interrupted: Callable[[], bool]
    on_request: Callable[[str, str, int, float, str], None]
    screens: Mapping[str, ScreenedIntake] = field(default_factory=dict)


class KeyNeeds(NamedTuple):
    """The demands of a source on the idempotency keys of pipelines.

    Attributes:
        ttl: seconds that a key is remembered.
        keys_max: most keys that are remembered, a pipeline; 0 for a source that has ids alone.
        signed_ttl: seconds that ids of signed deliveries are remembered at least.
        shared: there can be several principals; each has a share of the table.
        ids_max: most ids of senders' that are remembered, a pipeline.
    """

    ttl: float
    keys_max: int
    signed_ttl: float
    shared: bool
    ids_max: int


class SourceKind:
    """Base class of what the registry knows of a kind of source: its settings, and how to build it.

    It is imported with the settings, also for `--help`: what is large is imported in `build`.

    Attributes:
        settings: its section: the table `[KIND]`, and `[sources.NAME]` with `kind` and `pipeline`
            beside the section's own keys.
        listens: it takes requests at `settings.listen`, and can refuse one.
        feeds_all: its records can go to any pipeline, not to one alone.
        block_bytes: most bytes, beside a record, that it appends at once and can refuse to nobody.
        stored_whole: its settings that bound what is one row of a journal.
        source: the class that `build` builds, `module:name`, as in the registry.
    """

    settings: ClassVar[type[Section]] = Section
    listens: ClassVar[bool] = False
    feeds_all: ClassVar[bool] = False
    block_bytes: ClassVar[int] = 0
    stored_whole: ClassVar[Sequence[str]] = ()
    source: ClassVar[str]

    def problems(
        self,
        settings: Any,  # noqa: ARG002
        *,
        formats: Mapping[str, str],  # noqa: ARG002
        default: str,  # noqa: ARG002
        runs: bool,  # noqa: ARG002
    ) -> Iterable[tuple[str, str]]:
        """Finds settings that cannot work together: (key in the section, problem) for each.

        Args:
            settings: the section.
            formats: of the records of each pipeline.
            default: the pipeline of records that name none.
            runs: a source with these settings is built.
        """
        return ()

    def addresses(self, settings: Any) -> Sequence[str]:
        """Returns the TCP addresses, `HOST:PORT`, that a source with these settings listens at."""
        return (settings.listen,) if self.listens else ()

    def reads_input(self, settings: Any) -> bool:  # noqa: ARG002
        """Tells if a source with these settings reads standard input."""
        return False

    def keys(self, settings: Any) -> KeyNeeds | None:  # noqa: ARG002
        """The demands on idempotency keys; `None` for a source without."""
        return None

    def check(
        self,
        settings: Any,  # noqa: ARG002
        formats: Mapping[str, Format],  # noqa: ARG002
        default: str,  # noqa: ARG002
    ) -> Sequence[str]:
        """Reads the files that the settings name; returns what should be seen to.

        Raises:
            ConfigError: something is wrong with them.
        """
        return ()

    def build(self, settings: Any, context: SourceContext) -> Source:
        """Builds a source that is not started yet.

        Raises:
            ConfigError: something that the settings name is not what it should be.
        """
        return self._load().of(settings, context)

    def findings(self, settings: Any) -> Iterable[SinkFinding]:
        """See `Source.findings`; empty for a kind that has a `build` of its own."""
        return self._load().findings(settings) if hasattr(self, "source") else ()

    def _load(self) -> type[Source]:
        module, _, name = self.source.partition(":")
        source: type[Source] = getattr(import_module(module), name)
        return source


# -- retries of appends ----------------------------------------------------------------------------

AGAIN_SECONDS = 1.0
"""The longest wait: a try costs nothing here, and records that were read wait meanwhile."""


async def accept_patiently(intake: Intake, append: Append) -> None:
    """Has records accepted by a pipeline, which may be overloaded for any time.

    Raises:
        KeyTaken: its claim is void: the key has to be claimed again.
        IngestdError: see `Intake.accept`.
    """
    await patiently(partial(intake.accept, append))


async def patiently(call: Callable[[], Awaitable[None]]) -> None:
    """Calls until there is room.

    Raises:
        KeyTaken: the key has to be claimed again.
    """
    while True:
        try:
            await call()
        except KeyTaken:
            raise
        except Overloaded as overloaded:
            await asyncio.sleep(again_after(overloaded))
        else:
            return


def again_after(overloaded: Overloaded) -> float:
    """Seconds until a source that can wait tries an overloaded pipeline again, with jitter."""
    return min(overloaded.retry_after, AGAIN_SECONDS) * random.uniform(0.75, 1.25)  # noqa: S311
