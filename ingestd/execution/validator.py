"""Validates records before they are accepted: `handler.validate = "accept"`.

A process of its own has imported the handler's module and decodes records as a worker would, with
the same code; the handler is neither made nor called there. The daemon imports nothing of the
user's and decodes nothing on its loop. Invariants:

1. A record is accepted exactly if the decoding of a worker takes it. What of a run does not fit
   comes back as rejections; where the process cannot say, no record of the run is accepted, and the
   source is told that a later try may succeed.
2. A run goes in pieces, one after the other, so that a large one lets small ones through between
   its pieces, and a piece is not copied more than once on its way.
3. A piece that kills the process, makes it hang, or makes the decoding itself fail is halved, until
   the record is alone that does it. That one is rejected when it has done it twice, because a
   process may also be killed by others; a worker would fare no better with it.
4. Everything is bounded: the records that wait or are validated (`QUEUE_BYTES_MAX` and
   `QUEUE_RUNS_MAX`, beyond one run), the time of a piece (`CALL_SECONDS`), and so that of a run.
   At a bound the run is refused as an overload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.base.errors import Overloaded
from ingestd.base.record import Span
from ingestd.handlers.outcome import POSTPONED, Job, Rejection

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingestd.base.record import Records
    from ingestd.execution.pool import ThreadedPool
    from ingestd.handlers.outcome import Failure

PIECE_BYTES = 512 * 1024
"""Bytes of a piece, or one record: so two of them fit into the memory that is shared."""
CALL_SECONDS = 10.0
"""Longest time of one piece; decoding as many bytes takes pydantic about 0.1 s."""
QUEUE_BYTES_MAX = 64 * 1024 * 1024
QUEUE_RUNS_MAX = 1000
TRIES = 2
"""So often a record alone may end the process before it is rejected."""
_NO_MEMORY = "MemoryError"
_TOLD = {"crashed": "ended its process", "timeout": "took too long"}
"""Of what happened no more than this: clients are told, and an exception may say too much."""


class ValidatorBusy(Overloaded):
    """Records cannot be validated now; a later try may succeed."""

    message = "records of the pipeline {pipeline} cannot be validated now: {problem}"


class Validator:
    """Validates the records of one pipeline; on the event loop.

    Args:
        pipeline: its name.
        pool: of the one process that validates.
        schema: gives the schema of the records that the process told; see `Validation.schema`.
    """

    def __init__(self, pipeline: str, pool: ThreadedPool, schema: Callable[[], bytes]) -> None:
        self._pipeline = pipeline
        self._pool = pool
        self._schema = schema
        self._bytes = self._runs = 0
        self._is_open = False

    async def start(self) -> None:
        """Starts the process.

        Raises:
            HandlerLoadError: it can't load the handler, or has nothing to validate.
        """
        await self._pool.start()
        self._is_open = True

    @property
    def schema(self) -> bytes:
        """The JSON Schema of a record, with those that it refers to; see `Validation.schema`."""
        return self._schema()

    async def reject(self, records: Records) -> list[Rejection]:
        """Rejections of the records that do not fit, by their places.

        Raises:
            ValidatorBusy: it cannot be told now.
        """
        size = records.stored_bytes
        if self._runs and (self._bytes + size > QUEUE_BYTES_MAX or self._runs >= QUEUE_RUNS_MAX):
            raise self._busy("too many wait")
        self._bytes += size
        self._runs += 1
        try:
            found: list[Rejection] = []
            first = 0
            for piece in records._replace(envelopes=b"").pieces(PIECE_BYTES):
                found += await self._reject(piece, first)
                first += piece.count
        finally:
            self._bytes -= size
            self._runs -= 1
        return found

    async def _reject(self, records: Records, first: int) -> list[Rejection]:
        """Rejections of a piece, whose first record has the place `first`."""
        failure: Failure | None = None
        for _ in range(TRIES if records.count == 1 else 1):
            result = await self._pool.run(_job(records))
            failure = result.failure
            if failure is None:
                return [_moved(one, first) for one in result.rejections]
            if failure.reason == POSTPONED:
                raise self._busy("the process for it does not start")
            if failure.error.startswith(_NO_MEMORY):
                raise self._busy("there is no memory for it")
        if records.count == 1:
            told = _TOLD.get(failure.reason if failure is not None else "", "failed")
            return [Rejection(first, "undecodable", f"decoding it {told}, twice")]
        middle = records.count // 2
        found = await self._reject(records.part(0, middle), first)
        rest = records.part(middle, records.count - middle)
        return found + await self._reject(rest, first + middle)

    def _busy(self, problem: str) -> ValidatorBusy:
        return ValidatorBusy(pipeline=self._pipeline, problem=problem, retry_after=1.0)

    async def close(self, deadline: float) -> None:
        """Ends the process, by force after `deadline` (loop time)."""
        if self._is_open:
            self._is_open = False
            await self._pool.close(deadline)


def _job(records: Records) -> Job:
    return Job("", 1, records, [Span(0, 0, records.count)], "")


def _moved(rejection: Rejection, places: int) -> Rejection:
    return (
        Rejection(rejection.index + places, rejection.reason, rejection.error)
        if places
        else rejection
    )
