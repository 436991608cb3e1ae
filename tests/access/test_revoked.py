"""Who may not come in any more is not let go on: streams, waits, connections that are open."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.http.settings import HttpSettings
from tests.access.tools import LOGS, NEXT, SHOP, Files, bearer, on_both_loops
from tests.daemon.harness import daemon
from tests.sources.source_tools import Client, MemoryIntake, connected, serving, until
from tests.sources.test_idempotency import Door
from tests.sources.test_stream import CHUNKED, END, begin, chunk

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

TOKENS = {"shop": {"token": SHOP}, "logs": {"token": LOGS}}
held = threading.Event()


def hold(batch: list[Any]) -> None:
    """A handler that takes its time."""
    held.wait(300)


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingestd.http.body.PIECE_SECONDS", 0.02)


async def reload(source: Any, **changed: Any) -> None:
    await source.reload(source._settings.model_copy(update=changed))


def tokens(**written: Any) -> Any:
    return HttpSettings(tokens=written).tokens


@pytest.mark.parametrize(
    ("after", "answer"),
    [
        ({"logs": {"token": LOGS}}, (401, "unauthorized")),
        ({"shop": {"token": NEXT}}, (401, "unauthorized")),
        ({"shop": {"token": SHOP, "pipelines": ["logs"]}}, (403, "forbidden")),
    ],
)
async def test_a_stream_ends_in_order(after: Any, answer: tuple[int, str]) -> None:
    intake = MemoryIntake()
    async with contextlib.AsyncExitStack() as stack:
        logs = MemoryIntake("text", "logs")
        source = await stack.enter_async_context(serving(intake, logs, tokens=TOKENS))
        async with connected(source) as client, connected(source) as other:
            await begin(client, b"1\n2\nhalf", **bearer(SHOP))
            await begin(other, b"3\n", **bearer(LOGS))
            await until(lambda: len(intake.items) == 3)
            await reload(source, tokens=tokens(**{"logs": {"token": LOGS}, **after}))
            reply = await client.reply()
            assert (reply.status, reply.slug) == answer
            assert (reply.json["accepted"], reply.json["invalid"]) == (2, 0)
            assert reply.headers["connection"] == "close"
            other.send(chunk(b"4\n") + END)
            assert (await other.reply()).json["accepted"] == 2
    assert sorted(intake.items) == [b"1", b"2", b"3", b"4"]


async def test_what_comes_after_the_change_is_not_accepted() -> None:
    intake = MemoryIntake()
    async with serving(intake, tokens=TOKENS) as source, connected(source) as client:
        await begin(client, b"1\n", **bearer(SHOP))
        await until(lambda: len(intake.items) == 1)
        intake.gate.clear()
        client.send(chunk(b"2\n"))  # on its way when the token goes
        await until(lambda: intake.waiting)
        client.send(chunk(b"3\n"))
        await reload(source, tokens=tokens(logs={"token": LOGS}))
        intake.gate.set()
        reply = await client.reply()
        assert (reply.status, reply.json["accepted"]) == (401, 2)
    assert intake.items == [b"1", b"2"]


async def test_a_stream_goes_on_with_the_limits_of_its_token_as_they_are_now() -> None:
    intake = MemoryIntake()
    async with serving(intake, tokens=TOKENS) as source, connected(source) as client:
        await begin(client, b"1\n", **bearer(SHOP))
        await until(lambda: len(intake.items) == 1)
        await reload(source, tokens=tokens(shop={"token": SHOP, "records_per_second": 1}))
        client.send(chunk(b"2\n" * 1000))
        await until(lambda: len(intake.items) == 1001)
        assert source._authenticator._principals["shop"].wait() > 60
        await reload(source, tokens=tokens(logs={"token": LOGS}))
        client.send(chunk(b"3\n"))
        assert (await client.reply()).json["accepted"] == 1001


async def test_a_stream_of_which_nothing_has_come_ends_too() -> None:
    async with serving(MemoryIntake(), tokens=TOKENS) as source, connected(source) as client:
        client.post(b"", **CHUNKED, **bearer(SHOP))
        await until(lambda: source._handler.ingestion.quiet)
        await reload(source, tokens=tokens(logs={"token": LOGS}))
        assert (await client.reply()).slug == "unauthorized"
        assert await client.closed()


async def test_a_wait_ends_and_says_what_is_durable(tmp_path: Path) -> None:
    held.clear()
    target = {"target": "tests.access.test_revoked:hold"}
    more = {"handler": target, "executor": {"kind": "thread"}, "http": {"tokens": TOKENS}}
    async with Door(tmp_path, **more) as door, connected(door.source) as client:
        client.post(b"1\n2\n", Prefer="wait=60", **bearer(SHOP))
        await until(lambda: door.source._handler.ingestion.waiting)
        await reload(door.source, tokens=tokens(shop={"token": SHOP}))
        assert door.source._handler.ingestion.waiting
        await reload(door.source, tokens=tokens(logs={"token": LOGS}))
        reply = await client.reply()
        assert (reply.status, reply.json["accepted"]) == (202, 2)
        client.post(b"3", **bearer(SHOP))
        assert (await client.reply()).status == 401
        held.set()


async def test_a_head_that_was_let_in_before_the_change_is_not_known_after_it() -> None:
    """Its request ends well, and the next one with the same bytes is asked for its token."""
    intake = MemoryIntake()
    async with serving(intake, tokens=TOKENS) as source, connected(source) as client:
        intake.gate.clear()
        client.post(b"1\n", **bearer(SHOP))
        await until(lambda: intake.waiting)
        await reload(source, tokens=tokens(logs={"token": LOGS}))
        intake.gate.set()
        assert (await client.reply()).status == 202
        client.post(b"2\n", **bearer(SHOP))
        assert (await client.reply()).status == 401
    assert intake.items == [b"1"]


def test_sighup_at_the_daemon(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"{SHOP}\n{NEXT}\n")
    with daemon("--http.tokens.shop.file", str(file), cwd=tmp_path) as one:
        with socket.create_connection(("127.0.0.1", one.port), timeout=60) as client:
            client.sendall(
                b"POST /v1/records HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
                b"Authorization: Bearer " + SHOP.encode() + b"\r\n\r\n2\r\n1\n\r\n"
            )
            deadline = time.monotonic() + 60
            while one.status()["pipelines"]["default"]["accepted"] < 1:
                assert time.monotonic() < deadline
            file.write_text(f"{NEXT}\n")
            one.terminate(signal.SIGHUP)
            answer = b""
            while more := client.recv(65536):
                answer += more
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b'"accepted":1' in answer
        assert one.request("POST", "/v1/records", b"2", bearer(NEXT))[0] == 202


# -- certificates --------------------------------------------------------------------------------


async def shown(source: Any, context: ssl.SSLContext) -> tuple[Client, asyncio.StreamWriter]:
    host, _, port = source.addresses[0].rpartition(":")
    reader, writer = await asyncio.open_connection(
        host, int(port), ssl=context, server_hostname="localhost"
    )
    return Client(reader, writer), writer


@on_both_loops
async def test_a_certificate_that_expires_while_it_is_connected(tmp_path: Path) -> None:
    files = Files(tmp_path)
    context = ssl.create_default_context(cafile=files.ca)
    context.load_cert_chain(files.issue("client", "shop.example", days=1))
    tls = {"certificate": files.server(), "client_ca": files.ca, "client_required": True}
    intake = MemoryIntake()
    async with serving(intake, tls=tls) as source:
        client, writer = await shown(source, context)
        client.post(b"1")
        assert (await client.reply()).status == 202
        await begin(client, b"2\n")
        await until(lambda: len(intake.items) == 2)
        source._authenticator._now = lambda: time.time() + 2 * 86400
        client.send(chunk(b"3\n"))
        reply = await client.reply()
        assert (reply.status, reply.slug, reply.json["accepted"]) == (401, "unauthorized", 1)
        assert "expired" in reply.json["detail"]
        writer.close()
        client, writer = await shown(source, context)
        client.post(b"4")
        assert (await client.reply()).slug == "unauthorized"
        writer.close()
    assert intake.items == [b"1", b"2"]


@on_both_loops
async def test_authorities_that_change_end_what_they_vouched_for(tmp_path: Path) -> None:
    files, others = Files(tmp_path / "one"), Files(tmp_path / "other")
    ca = tmp_path / "clients.pem"
    ca.write_text((files.folder / "ca.pem").read_text())
    context = ssl.create_default_context(cafile=files.ca)
    context.load_cert_chain(files.issue("client", "shop.example"))
    tls = {"certificate": files.server(), "client_ca": str(ca)}
    intake = MemoryIntake()
    async with serving(intake, tls=tls) as source, contextlib.AsyncExitStack() as stack:
        idle, first = await shown(source, context)
        streaming, second = await shown(source, context)
        for writer in (first, second):
            stack.callback(writer.close)
        idle.post(b"1")
        assert (await idle.reply()).status == 202
        await begin(streaming, b"2\n")
        await until(lambda: len(intake.items) == 2)
        await source.reload()  # nothing has changed: everybody stays
        idle.post(b"3")
        assert (await idle.reply()).status == 202
        ca.write_text((others.folder / "ca.pem").read_text())
        await source.reload()
        assert await idle.closed()
        reply = await streaming.reply()
        assert (reply.status, reply.json["accepted"]) == (401, 1)
        assert "connect anew" in reply.json["detail"]
    assert intake.items == [b"1", b"2", b"3"]
