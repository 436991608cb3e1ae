"""CORS: what a browser is told, in preflights and in every other answer."""

from __future__ import annotations

import pytest

from tests.access.tools import SHOP, bearer
from tests.sources.source_tools import MemoryIntake, ask, connected, serving, until

APP = "https://app.example"
ASKS = f"Origin: {APP}\r\nAccess-Control-Request-Method: POST"


async def options(source, *lines: str, target: str = "/v1/records"):
    async with connected(source) as client:
        head = "\r\n".join([f"OPTIONS {target} HTTP/1.1", "Host: localhost", *lines, "", ""])
        client.send(head.encode())
        return await client.reply()


def about_cors(reply) -> dict[str, str]:
    return {
        name: value
        for name, value in reply.headers.items()
        if name.startswith("access-control-") or name == "vary"
    }


async def test_off_by_default() -> None:
    async with serving(MemoryIntake(), tokens={"shop": {"token": SHOP}}) as source:
        reply = await ask(source, b"1", Origin=APP, **bearer(SHOP))
        assert (reply.status, about_cors(reply)) == (202, {})  # CORS is no access control
        reply = await options(source, ASKS)
        assert (reply.status, about_cors(reply)) == (204, {})


async def test_a_preflight() -> None:
    async with serving(MemoryIntake(), cors_origins=["https://other.example", APP]) as source:
        reply = await options(source, ASKS, "Access-Control-Request-Headers: content-type")
        assert reply.status == 204
        said = about_cors(reply)
        assert said["access-control-allow-origin"] == APP
        assert said["access-control-allow-methods"] == "POST, OPTIONS"
        assert {"Content-Type", "Content-Encoding", "Idempotency-Key", "Authorization"} <= set(
            said["access-control-allow-headers"].split(", ")
        )
        assert said["access-control-max-age"] == "7200"
        assert said["vary"] == "Origin"
        assert "access-control-allow-credentials" not in said
        reply = await options(source, ASKS, target="/openapi.json")
        assert about_cors(reply)["access-control-allow-methods"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "https://app.example.evil",
        "https://APP.example",
        "http://app.example",
        "https://app.example:8443",
        "https://app.example/",
        f"{APP} {APP}",
        "*",
    ],
)
async def test_another_origin_is_told_nothing_and_served_if_it_shows_a_token(origin: str) -> None:
    intake = MemoryIntake()
    for tokens in ({}, {"shop": {"token": SHOP}}):
        async with serving(intake, cors_origins=[APP], tokens=tokens) as source:
            asked = (f"Origin: {origin}", "Access-Control-Request-Method: POST")
            reply = await options(source, *asked)
            assert (reply.status, about_cors(reply)) == (204, {"vary": "Origin"})
            reply = await ask(source, b"1", Origin=origin, **bearer(SHOP))
            served = 202 if tokens or not origin else 403
            assert (reply.status, about_cors(reply)) == (served, {"vary": "Origin"})
    assert intake.items == [b"1"] * (1 if origin else 2)


async def test_every_answer_says_it_whatever_became_of_the_request() -> None:
    intake = MemoryIntake()
    async with serving(intake, cors_origins=[APP], requests_max=2, client_share=0.5) as source:
        for body, path, more, status in (
            (b"1", "/v1/records", {}, 202),
            (b"bad", "/v1/records", {}, 400),
            (b"1", "/elsewhere", {}, 404),
            (b"1", "/", {}, 405),
            (b"1", "/v1/records", {"Content_Type": "text/csv"}, 415),
        ):
            reply = await ask(source, body, path, Origin=APP, **more)
            assert reply.status == status
            check_shown(reply)
        intake.gate.clear()
        async with connected(source) as first, connected(source) as second:
            first.post(b"1")
            second.post(b"1")
            await until(lambda: source._handler.ingestion.admission.requests == 2)
            reply = await ask(source, b"1", Origin=APP)
            assert reply.status == 503
            check_shown(reply)
            intake.gate.set()
            assert {(await first.reply()).status, (await second.reply()).status} == {202}
        async with connected(source) as client:
            client.send(f"GET / HTTP/1.1\r\nHost: localhost\r\nOrigin: {APP}\r\n\r\n".encode())
            check_shown(await client.reply())


def check_shown(reply) -> None:
    said = about_cors(reply)
    assert said["access-control-allow-origin"] == APP
    assert {"X-Request-Id", "Retry-After", "Idempotent-Replayed"} <= set(
        said["access-control-expose-headers"].split(", ")
    )
    assert said["vary"] == "Origin"
    assert "access-control-allow-methods" not in said


async def test_every_origin() -> None:
    async with serving(MemoryIntake(), cors_origins="*") as source:
        for origin in (APP, "null", "http://localhost:3000"):
            reply = await ask(source, b"1", Origin=origin)
            assert about_cors(reply)["access-control-allow-origin"] == "*"
            assert "vary" not in reply.headers
        reply = await options(source, ASKS)
        assert about_cors(reply)["access-control-allow-methods"] == "POST, OPTIONS"


async def test_options_that_is_no_preflight() -> None:
    async with serving(MemoryIntake(), cors_origins=[APP]) as source:
        reply = await options(source, f"Origin: {APP}")
        assert reply.headers["allow"] == "POST, OPTIONS"
        assert "access-control-allow-methods" not in reply.headers
