"""Screens records between a source and its pipeline: those that do not fit are not accepted.

A pipeline with `handler.validate = "accept"` is given to the sources as a `ScreenedIntake`, any
other one as it is, so that nothing is asked where nothing is to be done. Its `accept` screens first
and is what sources need that tell nobody. HTTP has to know before it makes its answer, which may be
stored in the commit of the records: it calls `screen`, and appends to `plain`.

A record that does not fit is an invalid one, with the reason `schema`: it is never accepted, counts
as any other invalid record, and is kept as a dead letter within the same bounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ingestd.base.append import DeliveryWaiter
from ingestd.base.envelope import EnvelopeRuns, is_shared
from ingestd.base.record import InvalidRecord
from ingestd.codecs.lines import Parsed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ingestd.base.append import (
        Append,
        IdempotencyClaim,
        RecentIds,
        SourceOffset,
    )
    from ingestd.base.record import Format, Records
    from ingestd.handlers.outcome import Rejection
    from ingestd.sources.base import Intake

SCHEMA = "schema"
"""The reason of an invalid record that does not fit the handler's annotation."""


class Screen(Protocol):
    """Knows which records fit a pipeline.

    Attributes:
        schema: of a record, JSON of `[schema, {name: schema that it refers to}]`; empty if there is
            none.
    """

    @property
    def schema(self) -> bytes: ...  # noqa: D102 - see the class

    async def reject(self, records: Records) -> Sequence[Rejection]:
        """Returns rejections of the records that do not fit.

        Raises:
            Overloaded: it cannot be told now.
        """
        ...


class PartWaiter(DeliveryWaiter):
    """Tells the waiter of an append of outcomes of those of its records that were accepted.

    Args:
        whole: of the append.
        places: of these records in it.
    """

    __slots__ = ("_places", "_whole")

    def __init__(self, whole: DeliveryWaiter, places: Sequence[int]) -> None:
        super().__init__(len(places))
        self._whole, self._places = whole, places

    def settled(self, index: int, records: int) -> None:
        """See `DeliveryWaiter`."""
        super().settled(index, records)
        for place in self._places[index : index + records]:
            self._whole.settled(place, 1)

    def died(self, index: int, records: int, reason: str, error: str) -> None:
        """See `DeliveryWaiter`."""
        for place in self._places[index : index + records]:
            self._whole.died(place, 1, reason, error)


class ScreenedIntake:
    """The intake of a pipeline that does not take every record.

    Args:
        intake: of the pipeline.
        screen: knows which records fit.

    Attributes:
        plain: of the pipeline, which takes every record.
    """

    def __init__(self, intake: Intake, screen: Screen) -> None:
        self.plain = intake
        self.name = intake.name
        self.format: Format = intake.format
        self.record_bytes_max = intake.record_bytes_max
        self.json_depth_max = intake.json_depth_max
        self._screen = screen
        self.reject = screen.reject
        self._waiters: dict[DeliveryWaiter, DeliveryWaiter] = {}  # those of `accept`

    @property
    def schema(self) -> bytes:
        """See `Screen`."""
        return self._screen.schema

    @property
    def recent_ids(self) -> RecentIds:
        """See `Intake`."""
        return self.plain.recent_ids

    async def begin(self, key: str, fingerprint: bytes) -> IdempotencyClaim | bytes:
        """See `Intake`."""
        return await self.plain.begin(key, fingerprint)

    def forget(self, claim: IdempotencyClaim) -> None:
        """See `Intake`."""
        self.plain.forget(claim)

    def stop_waiting(self, waiter: DeliveryWaiter) -> None:
        """See `Intake`."""
        self.plain.stop_waiting(self._waiters.pop(waiter, waiter))

    async def offset(self, key: str) -> SourceOffset | None:
        """See `Intake`."""
        return await self.plain.offset(key)

    async def fits(self, records: Records) -> bool:
        """Tells if all records can be accepted.

        Raises:
            Overloaded: it cannot be told now.
        """
        return not await self.reject(records)

    async def screen(self, parsed: Parsed, first: int = 0) -> Parsed:
        """Returns the records less those that do not fit, which are invalid.

        Args:
            parsed: the records.
            first: the index of the first one, good or not.

        Raises:
            Overloaded: it cannot be told now.
        """
        rejections = await self.reject(parsed.records) if parsed.records.count else ()
        return without_rejected(parsed, rejections, first) if rejections else parsed

    async def accept(self, append: Append) -> None:
        """Accepts the records that fit; see `Intake`. The others are settled then."""
        rejected = await self.reject(append.records) if append.records.count else ()
        if not rejected:
            await self.plain.accept(append)
            return
        parsed = Parsed(append.records, list(append.invalid), append.unkept)
        kept = without_rejected(parsed, rejected)
        append, whole = (
            append._replace(
                records=kept.records, invalid=kept.refused, unkept=kept.unlisted, waiter=None
            ),
            append.waiter,
        )
        if whole is not None and kept.records.count:
            bad = {one.index for one in rejected}
            good = [place for place in range(parsed.records.count) if place not in bad]
            part = self._waiters[whole] = PartWaiter(whole, good)
            append = append._replace(waiter=part)
        try:
            await self.plain.accept(append)
        except BaseException:
            if whole is not None:
                self.stop_waiting(whole)
            raise
        if whole is not None:
            for one in rejected:
                whole.settled(one.index, 1)


def without_rejected(parsed: Parsed, rejections: Sequence[Rejection], first: int = 0) -> Parsed:
    """Returns records without those that were rejected, which are among the invalid ones.

    Args:
        parsed: the records.
        rejections: by their places among the good ones.
        first: the index of the first record, good or not.
    """
    details = {one.index: one.error for one in rejections}
    places = sorted(details)
    records, items = parsed.records, parsed.records.items()
    envelopes = _envelopes_of(records)
    refused = [
        InvalidRecord(index, SCHEMA, details[place], items[place], envelopes(place))
        for place, index in zip(places, indexes(places, parsed, first), strict=False)
    ]
    unlisted = parsed.unlisted + len(places) - len(refused)
    good = [place for place in range(records.count) if place not in details]
    refused = sorted([*parsed.refused, *refused], key=lambda one: one.index)
    return Parsed(records.pick(good), refused, unlisted)


def _envelopes_of(records: Records) -> Callable[[int], bytes]:
    """Gives the envelope of the record at a place."""
    packed = records.envelopes
    if is_shared(packed):
        return lambda _: packed
    runs = EnvelopeRuns(packed, records.count)
    return lambda place: runs.part(place, 1)


def indexes(places: Sequence[int], parsed: Parsed, first: int = 0) -> Iterator[int]:
    """Yields the indexes, among all records that were sent, of some of the good ones.

    Behind the last invalid record that is listed they are not known, if there are more.

    Args:
        places: of them, among the good ones, growing.
        parsed: all of them.
        first: the index of the first record, good or not.
    """
    skipped, refused = 0, parsed.refused
    for place in places:
        while skipped < len(refused) and refused[skipped].index <= first + place + skipped:
            skipped += 1
        if parsed.unlisted and skipped == len(refused):
            return
        yield first + place + skipped
