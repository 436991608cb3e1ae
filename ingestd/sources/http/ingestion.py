"""One request's body: read, verified, decoded, accepted, and waited for.

`run` → admission → `_take` → `BodyCodec` → `Intake.accept` → `_wait`, below in that order. A body
of lines whose length is not known is accepted in pieces as it arrives (`stream.py`).
"""

from __future__ import annotations

import asyncio
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple, cast

import async_timeout

from ingestd.base.append import HELD_ID_BYTES, Append, DeliveryWaiter, SenderIds
from ingestd.base.errors import Draining, KeyTaken
from ingestd.base.record import Layout, Records
from ingestd.codecs.lines import Parsed
from ingestd.http import problem
from ingestd.http.admission import AdmissionController
from ingestd.http.auth import UNIDENTIFIED
from ingestd.http.body import (
    BLOCK_BYTES,
    SNAPPY,
    in_our_words,
    length_of,
    name_encoding,
    read_first,
    read_piece,
    read_whole,
    say_continue,
)
from ingestd.http.deadlines import BodyDeadline
from ingestd.http.peer import peer_of
from ingestd.http.problem import EXPLAINED, Problem, explain
from ingestd.http.request import size_of_head
from ingestd.sources.http.decode import BodyDecoder, check_good
from ingestd.sources.http.endpoints.base import Delivery
from ingestd.sources.http.headers import (
    IDEMPOTENCY_HEADER,
    NOTHING,
    PREFER_HEADER,
    REPLAYED,
    parse_key,
    parse_prefer,
)
from ingestd.sources.http.result import IngestResult, PartResult, count_body, counted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from multidict import MultiMapping

    from ingestd.base.append import IdempotencyClaim
    from ingestd.base.record import InvalidRecord
    from ingestd.http.admission import Reservation
    from ingestd.http.auth import Principal
    from ingestd.http.request import Request
    from ingestd.http.response import Response
    from ingestd.http.settings import HttpSettings
    from ingestd.sources.http.endpoints.base import BodyCodec, Decoded, Head, Route
    from ingestd.sources.http.headers import Preferences
    from ingestd.sources.http.stream import Stream
    from ingestd.sources.screening import Sorted

    Authorize = Callable[[Request, Route], Principal]
    Identify = Callable[[Request, Route, str], Principal]

_NOTHING = Parsed(Records.lines([]), [])
HEAD_BYTES_FREE = 8 * 1024
"""A head that takes more counts as held while its request is answered."""


class Durable(NamedTuple):
    """A request whose records are accepted, and whose client waits for their outcomes.

    Attributes:
        answer: the 202, for when the time is up.
        result: for the answer with the outcomes.
        head: of the request.
        waiter: of these records.
        prefer: the client's preferences.
    """

    answer: Response
    result: IngestResult
    head: Head
    waiter: DeliveryWaiter
    prefer: Preferences


class Admitted(NamedTuple):
    """A request that was let in, while its records are accepted.

    Attributes:
        route: where it goes.
        head: of it.
        principal: its sender.
        hold: what it holds.
        prefer: its sender's preferences.
        request: the one.
        codec: of its body.
    """

    route: Route
    head: Head
    principal: Principal
    hold: Reservation
    prefer: Preferences
    request: Request
    codec: BodyCodec

    def envelope(self) -> bytes:
        """The envelope of its records, packed."""
        headers = cast("MultiMapping[str]", self.head.headers)
        return self.route.envelopes.of(headers, self.principal.client)


