"""One request's body: read, verified, decoded, accepted, and waited for.

`run` → admission → `_take` → `BodyCodec` → `Intake.accept` → `_wait`, below in that order. A body
of lines whose length is not known is accepted in pieces as it arrives (`stream.py`).
"""

from __future__ import annotations

import asyncio
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple, cast

import async_timeout

from ingestd.base.append import Append, DeliveryWaiter, scoped
from ingestd.base.errors import Draining
from ingestd.http import problem
from ingestd.http.admission import AdmissionController
from ingestd.http.body import (
    BLOCK_BYTES,
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
from ingestd.http.problem import Problem
from ingestd.http.protocol import size_of_head
from ingestd.sources.http.decode import BodyDecoder
from ingestd.sources.http.endpoints.base import Delivery, Head
from ingestd.sources.http.headers import (
    IDEMPOTENCY_HEADER,
    NOTHING,
    PREFER_HEADER,
    REPLAYED,
    parse_key,
    parse_prefer,
)
from ingestd.sources.http.result import IngestResult
from ingestd.sources.http.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from ingestd.base.append import IdempotencyClaim
    from ingestd.codecs.lines import Parsed
    from ingestd.http.admission import Reservation
    from ingestd.http.auth import Principal
    from ingestd.http.protocol import Connection
    from ingestd.http.response import Response
    from ingestd.http.settings import HttpSettings
    from ingestd.sources.http.endpoints.base import Route
    from ingestd.sources.http.headers import Preferences

    Authorize = Callable[[web.BaseRequest, Route], Principal]

HEAD_BYTES_FREE = 8 * 1024
"""A head that takes more counts as held while its request is answered."""


class Durable(NamedTuple):
    """A request whose records are accepted, and whose client waits for their outcomes.

    Attributes:
        answer: the 202, for when the time is up.
        result: for the answer with the outcomes.
        waiter: of these records.
        prefer: the client's preferences.
    """

    answer: Response
    result: IngestResult
    waiter: DeliveryWaiter
    prefer: Preferences


class Ingestion:
    """Takes bodies; on the event loop.

    Args:
        settings: the bounds.
        authorize: returns the principal of a request that was let in before, or raises a `Problem`
            if it may not send there any more.

    Attributes:
        admission: what all requests together may hold.
        streams: in progress.
        waiting: requests that wait for the outcomes of their records.
        quiet: requests whose body may be a stream and has not begun.
    """

    def __init__(self, settings: HttpSettings, authorize: Authorize) -> None:
        self.admission = AdmissionController(
            settings.inflight_bytes_max,
            requests_max=settings.requests_max,
            share=settings.client_share,
            streams_max=settings.streams_max,
        )
        self._settings = settings
        self._authorize = authorize
        self._decoder = BodyDecoder(settings)
        self._loop = asyncio.get_running_loop()
        self.streams: set[Stream] = set()
        self.waiting: dict[DeliveryWaiter, tuple[web.BaseRequest, Route]] = {}
        self.quiet: dict[BodyDeadline, tuple[web.BaseRequest, Route]] = {}

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

    async def run(self, request: web.BaseRequest, route: Route, caller: Principal) -> Response:
        """Takes a request's records, and returns its answer.

        Raises:
            Problem: none was accepted, or not all of a stream.
        """
        with self.admission.enter(caller.name or peer_of(request)) as hold:
            if (head := size_of_head(request.raw_headers)) > HEAD_BYTES_FREE:
                hold.add_base(head)
            taken = await self._take(request, route, caller, hold)
            # Nothing holds the body any more, however long this takes.
            return await self._wait(request, route, taken) if isinstance(taken, Durable) else taken

    async def _take(
        self, request: web.BaseRequest, route: Route, caller: Principal, hold: Reservation
    ) -> Response | Durable:
        """Reads a body and makes its records durable."""
        headers, settings = request.headers, self._settings
        head = Head(request.method, request.raw_path, headers, route.value, route.intake.format)
        codec = route.endpoint.open(head)
        encoding = name_encoding(headers.getall("Content-Encoding", ()))
        length = length_of(request, settings)
        key = None
        if IDEMPOTENCY_HEADER in headers and not codec.verifies:
            key = scoped(caller.principal, parse_key(headers.getall(IDEMPOTENCY_HEADER)))
        prefer = NOTHING
        if PREFER_HEADER in headers:
            prefer = parse_prefer(headers.getall(PREFER_HEADER), settings.wait_max)
        hold.expect(length or 0)
        say_continue(request)
        streams = length is None and codec.streamable and key is None
        if streams and not prefer.strict and hold.begin_stream():
            try:
                first = await self._first_bytes(request, route)
                wire, ended = await read_first(
                    request, hold, settings, encoding=encoding, first=first
                )
                if not ended:
                    return await self._stream(
                        request, route, caller, hold, encoding=encoding, begun=wire
                    )
            finally:
                hold.end_stream()
        else:
            wire = await read_whole(request, hold, settings)
        delivery = None
        if codec.verifies:
            delivery = await self._decoder.verify(codec, wire)
        elif key is not None:
            kind = headers.get("Content-Type", "")
            delivery = Delivery(key, await self._decoder.fingerprint(wire, kind, encoding))
        # Claimed only now: a connection that died in the middle of a body must not keep the next
        # try of the same request waiting.
        claim = None if delivery is None else await route.intake.begin(*delivery)
        if isinstance(claim, bytes):
            answer = route.endpoint.answer(IngestResult(0, stored=claim))
            return answer._replace(headers={**answer.headers, **REPLAYED})
        try:
            parsed = await self._decoder.decode(
                wire, hold, encoding=encoding, codec=codec, limits=route.limits
            )
            del wire
            caller.charge(parsed.total, len(parsed.records.payload))
            return await self._accept(parsed, route, prefer, hold, claim)
        finally:
            if claim is not None:
                route.intake.forget(claim)

    async def _accept(
        self,
        parsed: Parsed,
        route: Route,
        prefer: Preferences,
        hold: Reservation,
        claim: IdempotencyClaim | None,
    ) -> Response | Durable:
        """Makes records durable."""
        if prefer.strict and parsed.refused:
            detail = f"{parsed.invalid} of {parsed.total} records; nothing was stored"
            raise Problem(problem.NOT_STRICT, detail, refused=parsed.refused)
        result = IngestResult(parsed.records.count, parsed.invalid, parsed.refused)
        answer = route.endpoint.answer(result)
        if claim is not None:
            claim.answer = answer.body
        kept = parsed.refused[: route.limits.invalid_kept]
        waiter = DeliveryWaiter(parsed.records.count) if prefer.wait else None
        try:
            await route.intake.accept(
                Append(
                    parsed.records,
                    kept,
                    claim=claim,
                    waiter=waiter,
                    principal=hold.client,
                    unkept=parsed.invalid - len(kept),
                )
            )
        except BaseException:
            if waiter is not None:
                route.intake.stop_waiting(waiter)
            raise
        if prefer is not NOTHING:
            answer = answer._replace(headers={**answer.headers, **prefer.applied()})
        if waiter is None:
            return answer
        hold.give_back()
        listed = [one._replace(payload=b"") for one in parsed.refused]
        return Durable(answer, result._replace(errors=listed, waiter=waiter), waiter, prefer)

    async def _wait(self, request: web.BaseRequest, route: Route, durable: Durable) -> Response:
        """Returns once all records have their outcome, the time is up, or the client has left."""
        waiter = durable.waiter
        connection = cast("Connection", request.protocol)
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
        answer = route.endpoint.answer(durable.result)
        return answer._replace(headers={**answer.headers, **durable.prefer.applied()})

    async def _first_bytes(self, request: web.BaseRequest, route: Route) -> bytes:
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
        self,
        request: web.BaseRequest,
        route: Route,
        caller: Principal,
        hold: Reservation,
        *,
        encoding: str,
        begun: bytes,
    ) -> Response:
        """Accepts a body in pieces."""
        connection = cast("Connection", request.protocol)

        async def read() -> tuple[bytes, bool]:
            with in_our_words(request), BytesIO() as sink:
                ended = await read_piece(request.content, sink, stream.grow)
                return sink.getvalue(), ended

        stream = Stream(
            read,
            route.intake,
            caller,
            hold,
            self._decoder.stream_thread,
            invalid_kept=self._settings.invalid_kept,
            encoding=encoding,
            ratio_max=self._settings.inflate_ratio_max,
            silence=self._settings.stream_silence_max,
            gone=lambda: request.transport is None or connection.half_closed,
            allowed=lambda: self._authorize(request, route),
        )
        self.streams.add(stream)
        try:
            return route.endpoint.answer(await stream.run(begun))
        finally:
            self.streams.discard(stream)
