"""Screens records between a source and its pipeline: which go to others, and which do not fit.

A pipeline with a `[route]` or `handler.validate = "accept"` is given to the sources as a
`ScreenedIntake`, any other one as it is, so that nothing is asked where nothing is to be done. Its
`accept` screens first and is what sources need that tell nobody. HTTP has to know before it makes
its answer, which may be stored in the commit of the records: it calls `sort` and `divide`, and
appends to the pipelines themselves.

1. A record goes to one pipeline: that of the table for its value, else the default one. It has to
   fit the pipeline that it goes to.
2. A record that does not fit is invalid with the reason `schema`, one that has no pipeline with the
   reason `unrouted`. Such a record is never accepted, counts as any other invalid one, and is kept
   as a dead letter within the same bounds, in the pipeline that it was for.
3. Pipelines have a journal each, so what goes to several is accepted in several commits. `accept`
   ends when all are done. If no pipeline has room, nothing is accepted and that is an overload;
   once one has accepted its part the others are tried until they do. What else is in the append,
   such as an offset, is committed behind all of that in the pipeline that it was for. So a crash in
   between repeats records, and loses none.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import msgspec

from ingestd.base.append import DeliveryWaiter
from ingestd.base.bursts import compute_beside
from ingestd.base.envelope import EnvelopeRuns, is_shared
from ingestd.base.errors import (
    IdsInFlight,
    KeyInFlight,
    KeyReused,
    KeysFull,
    KeysUnsupported,
    KeyTaken,
    Overloaded,
)
from ingestd.base.record import InvalidRecord
from ingestd.codecs.lines import Parsed
from ingestd.codecs.pointer import Pointer
from ingestd.handlers.outcome import Rejection
from ingestd.sources.base import AGAIN_SECONDS, accept_patiently, patiently
from ingestd.sources.targets import NAME_CHARACTERS_MAX, TargetTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ingestd.base.append import (
        Append,
        IdempotencyClaim,
        RecentIds,
        SourceOffset,
    )
    from ingestd.base.record import Format, Records
    from ingestd.sources.base import Intake

T = TypeVar("T")

SCHEMA = "schema"
"""The reason of an invalid record that does not fit the handler's annotation."""
UNROUTED = "unrouted"
"""The reason of an invalid record that has no pipeline."""
THREAD_BYTES = 64 * 1024
"""From this size on records are sorted in a thread; of good ones it takes 0.3 ms on the loop."""
VALUES_MAX = 1000
"""Values whose pipeline is remembered."""


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


class Sorted(NamedTuple):
    """Places of a run of records by what becomes of them, growing.

    Attributes:
        places: by pipeline, of those that it accepts.
        rejected: by pipeline, of those that are invalid; the reason is that of an invalid record.
    """

    places: dict[str, Sequence[int]]
    rejected: dict[str, Sequence[Rejection]]


class Router:
    """Finds the pipeline of each record by a value in it.

    Args:
        field: JSON Pointer of the value.
        table: by the value, a text as it is, a number or a truth value as JSON has it.
        default: of other records; empty: they have none.
    """

    def __init__(self, field: str, table: Mapping[str, str], default: str) -> None:
        self._pointer = Pointer(field)
        self._table = TargetTable(table)
        self._default = default
        self._known: dict[bytes | None, str] = {None: default}

    def sort(self, records: Records) -> tuple[dict[str, list[int]], list[Rejection]]:
        """Returns places by pipeline, and rejections of the records that have none."""
        places: dict[str, list[int]] = {}
        rejected: list[Rejection] = []
        for place, value in enumerate(self._pointer.values(records)):
            to = self._known.get(value)
            if to is None:
                to = self._find(value)
            if to:
                places.setdefault(to, []).append(place)
            else:
                rejected.append(Rejection(place, UNROUTED, self._fault(value)))
        return places, rejected

    def _find(self, value: bytes | None) -> str:
        text = _text_of(value)
        to = (self._table.find(text) if text is not None else "") or self._default
        if len(self._known) < VALUES_MAX and len(value or b"") <= NAME_CHARACTERS_MAX:
            self._known[value] = to
        return to

    def _fault(self, value: bytes | None) -> str:
        what = "has no value" if value is None else "names no pipeline"
        return f"{self._pointer.text} {what}"


def _text_of(value: bytes | None) -> str | None:
    """The text that a table has for a value; `None` for one that it cannot have."""
    if value is None or value[:1] in b"{[":
        return None
    return str(msgspec.json.decode(value)) if value[:1] == b'"' else value.decode()