class Ingestion:
    """Takes bodies; on the event loop.

    Args:
        settings: the bounds.
        authorize: returns the principal of a request that was let in before, or raises a `Problem`
            if it may not send there any more.
        identify: returns the principal of the token in a body, or raises a `Problem`.

    Attributes:
        admission: what all requests together may hold.
        streams: in progress.
        waiting: requests that wait for the outcomes of their records.
        quiet: requests whose body may be a stream and has not begun.
        on_plain: called with a request whose records were accepted, all of them.
    """

    def __init__(self, settings: HttpSettings, authorize: Authorize, identify: Identify) -> None:
        self.admission = AdmissionController(
            settings.inflight_bytes_max,
            requests_max=settings.requests_max,
            share=settings.client_share,
            streams_max=settings.streams_max,
        )
        self._settings = settings
        self._authorize = authorize
        self._identify = identify
        self._decoder = BodyDecoder(settings)
        self.on_plain: Callable[[Admitted], None] = lambda _: None
        self._loop = asyncio.get_running_loop()
        self.streams: set[Stream] = set()
        self.waiting: dict[DeliveryWaiter, tuple[Request, Route]] = {}
        self.quiet: dict[BodyDeadline, tuple[Request, Route]] = {}

    def begin_to_drain(self) -> None:
        """Brings streams and waits to an end."""
        for stream in self.streams:
            stream.leave()
        for waiter in self.waiting:
            waiter.done.set()
        for deadline in self.quiet:
            deadline.end(Draining())

    def look_again(self) -> None:
        """Ends requests in progress that are not allowed any more."""
        for stream in tuple(self.streams):
            stream.look_again()
        for waiter, (request, route) in self.waiting.items():
            try:
                self._authorize(request, route)
            except Problem:
                waiter.done.set()  # its records are accepted, and the answer says so
        for deadline, (request, route) in self.quiet.items():
            try:
                self._authorize(request, route)
            except Problem as found:
                deadline.end(found.with_traceback(None))

    def close(self) -> None:
        """Ends the threads."""
        self._decoder.close()

    async def run(self, request: Request, route: Route, principal: Principal) -> Response:
        """Takes a request's records, and returns its answer.

        Raises:
            Problem: none was accepted, or not all of a stream.
        """
        with self.admission.enter(principal.name or peer_of(request)) as hold:
            if (head := size_of_head(request.raw_headers)) > HEAD_BYTES_FREE:
                hold.add_base(head)
            taken = await self._take(request, route, principal, hold)
            # Nothing holds the body any more, however long this takes.
            return await self._wait(request, route, taken) if isinstance(taken, Durable) else taken

    async def _take(
        self, request: Request, route: Route, principal: Principal, hold: Reservation
    ) -> Response | Durable:
        """Reads a body and makes its records durable."""
        headers, settings = request.headers, self._settings
        head = route.head_of(request.method, request.raw_path, headers)
        codec = route.endpoint.open(head)
        encoding = codec.encoding or name_encoding(headers.getall("Content-Encoding", ()))
        length = length_of(request, settings)
        keyed = IDEMPOTENCY_HEADER in headers and not codec.verifies
        key = parse_key(headers.getall(IDEMPOTENCY_HEADER)) if keyed else None
        prefers = PREFER_HEADER in headers
        prefer = (
            parse_prefer(headers.getall(PREFER_HEADER), settings.wait_max) if prefers else NOTHING
        )
        hold.expect(length or 0)
        say_continue(request)
        # Of these each part alone has a claim, once its pipeline and its sender are known.
        by_part = codec.routes or principal is UNIDENTIFIED
        to = Admitted(route, head, principal, hold, prefer, request, codec)
        streams = length is None and codec.streamable and encoding != SNAPPY
        streams = streams and key is None and not (by_part or route.is_routed)
        wire: bytes | Response
        if streams and not prefer.strict and hold.begin_stream():
            wire = await self._begin_stream(request, to, encoding)
            if not isinstance(wire, bytes):
                return wire
        else:
            wire = await read_whole(request, hold, settings)
        delivery = claim = None
        if codec.verifies:
            delivery = await self._decoder.verify(codec, wire)
        elif key is not None:
            kind = headers.get("Content-Type", "")
            fingerprint = await self._decoder.fingerprint(wire, kind, encoding)
            delivery = Delivery(key, fingerprint)
        # Claimed only now: a connection that died in the middle of a body must not keep the next
        # try of the same request waiting.
        if delivery is not None and not by_part:
            named = delivery if codec.verifies else delivery.of(principal.id)
            claim = await route.intake.begin(*named)
        if isinstance(claim, bytes):
            return _replayed(claim, route, head)
        try:
            parts = await self._decoder.decode(
                wire, hold, encoding=encoding, codec=codec, limits=route.limits
            )
            del wire
            _hold_records(parts, hold)
            if principal is UNIDENTIFIED:
                to = to._replace(principal=self._identify(request, route, _token_in(parts)))
            parts = await self._charged(parts, to)
            by_part = by_part or route.is_routed
            if len(parts) == 1 and not by_part and _is_plain(parts[0]):
                return await self._accept_plain(parts[0], to, claim)
            return await self._accept_parts(parts, to, delivery, claim)
        finally:
            if claim is not None:
                route.intake.forget(claim)

    async def _charged(self, parts: Sequence[Decoded], to: Admitted) -> Sequence[Decoded]:
        """Returns the parts, charged to their sender, less the records that do not fit."""
        for part in parts:
            to.principal.charge(part.parsed.total, len(part.parsed.records.payload))
        if not to.route.screens:
            return parts
        if to.route.is_routed:  # what goes to several is copied
            to.hold.grow(sum(len(part.parsed.records.payload) for part in parts))
        return await _screened(parts, to)

    async def _begin_stream(
        self, request: Request, to: Admitted, encoding: str
    ) -> bytes | Response:
        """Reads a body that may be a stream; one that is gives its answer instead."""
        hold = to.hold
        try:
            first = await self._first_bytes(request, to.route)
            wire, ended = await read_first(
                request, hold, self._settings, encoding=encoding, first=first
            )
            return wire if ended else await self._stream(request, to, encoding, begun=wire)
        finally:
            hold.end_stream()

    async def _accept_plain(
        self, part: Decoded, to: Admitted, claim: IdempotencyClaim | None
    ) -> Response | Durable:
        """Makes records durable, or returns the answer of a daemon that was faster."""
        try:
            return await self._accept(part, to, claim)
        except KeyTaken:
            if claim is None:
                raise
            again = await to.route.intake.begin(claim.key, claim.fingerprint)
            if isinstance(again, bytes):
                return _replayed(again, to.route, to.head)
            to.route.intake.forget(again)
            raise

    async def _accept(
        self, part: Decoded, to: Admitted, claim: IdempotencyClaim | None
    ) -> Response | Durable:
        """Makes records durable."""
        parsed, (route, head, _, hold, prefer, *_) = part.parsed, to
        if prefer.strict and parsed.refused:
            detail = f"{parsed.invalid} of {parsed.total} records; nothing was stored"
            raise Problem(problem.NOT_STRICT, detail, refused=parsed.refused)
        result = IngestResult(
            parsed.records.count, parsed.invalid, parsed.refused, notes=part.notes
        )
        answer = route.endpoint.answer(result, head)
        if claim is not None:
            claim.answer = answer.body
        kept = parsed.refused[: route.limits.invalid_kept]
        waiter = DeliveryWaiter(parsed.records.count) if prefer.wait else None
        append = Append(
            parsed.records,
            kept,
            claim=claim,
            waiter=waiter,
            principal=hold.client,
            unkept=parsed.invalid - len(kept),
            envelope=to.envelope(),
        )
        try:
            await route.intake.accept(append)
        except BaseException:
            if waiter is not None:
                route.intake.stop_waiting(waiter)
            raise
        route.counts.accepted(append)
        if prefer is not NOTHING:
            answer = answer._replace(headers={**answer.headers, **prefer.applied()})
        if waiter is None:
            if not parsed.invalid:
                self.on_plain(to)
            return answer
        hold.give_back()
        listed = [one._replace(payload=b"") for one in parsed.refused]
        result = result._replace(errors=listed, waiter=waiter)
        return Durable(answer, result, head, waiter, prefer)

    async def _accept_parts(
        self,
        parts: Sequence[Decoded],
        to: Admitted,
        delivery: Delivery | None,
        claim: IdempotencyClaim | None,
    ) -> Response:
        """Makes the records of each part durable, each for itself.

        A claim on the whole request is stored with its answer behind all of them, in the commit of
        the part that stays in the route's own pipeline: a request that was interrupted before that
        comes again, and each part is known by the key in its pipeline.

        Raises:
            Problem: nothing was accepted: that of the first part.
        """
        refused = _refused_of(parts)
        if to.prefer.strict and refused:
            detail = f"{sum(part.parsed.invalid for part in parts)} records; nothing was stored"
            raise Problem(problem.NOT_STRICT, detail, refused=refused)
        last = _last_of(parts, to) if claim is not None else None
        results = await asyncio.gather(
            *(_accept_part(part, to, delivery) for part in parts if part is not last),
            return_exceptions=True,
        )
        done = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            done.append(result)
        is_routed = any(part.is_routed for part in parts)
        if last is not None and claim is not None and all(one.problem is None for one in done):
            there = [*done, _result_of(last, to.route.intake.name)]
            claim.answer = self._answer_of(there, to, is_routed=is_routed).body
            done.append(await _accept_part(last, to, None, claim))
        problems = [result.problem for result in done if result.problem is not None]
        if problems and is_routed:
            raise _of_routed(problems, done)
        if problems and len(problems) == len(done):
            raise problems[0]
        for found in problems:
            to.route.counts.refuse(found.kind.slug)
        return self._answer_of(done, to, is_routed=is_routed)

    @staticmethod
    def _answer_of(done: Sequence[PartResult], to: Admitted, *, is_routed: bool) -> Response:
        errors = [one for result in done for one in result.errors]
        if is_routed:
            errors.sort(key=_index)
        answer = to.route.endpoint.answer(
            IngestResult(
                sum(result.accepted for result in done),
                sum(result.invalid for result in done),
                errors,
                parts=done,
            ),
            to.head,
        )
        applied = to.prefer._replace(wait=None).applied()  # the outcomes of several are not told
        return answer._replace(headers={**answer.headers, **applied}) if applied else answer

    async def _wait(self, request: Request, route: Route, durable: Durable) -> Response:
        """Returns once all records have their outcome, the time is up, or the client has left."""
        waiter = durable.waiter
        connection = request.protocol
        self.waiting[waiter] = request, route
        try:
            with connection.at_end(waiter.done.set):
                async with async_timeout.timeout(durable.prefer.wait):
                    await waiter.done.wait()
        except TimeoutError:
            pass
        finally:
            del self.waiting[waiter]
            route.intake.stop_waiting(waiter)
        if waiter.left:
            return durable.answer
        answer = route.endpoint.answer(durable.result, durable.head)
        return answer._replace(headers={**answer.headers, **durable.prefer.applied()})

    async def _first_bytes(self, request: Request, route: Route) -> bytes:
        """Returns the first bytes of a body that may be a stream; nothing if it is empty.

        The first line of a stream may come as late as any other.
        """
        silence = self._settings.stream_silence_max
        detail = f"nothing came for http.stream_silence_max = {silence:g} s"
        deadline = BodyDeadline(
            self._loop, request.content, lambda: 0, timeout=silence, rate_min=0, detail=detail
        )
        self.quiet[deadline] = request, route
        try:
            with in_our_words(request), deadline:
                return await request.content.read(BLOCK_BYTES)
        finally:
            del self.quiet[deadline]

    async def _stream(
        self, request: Request, to: Admitted, encoding: str, *, begun: bytes
    ) -> Response:
        """Accepts a body in pieces."""
        route, head, principal, hold, *_ = to
        connection = request.protocol

        async def read() -> tuple[bytes, bool]:
            with in_our_words(request), BytesIO() as sink:
                ended = await read_piece(request.content, sink, stream.grow)
                return sink.getvalue(), ended

        from ingestd.sources.http.stream import Stream  # noqa: PLC0415  few daemons get one

        screened = route.screens.get(route.intake.name)
        stream = Stream(
            read,
            route.intake,
            principal,
            hold,
            self._decoder.stream_thread,
            invalid_kept=self._settings.invalid_kept,
            encoding=encoding,
            ratio_max=self._settings.inflate_ratio_max,
            silence=self._settings.stream_silence_max,
            envelope=to.envelope(),
            counts=route.counts,
            gone=lambda: request.transport is None or connection.half_closed,
            allowed=lambda: self._authorize(request, route),
            screen=screened.screen if screened is not None else None,
        )
        self.streams.add(stream)
        try:
            return route.endpoint.answer(await stream.run(begun), head)
        finally:
            self.streams.discard(stream)


