"""Pages in a browser on this machine: by which name they ask, and whose they are."""

from __future__ import annotations

import asyncio
import http.client
import socket
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.admin.server import AdminServer
from ingestd.base.metrics import Metrics
from ingestd.config.network import Hosts, check_hosts, split_address
from ingestd.http.settings import HttpSettings
from ingestd.settings import AdminSettings
from ingestd.sources.http.source import HttpSource
from tests.access.tools import SHOP, bearer
from tests.admin.test_admin_server import View
from tests.daemon.harness import daemon
from tests.sources.source_tools import MemoryIntake, connected, serving

if TYPE_CHECKING:
    from pathlib import Path

HOOKS = {"hub": {"kind": "github", "secret": "an-example-of-a-secret"}}
OURS = ["127.0.0.1", "127.0.0.1:8080", "localhost", "LOCALHOST:1", "localhost.", "x.localhost:80",
        "[::1]:8080", "[::1]", "192.0.2.7:99"]  # fmt: skip
OTHERS = ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example",
          "notlocalhost", "x"]  # fmt: skip


async def asked(
    source: Any, *lines: str, line: str = "POST /v1/records HTTP/1.1"
) -> tuple[int, str]:
    async with connected(source) as client:
        body = b"1" if line.startswith("POST") else b""
        head = "\r\n".join([line, *lines, f"Content-Length: {len(body)}", "", ""])
        client.send(head.encode() + body)
        reply = await client.reply(bodiless=line.startswith("HEAD"))
        return reply.status, reply.slug if reply.status >= 400 and reply.body else ""


@pytest.mark.parametrize("host", OURS)
async def test_names_of_this_machine(host: str) -> None:
    async with serving(MemoryIntake()) as source:
        assert await asked(source, f"Host: {host}") == (202, "")


@pytest.mark.parametrize("host", OTHERS)
async def test_a_rebound_name_reads_and_sends_nothing(host: str) -> None:
    intake = MemoryIntake()
    async with serving(intake) as source:
        assert await asked(source, f"Host: {host}") == (421, "misdirected")
        unknown = "POST /v1/records/nowhere HTTP/1.1"
        assert await asked(source, f"Host: {host}", line=unknown) == (421, "misdirected")
        for page in ("/", "/openapi.json"):
            assert (await asked(source, f"Host: {host}", line=f"GET {page} HTTP/1.1"))[0] == 421
        whole = f"POST http://{host}/v1/records HTTP/1.1"
        assert await asked(source, "Host: 127.0.0.1", line=whole) == (421, "misdirected")
        assert await asked(source, line="POST /v1/records HTTP/1.0") == (202, "")
    async with serving(intake, hosts=[host.partition(":")[0]]) as source:
        assert await asked(source, f"Host: {host}") == (202, "")
    async with serving(intake, hosts=["*"]) as source:
        assert await asked(source, f"Host: {host}") == (202, "")
    assert len(intake.items) == 3


PAGES = [
    ("Origin: https://evil.example",),
    ("Origin: null",),
    ("Origin: http://127.0.0.1:8080", "Origin: https://evil.example"),
    ("Origin: http://localhost:3000",),
    ("Origin: http://127.0.0.1:8081",),
    ("Sec-Fetch-Site: cross-site",),
    ("Sec-Fetch-Site: same-site",),
    (
        "Origin: https://evil.example",
        "Sec-Fetch-Site: cross-site",
        "Content-Type: application/x-www-form-urlencoded",
    ),
]


@pytest.mark.parametrize("lines", PAGES)
async def test_pages_of_other_origins_do_not_send(lines: tuple[str, ...]) -> None:
    intake = MemoryIntake()
    async with serving(intake) as source:
        assert await asked(source, "Host: 127.0.0.1:8080", *lines) == (403, "foreign-origin")
    async with serving(intake, hosts=["*"]) as source:
        assert (await asked(source, "Host: 127.0.0.1:8080", *lines))[0] == 403
    assert not intake.runs
    async with serving(intake, tokens={"shop": {"token": SHOP}}) as source:
        shown = f"Authorization: {bearer(SHOP)['Authorization']}"
        assert await asked(source, "Host: evil.example", shown, *lines) == (202, "")


@pytest.mark.parametrize(
    "lines",
    [
        ("Origin: http://127.0.0.1:8080",),
        ("Origin: https://127.0.0.1:8080", "Sec-Fetch-Site: same-origin"),
        ("Sec-Fetch-Site: none",),
        ("Origin: https://app.example", "Sec-Fetch-Site: cross-site"),
    ],
)
async def test_our_own_pages_and_those_that_are_listed_do(lines: tuple[str, ...]) -> None:
    async with serving(MemoryIntake(), cors_origins=["https://app.example"]) as source:
        assert await asked(source, "Host: 127.0.0.1:8080", *lines) == (202, "")


async def test_every_origin_is_every_origin() -> None:
    async with serving(MemoryIntake(), cors_origins=["*"]) as source:
        for lines in PAGES:
            assert await asked(source, "Host: localhost", *lines) == (202, "")


