"""`GET /v1/tap`: records as they pass a stage of a pipeline, as lines of JSON.

A pipeline that is tapped hands over what it has in hands anyway, whole: a chunk when it is durable,
a batch when it is settled. Nothing is done for each record there, and nothing at all while nothing
taps. The tap keeps a bounded number of these, and takes them apart in a thread for at most a tenth
of its time, so neither a slow reader nor a fast pipeline changes the pace of the pipeline. What has
no room is lost for the tap and counted: lines `{"lost": N}` have the number of records that it has
not looked at. An empty line says that there is nothing to show.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import async_timeout
import msgspec

from ingestd.admin.connection import StreamedResponse, pieced
from ingestd.admin.operations import number_in
from ingestd.base.clock import SystemClock, shown
from ingestd.base.envelope import facts_of, singles
from ingestd.base.record import Span
from ingestd.codecs.pointer import Where
from ingestd.http import problem
from ingestd.http.problem import Problem, retry_after
from ingestd.journal.handling import payload_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ingestd.admin.connection import Outlet
    from ingestd.admin.status import AdminView
    from ingestd.base.batch import SealedBatch
    from ingestd.base.record import Records
    from ingestd.journal.dead_letters import DeadLetter
    from ingestd.journal.interface import Chunk
    from ingestd.pipeline import Pipeline

Stage = Literal["accepted", "processed", "dead"]

TAPS_MAX = 8
"""Taps at one time."""
HELD_BYTES = 4 << 20
"""Bytes of records that a tap holds, beside one chunk or batch."""
HELD_MAX = 64
"""Chunks and batches that it holds."""
SHARE = 0.1
"""The part of the time in which it takes records apart."""
IDLE_SECONDS = 5.0
"""Time without records after which an empty line is sent: that finds clients that have gone."""
PAUSE_MAX = 1.0
"""Seconds between two looks, at most."""
CONDITIONS_MAX = 16


class Seen(NamedTuple):
    """Records that pass a stage together.

    Attributes:
        pipeline: its name.
        journal: the id of its journal.
        at: when it happened, seconds since the epoch.
        records: the records.
        spans: their places in the journal.
        batch: the number of their batch; 0 before they are in one.
        attempts: tries of that batch.
        wanted: the places of those that pass this stage; `None` for all.
        reasons: of each of these that died: reason and error.
    """

    pipeline: str
    journal: str
    at: float
    records: Records
    spans: Sequence[Span]
    batch: int = 0
    attempts: int = 0
    wanted: Sequence[int] | None = None
    reasons: Mapping[int, tuple[str, str]] = MappingProxyType({})

    @property
    def passing(self) -> Sequence[int]:
        """The places of the records that pass."""
        return range(self.records.count) if self.wanted is None else self.wanted


class TapQuery(NamedTuple):
    """The parameters of a tap.

    Attributes:
        pipelines: names.
        stage: the stage.
        where: conditions on the records.
        sample: the part of the records that is shown.
        limit: ends after so many; 0 for no end.
    """

    pipelines: Sequence[str]
    stage: Stage
    where: Where
    sample: float
    limit: int


def read_query(asked: Mapping[str, Sequence[str]], pipelines: Sequence[str]) -> TapQuery:
    """Reads the parameters of a request.

    Args:
        asked: its query; the names in it are known ones.
        pipelines: the names of those that it is about.

    Raises:
        Problem: 400.
    """
    found = {name: values[-1] for name, values in asked.items()}
    stage: Any = found.get("stage", "accepted")
    if stage not in get_args(Stage):
        raise Problem(problem.BAD_REQUEST, f"stage is one of {', '.join(get_args(Stage))}")
    conditions = asked.get("where", ())
    if len(conditions) > CONDITIONS_MAX:
        raise Problem(problem.BAD_REQUEST, f"there are at most {CONDITIONS_MAX} conditions")
    try:
        where = Where(conditions)
        sample = float(found.get("sample", "1"))
    except ValueError as error:
        raise Problem(problem.BAD_REQUEST, str(error)) from None
    if not 0 < sample <= 1:
        raise Problem(problem.BAD_REQUEST, "sample is above 0 and up to 1")
    return TapQuery(pipelines, stage, where, sample, number_in(asked, "limit") or 0)


class Taps:
    """The taps of all pipelines.

    Args:
        view: the daemon.
    """

    def __init__(self, view: AdminView) -> None:
        self._view = view
        self._taps: list[_Tap] = []

    def open(self, query: TapQuery, is_allowed: Callable[[], bool]) -> StreamedResponse:
        """Opens a tap.

        Args:
            query: what it shows.
            is_allowed: see `StreamedResponse`.

        Raises:
            Problem: there are too many.
        """
        if len(self._taps) >= TAPS_MAX:
            detail = f"there are {TAPS_MAX} taps already"
            raise Problem(problem.BUSY, detail, headers=retry_after(10.0))
        write = partial(self._write, query)
        return StreamedResponse("application/x-ndjson", write, is_allowed)

    async def _write(self, query: TapQuery, outlet: Outlet) -> None:
        tap = _Tap(query)
        self._taps.append(tap)
        self._connect()
        try:
            await tap.write(outlet)
        finally:
            self._taps.remove(tap)
            self._connect()

    def _connect(self) -> None:
        """Has each pipeline hand over what some tap wants to see, and no more."""
        for name, pipeline in self._view.pipelines.items():
            stages = {tap.query.stage for tap in self._taps if name in tap.query.pipelines}
            accepted, settled = "accepted" in stages, stages & {"processed", "dead"}
            pipeline.reader.on_push = partial(self._accepted, pipeline) if accepted else None
            pipeline.settlements.on_outcome = partial(self._settled, pipeline) if settled else None

    def _accepted(self, pipeline: Pipeline, chunk: Chunk) -> None:
        spans = (Span(chunk.id, 0, chunk.records.count),)
        name, journal = pipeline.name, pipeline.settlements.journal_id
        self._offer("accepted", Seen(name, journal, chunk.accepted_at, chunk.records, spans))

    def _settled(
        self,
        pipeline: Pipeline,  # one of an adopted log may have left the others
        batch: SealedBatch,
        records: Records,
        dead: Mapping[int, DeadLetter],
        again: frozenset[int],
    ) -> None:
        seen = Seen(
            pipeline.name, pipeline.settlements.journal_id, SystemClock.now(), records,
            batch.spans, batch.number, batch.attempts,
        )  # fmt: skip
        if dead:
            reasons = {index: (one.reason, one.error) for index, one in dead.items()}
            self._offer("dead", seen._replace(wanted=sorted(dead), reasons=reasons))
        if dead or again:
            left = [n for n in range(records.count) if n not in dead and n not in again]
            seen = seen._replace(wanted=left)
        if seen.passing:
            self._offer("processed", seen)

    def _offer(self, stage: Stage, seen: Seen) -> None:
        for tap in self._taps:
            if tap.query.stage == stage and seen.pipeline in tap.query.pipelines:
                tap.offer(seen)


class _Tap:
    """One tap.

    Args:
        query: what it shows.

    Attributes:
        lost: records that it had no room for.
    """

    def __init__(self, query: TapQuery) -> None:
        self.query = query
        self._held: deque[Seen] = deque()
        self._bytes = 0
        self._came = asyncio.Event()
        self._shown = 0
        self._passed = 0.0
        self.lost = 0

    def offer(self, seen: Seen) -> None:
        """Takes records that pass, if there is room."""
        size = seen.records.held_bytes
        if len(self._held) >= HELD_MAX or (self._held and self._bytes + size > HELD_BYTES):
            self.lost += len(seen.passing)
            return
        self._held.append(seen)
        self._bytes += size
        self._came.set()

    async def write(self, outlet: Outlet) -> None:
        """Writes lines until the limit is reached, or the client has gone.

        Raises:
            TimeoutError: it takes nothing.
        """
        loop = asyncio.get_running_loop()
        told = 0
        while not (self.query.limit and self._shown >= self.query.limit):
            if not await self._wait():
                await outlet.send(b"\n")
                continue
            seen = self._held.popleft()
            self._bytes -= seen.records.held_bytes
            lines, piece = self._lines(seen), b"."
            while piece:
                began = loop.time()
                piece = await loop.run_in_executor(None, pieced, lines)
                worked = loop.time() - began
                await outlet.send(piece)
                await asyncio.sleep(min(PAUSE_MAX, worked * (1 / SHARE - 1)))
            if self.lost > told:
                told = self.lost
                await outlet.send(msgspec.json.encode({"lost": told}) + b"\n")

    async def _wait(self) -> bool:
        """Waits for records; returns False if none came for a while."""
        self._came.clear()
        if not self._held:
            try:
                async with async_timeout.timeout(IDLE_SECONDS):
                    await self._came.wait()
            except TimeoutError:
                return False
        return True

    def _lines(self, seen: Seen) -> Iterator[bytes]:
        """Yields the lines of the records that are shown; in a thread."""
        query = self.query
        items, records = seen.records.items(), seen.records
        places, envelopes = _ids(seen), singles(records.envelopes, records.count)
        for index in seen.passing:
            if query.limit and self._shown >= query.limit:
                return
            if not query.where.holds(items[index]):
                continue
            # Each record adds its part, and each whole that this makes is shown: no run of records
            # is preferred.
            self._passed += query.sample
            if self._passed < 1:
                continue
            self._passed -= 1
            self._shown += 1
            facts: dict[str, Any] = {
                "stage": query.stage,
                "pipeline": seen.pipeline,
                "at": shown(seen.at),
                "id": places[index],
            }
            if seen.batch:
                facts |= {"batch": f"{seen.journal}-{seen.batch}", "attempts": seen.attempts}
            if index in seen.reasons:
                facts["reason"], facts["error"] = seen.reasons[index]
            facts["envelope"] = facts_of(envelopes[index])
            yield msgspec.json.encode({**facts, **payload_fields(items[index])}) + b"\n"


def _ids(seen: Seen) -> Sequence[str]:
    places = [
        f"{seen.journal}.{chunk}.{index}"
        for chunk, first, count in seen.spans
        for index in range(first, first + count)
    ]
    names = seen.records.names
    return [name or place for name, place in zip(names, places, strict=True)] if names else places