def _hold_records(parts: Sequence[Decoded], hold: Reservation) -> None:
    """Counts the ids of senders, and records that are larger than their body, as some become."""
    size = sum(len(part.parsed.records.payload) for part in parts)
    size += HELD_ID_BYTES * sum(len(part.ids.known) for part in parts if part.ids is not None)
    if (more := size + hold.base - hold.bytes) > 0:
        hold.grow(more)


def _refused_of(parts: Sequence[Decoded]) -> list[InvalidRecord]:
    """The invalid records of all parts, by their places in the body where these are known."""
    refused = [one for part in parts for one in part.parsed.refused]
    return sorted(refused, key=_index) if any(part.is_routed for part in parts) else refused


def _index(one: InvalidRecord) -> int:
    return one.index


def _of_routed(problems: Sequence[Problem], done: Sequence[PartResult]) -> Problem:
    """The problem of a request whose sender knows nothing of parts: it sends all of them again.

    Those that were accepted are told, and are not accepted twice under an idempotency key.
    """
    found = max(problems, key=lambda one: one.kind.status)  # one that passes comes first
    found.members = {
        "accepted": sum(one.accepted for one in done),
        "invalid": sum(one.invalid for one in done),
    }
    return found


async def _screened(parts: Sequence[Decoded], to: Admitted) -> Sequence[Decoded]:
    """Returns the parts less the records that do not fit.

    Raises:
        Problem: none does, or most do not.
    """
    try:
        screened = await asyncio.gather(*(_screened_part(part, to) for part in parts))
    except EXPLAINED as error:
        raise explain(error) from None
    found = [part for some in screened for part in some]
    refused = _refused_of(found)
    # The answer of a codec that routes tells of each record, or the part.
    if refused and not to.codec.routes and any(part.rejected for part in found):
        check_good(
            sum(part.parsed.records.count for part in found),
            refused,
            sum(part.parsed.unlisted for part in found),
        )
    return found


