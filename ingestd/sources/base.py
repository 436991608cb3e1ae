"""The two sides of a source: the door it hands records to, and the life its owner gives it."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ingestd.base.append import Append, DeliveryWaiter, IdempotencyClaim, SourceOffset
    from ingestd.base.errors import Overloaded
    from ingestd.base.record import Format


class Intake(Protocol):
    """The door of one pipeline.

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
        """The stored answer of a request that was accepted before, else a claim on its key.

        Whoever gets a claim sets its answer, hands it to `accept`, and calls `forget` in any case.

        Args:
            key: what the client calls the request.
            fingerprint: tells whether it is the same one.

        Raises:
            KeyInFlight: the same request is in progress.
            KeyReused: the key belongs to another request.
            Overloaded: no more keys can be remembered.
        """
        ...

    def forget(self, claim: IdempotencyClaim) -> None:
        """Ends a claim, unless records that came with it are on their way into the journal."""
        ...

    def unwatch(self, watch: DeliveryWaiter) -> None:
        """Nobody waits for what becomes of these records any more."""
        ...

    async def bookmark(self, key: str) -> SourceOffset | None:
        """The last accepted one of that key.

        Raises:
            JournalFailed: it can't be read.
        """
        ...

    async def accept(self, append: Append) -> None:
        """Returns once all of it is durable; all or nothing.

        Raises:
            Overloaded: at a bound; nothing was taken.
            NeverFits: at a bound, and it always would be.
            Draining: nothing is taken any more.
            JournalFailed: nothing can be stored any more.
        """
        ...


class Source(Protocol):
    """Where records come in. The calls come in this order, each once."""

    async def start(self) -> None:
        """Begins to take records.

        Raises:
            AddressError: it cannot listen where it should.
        """
        ...

    def facts(self) -> dict[str, object]:
        """Where records come from, for the log line of a start; after `start`."""
        ...

    async def wait_finished(self) -> None:
        """Returns when there is no more input and all of it is accepted; never for a server.

        Raises:
            InputIncomplete: some of it was given up; the rest is accepted.
            IngestdError: the input could not be stored, and why.
        """
        ...

    async def stop_taking(self, deadline: float) -> None:
        """Takes nothing new, and waits for what was taken until it is accepted and answered.

        Args:
            deadline: in the event loop's time.
        """
        ...

    async def close(self) -> None:
        """Ends everything that is still there: connections, tasks, threads, descriptors."""
        ...


# -- when a source that can wait asks an overloaded pipeline again ---------------------------------

AGAIN_SECONDS = 1.0
"""The longest wait: asking costs nothing here, and what is read waits meanwhile."""


def again_after(overloaded: Overloaded) -> float:
    """Seconds until it is asked again, with jitter."""
    return min(overloaded.retry_after, AGAIN_SECONDS) * random.uniform(0.75, 1.25)  # noqa: S311
