"""Quick requests: those with a known head, all that come in one turn of the loop together.

`KnownHeads` says which requests can be taken here. Each is decoded as it comes; what comes within
one turn for one pipeline is one append, and one callback writes all the answers. There is no task,
no future, no context and no response object for a single request.

Invariants:

1. A request that is taken holds its place and its bytes in the `AdmissionController`, and counts
   as in progress, until it has its answer or goes the ordinary way.
2. Only what the ordinary way would accept whole and at once is taken: all records good, no bound
   near, its client's turn, nobody draining. For everything else `take` returns False, and nothing
   has happened.
3. An append is all or nothing. If it is refused, or has a record that does not fit, nothing of it
   was accepted, and each of its requests goes the ordinary way by itself, where it gets the answer
   that is its own.
4. An answer is the ordinary one, byte for byte, but for the request's id and the date. It is made
   by the endpoint once for a head and a number of records.
"""

from __future__ import annotations

import asyncio
import secrets
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.append import Append
from ingestd.base.logging import get_logger
from ingestd.base.record import Records, join
from ingestd.codecs.lines import Parsed
from ingestd.http import problem
from ingestd.http.auth import UNIDENTIFIED
from ingestd.http.known_heads import is_common
from ingestd.http.peer import client_of
from ingestd.http.problem import EXPLAINED, Problem
from ingestd.http.response import date, encode
from ingestd.sources.http.decode import THREAD_BYTES
from ingestd.sources.http.endpoints.base import Decoded
from ingestd.sources.http.result import IngestResult

if TYPE_CHECKING:
    from collections.abc import Hashable

    from ingestd.http.admission import ClientShare
    from ingestd.http.protocol import Connection
    from ingestd.http.server import Server
    from ingestd.sources.http.handler import IngestHandler
    from ingestd.sources.http.ingestion import Admitted

log = get_logger()

APPEND_BYTES = 256 * 1024
"""What comes beyond it in one turn is another append: a chunk of the journal has so many."""
ANSWERS_MAX = 64
"""Answers that are kept for one head, one for each number of records."""

_PLAIN = Decoded(Parsed(Records.lines([]), []))[1:]
_ID = secrets.token_hex(16)
"""Stands for the request's id in an answer that is made for many requests."""


class _QuickHead:
    """A known head as the source sees it.

    Attributes:
        route: where it leads.
        principal: the sender.
        client: its name, as bounds count it; empty for that of the connection.
        codec: reads the bodies.
        envelope: of its records.
    """

    __slots__ = (
        "_answers",
        "_date",
        "_head",
        "_headers",
        "client",
        "codec",
        "envelope",
        "principal",
        "route",
    )

    def __init__(self, asked: Admitted, headers: dict[str, str]) -> None:
        self.route, self._head, self.principal = asked.route, asked.head, asked.principal
        self.codec, self.envelope = asked.codec, asked.envelope()
        self.client = client_of(self.principal.name) if self.principal.name else ""
        self._headers = headers
        self._answers: dict[int, tuple[int, bytes, bytes]] = {}
        self._date = b""

    def answer(self, count: int) -> tuple[int, bytes, bytes]:
        """Returns the status, and what stands before and behind the request's id in the answer."""
        now = date()
        if now is not self._date or len(self._answers) > ANSWERS_MAX:
            self._answers.clear()
            self._date = now
        parts = self._answers.get(count)
        if parts is None:
            answer = self.route.endpoint.answer(IngestResult(count), self._head)
            headers = {"X-Request-Id": _ID, **self._headers, **answer.headers}
            whole = encode(answer.status, answer.content_type, answer.body, headers=headers)
            before, _, behind = whole.partition(_ID.encode())
            parts = self._answers[count] = answer.status, before, behind
        return parts


class _Asked(NamedTuple):
    """A request that was taken."""

    connection: Connection
    head: _QuickHead
    share: ClientShare
    body: bytes
    count: int  # type: ignore[assignment]  # hides tuple.count


class _Group:
    """Requests that become one append."""

    __slots__ = ("asked", "runs", "size", "started")

    def __init__(self, started: float) -> None:
        self.started = started
        self.runs: list[Records] = []
        self.asked: list[_Asked] = []
        self.size = 0