async def _screened_part(part: Decoded, to: Admitted) -> Sequence[Decoded]:
    """Returns what of a part goes to each pipeline.

    Raises:
        Problem: 403 if its sender may not send to one of them.
    """
    name = part.pipeline or to.route.intake.name
    screen = to.route.screens.get(name)
    found = await screen.sort(part.parsed.records) if screen is not None else None
    if screen is None or found is None:
        return (part,)
    parts = []
    for pipeline, parsed in (await screen.divide(part.parsed, found)).items():
        if pipeline != name:
            _authorize_part(pipeline, part, to, found)
        elif not parsed.total:
            continue  # all of it goes to others
        ids = part.ids
        if ids is not None:
            each = tuple(ids.each[place] for place in found.places.get(pipeline, ()))
            ids = SenderIds(each, ids.known.intersection(each))
        parts.append(
            part._replace(
                parsed=parsed,
                pipeline=part.pipeline if pipeline == name else pipeline,
                ids=ids,
                rejected=found.rejected.get(pipeline, ()),
                is_routed=screen.is_routed,
            )
        )
    return parts


def _authorize_part(pipeline: str, part: Decoded, to: Admitted, found: Sorted) -> None:
    """Checks that a sender may send to a pipeline that a route has chosen.

    Raises:
        Problem: 403. It does not name the pipeline, which this sender may not know of, but the
            first record that goes there.
    """
    try:
        to.principal.authorize(pipeline)
    except Problem as forbidden:
        from ingestd.sources.screening import indexes  # noqa: PLC0415  what screens has it

        index = next(indexes(found.places.get(pipeline, ())[:1], part.parsed), None)
        if index is None or to.codec.routes:
            raise
        detail = f"{forbidden.detail}: the record at index {index} is routed to another pipeline"
        raise Problem(forbidden.kind, detail) from None


