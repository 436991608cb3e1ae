"""Known heads: the same answers and the same records as without them, and when none is used."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import ssl
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingestd.base.errors import JournalFailed, Overloaded
from ingestd.http import known_heads
from ingestd.http.settings import HttpSettings
from ingestd.sources.http.handler import IngestHandler
from ingestd.sources.http.source import HttpSource
from tests.access.tools import LOGS, SHOP, Files, bearer, on_both_loops
from tests.attacks.test_holding import ONE, OTHER, at
from tests.sources.source_tools import Client, MemoryIntake, ask, connected, serving, until
from tests.sources.test_idempotency import Door

if TYPE_CHECKING:
    from pathlib import Path

    from ingestd.base.append import Append

pytestmark = pytest.mark.slow

TOKENS = {"shop": {"token": SHOP}, "logs": {"token": LOGS, "pipelines": ["text"]}}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statuses of requests that were quick."""
    seen: list[int] = []
    count = IngestHandler.count_accepted

    def counted(self: Any, route: Any, status: int, seconds: float) -> None:
        seen.append(status)
        count(self, route, status, seconds)

    monkeypatch.setattr(IngestHandler, "count_accepted", counted)
    return seen


async def post(client: Client, body: bytes = b"1\n", path: str = "/v1/records", **more: str) -> int:
    client.post(body, path, **more)
    return (await client.reply()).status


# -- it is used ------------------------------------------------------------------------------------


@on_both_loops
async def test_a_head_is_read_once_for_all_connections() -> None:
    intake = MemoryIntake()
    async with serving(intake) as source:
        for _ in range(3):
            async with connected(source) as client:
                for body in (b"1\n", b"2\n3\n", b"4", b'{"five": 5}\n' * 100):
                    client.post(body)
                    reply = await client.reply()
                    assert reply.status == 202
                    assert reply.json == {
                        "accepted": max(1, body.count(b"\n")), "invalid": 0, "errors": [],
                    }  # fmt: skip
        assert len(source._server.heads) == 1
        assert source._handler._active == 0
        assert source._handler.ingestion.admission.requests == 0
        assert source._handler.ingestion.admission.bytes == 0
    assert len(intake.items) == 3 * 104


async def test_what_comes_in_one_turn_is_one_append(quick: list[int]) -> None:
    intake = MemoryIntake()
    async with serving(intake) as source, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(source)) for _ in range(20)]
        assert [await post(client) for client in clients] == [202] * 20
        before = len(intake.runs)
        for number, client in enumerate(clients):
            client.post(b'{"n":%d}\n' % number)
        replies = [await client.reply() for client in clients]
        assert {reply.status for reply in replies} == {202}
        assert len({reply.headers["x-request-id"] for reply in replies}) == 20
        assert len(intake.runs) - before < 20
        assert sorted(intake.items[-20:]) == sorted(b'{"n":%d}' % n for n in range(20))
    assert quick == [202] * 39


@pytest.mark.parametrize("form", ["text", "bytes"])
async def test_other_formats(quick: list[int], form: Any) -> None:
    intake = MemoryIntake(form)
    async with serving(intake) as source, connected(source) as client:
        for _ in range(3):
            assert await post(client, b"a line\n") == 202
    assert len(quick) == 2
    assert intake.items == [b"a line" if form == "text" else b"a line\n"] * 3


# -- it is the same: any sequence of requests ------------------------------------------------------