class ScreenedIntake:
    """The intake of a pipeline that does not take every record.

    Args:
        intake: of the pipeline.
        screen: knows which records fit it; `None` if all do.
        router: knows which pipelines its records go to; `None` if they are its own.
        intakes: of all pipelines, themselves.
        screens: knows of others which records fit, where not all do.

    Attributes:
        plain: of the pipeline itself.
        is_routed: its records may go to others.
    """

    def __init__(
        self,
        intake: Intake,
        screen: Screen | None = None,
        router: Router | None = None,
        intakes: Mapping[str, Intake] = MappingProxyType({}),
        screens: Mapping[str, Screen] = MappingProxyType({}),
    ) -> None:
        self.plain = intake
        self.name = intake.name
        self.format: Format = intake.format
        self.record_bytes_max = intake.record_bytes_max
        self.json_depth_max = intake.json_depth_max
        self.is_routed = router is not None
        self._screen, self._router = screen, router
        self._intakes = {**intakes, intake.name: intake}
        self._screens = {**screens, **({intake.name: screen} if screen is not None else {})}
        self._waiters: dict[DeliveryWaiter, list[tuple[Intake, DeliveryWaiter]]] = {}
        self._turn = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(
            1, f"{intake.name}-route", initializer=compute_beside, initargs=(self._loop,)
        )

    @property
    def schema(self) -> bytes:
        """See `Screen`; empty where records may go to other pipelines."""
        return self._screen.schema if self._screen is not None and self._router is None else b""

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
        for intake, one in self._waiters.pop(waiter, [(self.plain, waiter)]):
            intake.stop_waiting(one)

    async def offset(self, key: str) -> SourceOffset | None:
        """See `Intake`."""
        return await self.plain.offset(key)

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # -- screening -----------------------------------------------------------------------------

    async def fits(self, records: Records) -> bool:
        """Tells if all records can be accepted here.

        Raises:
            Overloaded: it cannot be told now.
        """
        return await self.sort(records) is None

    async def sort(self, records: Records) -> Sorted | None:
        """Tells what becomes of records; `None` if all are accepted here.

        Raises:
            Overloaded: it cannot be told now.
        """
        if not records.count:
            return None
        places: dict[str, Sequence[int]] = {self.name: range(records.count)}
        rejected: dict[str, Sequence[Rejection]] = {}
        if self._router is not None:
            found, unrouted = await self._beside(records, self._router.sort, records)
            places = dict(found)
            if unrouted:
                rejected[self.name] = unrouted
        for to in [to for to in places if to in self._screens]:
            mine = places[to]
            some = await self._beside(records, records.pick, mine)
            found_bad = await self._screens[to].reject(some)
            if not found_bad:
                continue
            bad = {one.index for one in found_bad}
            said = [Rejection(mine[one.index], SCHEMA, one.error) for one in found_bad]
            rejected[to] = sorted([*rejected.get(to, ()), *said], key=lambda one: one.index)
            places[to] = [place for at, place in enumerate(mine) if at not in bad]
        if not rejected and list(places) == [self.name]:
            return None
        return Sorted(places, rejected)

    async def divide(self, parsed: Parsed, found: Sorted, first: int = 0) -> dict[str, Parsed]:
        """Returns what goes to each pipeline: its records, and those that are invalid there.

        Args:
            parsed: the records, and those that were invalid before: they stay here.
            found: of the records.
            first: the index of the first one, good or not.
        """
        return await self._beside(parsed.records, divided, parsed, found, self.name, first)

    async def screen(self, parsed: Parsed, first: int = 0) -> Parsed:
        """Returns the records less those that do not fit, where all others are accepted here.

        Raises:
            Overloaded: it cannot be told now.
        """
        found = await self.sort(parsed.records)
        if found is None:
            return parsed
        return (await self.divide(parsed, found, first))[self.name]

    async def _beside(self, records: Records, call: Callable[..., T], *arguments: Any) -> T:
        if len(records.payload) < THREAD_BYTES:
            return call(*arguments)
        return await self._loop.run_in_executor(self._thread, call, *arguments)

    # -- acceptance ----------------------------------------------------------------------------

    async def accept(self, append: Append) -> None:
        """Accepts the records that fit; see `Intake`. The others are settled then.

        Appends keep their order, although large ones are sorted in a thread and small ones are not.
        What fits as it is waits for its commit outside of the turn, so it shares one with others.
        """
        async with self._turn:
            found = await self.sort(append.records)
            if found is not None:
                await self._accept_sorted(append, found)
                return
            accepting = self._loop.create_task(self.plain.accept(append))
        await accepting

    async def _accept_sorted(self, append: Append, found: Sorted) -> None:
        parsed = Parsed(append.records, list(append.invalid), append.unkept)
        parts = {
            to: append._replace(
                records=part.records, invalid=part.refused, unkept=part.unlisted,
                waiter=None, claim=None, offset=None, ids=None,
            )
            for to, part in (await self.divide(parsed, found)).items()
        }  # fmt: skip
        whole = append.waiter
        if whole is not None:
            self._add_waiters(whole, parts, found)
        own = parts.pop(self.name)._replace(
            claim=append.claim, offset=append.offset, ids=append.ids
        )
        try:
            await self._accept_others(parts, append.claim)
            if not _is_empty(own):
                await (accept_patiently(self.plain, own) if parts else self.plain.accept(own))
        except BaseException:
            if whole is not None:
                self.stop_waiting(whole)
            raise
        if whole is not None:
            for rejected in found.rejected.values():
                for one in rejected:
                    whole.settled(one.index, 1)

    def _add_waiters(self, whole: DeliveryWaiter, parts: dict[str, Append], found: Sorted) -> None:
        """Gives each part a waiter that tells that of the whole append."""
        waiters: list[tuple[Intake, DeliveryWaiter]] = []
        for to, part in parts.items():
            if part.records.count:
                waiter = PartWaiter(whole, found.places[to])
                parts[to] = part._replace(waiter=waiter)
                waiters.append((self._intakes[to], waiter))
        if waiters:
            self._waiters[whole] = waiters

    async def _accept_others(
        self, parts: Mapping[str, Append], claim: IdempotencyClaim | None
    ) -> None:
        """Accepts what goes to other pipelines, see the third invariant."""
        calls = [
            partial(_accept_part, self._intakes[to], part, claim) for to, part in parts.items()
        ]
        done = await asyncio.gather(*(call() for call in calls), return_exceptions=True)
        errors = [one for one in done if isinstance(one, BaseException)]
        for error in errors:
            if not isinstance(error, Overloaded) or len(errors) == len(calls):
                raise error
        for call, refused in zip(calls, done, strict=True):
            if refused is not None:
                await patiently(call)


