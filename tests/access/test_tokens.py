"""Tokens at the door: who comes in, where to, and how much. Real sockets."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.errors import ConfigError
from ingestd.http.admission import BURST_SECONDS
from ingestd.http.credentials import hash_of
from tests.access.tools import LOGS, NEXT, SHOP, acurl, bearer, needs_curl
from tests.sources.source_tools import MemoryIntake, Reply, ask, connected, serving, until

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = {
    "shop": {"token": SHOP},
    "logs": {"hash": hash_of(LOGS), "pipelines": ["logs"]},
}


def basic(user: str, token: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{token}".encode()).decode()}


@pytest.fixture
def intakes() -> tuple[MemoryIntake, MemoryIntake]:
    return MemoryIntake(), MemoryIntake("text", "logs")


async def code(source: Any, path: str = "/v1/records", **headers: str) -> tuple[int, str]:
    reply = await ask(source, b"1", path, **headers)
    return reply.status, reply.slug if reply.status >= 400 else ""


OK = (202, "")
UNAUTHORIZED, FORBIDDEN = (401, "unauthorized"), (403, "forbidden")


async def test_a_token_opens_what_is_its_own(intakes: Any) -> None:
    async with serving(*intakes, tokens=TOKENS) as source:
        assert await code(source, **bearer(SHOP)) == OK
        assert await code(source, "/v1/records/logs", **bearer(SHOP)) == OK
        assert await code(source, "/v1/records/logs", **bearer(LOGS)) == OK
        assert await code(source, **bearer(LOGS)) == FORBIDDEN
        assert await code(source, **basic("shop", SHOP)) == OK
        assert await code(source, "/v1/records/logs", **basic("logs", LOGS)) == OK
        assert await code(source, Authorization=f"bEaReR  {SHOP} ") == OK
    assert len(intakes[0].items) == 3
    assert len(intakes[1].items) == 3


@pytest.mark.parametrize(
    "shown",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        bearer(SHOP[:-1]),
        bearer(SHOP + "x"),
        bearer(SHOP.upper()),
        bearer(hash_of(SHOP)),
        bearer("ä" * 20),
        {"Authorization": SHOP},
        {"Authorization": f"Token {SHOP}"},
        {"Authorization": f"Digest {SHOP}"},
        {"Authorization": f"Bearer {SHOP}\r\nAuthorization: Bearer {SHOP}"},
        basic("logs", SHOP),
        basic("", SHOP),
        basic("shop", ""),
        basic("nobody", "x" * 20),
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic /w=="},
        {"Authorization": "Basic " + base64.b64encode(SHOP.encode()).decode()},
    ],
)
async def test_everybody_else_is_a_stranger(intakes: Any, shown: dict[str, str]) -> None:
    async with serving(*intakes, tokens=TOKENS) as source:
        reply = await ask(source, b"1", **shown)
        assert (reply.status, reply.slug) == UNAUTHORIZED
        challenge = reply.headers["www-authenticate"]
        assert challenge.startswith('Bearer realm="ingestd"')
        assert 'Basic realm="ingestd", charset="UTF-8"' in challenge
        assert ("invalid_token" in challenge) == ("Authorization" in shown)
        for path in ("/v1/records/logs", "/v1/records/nowhere"):
            assert await code(source, path, **shown) == UNAUTHORIZED
    assert not intakes[0].runs
    assert not intakes[1].runs


async def test_only_who_may_see_all_learns_which_pipelines_exist(intakes: Any) -> None:
    async with serving(*intakes, tokens=TOKENS) as source:
        paths = ("/v1/records", "/v1/records/default", "/v1/records/nowhere")
        strange = [await ask(source, b"1", path) for path in paths]
        foreign = [await ask(source, b"1", path, **bearer(LOGS)) for path in paths]
        assert await code(source, paths[2], **bearer(SHOP)) == (404, "unknown-pipeline")
        async with connected(source) as client:
            for path in paths:
                client.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                assert (await client.reply()).status == 405
    for replies in (strange, foreign):
        assert len({(reply.status, reply.body) for reply in replies}) == 1


async def test_nothing_of_a_body_is_read_before_it_is_known_whose_it_is(intakes: Any) -> None:
    async with serving(*intakes, tokens=TOKENS) as source:
        for shown, expected in (({}, 401), (bearer(LOGS), 403)):
            async with connected(source) as client:
                client.post(b"", Content_Length="1000000", Expect="100-continue", **shown)
                reply = await client.reply()
                assert (reply.status, reply.headers["connection"]) == (expected, "close")
                assert source._handler.ingestion.admission.requests == 0


async def test_a_stranger_is_told_nothing_about_the_rest_of_the_request(intakes: Any) -> None:
    async with serving(*intakes, tokens=TOKENS) as source:
        wrong = {"Content_Type": "image/png", "Content_Encoding": "br", "Idempotency_Key": '"'}
        assert await code(source, **wrong) == UNAUTHORIZED
        assert await code(source, **wrong, **bearer(SHOP)) == (415, "unsupported-media-type")


async def test_without_tokens_everybody_may(intakes: Any) -> None:
    async with serving(*intakes) as source:
        assert await code(source) == OK
        assert await code(source, **bearer("whatever")) == OK


async def test_where_webhooks_are_the_only_way_in_records_are_closed(intakes: Any) -> None:
    hook = {"hub": {"kind": "github", "secret": "an-example-of-a-secret"}}
    async with serving(*intakes, webhooks=hook) as source:
        assert await code(source) == UNAUTHORIZED
    async with serving(*intakes, webhooks=hook, allow_anonymous=True) as source:
        assert await code(source) == OK


async def test_a_file_holds_several_tokens_and_is_read_again(intakes: Any, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"{SHOP}\r\n\n  {hash_of(NEXT).upper()}\n")
    async with serving(*intakes, tokens={"shop": {"file": str(file)}}) as source:
        assert await code(source, **bearer(SHOP)) == OK
        assert await code(source, **bearer(NEXT)) == OK
        async with connected(source) as open_before:
            file.write_text(LOGS)
            await source.reload()
            open_before.post(b"1", **bearer(SHOP))
            assert (await open_before.reply()).status == 401
        assert await code(source, **bearer(LOGS)) == OK
        file.write_text("short\n")
        with pytest.raises(ConfigError, match=r"http\.tokens\.shop\.file: line 1"):
            await source.reload()
        assert await code(source, **bearer(LOGS)) == OK


# -- how much ------------------------------------------------------------------------------------


async def limited(source: Any, body: bytes, token: str = SHOP) -> Reply:
    return await ask(source, body, **bearer(token))


async def test_records_beyond_the_rate_wait(intakes: Any) -> None:
    tokens = {"shop": {"token": SHOP, "records_per_second": 10}, "other": {"token": NEXT}}
    burst = int(10 * BURST_SECONDS)
    async with serving(*intakes, tokens=tokens) as source:
        now = [0.0]
        principal = source._authenticator._principals["shop"]
        principal._monotonic = lambda: now[0]
        now[0] = 1e9  # long idle
        # Whole, although it is more than there is.
        assert (await limited(source, b"1\n" * (burst + 100))).status == 202
        reply = await limited(source, b"1")
        assert (reply.status, reply.slug) == (429, "rate-limited")
        assert reply.headers["retry-after"] == "10"
        assert "http.tokens.shop.records_per_second" in reply.json["detail"]
        assert (await limited(source, b"1\n" * 1000, NEXT)).status == 202
        now[0] += 9.5
        assert (await limited(source, b"1")).headers["retry-after"] == "1"
        now[0] += 0.5
        assert (await limited(source, b"1")).status == 202


async def test_bytes_are_those_of_the_records_decompressed(intakes: Any) -> None:
    import gzip

    tokens = {"shop": {"token": SHOP, "bytes_per_second": "1kB"}}
    async with serving(*intakes, tokens=tokens) as source:
        now = [1e9]
        source._authenticator._principals["shop"]._monotonic = lambda: now[0]
        body = b'"' + b"x" * 10_000 + b'"\n'
        reply = await ask(source, gzip.compress(body), Content_Encoding="gzip", **bearer(SHOP))
        assert reply.status == 202
        reply = await limited(source, b"1")
        owed = len(body) - 1000 * BURST_SECONDS
        assert (reply.status, reply.headers["retry-after"]) == (429, str(-int(-owed // 1000)))


async def test_a_debt_outlives_connections_and_reloads(intakes: Any) -> None:
    tokens = {"shop": {"token": SHOP, "records_per_second": 1}}
    async with serving(*intakes, tokens=tokens) as source, connected(source) as client:
        client.post(b"1\n" * 10_000, **bearer(SHOP))
        assert (await client.reply()).status == 202
        await source.reload()
        for _ in range(2):
            assert (await limited(source, b"1")).status == 429
        client.post(b"1", **bearer(SHOP))
        assert (await client.reply()).status == 429


async def test_a_share_is_a_tokens_and_not_an_addresss(intakes: Any) -> None:
    tokens = {"shop": {"token": SHOP}, "next": {"token": NEXT}}
    intakes[0].gate.clear()
    async with serving(*intakes, tokens=tokens, requests_max=4, client_share=0.5) as source:
        waiting = [asyncio.create_task(limited(source, b"1")) for _ in range(2)]
        waiting.append(asyncio.create_task(limited(source, b"1", NEXT)))
        await until(lambda: source._handler.ingestion.admission.requests == 3)
        reply = await limited(source, b"1")
        assert (reply.status, reply.slug) == (429, "over-share")
        intakes[0].gate.set()
        assert {(await task).status for task in waiting} == {202}


@needs_curl
async def test_curl(intakes: Any) -> None:
    async with serving(*intakes, tokens=TOKENS) as source:
        url = f"http://{source.addresses[0]}/v1/records"
        for arguments in (["-H", f"Authorization: Bearer {SHOP}"], ["-u", f"shop:{SHOP}"],
                          ["--oauth2-bearer", SHOP]):  # fmt: skip
            assert (await acurl(url, "-d", "1", *arguments)).status == 202
        assert (await acurl(url, "-d", "1", "-u", f"logs:{SHOP}")).status == 401
        assert (await acurl(url, "-d", "1")).status == 401
        # curl asks first what is wanted, and then takes the stronger way that it knows.
        assert (await acurl(url, "-d", "1", "--anyauth", "-u", f"shop:{SHOP}")).status == 202


async def test_who_was_turned_away_is_logged_seldom_and_without_the_token(intakes: Any) -> None:
    import structlog

    with structlog.testing.capture_logs() as logs:
        async with serving(*intakes, tokens=TOKENS) as source:
            for _ in range(50):
                await code(source, **bearer("a-wrong-token-0123456789"))
    denied = [line for line in logs if line["event"] == "requests_denied"]
    assert denied == [
        {"event": "requests_denied", "count": 1, "last": "127.0.0.1", "log_level": "info"}
    ]
