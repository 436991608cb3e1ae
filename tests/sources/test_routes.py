"""Where a request goes: the pure look-up, and the methods of a real source."""

from __future__ import annotations

import pytest

from ingestd.http.credentials import hash_of, make_token
from ingestd.http.problem import Problem
from ingestd.http.routing import ASK, READ, SERVER, Resource, find, path_of
from ingestd.sources.http.endpoints.records import RECORDS
from tests.sources.source_tools import MemoryIntake, ask, connected, serving

WRITE = ("POST", "OPTIONS")
ANY_PIPELINE = f"{RECORDS}/"
TABLE = {
    "/": Resource(READ, "page"),
    RECORDS: Resource(WRITE, "default"),
    f"{RECORDS}/logs": Resource(WRITE, "logs"),
    ANY_PIPELINE: Resource(WRITE, "any"),
    SERVER: Resource(ASK, "server"),
}


@pytest.mark.parametrize(
    ("method", "target", "what"),
    [
        ("GET", "/", "page"),
        ("HEAD", "/?x=1", "page"),
        ("GET", "http://h:80/", "page"),
        ("GET", "http://h", "page"),
        ("GET", "http://h?a=/v1/records", "page"),
        ("OPTIONS", "/", "page"),
        ("OPTIONS", "*", "server"),
        ("OPTIONS", "http://h", "server"),
        ("POST", "/v1/records", "default"),
        ("POST", "/v1/records?", "default"),
        ("POST", "/v1/records#x", "default"),
        ("POST", "http://h/v1/records?x=://", "default"),
        ("POST", "/v1/records/logs?a/b", "logs"),
        ("POST", "HTTPS://h/v1/records/logs", "logs"),
        ("POST", f"{RECORDS}/", "any"),
        ("POST", f"{RECORDS}/logs/", "any"),
        ("OPTIONS", f"{RECORDS}/other?x", "any"),
    ],
)
def test_found(method: str, target: str, what: str) -> None:
    assert find(TABLE, method, target).what == what


@pytest.mark.parametrize(
    ("method", "target", "slug", "allow"),
    [
        ("POST", "/", "method-not-allowed", "GET, HEAD, OPTIONS"),
        ("GET", RECORDS, "method-not-allowed", "POST, OPTIONS"),
        ("HEAD", f"{RECORDS}/logs", "method-not-allowed", "POST, OPTIONS"),
        ("M-SEARCH", f"{RECORDS}?x", "method-not-allowed", "POST, OPTIONS"),
        ("GET", "*", "method-not-allowed", "OPTIONS"),
        ("POST", "http://h", "method-not-allowed", "GET, HEAD, OPTIONS"),
        ("GET", f"{RECORDS}/other", "method-not-allowed", "POST, OPTIONS"),
        ("POST", "/v1/recordsx", "not-found", None),
        ("POST", "//v1/records", "not-found", None),
        ("POST", "/v1/%72ecords", "not-found", None),
        ("GET", "", "not-found", None),
        ("CONNECT", "h:80", "not-found", None),
        ("OPTIONS", "/elsewhere", "not-found", None),
    ],
)
def test_not_found(method: str, target: str, slug: str, allow: str | None) -> None:
    with pytest.raises(Problem) as caught:
        find(TABLE, method, target)
    assert caught.value.kind.slug == slug
    assert caught.value.headers.get("Allow") == allow


def test_a_segment_of_any_value_and_the_paths_below_a_prefix() -> None:
    table = {
        "/elastic": Resource(READ, "probe"),
        "/elastic/": Resource(READ, "probe", alone=True),
        "/elastic/_bulk": Resource(WRITE, "bulk"),
        "/elastic/*/_bulk": Resource(WRITE, "index"),
        "/elastic/**": Resource((*WRITE, "GET"), "unknown"),
        "/batch/": Resource(WRITE, "batch", alone=True),
    }
    for target, what in (
        ("/elastic/?pretty", "probe"),
        ("/elastic/_bulk?x", "bulk"),
        ("/elastic/logs/_bulk", "index"),
        ("/elastic//_bulk", "unknown"),
        ("/elastic/a/b/_bulk", "unknown"),
        ("/elastic/_license", "unknown"),
        ("/batch/", "batch"),
    ):
        method = "GET" if what == "probe" else "POST"
        assert find(table, method, target).what == what
    for target in ("/batch/more", "/elastics/x", "/elastic/" + "a/" * 20 + "_bulk"):
        if target.startswith("/elastic/"):
            assert find(table, "POST", target).what == "unknown"
        else:
            with pytest.raises(Problem):
                find(table, "POST", target)


def test_what_is_written_in_the_target_is_not_interpreted() -> None:
    assert path_of("/a%2Fb/../c", "GET") == "/a%2Fb/../c"
    assert path_of("http://h//x", "GET") == "//x"


