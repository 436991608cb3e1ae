from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
import pytest
import uvloop
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from ingestd.admin import connection as admin_server
from ingestd.admin.server import AdminServer
from ingestd.admin.status import (
    BatchesStatus,
    HandlerStatus,
    JournalUsage,
    PipelineStatus,
    QueueStatus,
    Status,
    bounds_near,
)
from ingestd.base.errors import AddressError, Exit
from ingestd.base.metrics import Metrics
from ingestd.config.network import split_address
from ingestd.settings import AdminSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DEADLINE = 60.0

STATUS = Status(
    state="running",
    version="1.2.3",
    uptime_seconds=12.5,
    pipelines={
        "default": PipelineStatus(
            accepted=10,
            processed=7,
            dead=1,
            pending=2,
            invalid=3,
            balanced=True,
            journal=JournalUsage(bytes=900, bytes_max=1000, poisoned=False),
            queue=QueueStatus(chunks=2, bytes=100, bytes_max=1000),
            batches=BatchesStatus(sealed=1, running=1, waiting_retry=0),
            oldest_pending_seconds=0.25,
            bounds_near=["journal.bytes_max"],
        )
    },
)


class View:
    """A daemon, as far as the admin server can see."""

    def __init__(self) -> None:
        self.answer = (True, "taking records")
        self.living = (True, "alive")
        self.broken = False
        self.now = STATUS

    def alive(self) -> tuple[bool, str]:
        return self.living

    def ready(self) -> tuple[bool, str]:
        return self.answer

    def status(self) -> Status:
        if self.broken:
            raise RuntimeError("broken")
        return self.now


class Admin:
    """A real admin server and a way to ask it."""

    def __init__(self) -> None:
        self.view = View()
        self.metrics = Metrics("1.2.3")
        self.server = AdminServer(AdminSettings(listen="127.0.0.1:0"), self.view, self.metrics)

    @property
    def address(self) -> tuple[str, int]:
        [address] = self.server.addresses
        return split_address(address)

    async def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, Any]:
        host, port = self.address
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, f"http://{host}:{port}{path}", headers=headers) as response,
        ):
            return response.status, await response.read(), response.headers

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.address)


@pytest.fixture
async def admin() -> AsyncIterator[Admin]:
    made = Admin()
    await made.server.start()
    yield made
    await made.server.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection ends for its age within the time of a test."""
    monkeypatch.setattr(admin_server, "CONNECTION_SECONDS", 10 * DEADLINE)
    monkeypatch.setattr(admin_server, "ANSWER_SECONDS", 10 * DEADLINE)


async def hung_up(reader: asyncio.StreamReader) -> bytes:
    """What still comes before the server closes the connection."""
    with contextlib.suppress(ConnectionResetError):
        return await asyncio.wait_for(reader.read(), DEADLINE)
    return b""


async def status_errors(error: str, listen: str, **headers: str) -> str:
    """The handler's error as `/v1/status` shows it."""
    [(name, one)] = STATUS.pipelines.items()
    down = msgspec.structs.replace(one, handler=HandlerStatus("down", error=error))
    token = {"hash": "sha256:" + hashlib.sha256(b"a-token-of-16-characters").hexdigest()}
    tokens = {"eye": token} if headers else {}
    admin = Admin()
    admin.view.now = msgspec.structs.replace(STATUS, pipelines={name: down})
    admin.server = AdminServer(
        AdminSettings(listen=listen, tokens=tokens), admin.view, admin.metrics
    )
    await admin.server.start()
    try:
        status, body, _ = await admin.ask("/v1/status", **headers)
    finally:
        await admin.server.close()
    assert status == 200
    return json.loads(body)["pipelines"]["default"]["handler"]["error"]


async def test_the_text_of_an_error_is_for_who_may_read() -> None:
    """It may quote a record, and status is open beyond loopback while there are no tokens."""
    secret = "ValueError: no such card: 4111 1111 1111 1111"
    kind = "(its text is in the log, and here for a token of [admin.tokens.NAME])"
    token = {"Authorization": "Bearer a-token-of-16-characters"}
    assert await status_errors(secret, "127.0.0.1:0") == secret
    assert await status_errors(secret, "0.0.0.0:0") == f"ValueError {kind}"
    assert await status_errors("4111 1111", "0.0.0.0:0") == f"an error {kind}"
    assert await status_errors("", "0.0.0.0:0") == ""
    assert await status_errors(secret, "0.0.0.0:0", **token) == secret
    assert await status_errors(secret, "127.0.0.1:0", Via="1.1 proxy", **token) == secret


async def test_alive_and_ready(admin: Admin) -> None:
    assert (await admin.ask("/livez"))[:2] == (200, b"alive\n")
    assert (await admin.ask("/readyz"))[:2] == (200, b"ready\n")


