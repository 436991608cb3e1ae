"""Addresses: which are public, and that no other one is ever connected to."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver

from ingestd.base.addresses import is_public
from ingestd.base.errors import InputIncomplete
from ingestd.sources.fetch.client import next_url, proxy_for
from ingestd.sources.fetch.failure import DownloadFailed
from ingestd.sources.fetch.safety import ForbiddenAddress, Resolver
from ingestd.sources.fetch.urls import as_url
from tests.fetch.tools import Intake, answers, fetching, lines, serving

if TYPE_CHECKING:
    from collections.abc import Mapping

SPECIAL = """
0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.127.255.255 127.0.0.1 127.255.255.255 169.254.169.254
172.16.0.1 172.31.255.255 192.0.0.8 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.19.255.255
198.51.100.1 203.0.113.9 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 168.63.129.16
:: ::1 ::7f00:1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 fe80::1
fe80::1%eth0 fec0::1 fc00::1 fd00:ec2::254 ff02::1 100::1 2001::1 2001:0:4136:e378::1
2001:10::1 2001:db8::1 3fff::1 2002:7f00:1:: 2002:a00:1:: 2002:a9fe:a9fe::1 64:ff9b::127.0.0.1
64:ff9b::10.1.2.3 64:ff9b::169.254.169.254 64:ff9b:1::808:808 5f00::1 4000::1
localhost 127.1 0x7f000001 2130706433 017700000001 1.2.3 nonsense
"""
PUBLIC = """
1.1.1.1 8.8.8.8 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 192.167.1.1 192.169.1.1
223.255.255.1 2606:4700::1111 2a00:1450::1 ::ffff:8.8.8.8 64:ff9b::8.8.8.8
2002:808:808::1 2620:4f::1
"""


@pytest.mark.parametrize("address", SPECIAL.split())
def test_special_addresses(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC.split())
def test_public_addresses(address: str) -> None:
    assert is_public(address)


async def given_up(url: str, options: Any = None, **more: Any) -> str:
    """Why a URL was given up; nothing of it was accepted."""
    intake = Intake()
    async with fetching(intake, url, options=options, allow_private=False, **more) as source:
        with pytest.raises(InputIncomplete):
            await source.wait_finished()
        (download,) = source._downloads
    assert intake.items == []
    return download.reason


PRIVATE = "its address is private or special (see fetch.allow_private)"


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "[::1]", "0.0.0.0"]
)
async def test_a_private_address_is_not_connected_to(host: str) -> None:
    async with serving(answers(lines(0, 3))) as server:
        port = server.url.rpartition(":")[2]
        assert await given_up(f"http://{host}:{port}/") == PRIVATE
        assert server.asked == []


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f.1", "0177.0.0.1"])
async def test_numbers_that_are_no_usual_address(host: str) -> None:
    async with serving(answers(lines(0, 3))) as server:
        port = server.url.rpartition(":")[2]
        await given_up(f"http://{host}:{port}/")
        assert server.asked == []


class Names(AbstractResolver):
    """Answers each question with the next list of addresses; the last one for ever."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> Any:
        self.asked += 1
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [
            {"hostname": host, "host": one, "port": port, "family": socket.AF_INET, "proto": 0,
             "flags": 0}
            for one in addresses
        ]  # fmt: skip

    async def close(self) -> None:
        pass


async def test_only_what_passes_comes_out_of_the_resolver() -> None:
    resolver = Resolver(is_public, Names(["10.0.0.1", "1.1.1.1"], ["10.0.0.1"], []))
    assert [one["host"] for one in await resolver.resolve("a")] == ["1.1.1.1"]
    with pytest.raises(ForbiddenAddress):
        await resolver.resolve("a")
    assert await resolver.resolve("a") == []


async def test_a_name_that_resolves_to_a_private_address() -> None:
    async with serving(answers(lines(0, 3))) as server:
        port = server.url.rpartition(":")[2]
        options = {"resolver": Names(["127.0.0.1", "10.0.0.1"])}
        assert await given_up(f"http://public.example:{port}/", options) == PRIVATE
        assert server.asked == []