BODIES = st.sampled_from(
    [
        b"1\n", b"2", b'{"a":1}\n{"b":2}\n', b"[1,2]", b"x\n", b"1\nx\n", b"", b"\n", b"1\r\n2\r\n",
        b" 1\n", b"\xef\xbb\xbf1\n", b"[" * 200 + b"]" * 200, b'"' + b"y" * 3000 + b'"\n',
        b"\xff\n", b"1 2\n", b"POST /v1/records HTTP/1.1\r\nContent-Length: 1\r\n\r\n1",
    ]
)  # fmt: skip
HEADERS = st.lists(
    st.sampled_from(
        [
            b"Content-Type: application/json", b"Content-Type: application/x-ndjson",
            b"content-type: text/plain", b"Content-Type: image/png", b"Connection: close",
            b"Connection: keep-alive", b"X-Request-Id: mine", b"X-Request-Id: \xff",
            b"Prefer: handling=strict", b"Expect: 100-continue", b"Origin: https://a.example",
            b"Sec-Fetch-Site: cross-site", b"X-Event: a", b"X-Event: b",
            b"X-Other: Content-Length: 7",
            b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ]
    ),
    max_size=3, unique=True,
)  # fmt: skip
FIELDS = st.sampled_from(
    [b"Content-Length: %d", b"Content-Length: %d", b"content-length: %d", b"Content-length: %d",
     b"Content-Length:%d", b"Content-Length: 0%d", b"Content-Length: %d ",
     b"Content-Length: %d\r\nX: 1\r\ncontent-length: 3"]
)  # fmt: skip
LINE = st.sampled_from(
    [b"POST /v1/records HTTP/1.1", b"POST /v1/records HTTP/1.1", b"POST /v1/records/text HTTP/1.1",
     b"POST /v1/records?a=b HTTP/1.1", b"POST /v1/records HTTP/1.0", b"PUT /v1/records HTTP/1.1",
     b"POST /v1/none HTTP/1.1", b"\r\nPOST /v1/records HTTP/1.1"]
)  # fmt: skip
SENDER = st.sampled_from(
    [SHOP.encode(), SHOP.encode(), LOGS.encode(), b"unknown-token-0123456789012345"]
)
HOST = st.sampled_from([b"localhost", b"localhost", b"127.0.0.1:80", b"a b"])


@st.composite
def requests(draw: Any) -> bytes:
    body = draw(BODIES)
    lines = [
        draw(LINE), b"Host: " + draw(HOST), b"Authorization: Bearer " + draw(SENDER),
        *draw(HEADERS), draw(FIELDS) % len(body),
    ]  # fmt: skip
    return b"\r\n".join([*lines, b"", body])


class Step:
    """Requests on one of some connections, each sent so often, in some pieces."""

    def __init__(self, connection: int, sent: bytes, times: int, together: bool, cut: int) -> None:
        self.connection, self.sent, self.times = connection, sent, times
        self.together, self.cut = together, cut

    def __repr__(self) -> str:
        return f"Step({self.connection}, {self.sent!r}, {self.times}, {self.together}, {self.cut})"


STEPS = st.lists(
    st.builds(
        Step, st.integers(0, 2), requests(), st.integers(1, 4), st.booleans(),
        st.sampled_from([0, 0, 0, 7, 150, 200]),
    ),
    max_size=8,
)  # fmt: skip


async def told(source: HttpSource, steps: list[Step]) -> list[Any]:
    """All that was answered, without what differs by nature."""
    seen: list[Any] = []
    host, _, port = source.addresses[0].rpartition(":")
    clients: dict[int, Client] = {}
    for step in steps:
        for _ in range(1 if step.together else step.times):
            if step.connection not in clients:
                streams = await asyncio.open_connection(host, int(port))
                clients[step.connection] = Client(*streams)
            client = clients[step.connection]
            times = step.times if step.together else 1
            data = step.sent * times
            client.send(data[: step.cut])
            if step.cut:
                await asyncio.sleep(0.001)
            client.send(data[step.cut :])
            while times:
                try:
                    reply = await client.reply()
                except (asyncio.IncompleteReadError, ConnectionError):
                    seen.append("closed")
                    clients.pop(step.connection).writer.close()
                    break
                same = {
                    name: value for name, value in reply.headers.items()
                    if name != "date" and (name != "x-request-id" or value == "mine")
                }  # fmt: skip
                seen.append((reply.status, same, reply.body))
                times -= reply.status != 100
    for client in clients.values():
        client.writer.close()
    return seen


class Whole(MemoryIntake):
    """Keeps each record with its envelope."""

    def __init__(self, *more: Any) -> None:
        super().__init__(*more)
        self.whole: list[tuple[bytes, bytes]] = []

    async def accept(self, append: Append) -> None:
        await super().accept(append)
        self.whole += [(item, append.envelope) for item in append.records.items()]


async def all_of(steps: list[Step], *, table: bool) -> tuple[Any, ...]:
    intakes = Whole(), Whole("text", "text")
    counted: list[Any] = []
    async with serving(
        *intakes,
        tokens=TOKENS,
        cors_origins=["https://a.example"],
        keep_headers=["X-Event"],
        on_request=lambda *seen: counted.append((*seen[:3], seen[4])),
    ) as source:
        if not table:
            source._server.heads.learn = lambda *_: None  # type: ignore[method-assign]
        answers = await told(source, steps)
        await until(lambda: source._handler._active == 0)
        room = source._handler.ingestion.admission
        assert (room.requests, room.bytes) == (0, 0)
        assert bool(table) or not len(source._server.heads)
    kept = [(one.whole, [tuple(x) for x in one.refused], one.unkept) for one in intakes]
    return answers, kept, counted


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(STEPS)
def test_any_sequence_of_requests_has_the_same_answers_and_records(steps: list[Step]) -> None:
    with_table = asyncio.run(all_of(steps, table=True))
    assert with_table == asyncio.run(all_of(steps, table=False))


