"""The two sides of a source: the door it hands records to, and the life its owner gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ingestd.base.record import Records, Refused

Format = Literal["json", "text", "bytes"]
"""What the records of a pipeline are."""


class Intake(Protocol):
    """The door of one pipeline.

    Attributes:
        name: the pipeline's.
        format: what its records are.
        record_bytes_max: a longer record is refused.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - see the class
    @property
    def format(self) -> Format: ...  # noqa: D102
    @property
    def record_bytes_max(self) -> int: ...  # noqa: D102

    async def accept(self, records: Records, refused: Sequence[Refused] = ()) -> None:
        """Returns once all of it is durable; all or nothing.

        Args:
            records: may be an empty run if there are refused ones.
            refused: records to be kept as dead letters.

        Raises:
            Overloaded: at a bound; nothing was taken.
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

    async def wait_finished(self) -> None:
        """Returns when there is no more input and all of it is accepted; never for a server.

        Raises:
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