async def test_not_ready_says_why_and_is_still_alive(admin: Admin) -> None:
    admin.view.answer = (False, "draining")
    status, body, headers = await admin.ask("/readyz")
    assert status == 503
    assert headers["Content-Type"] == "application/problem+json"
    assert msgspec.json.decode(body)["detail"] == "draining"
    assert (await admin.ask("/livez"))[0] == 200


async def test_status_is_what_the_daemon_says(admin: Admin) -> None:
    status, body, headers = await admin.ask("/v1/status")
    assert status == 200
    assert headers["Content-Type"] == "application/json"
    assert msgspec.json.decode(body, type=Status) == STATUS
    default = msgspec.json.decode(body)["pipelines"]["default"]
    assert default["accepted"] == default["processed"] + default["dead"] + default["pending"]


async def test_metrics_are_read_when_asked(admin: Admin) -> None:
    default = STATUS.pipelines["default"]
    state = msgspec.structs.replace(default, accepted=1, processed=0, dead=0, pending=1)
    admin.metrics.watch(lambda: {"default": state})

    async def accepted() -> float:
        status, body, headers = await admin.ask("/metrics")
        assert status == 200
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        [family] = [f for f in parse_text(body.decode()) if f.name == "ingestd_records_accepted"]
        return float(family.samples[0].value)

    assert await accepted() == 1
    state = msgspec.structs.replace(state, accepted=2, pending=2)
    assert await accepted() == 2