def no_trap(address: str) -> bool:
    """Stands for the rules: here 127.0.0.2 is a public address and 127.0.0.1 a private one."""
    return address == "127.0.0.2"


async def test_a_name_that_resolves_differently_the_second_time_gains_nothing() -> None:
    """DNS rebinding: the address that was checked is the one that is connected to."""

    async def drop(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    async with serving(drop, host="127.0.0.2") as server:
        port = int(server.url.rpartition(":")[2])
        async with serving(answers(lines(0, 3)), port=port) as trap:
            names = Names(["127.0.0.2"], ["127.0.0.1"])
            options = {"resolver": names, "allowed": no_trap}
            url = f"http://public.example:{port}/"
            await given_up(url, options, attempts_max=6)
            assert server.asked
            assert names.asked > 1
            assert trap.asked == []


async def test_of_several_addresses_only_those_that_pass_are_tried() -> None:
    async with serving(answers(lines(0, 3)), host="127.0.0.2") as server:
        port = int(server.url.rpartition(":")[2])
        async with serving(answers(lines(5, 9)), port=port) as trap:
            intake = Intake()
            options = {"resolver": Names(["127.0.0.1", "127.0.0.2"]), "allowed": no_trap}
            url = f"http://public.example:{port}/"
            async with fetching(intake, url, options=options, allow_private=False) as source:
                await source.wait_finished()
            assert trap.asked == []
    assert len(intake.items) == 3


async def test_a_redirect_to_a_private_address_is_not_followed() -> None:
    async with serving(answers(lines(0, 3))) as trap:

        async def redirect(request: web.Request) -> web.StreamResponse:
            raise web.HTTPFound(trap.url)

        async with serving(redirect, host="127.0.0.2") as server:
            assert await given_up(server.url + "/", {"allowed": no_trap}) == PRIVATE
            assert server.asked
            assert trap.asked == []


@pytest.mark.parametrize(
    ("url", "location", "target"),
    [
        ("http://a/x/y?q", "z?k=%2F", "http://a/x/z?k=%2F"),
        ("http://a/x", "//b/z", "http://b/z"),
        ("http://a/x", "https://a/x#part", "https://a/x"),
        ("http://a/x", "http://user:secret@b/", "http://b/"),
        ("https://a/x", "/ä", "https://a/%C3%A4"),
    ],
)
def test_where_a_redirect_leads(url: str, location: str, target: str) -> None:
    assert str(next_url(as_url(url), location)) == target


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("http://a/", "from https to http"),
        ("ftp://a/", "not http or https"),
        ("file:///etc/passwd", "not http or https"),
        ("javascript:alert(1)", "not http or https"),
        ("http://[::1", "not a URL"),
        ("https://a:99999/", "not a URL"),
    ],
)
def test_where_no_redirect_may_lead(location: str, says: str) -> None:
    with pytest.raises(DownloadFailed, match=says):
        next_url(as_url("https://a/"), location)


@pytest.mark.parametrize(
    ("environ", "url", "proxy"),
    [
        ({}, "http://a/", None),
        ({"http_proxy": "http://p:1"}, "http://a/", "http://p:1"),
        ({"http_proxy": "http://p:1"}, "https://a/", None),
        ({"https_proxy": "http://p:1", "no_proxy": "a,b"}, "https://a/", None),
        ({"all_proxy": "http://p:1"}, "https://a/", "http://p:1"),
    ],
)
def test_proxies_of_the_environment(
    environ: Mapping[str, str], url: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert proxy_for(as_url(url)) == proxy


@pytest.mark.parametrize("trust", [False, True])
async def test_the_environments_proxy_is_used_only_if_it_is_trusted(
    trust: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    async with serving(answers(lines(0, 3))) as server, serving(answers(lines(5, 9))) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        intake = Intake()
        async with fetching(intake, server.url + "/", trust_env=trust) as source:
            await source.wait_finished()
    assert len(intake.items) == (4 if trust else 3)
    assert bool(proxy.asked) is trust
    assert bool(server.asked) is not trust
