"""Appends the records of one URL in order: one append runs, and records wait for the next one.

A position that is durable says that everything before it was accepted. So no append may overtake
another one, not even where a full disk refuses the first and takes the second.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.append import Append
from ingestd.base.record import join
from ingestd.sources.base import accept_patiently

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingestd.base.append import SourceOffset
    from ingestd.codecs.lines import Parsed
    from ingestd.sources.base import Intake
    from ingestd.sources.fetch.concurrency import InflightBudget

APPEND_BYTES = 4 * 1024**2
"""Size up to which waiting runs are joined to one append."""
_REFUSED_BYTES = 256  # what a refused record costs beside its payload, about


class _Sized(NamedTuple):
    append: Append
    size: int


class Appends:
    """Appends the records of one URL in order.

    Args:
        intake: the pipeline.
        budget: shared with the other URLs.
        accepted: called after each append with its numbers of good and refused records.

    Attributes:
        envelope: packed, of records that have none of their own.
    """

    def __init__(
        self, intake: Intake, budget: InflightBudget, accepted: Callable[[int, int], None]
    ) -> None:
        self._intake = intake
        self._budget = budget
        self._accepted = accepted
        self.envelope = b""
        self._waiting: deque[_Sized] = deque()
        self._held = 0
        self._task: asyncio.Task[None] | None = None

    async def put(self, parsed: Parsed, offset: SourceOffset | None) -> None:
        """Takes records and their end position, as soon as the budget allows.

        Raises:
            IngestdError: nothing more can be stored.
        """
        size = _size(parsed)
        while self._held and not self._budget.has(size):
            self._check()
            await self._budget.freed()
        self._check()
        self.put_now(parsed, offset)

    def put_now(self, parsed: Parsed, offset: SourceOffset | None) -> None:
        """The same without waiting, for the last ones."""
        size = _size(parsed)
        records, envelope = parsed.records, self.envelope
        if not records.envelopes:
            records = records._replace(envelopes=envelope)
        refused = [one._replace(envelope=one.envelope or envelope) for one in parsed.refused]
        append = Append(records, refused, offset=offset, unkept=parsed.unlisted)
        self._waiting.append(_Sized(append, size))
        self._hold(size)
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="fetch-append")

    async def flushed(self) -> None:
        """Returns once everything that was taken is accepted.

        Raises:
            IngestdError: it can't be.
        """
        while self._task is not None:
            await asyncio.wait([self._task])
            self._check()

    async def close(self) -> int:
        """Ends. Records that are not accepted by now are left, and so is their position.

        Returns:
            Their bytes.
        """
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        left, self._held = self._held, 0
        self._budget.take(-left)
        return left

    def _hold(self, size: int) -> None:
        self._held += size
        self._budget.take(size)

    def _check(self) -> None:
        task = self._task
        if task is not None and task.done() and not task.cancelled() and task.exception():
            raise task.exception() or RuntimeError

    async def _run(self) -> None:
        while self._waiting:
            append, size = self._next()
            try:
                await accept_patiently(self._intake, append)
            except BaseException:
                self._budget.wake()  # waiters for the budget see the failure
                raise
            self._accepted(append.records.count, len(append.invalid) + append.unkept)
            self._hold(-size)
        self._task = None

    def _next(self) -> _Sized:
        """Joins everything that waits, within the bound."""
        runs = [self._waiting.popleft()]
        size = runs[0].size
        while self._waiting and size + self._waiting[0].size <= APPEND_BYTES:
            runs.append(self._waiting.popleft())
            size += runs[-1].size
        if len(runs) == 1:
            return runs[0]
        appends = [run.append for run in runs]
        records = [one.records for one in appends if one.records.count]
        joined = Append(
            join(records) if records else appends[0].records,
            [record for one in appends for record in one.invalid],
            offset=next((one.offset for one in reversed(appends) if one.offset is not None), None),
            unkept=sum(one.unkept for one in appends),
        )
        return _Sized(joined, size)


def _size(parsed: Parsed) -> int:
    kept = sum(len(one.payload) + _REFUSED_BYTES for one in parsed.refused)
    return parsed.records.stored_bytes + kept