def test_sequences_have_quick_requests(quick: list[int]) -> None:
    """What the test before compares is not the ordinary way alone."""
    sent = (
        b"POST /v1/records HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\n"
        b"Content-Length: 2\r\n\r\n1\n"
    ) % SHOP.encode()
    steps = [Step(0, sent, 3, False, 0), Step(1, sent, 2, True, 0), Step(2, sent, 1, False, 9)]
    assert asyncio.run(all_of(steps, table=True)) == asyncio.run(all_of(steps, table=False))
    assert 2 <= len(quick) <= 4


async def test_a_journal_holds_the_same(tmp_path: Path) -> None:
    """Concurrent clients, real pipelines: every record once, and the ledger adds up."""
    ledgers = []
    for table in (True, False):
        folder = tmp_path / str(table)
        folder.mkdir()
        async with Door(folder) as door:
            if not table:
                door.source._server.heads.learn = lambda *_: None  # type: ignore[method-assign]

            async def send(client: int, door: Door = door) -> None:
                async with connected(door.source) as one:
                    for number in range(30):
                        body = b'{"c":%d,"n":%d}\n' % (client, number) * (1 + number % 3)
                        assert await post(one, body if number % 10 else b"x\n1\n") == 202

            await asyncio.gather(*(send(client) for client in range(8)))
            journal = door.pipelines["default"].journal
            await until(lambda j=journal: not j.ledger.pending)
            ledgers.append(journal.ledger)
    assert ledgers[0] == ledgers[1]


# -- what differs between two requests with the same bytes -----------------------------------------


async def test_a_reload_forgets_all_heads(quick: list[int]) -> None:
    async with serving(MemoryIntake(), tokens=TOKENS) as source, connected(source) as client:
        for _ in range(2):
            assert await post(client, **bearer(SHOP)) == 202
        await source.reload(HttpSettings(tokens={"logs": {"token": LOGS}}))
        assert len(source._server.heads) == 0
        assert await post(client, **bearer(SHOP)) == 401
    assert len(quick) == 1


async def test_a_rate_limit_is_asked_each_time(quick: list[int]) -> None:
    tokens = {"shop": {"token": SHOP, "records_per_second": 10}}
    async with serving(MemoryIntake(), tokens=tokens) as source, connected(source) as client:
        for _ in range(2):
            assert await post(client, **bearer(SHOP)) == 202
        assert await post(client, b"1\n" * 2000, **bearer(SHOP)) == 202
        client.post(b"1\n", **bearer(SHOP))
        assert (await client.reply()).slug == "rate-limited"
    assert len(quick) == 2


async def test_a_drain_takes_nothing_more(quick: list[int]) -> None:
    intake = MemoryIntake()
    async with serving(intake) as source, connected(source) as client, connected(source) as other:
        assert await post(client) == await post(other) == 202
        intake.gate.clear()
        client.post(b"2\n")
        await until(lambda: source._handler._active == 1)
        draining = asyncio.create_task(source.stop_taking(asyncio.get_running_loop().time() + 10))
        await until(lambda: source._handler.draining)
        other.post(b"3\n")
        assert (await other.reply()).slug == "draining"
        assert not draining.done()  # the quick one is in progress
        intake.gate.set()
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (202, "close")
        assert await client.closed()
        await draining
    assert quick == [202, 202]


async def test_bounds_hold_and_say_so(quick: list[int]) -> None:
    intake = MemoryIntake()
    async with (
        serving(intake, requests_max=2, client_share=1) as source,
        connected(source) as client,
        connected(source) as second,
        connected(source) as third,
    ):
        assert await post(client) == 202
        intake.gate.clear()
        client.post(b"2\n")
        second.post(b"3\n")
        await until(lambda: source._handler._active == 2)
        third.post(b"4\n")
        assert (await third.reply()).slug == "busy"
        intake.gate.set()
        assert [(await one.reply()).status for one in (client, second)] == [202, 202]


