"""Interfaces of sources: `Intake` accepts their records, `Source` is their life cycle."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ingestd.base.append import Append, DeliveryWaiter, IdempotencyClaim, SourceOffset
    from ingestd.base.errors import Overloaded
    from ingestd.base.record import Format


class Intake(Protocol):
    """Accepts records for one pipeline.

    Attributes:
        name: the pipeline's.
        format: what its records are.
        record_bytes_max: a longer record is refused.
        json_depth_max: JSON that is nested deeper is refused.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - see the class
    @property
    def format(self) -> Format: ...  # noqa: D102
    @property
    def record_bytes_max(self) -> int: ...  # noqa: D102
    @property
    def json_depth_max(self) -> int: ...  # noqa: D102

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
            Overloaded: no more keys can be remembered.
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
            NeverFits: at a bound, and it always would be.
            Draining: nothing is accepted any more.
            JournalFailed: nothing can be stored any more.
        """
        ...


class Source(Protocol):
    """Life cycle of one source. Its owner makes these calls in this order, each once."""

    async def start(self) -> None:
        """Begins to accept records.

        Raises:
            AddressError: it cannot listen where it should.
        """
        ...

    def facts(self) -> dict[str, object]:
        """Facts for the log line of a start, such as addresses; valid after `start`."""
        ...

    async def wait_finished(self) -> None:
        """Returns when there is no more input and all of it is accepted; never for a server.

        Raises:
            InputIncomplete: some of it was given up; the rest is accepted.
            IngestdError: the input could not be stored, and why.
        """
        ...

    async def stop_taking(self, deadline: float) -> None:
        """Accepts no new input, and waits until received records are accepted and answered.

        Args:
            deadline: in the event loop's time.
        """
        ...

    async def close(self) -> None:
        """Ends all connections, tasks, threads and descriptors that are left."""
        ...


# -- retries of appends ----------------------------------------------------------------------------

AGAIN_SECONDS = 1.0
"""The longest wait: a try costs nothing here, and records that were read wait meanwhile."""


def again_after(overloaded: Overloaded) -> float:
    """Seconds until a source that can wait tries an overloaded pipeline again, with jitter."""
    return min(overloaded.retry_after, AGAIN_SECONDS) * random.uniform(0.75, 1.25)  # noqa: S311