async def test_elsewhere_names_are_checked_only_if_there_are_some() -> None:
    async with serving(MemoryIntake(), listen="0.0.0.0:0", allow_anonymous=True) as source:
        for lines in PAGES:
            assert await asked(source, "Host: ingest.example", *lines) == (202, "")
    more: dict[str, Any] = {"listen": "0.0.0.0:0", "hosts": ["ingest.example"]}
    for who in ({"allow_anonymous": True}, {"tokens": {"shop": {"token": SHOP}}}):
        async with serving(MemoryIntake(), **more, **who) as source:
            shown = f"Authorization: {bearer(SHOP)['Authorization']}"
            assert await asked(source, "Host: ingest.example:99", shown) == (202, "")
            assert await asked(source, "Host: other.example", shown) == (421, "misdirected")


async def test_a_unix_socket_is_nothing_for_browsers(tmp_path: Path) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(tmp_path / "socket"))
    sock.listen()
    sock.setblocking(False)
    intake = MemoryIntake()
    source = HttpSource(HttpSettings(), {"default": intake}, default="default", sockets=[sock])
    await source.start()
    try:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "socket"))
        writer.write(b"POST /v1/records HTTP/1.1\r\nHost: any\r\nContent-Length: 1\r\n\r\n1")
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 202 ")
        writer.close()
    finally:
        await source.close()


def test_names_as_settings_write_them() -> None:
    assert check_hosts(("a", "a.b-c.d_e", "*")) == ("a", "a.b-c.d_e", "*")
    for wrong in ("A", "a:80", "http://a", "a.", ".a", "", "[::1]", "a*"):
        with pytest.raises(ValueError, match="is no name of a host"):
            check_hosts((wrong,))
    hosts = Hosts(["a.example"])
    for number in range(1000):
        assert hosts.know(f"a.example:{number}")
        assert not hosts.know(f"b.example:{number}")
    assert len(hosts.known) <= 256


# -- webhooks alone ------------------------------------------------------------------------------


async def test_webhooks_alone_say_what_else_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(MemoryIntake(), webhooks=HOOKS) as source:
        assert "records_refused" in capsys.readouterr().out
        async with connected(source) as client:
            client.post(b"1")
            reply = await client.reply()
            assert (reply.status, reply.slug) == (401, "unauthorized")
            for words in ("webhooks", "http.tokens.NAME.hash", "http.allow_anonymous"):
                assert words in reply.json["detail"]
    async with serving(MemoryIntake(), webhooks=HOOKS, tokens={"a": {"token": SHOP}}) as source:
        assert "records_refused" not in capsys.readouterr().out


# -- the admin server ----------------------------------------------------------------------------


async def admin_answers(settings: AdminSettings, *lines: str, page: str = "/v1/status") -> int:
    admin = AdminServer(settings, View(), Metrics("1"))
    await admin.start()
    try:
        port = split_address(admin.addresses[0])[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write("\r\n".join([f"GET {page} HTTP/1.1", *lines, "", ""]).encode())
        answer = await reader.read()
        writer.close()
        return int(answer.split()[1])
    finally:
        await admin.close()


LOOPBACK, ANYWHERE = AdminSettings(listen="127.0.0.1:0"), AdminSettings(listen="0.0.0.0:0")


async def test_a_rebound_name_reads_no_status() -> None:
    for host in OURS:
        assert await admin_answers(LOOPBACK, f"Host: {host}") == 200
    for host in OTHERS:
        for page in ("/v1/status", "/metrics", "/livez", f"http://{host}/v1/status"):
            assert await admin_answers(LOOPBACK, f"Host: {host}", page=page) == 421


async def test_monitoring_that_asks_by_a_name_goes_on() -> None:
    name = "Host: ingestd.default.svc.cluster.local:8081"
    assert await admin_answers(ANYWHERE, name) == 200
    named = AdminSettings(listen="127.0.0.1:0", hosts="ingestd.default.svc.cluster.local")
    assert await admin_answers(named, name) == 200
    assert await admin_answers(named, "Host: other.example") == 421
    named = AdminSettings(listen="0.0.0.0:0", hosts="ingestd.default.svc.cluster.local")
    assert await admin_answers(named, name) == 200
    assert await admin_answers(named, "Host: other.example") == 421
    assert await admin_answers(named, "Host: 10.1.2.3:8081") == 200


async def test_pages_of_other_origins_read_no_status() -> None:
    host = "Host: 127.0.0.1:8081"
    assert await admin_answers(LOOPBACK, host, "Origin: https://evil.example") == 403
    assert await admin_answers(LOOPBACK, host, "Sec-Fetch-Site: cross-site") == 403
    assert await admin_answers(LOOPBACK, host, "Sec-Fetch-Site: same-origin") == 200
    link = ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate")
    assert await admin_answers(LOOPBACK, host, *link) == 200
    assert await admin_answers(ANYWHERE, host, "Origin: https://grafana.example") == 200


def test_the_daemon_as_it_comes(tmp_path: Path) -> None:
    with daemon(cwd=tmp_path) as one:
        assert one.post(b"1")[0] == 202
        for port, method, page in (
            (one.port, "POST", "/v1/records"),
            (one.admin_port, "GET", "/v1/status"),
        ):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request(method, page, b"1", {"Host": "rebound.example"})
            assert connection.getresponse().status == 421
            connection.close()
        assert one.until_settled()["accepted"] == 1