async def test_a_client_has_its_own_share_and_not_that_of_a_head() -> None:
    intake = MemoryIntake()
    async with (
        serving(intake, requests_max=4, client_share=0.5) as source,
        contextlib.AsyncExitStack() as stack,
    ):
        mine = [await stack.enter_async_context(at(source, ONE)) for _ in range(3)]
        other = await stack.enter_async_context(at(source, OTHER))
        assert await post(other) == 202
        intake.gate.clear()
        for client in (*mine[:2], other):
            client.post(b"1\n")
        await until(lambda: source._handler._active == 3)
        shares = source._handler.ingestion.admission._clients
        assert {name: one.requests for name, one in shares.items()} == {ONE: 2, OTHER: 1}
        mine[2].post(b"1\n")
        assert (await mine[2].reply()).slug == "over-share"
        intake.gate.set()
        for client in (*mine[:2], other):
            assert (await client.reply()).status == 202


async def test_a_certificate_belongs_to_its_connection(tmp_path: Path) -> None:
    """The same bytes with the one certificate, with another one, and with none."""
    files = Files(tmp_path)
    tls = {"certificate": files.server(), "client_ca": files.ca}
    tokens = {"shop": {"client_certificate": "shop.example"}, "logs": {"token": LOGS}}
    answers = []
    async with serving(MemoryIntake(), tls=tls, tokens=tokens) as source:
        port = int(source.addresses[0].rpartition(":")[2])
        for name in ("shop.example", "other.example", ""):
            context = ssl.create_default_context(cafile=files.ca)
            if name:
                context.load_cert_chain(files.issue(name, name))
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            client = Client(reader, writer)
            answers.append([await post(client) for _ in range(3)])
            writer.close()
        assert len(source._server.heads) == 0
    assert answers == [[202] * 3, [401] * 3, [401] * 3]


async def test_a_unix_socket_vouches_for_no_other_connection(tmp_path: Path) -> None:
    """Any `Host` may be sent over it; a page in a browser reaches the other one."""
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "socket"))
    tcp = socket.create_server(("127.0.0.1", 0))
    for sock in (unix, tcp):
        sock.listen()
        sock.setblocking(False)
    intake = MemoryIntake()
    source = HttpSource(
        HttpSettings(hosts=["a.example"]), {"default": intake}, default="default",
        sockets=[unix, tcp],
    )  # fmt: skip
    await source.start()
    asked = b"POST /v1/records HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 1\r\n\r\n1"
    try:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "socket"))
        client = Client(reader, writer)
        for _ in range(2):
            client.send(asked)
            assert (await client.reply()).status == 202
        writer.close()
        reader, writer = await asyncio.open_connection(*tcp.getsockname())
        client = Client(reader, writer)
        client.send(asked)
        assert (await client.reply()).slug == "misdirected"
        writer.close()
    finally:
        await source.close()


async def test_heads_of_one_request_are_not_learned() -> None:
    async with serving(MemoryIntake()) as source:
        for more in (
            {"X_Request_Id": "a"}, {"Prefer": "wait=0"}, {"Expect": "100-continue"},
            {"Content_Encoding": "identity"}, {"Connection": "close"}, {"Upgrade": "x"},
            {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
            {"X": "y" * 2048},
        ):  # fmt: skip
            async with connected(source) as client:
                client.post(b"1\n", **more)
                await client.reader.readuntil(b"}")
        await ask(source, gzip.compress(b"1\n"), Content_Encoding="gzip")
        await ask(source, b"1\n", Authorization="Bearer " + SHOP)
        assert len(source._server.heads) == 1


async def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_heads, "HEADS_MAX", 5)
    async with serving(MemoryIntake()) as source, connected(source) as client:
        for number in range(20):
            for _ in range(2):
                assert await post(client, X=str(number)) == 202
        assert len(source._server.heads) == 5


# -- what may happen before the answer -------------------------------------------------------------


async def test_what_is_refused_gets_its_own_answer(quick: list[int]) -> None:
    intake = MemoryIntake()
    full = Overloaded(what="the journal", retry_after=3.0)
    async with serving(intake) as source, connected(source) as client, connected(source) as other:
        assert await post(client) == await post(other) == 202
        intake.errors = [full, full]
        client.post(b"2\n")
        reply = await client.reply()
        assert (reply.status, reply.slug) == (503, "overloaded")
        intake.errors = [full]  # and when it is tried again there is room
        assert await post(client, b"3\n") == 202
        intake.errors = [JournalFailed(path="/secret", problem="EIO")] * 2
        client.post(b"4\n")
        reply = await client.reply()
        assert reply.slug == "journal-failed"
        assert b"secret" not in reply.body
    assert quick == [202]
    assert intake.items == [b"1", b"1", b"3"]