async def _accept_part(intake: Intake, part: Append, whole: IdempotencyClaim | None) -> None:
    """Has another pipeline accept its part of an append, once under the key of the whole.

    Raises:
        Overloaded: see `Intake.accept`, or another try of it is in progress there.
    """
    while whole is not None:
        try:
            claim = await intake.begin(whole.key, whole.fingerprint)
        except KeyInFlight as error:
            raise IdsInFlight(retry_after=AGAIN_SECONDS) from error
        except (KeysFull, KeyReused, KeysUnsupported):
            break  # they are no reason to keep records out
        if isinstance(claim, bytes):
            return
        claim.answer = whole.answer
        try:
            await intake.accept(part._replace(claim=claim))
        except KeyTaken:  # now it has an answer
            continue
        finally:
            intake.forget(claim)
        return
    await intake.accept(part)


def _is_empty(append: Append) -> bool:
    """Tells if there is nothing to append."""
    has_records = append.records.count or append.invalid or append.unkept
    return not (has_records or append.claim or append.offset or append.ids)


def divided(parsed: Parsed, found: Sorted, own: str, first: int = 0) -> dict[str, Parsed]:
    """Returns what goes to each pipeline; `own` has those that were invalid before.

    See `ScreenedIntake.divide`.
    """
    records = parsed.records
    parts = {to: Parsed(records.pick(places), []) for to, places in found.places.items() if places}
    parts[own] = Parsed(
        parts[own].records if own in parts else records.pick(()), parsed.refused, parsed.unlisted
    )
    if not found.rejected:
        return parts
    items, envelopes = records.items(), _envelopes_of(records)
    bad = sorted(one.index for rejected in found.rejected.values() for one in rejected)
    known = dict(zip(bad, indexes(bad, parsed, first), strict=False))
    for to, rejected in found.rejected.items():
        refused = [
            InvalidRecord(
                known[one.index], one.reason, one.error, items[one.index], envelopes(one.index)
            )
            for one in rejected
            if one.index in known
        ]
        before = parts.get(to, Parsed(records.pick(()), []))
        listed = sorted([*before.refused, *refused], key=lambda one: one.index)
        unlisted = before.unlisted + len(rejected) - len(refused)
        parts[to] = Parsed(before.records, listed, unlisted)
    return parts


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