@pytest.mark.parametrize("path", ["/", "/openapi.json", "/?x=1", "http://localhost/"])
async def test_head_is_get_without_the_body(path: str) -> None:
    async with serving(MemoryIntake()) as source, connected(source) as client:
        replies = {}
        for method in ("GET", "HEAD"):
            client.send(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            replies[method] = await client.reply(bodiless=method == "HEAD")
        client.post(b"1")  # the connection goes on
        assert (await client.reply()).status == 202
    different = {"x-request-id", "date"}
    got, head = (
        {k: v for k, v in r.headers.items() if k not in different} for r in replies.values()
    )
    assert got == head
    assert replies["HEAD"].status == replies["GET"].status == 200
    assert int(head["content-length"]) == len(replies["GET"].body) > 1000


@pytest.mark.parametrize(
    ("target", "allow"),
    [
        ("/", "GET, HEAD, OPTIONS"),
        ("/openapi.json", "GET, HEAD, OPTIONS"),
        ("/v1/records", "POST, OPTIONS"),
        ("/v1/records/default?x", "POST, OPTIONS"),
        ("*", "OPTIONS"),
        ("http://x", "OPTIONS"),
    ],
)
async def test_options(target: str, allow: str) -> None:
    told = []
    async with (
        serving(MemoryIntake(), on_request=lambda *what: told.append(what)) as source,
        connected(source) as client,
    ):
        client.send(f"OPTIONS {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        reply = await client.reply()
        assert (reply.status, reply.headers["allow"]) == (204, allow)
        assert not {"content-length", "content-type", "vary"} & set(reply.headers)
        client.post(b"1")  # a 204 without a length ends where its head ends
        assert (await client.reply()).status == 202
    assert [status for _, _, status, _, _ in told] == [202]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE"])
@pytest.mark.parametrize("path", ["/", "/openapi.json"])
async def test_what_there_is_to_read_is_only_read(method: str, path: str) -> None:
    async with serving(MemoryIntake()) as source, connected(source) as client:
        client.send(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        reply = await client.reply()
        assert (reply.status, reply.slug) == (405, "method-not-allowed")
        assert reply.headers["allow"] == "GET, HEAD, OPTIONS"


async def test_a_body_that_nobody_wants_ends_the_connection() -> None:
    async with serving(MemoryIntake()) as source, connected(source) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert await client.closed()


async def test_what_is_read_is_there_while_the_daemon_drains() -> None:
    async with serving(MemoryIntake()) as source, connected(source) as client:
        client.post(b"1")
        assert (await client.reply()).status == 202
        await source.stop_taking(0)
        client.send(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")


async def test_a_known_etag_is_304() -> None:
    async with serving(MemoryIntake()) as source, connected(source) as client:
        for path in ("/", "/openapi.json"):
            client.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            tag = (await client.reply()).headers["etag"]
            for known in (tag, f'"x", W/{tag} ', "*", '"x"', "", tag.strip('"')):
                head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nIf-None-Match: {known}\r\n\r\n"
                client.send(head.encode())
                reply = await client.reply()
                assert reply.headers["etag"] == tag
                assert reply.headers["cache-control"] == "no-cache"
                if known in ("", '"x"', tag.strip('"')):
                    assert reply.status == 200
                    assert reply.body
                else:
                    assert reply.status == 304
                    assert "content-length" not in reply.headers


def test_a_path_that_stands_alone_is_one_look_up() -> None:
    class Counting(dict[str, Resource[str]]):
        looked = 0

        def get(self, *args):  # type: ignore[no-untyped-def]
            self.looked += 1
            return super().get(*args)

    table = Counting(TABLE)
    for target in (RECORDS, f"{RECORDS}/logs", "/"):
        table.looked = 0
        find(table, "OPTIONS", target)
        assert table.looked == 1


async def test_nothing_of_a_request_is_reflected() -> None:
    async with serving(MemoryIntake()) as source:
        reply = await ask(source, b"1", "/?<script>evil", X_Forwarded_Host="evil", Host="evil")
        assert b"evil" not in reply.body
        async with connected(source) as client:
            client.send(b"GET /?<b>evil HTTP/1.1\r\nHost: localhost\r\nReferer: evil\r\n\r\n")
            reply = await client.reply()
            assert reply.status == 200
            assert b"evil" not in reply.body
            client.send(b"GET / HTTP/1.1\r\nHost: evil.example\r\nReferer: evil\r\n\r\n")
            reply = await client.reply()
            assert reply.status == 421
            assert b"evil" not in reply.body


async def test_a_path_of_an_endpoint_that_is_off_says_how_to_switch_it_on() -> None:
    async with serving(MemoryIntake()) as source:
        assert source._off is None
        for path, name in (
            ("/loki/api/v1/push", "loki"),
            ("/elastic/x/_bulk", "elasticsearch"),
        ):
            reply = await ask(source, b"{}", path)
            assert (reply.status, reply.slug) == (404, "not-found")
            setting = f"http.endpoints.{name}.pipeline"
            assert reply.json["detail"] == f"the endpoint {name} is off: set {setting}"
        for path in ("/v2/records", "/v1/status"):
            detail = (await ask(source, b"{}", path)).json["detail"]
            assert "/ and /openapi.json list the paths" in detail
            assert "status and metrics are at the admin address (admin.listen)" in detail
    async with serving(MemoryIntake()) as source:
        source._name = "web"
        detail = (await ask(source, b"{}", "/loki/api/v1/push")).json["detail"]
        assert detail == "the endpoint loki is off: set sources.web.endpoints.loki.pipeline"


async def test_an_unknown_token_is_told_where_tokens_are_set() -> None:
    async with serving(MemoryIntake(), tokens={"shop": {"hash": hash_of(make_token())}}) as source:
        reply = await ask(source, b"{}", Authorization=f"Bearer {make_token()}")
    assert reply.status == 401
    assert "it is not known here: no http.tokens.NAME.hash belongs to it" in reply.json["detail"]