def _is_plain(part: Decoded) -> bool:
    """Tells if a part is records without keys or ids of their own."""
    return part.delivery is None and part.ids is None and part.parsed.total > 0


def _token_in(parts: Sequence[Decoded]) -> str:
    """The token in a body; empty if there is none, or more than one."""
    tokens = {part.token for part in parts}
    return tokens.pop() if len(tokens) == 1 else ""


def _replayed(stored: bytes, route: Route, head: Head) -> Response:
    """The answer that a request got the first time."""
    answer = route.endpoint.answer(IngestResult(0, stored=stored), head)
    return answer._replace(headers={**answer.headers, **REPLAYED})


def _last_of(parts: Sequence[Decoded], to: Admitted) -> Decoded | None:
    """The part that carries the claim on its request; one without records if there is none."""
    for part in parts:
        if part.parsed.total and not part.pipeline and part.delivery is None:
            return part
    if not to.route.is_routed or not any(part.parsed.total for part in parts):
        return None
    return parts[0]._replace(parsed=_NOTHING, pipeline="", delivery=None, ids=None, rejected=())


def _result_of(part: Decoded, pipeline: str) -> PartResult:
    """The result of a part that is accepted."""
    parsed = part.parsed
    counts = parsed.records.count, parsed.invalid
    return PartResult(pipeline, *counts, parsed.refused, notes=part.notes, rejected=part.rejected)