class QuickRequests:
    """Takes quick requests; on the event loop.

    Args:
        handler: counts requests, names them, and answers all others.
        server: has the table of heads, and the turns of clients.
    """

    def __init__(self, handler: IngestHandler, server: Server) -> None:
        self._handler = handler
        self._admission = handler.ingestion.admission
        self._heads = server.heads
        self._turns = server.turns
        self._loop = asyncio.get_running_loop()
        self._groups: dict[Hashable, _Group] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        handler.ingestion.on_plain = self.learn

    def learn(self, asked: Admitted) -> None:
        """Remembers the head of a request that was accepted, if others with it are like it."""
        handler, codec, request = self._handler, asked.codec, asked.request
        if (
            asked.route.endpoint.is_pure
            and not (codec.verifies or codec.routes or codec.encoding)
            and asked.principal is not UNIDENTIFIED
            and not handler.closes
            and handler.serves(asked.route)
            and is_common(request)
            and handler.authenticator.decides_by_head(request)
        ):
            quick = _QuickHead(asked, handler.headers_for(request))
            self._heads.learn(request, partial(self._take, quick))

    def _take(self, head: _QuickHead, connection: Connection, body: bytes) -> bool:
        if (tracer := self._handler.tracer) is not None and tracer.wants():
            return False
        client = head.client or connection.client
        if not client:  # a peer of a Unix socket, which the ordinary way tells by its user
            return False
        # Twice: as it came, and joined with others.
        share = self._admission.enter_quickly(client, 2 * len(body))
        if share is None:
            return False
        self._handler.begin()
        if not self._turns.is_free(connection.client):
            call = partial(self._take_late, head, connection, share, body)
            self._turns.defer(connection.client, call)
        elif not self._add(head, connection, share, body):
            self._give_up(share, body)
            return False
        return True

    def _take_late(
        self, head: _QuickHead, connection: Connection, share: ClientShare, body: bytes
    ) -> None:
        """Takes a request whose turn has come."""
        if connection.transport is None or not self._add(head, connection, share, body):
            self._give_up(share, body)
            connection.go_ordinary_way(body)

    def _give_up(self, share: ClientShare, body: bytes) -> None:
        self._admission.leave(share, 2 * len(body))
        self._handler.end(1)

    def _add(
        self, head: _QuickHead, connection: Connection, share: ClientShare, body: bytes
    ) -> bool:
        """Puts a request's records to those of this turn; returns False if they are not so good."""
        principal = head.principal
        if self._handler.closes or len(body) >= THREAD_BYTES or principal.wait() > 0:
            return False
        try:
            parts = head.codec.decode_quickly(body, head.route.limits)
        except Problem:
            return False
        if parts is None or len(parts) != 1 or parts[0].parsed.invalid or parts[0][1:] != _PLAIN:
            return False
        records = parts[0].parsed.records
        principal.charge(records.count, len(records.payload))
        group = self._group_of(head, records)
        group.size += len(records.payload)
        group.runs.append(records)
        group.asked.append(_Asked(connection, head, share, body, records.count))
        return True

    def _group_of(self, head: _QuickHead, records: Records) -> _Group:
        key = head.route.intake, records.layout, head.envelope
        group = self._groups.get(key)
        if group is not None:
            if group.size + len(records.payload) <= APPEND_BYTES:
                return group
            self._start(group)
        elif not self._groups:
            self._loop.call_soon(self._flush)
        group = self._groups[key] = _Group(self._loop.time())
        return group

    def _flush(self) -> None:
        """The turn is over: each group is appended."""
        groups, self._groups = self._groups, {}
        for group in groups.values():
            self._start(group)

    def _start(self, group: _Group) -> None:
        task = self._loop.create_task(self._accept(group), name="http-quick")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, group: _Group) -> None:
        found: Problem | None = None
        accepted = False
        try:
            head = group.asked[0].head
            append = Append(join(group.runs), envelope=head.envelope)
            intake = head.route.intake
            screen = head.route.screens.get(intake.name)
            if screen is None or await screen.fits(append.records):
                await intake.accept(append)
                accepted = True
                head.route.counts.accepted(append)
        except EXPLAINED:
            pass  # each gets its own answer
        except Exception:
            log.exception("request_failed")
            found = Problem(problem.INTERNAL, "see the log")
        finally:
            self._leave(group, charged=accepted)
        if accepted:
            self._answer(group)
        else:
            for one in group.asked:
                one.connection.go_ordinary_way(one.body, found)

    def _leave(self, group: _Group, *, charged: bool) -> None:
        """Gives back what the requests of a group hold; what they owe, too, if they failed."""
        held: dict[ClientShare, list[int]] = {}
        for one in group.asked:
            sums = held.setdefault(one.share, [0, 0])
            sums[0] += 2 * len(one.body)
            sums[1] += 1
        for share, (size, requests) in held.items():
            self._admission.leave(share, size, requests)
        self._handler.end(len(group.asked))
        if not charged:
            for one, records in zip(group.asked, group.runs, strict=True):
                one.head.principal.charge(-records.count, -len(records.payload))

    def _answer(self, group: _Group) -> None:
        handler = self._handler
        close, write_timeout = handler.closes, handler.write_timeout
        seconds = self._loop.time() - group.started
        for connection, head, _, _, count in group.asked:
            status, before, behind = head.answer(count)
            connection.finish_quick(
                b"%b%b%b" % (before, handler.next_id().encode(), behind),
                close=close,
                write_timeout=write_timeout,
            )
            handler.count_accepted(head.route, status, seconds)

    def close(self) -> None:
        """Ends appends that are on their way; their requests get no answer."""
        for task in self._tasks:
            task.cancel()