async def test_openmetrics_by_accept(admin: Admin) -> None:
    _, body, headers = await admin.ask(
        "/metrics", Accept="application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
    )
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert list(parse_openmetrics(body.decode()))


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/v1/status"])
async def test_head_is_get_without_the_body(admin: Admin, path: str) -> None:
    status, body, headers = await admin.ask(path, "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 0
    assert headers["Cache-Control"] == "no-store"
    assert headers["Server"] == "ingestd"


@pytest.mark.parametrize("path", ["/v1", "/v1/records", "/livez/", "/metrics/x", "//livez"])
async def test_no_other_pages(admin: Admin, path: str) -> None:
    status, body, headers = await admin.ask(path)
    assert status == 404
    assert headers["Content-Type"] == "application/problem+json"
    problem = msgspec.json.decode(body)
    assert problem["status"] == 404
    assert "records go to the address of the http source (http.listen)" in problem["detail"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
async def test_pages_are_only_read(admin: Admin, method: str) -> None:
    status, body, headers = await admin.ask("/livez", method)
    assert status == 405
    assert headers["Allow"] == "GET, HEAD"
    assert headers["Content-Type"] == "application/problem+json"
    assert msgspec.json.decode(body)["title"] == "Method Not Allowed"


async def test_a_page_that_fails_leaves_the_others(admin: Admin) -> None:
    admin.view.broken = True
    status, body, headers = await admin.ask("/v1/status")
    assert status == 500
    assert headers["Content-Type"] == "application/problem+json"
    assert b"broken" not in body
    assert (await admin.ask("/livez"))[0] == 200


async def test_what_is_not_http_is_answered_and_hung_up_on(admin: Admin) -> None:
    reader, writer = await admin.connect()
    writer.write(b"\x16\x03\x01 no http\r\n\r\n")
    assert (await hung_up(reader)).startswith(b"HTTP/1.0 400")
    writer.close()


# Nobody locks operators out


async def test_a_connection_that_says_nothing_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, admin: Admin
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(admin_server, "CONNECTION_SECONDS", 0.1)
        for start in (b"", b"GET /livez HTT"):
            reader, writer = await admin.connect()
            writer.write(start)
            assert await hung_up(reader) == b""
            writer.close()
    assert (await admin.ask("/livez"))[0] == 200


async def test_who_holds_connections_keeps_no_probe_from_its_answer(admin: Admin) -> None:
    held = [await admin.connect() for _ in range(3 * admin_server.CONNECTIONS_MAX)]
    assert (await admin.ask("/livez"))[0] == 200
    assert len(admin.server._protocol._inside) <= admin_server.CONNECTIONS_MAX
    for _, writer in held:
        writer.close()


@pytest.mark.usefixtures("patient")
async def test_answers_that_nobody_takes_are_bounded_together(
    admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_server, "ANSWERS_BYTES_MAX", 20 << 20)
    version = "x" * (6 << 20)
    large = msgspec.structs.replace(STATUS, version=version)
    monkeypatch.setattr(admin.view, "status", lambda: large)
    connections = []
    for _ in range(20):
        reader, writer = await admin.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connections.append((reader, writer))
    inside = admin.server._protocol._inside

    def held() -> int:
        return sum(one.transport.get_write_buffer_size() for one in inside)

    async with asyncio.timeout(DEADLINE):
        while not all(one.transport.is_closing() for one in inside) or held() > 20 << 20:
            await asyncio.sleep(0.01)
    assert held() > 10 << 20
    status, body, _ = await admin.ask("/v1/status")
    assert (status, msgspec.json.decode(body)["version"]) == (200, version)
    for _, writer in connections:
        writer.transport.abort()


async def test_who_sends_what_is_no_http_does_not_fill_the_log(
    admin: Admin, caplog: pytest.LogCaptureFixture
) -> None:
    for data in (
        b"BREW",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000,
        b"PRI * HTTP/2.0\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ):
        reader, writer = await admin.connect()
        writer.write(data + b"\r\n\r\n")
        assert b" 400 " in (await hung_up(reader)).split(b"\r\n")[0]
        writer.close()
    assert not [one for one in caplog.records if one.levelname not in ("DEBUG", "INFO")]


async def test_one_request_a_connection(admin: Admin) -> None:
    reader, writer = await admin.connect()
    writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
    text = await hung_up(reader)
    assert text.count(b"HTTP/1.1 200") == 1
    assert b"Connection: close" in text
    writer.close()


@pytest.mark.usefixtures("patient")
async def test_connections_are_bounded_and_room_comes_back(
    monkeypatch: pytest.MonkeyPatch, admin: Admin
) -> None:
    monkeypatch.setattr(admin_server, "CONNECTIONS_MAX", 3)
    inside = [await admin.connect() for _ in range(4)]
    # The first one that asks nothing has to go.
    reader, writer = inside.pop(0)
    assert await hung_up(reader) == b""
    writer.close()
    for reader, writer in inside:
        writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in await hung_up(reader)
        writer.close()
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        with contextlib.suppress(aiohttp.ClientError):
            assert (await admin.ask("/livez"))[0] == 200
            return
    pytest.fail("room did not come back")


# Listening


async def test_a_taken_port_is_named_with_its_setting(admin: Admin) -> None:
    host, port = admin.address
    other = AdminServer(AdminSettings(listen=f"{host}:{port}"), admin.view, admin.metrics)
    with pytest.raises(AddressError) as caught:
        await other.start()
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{port} (admin.listen): address already in use; another program"
        ' has it: choose another address, like "127.0.0.1:0" for any port that is free, or "" for'
        " none"
    )
    assert caught.value.exit_code == Exit.CONFIG
    await other.close()


@pytest.mark.parametrize("host", ["host.invalid", "a" * 64])
async def test_a_host_that_is_not_there_is_a_clear_error(admin: Admin, host: str) -> None:
    other = AdminServer(AdminSettings(listen=f"{host}:0"), admin.view, admin.metrics)
    with pytest.raises(AddressError, match=r"cannot listen on .* \(admin\.listen\): \S"):
        await other.start()


async def test_no_listen_is_no_server() -> None:
    server = AdminServer(AdminSettings(listen=""), View(), Metrics("1"))
    await server.start()
    assert server.addresses == []
    await server.close()


async def test_ipv6() -> None:
    server = AdminServer(AdminSettings(listen="[::1]:0"), View(), Metrics("1"))
    try:
        await server.start()
    except AddressError:
        pytest.skip("no IPv6 here")
    [address] = server.addresses
    host, port = split_address(address)
    assert host == "::1"
    assert port
    await server.close()


@pytest.mark.usefixtures("patient")
async def test_close_frees_the_port_and_hangs_up_on_who_is_there() -> None:
    admin = Admin()
    await admin.server.start()
    host, port = admin.address
    idle, writer = await admin.connect()
    assert (await admin.ask("/livez"))[0] == 200
    async with asyncio.timeout(DEADLINE):
        await admin.server.close()
    assert await hung_up(idle) == b""
    writer.close()
    with pytest.raises(OSError), socket.create_connection((host, port), timeout=1):
        pass
    await admin.server.close()


@pytest.mark.usefixtures("patient")
async def test_close_does_not_wait_for_a_reader_who_takes_no_answer() -> None:
    admin = Admin()
    for number in range(500):
        admin.metrics.pipeline(f"pipeline{number}")
    await admin.server.start()
    reader, writer = await admin.connect()
    assert isinstance(reader, asyncio.StreamReader)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await writer.drain()
    assert (await admin.ask("/livez"))[0] == 200
    async with asyncio.timeout(DEADLINE):
        await admin.server.close()
    writer.transport.abort()


def test_it_serves_on_the_loop_that_the_daemon_uses() -> None:
    async def life() -> None:
        admin = Admin()
        await admin.server.start()
        assert (await admin.ask("/livez"))[0] == 200
        idle, writer = await admin.connect()
        other = AdminServer(
            AdminSettings(listen=f"127.0.0.1:{admin.address[1]}"), admin.view, admin.metrics
        )
        with pytest.raises(AddressError, match=r": address already in use; another program has it"):
            await other.start()
        await admin.server.close()
        assert await hung_up(idle) == b""
        writer.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(life())


def test_bounds_that_are_near() -> None:
    used = {"journal.bytes_max": (79.9, 100), "queue.bytes_max": (80, 100), "x": (101, 100)}
    assert bounds_near(used) == ["queue.bytes_max", "x"]