async def _accept_part(
    part: Decoded, to: Admitted, delivery: Delivery | None, claim: IdempotencyClaim | None = None
) -> PartResult:
    """Makes the records of one part durable; a refusal is a result of it.

    Args:
        part: the one.
        to: its request.
        delivery: the key of the request, which is claimed in the part's pipeline.
        claim: in place of that, the claim on the request itself; its holder forgets it.
    """
    parsed = part.parsed
    intake = to.route.intakes[part.pipeline] if part.pipeline else to.route.intake
    principal = to.principal
    own = held = None
    try:
        principal.authorize(intake.name)
        if not parsed.total and claim is None:
            return PartResult(intake.name, notes=part.notes)
        if claim is None and (named := part.delivery or delivery):
            begun = await intake.begin(*named.of(principal.id))
            if isinstance(begun, bytes):
                counts = counted(begun)
                return PartResult(intake.name, *counts, notes=part.notes, rejected=part.rejected)
            claim = own = begun
            claim.answer = count_body(parsed.records.count, parsed.invalid, parsed.refused)
        records = parsed.records
        if part.ids is not None and part.ids.known:
            held = intake.recent_ids.hold(principal.id, part.ids.known)
            records = _without(records, part.ids, held.accepted)
        kept = parsed.refused[: to.route.limits.invalid_kept]
        append = Append(
            records,
            kept,
            claim=claim,
            principal=principal.name or to.hold.client,
            unkept=parsed.invalid - len(kept),
            envelope=to.envelope(),
            ids=held if held and held.new else None,
        )
        await intake.accept(append)
        to.route.counts.accepted(append)
    except Problem as found:
        return PartResult(intake.name, problem=found.with_traceback(None), notes=part.notes)
    except EXPLAINED as error:
        return PartResult(intake.name, problem=explain(error), notes=part.notes)
    finally:
        if own is not None:
            intake.forget(own)
        if held is not None:
            intake.recent_ids.release(held)
    return _result_of(part, intake.name)


def _without(records: Records, ids: SenderIds, accepted: frozenset[bytes]) -> Records:
    """Returns the records whose ids are not among those that were accepted before."""
    if not accepted:
        return records
    pairs = zip(records.items(), ids.each, strict=True)
    left = [item for item, sender_id in pairs if sender_id not in accepted]
    return Records.lines(left) if records.layout is Layout.LINES else Records.sized(left)