async def test_an_error_of_ours_is_one(quick: list[int], capsys: Any) -> None:
    intake = MemoryIntake()
    async with serving(intake) as source, connected(source) as client:
        assert await post(client) == 202
        intake.errors = [RuntimeError("a bug")]
        client.post(b"2\n")
        assert (await client.reply()).slug == "internal"
        assert await client.closed()
        assert source._handler._active == 0
    assert intake.items == [b"1"]


@on_both_loops
async def test_requests_behind_a_quick_one_wait_for_it() -> None:
    intake = MemoryIntake()
    async with serving(intake) as source, connected(source) as client:
        assert await post(client) == 202
        intake.gate.clear()
        client.post(b"2\n")
        await until(lambda: source._handler._active == 1)
        client.post(b"x\n")
        client.post(b"3\n")
        client.send(b"POST /v1/rec")
        await until(lambda: len(source._server.connections[0]._messages) == 2)
        intake.gate.set()
        assert [(await client.reply()).status for _ in range(3)] == [202, 400, 202]
        client.send(b"ords HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n4")
        assert (await client.reply()).status == 202
    assert intake.items == [b"1", b"2", b"3", b"4"]


@on_both_loops
async def test_a_client_that_ends_its_direction_is_answered() -> None:
    intake = MemoryIntake()
    async with serving(intake) as source, connected(source) as client:
        assert await post(client) == 202
        intake.gate.clear()
        client.post(b"2\n")
        client.writer.write_eof()
        await until(lambda: source._handler._active == 1)
        await until(lambda: source._server.connections[0].half_closed)
        intake.gate.set()
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (202, "close")
        assert await client.closed()


@on_both_loops
async def test_a_client_that_leaves_holds_nothing() -> None:
    intake = MemoryIntake()
    async with serving(intake) as source:
        async with connected(source) as client:
            assert await post(client) == 202
            intake.gate.clear()
            client.post(b"2\n")
            await until(lambda: source._handler._active == 1)
            sock = client.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.writer.transport.abort()
        await until(lambda: source._server.open == 0)
        intake.gate.set()
        await until(lambda: source._handler._active == 0)
        assert source._handler.ingestion.admission.bytes == 0
    assert intake.items == [b"1", b"2"]  # it had no answer, as after any lost connection


@on_both_loops
async def test_requests_that_come_together_wait_for_their_turn() -> None:
    """Once a turn of the loop is full, each client has its requests in rotation."""
    intake = MemoryIntake()
    async with serving(intake) as source, contextlib.AsyncExitStack() as stack:
        mine = [await stack.enter_async_context(at(source, ONE)) for _ in range(20)]
        other = await stack.enter_async_context(at(source, OTHER))
        assert await post(other) == 202
        deferred: list[str] = []
        turns = source._server.turns
        turns.is_free = lambda client: False
        defer = turns.defer

        def noted(client: str, call: Any) -> None:
            deferred.append(client)
            defer(client, call)
            if len(deferred) == 1:
                asyncio.get_running_loop().call_soon(turns._next)

        turns.defer = noted
        for number, client in enumerate((*mine, other)):
            client.post(b"%d\n" % number)
        assert [(await one.reply()).status for one in (*mine, other)] == [202] * 21
        assert sorted(deferred) == [ONE] * 20 + [OTHER]
        assert source._handler._active == 0
    assert sorted(map(int, intake.items[1:])) == list(range(21))


async def test_answers_that_are_not_read_end_the_connection(quick: list[int]) -> None:
    intake = MemoryIntake()
    async with (
        serving(intake, body_timeout="100ms", body_rate_min=0) as source,
        connected(source) as client,
    ):
        assert await post(client) == 202
        intake.gate.clear()
        client.post(b"2\n")
        await until(lambda: source._handler._active == 1)
        source._server.connections[0].pause_writing()  # as its transport does with a full buffer
        intake.gate.set()
        await until(lambda: source._server.open == 0)
        assert source._server._held == 0
    assert quick == [202]


async def test_the_idle_time_begins_anew(quick: list[int], monkeypatch) -> None:
    # Where this process had no time for a moment, that is not the client's.
    monkeypatch.setattr("ingestd.http.deadlines.LATE_SECONDS", 0.01)
    async with (
        serving(MemoryIntake(), keepalive_timeout="1s") as source,
        connected(source) as client,
    ):
        assert await post(client) == 202
        connection = source._server.connections[0]
        before = connection._idle_until
        await until(lambda: asyncio.get_running_loop().time() > before - 0.99)
        assert await post(client) == 202
        assert connection._idle_until > before
        assert connection._idle_timer is not None
        assert await client.closed()
    assert quick == [202]
