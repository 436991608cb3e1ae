"""What belongs to one principal alone: its idempotency keys, and its share of their table."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import time
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.append import Append
from ingestd.base.record import Records
from ingestd.http.credentials import hash_of, principal_of_certificate
from ingestd.http.settings import HttpSettings, WebhookSettings, has_one_principal, signatures_valid
from ingestd.journal.idempotency import KeyRule
from ingestd.journal.sqlite.journal import SqliteJournal
from ingestd.sources.http.endpoints.webhooks import read_webhooks
from ingestd.sources.http.headers import take_fingerprint
from tests.access.test_access_settings import ingestd
from tests.access.test_tokens import basic
from tests.access.tools import LOGS, NEXT, SHOP, bearer
from tests.daemon.harness import daemon
from tests.sources.source_tools import MemoryIntake, ask, serving
from tests.sources.test_idempotency import KINDS, Door

if TYPE_CHECKING:
    from pathlib import Path

DAY = 86400.0
TOKENS = {"shop": {"token": SHOP}, "logs": {"token": LOGS}, "next": {"token": NEXT}}
SECRET = b"a secret of the tests, 32 bytes."
HOOK = {"kind": "standard", "secret": "whsec_" + base64.b64encode(SECRET).decode()}


def signed(body: bytes, delivery: str, at: float) -> dict[str, str]:
    text = f"{delivery}.{at:.0f}.".encode() + body
    mac = base64.b64encode(hmac.new(SECRET, text, hashlib.sha256).digest()).decode()
    return {
        "webhook_id": delivery,
        "webhook_timestamp": f"{at:.0f}",
        "webhook_signature": f"v1,{mac}",
        "Content_Type": "application/json",
    }


@pytest.mark.parametrize("kind", KINDS)
async def test_a_key_of_one_token_is_none_of_another(tmp_path: Path, kind: str) -> None:
    async with Door(tmp_path, journal={"kind": kind}, http={"tokens": TOKENS}) as door:
        for token, body in ((SHOP, b"1"), (LOGS, b"1"), (NEXT, b"2")):
            first = await door.post(body, "k", **bearer(token))
            again = await door.post(body, "k", **bearer(token))
            assert (first.status, again.status) == (202, 202)
            assert "idempotent-replayed" not in first.headers
            assert again.headers["idempotent-replayed"] == "true"
        assert (await door.post(b"3", "k", **bearer(SHOP))).status == 422
        assert door.accepted == 3


async def test_a_client_can_choose_no_key_that_is_a_delivery_or_anothers(tmp_path: Path) -> None:
    http = {"tokens": TOKENS, "webhooks": {"std": HOOK}}
    async with Door(tmp_path, http=http) as door:
        body = b"[1]"
        delivery = signed(body, "k", time.time())
        assert (await ask(door.source, body, "/v1/webhooks/std", **delivery)).status == 202
        assert (await door.post(b"1", "k", **bearer(SHOP))).status == 202
        again = await ask(door.source, body, "/v1/webhooks/std", **delivery)
        assert again.headers["idempotent-replayed"] == "true"
        assert door.rows() == [("webhook std k",), ("token shop k",)]


@pytest.mark.parametrize("kind", KINDS)
async def test_nobody_fills_the_table_for_others(tmp_path: Path, kind: str) -> None:
    rule = KeyRule(DAY, 100, shared=True)
    more = {"http": {"tokens": TOKENS}, "keys": rule, "journal": {"kind": kind}}

    async def fill(door: Door, token: str) -> tuple[int, Any]:
        for number in range(200):
            reply = await door.post(b"1", f"k{number}", **bearer(token))
            if reply.status != 202:
                return number, reply
        raise AssertionError("no bound")

    async with Door(tmp_path, **more) as door:
        taken, refused = await fill(door, SHOP)
        assert (taken, refused.status, refused.slug) == (50, 503, "overloaded")
        assert "this client's share" in refused.json["detail"]
        assert "http.idempotency_keys_max" in refused.json["detail"]
        assert (await fill(door, LOGS))[0] == 25
        assert (await fill(door, NEXT))[0] == 13
        # What was accepted once is accepted once, also at the bound, and needs no key to be taken.
        again = await door.post(b"1", "k0", **bearer(SHOP))
        assert again.headers["idempotent-replayed"] == "true"
        assert (await ask(door.source, b"1", **bearer(SHOP))).status == 202
        door.clock.ahead = DAY + 1
        await door.post(b"1", "new", **bearer(SHOP))
        async with asyncio.timeout(60):
            while (await door.post(b"1", "new", **bearer(SHOP))).status != 202:
                pass
    if kind == "sqlite":
        async with Door(tmp_path, **more) as door:  # the shares outlive a restart
            owners = door.pipelines["default"].journal.idempotency.owners
            assert owners["token shop"] == 1
            assert sum(owners.values()) == len(door.rows())


@pytest.mark.parametrize(
    ("http", "one"),
    [
        ({}, True),
        ({"tokens": {"shop": {"token": SHOP}}}, True),
        ({"tokens": TOKENS}, False),
        ({"webhooks": {"std": HOOK}}, True),
        ({"webhooks": {"std": HOOK}, "allow_anonymous": True}, False),
        ({"tls": {"certificate": "x", "client_ca": "y"}}, False),
    ],
)
def test_who_is_alone_has_the_whole_table(http: dict[str, Any], *, one: bool) -> None:
    assert has_one_principal(HttpSettings(**http)) is one


async def test_keys_of_a_journal_without_principals_are_honoured(tmp_path: Path) -> None:
    (tmp_path / "default").mkdir()
    before = SqliteJournal(
        tmp_path / "default" / "journal.db", bytes_max=2**30, clock=Door(tmp_path).clock,
        on_commit=lambda *_: None,
    )  # fmt: skip
    await before.open(lambda _: None)
    claim = await before.idempotency.begin("k", take_fingerprint(b"1", "", "identity"))
    assert not isinstance(claim, bytes)
    claim.answer = b'{"accepted":1,"invalid":0,"errors":[]}'
    await before.append(Append(Records.lines([b"1"]), claim=claim))
    await before.close()
    for http, shown in (({"tokens": TOKENS}, bearer(SHOP)), ({}, {})):
        async with Door(tmp_path, http=http) as door:
            accepted = door.accepted
            for _ in range(2):
                again = await door.post(b"1", "k", **shown)
                assert (again.status, again.headers["idempotent-replayed"]) == (202, "true")
            assert door.accepted == accepted


async def test_another_request_under_an_old_key_may_be_another_clients(tmp_path: Path) -> None:
    async with Door(tmp_path, http={"tokens": TOKENS}) as door:
        keys = door.pipelines["default"].journal.idempotency
        claim = await keys.begin("k", take_fingerprint(b"1", "", "identity"))
        assert not isinstance(claim, bytes)
        await door.pipelines["default"].accept(Append(Records.lines([b"1"]), claim=claim))
        other = await door.post(b"2", "k", **bearer(LOGS))
        assert (other.status, "idempotent-replayed" in other.headers) == (202, False)
        assert (await door.post(b"2", "k", **bearer(LOGS))).headers["idempotent-replayed"] == "true"
        assert door.accepted == 2


def test_a_renewed_certificate_is_the_same_principal() -> None:
    one = {"subject": ((("commonName", "shop"),),), "notAfter": "Jan  1 00:00:00 2030 GMT"}
    assert principal_of_certificate(one) == principal_of_certificate({**one, "notAfter": "x"})
    other = {"subject": ((("commonName", "logs"),),)}
    alternative = {"subject": (), "subjectAltName": (("DNS", "shop"),)}
    assert len({principal_of_certificate(c) for c in (one, other, alternative)}) == 3
    assert " " not in principal_of_certificate(one).removeprefix("certificate ")


# -- deliveries ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_a_delivery_is_taken_once_as_long_as_its_signature_is_valid(
    tmp_path: Path, kind: str
) -> None:
    http = HttpSettings(webhooks={"std": HOOK}, idempotency_ttl="1s")
    assert signatures_valid(http) > 2 * 300
    rule = KeyRule(http.idempotency_ttl, signed_ttl=signatures_valid(http))
    more: dict[str, Any] = {"http": {"webhooks": {"std": HOOK}}, "journal": {"kind": kind}}
    async with Door(tmp_path, keys=rule, **more) as door:
        body = b"[1]"
        early = signed(body, "msg", time.time() + 290)  # the sender's clock is ahead
        for ahead in (0, 10, 290, 595):
            door.clock.ahead = ahead
            reply = await ask(door.source, body, "/v1/webhooks/std", **early)
            assert reply.status == 202
            await ask(
                door.source, body, "/v1/webhooks/std", **signed(body, f"o{ahead}", time.time())
            )
        assert door.accepted == 1 + 4
        door.clock.ahead = signatures_valid(http) + 5
        assert (
            "idempotent-replayed"
            not in (await ask(door.source, body, "/v1/webhooks/std", **early)).headers
        )


def test_the_daemon_keeps_ids_of_deliveries_longer_than_other_keys(tmp_path: Path) -> None:
    flags = ("--http.idempotency_ttl", "1ms", "--http.allow_anonymous", "true",
             "--http.webhooks.std.kind", "standard",
             "--http.webhooks.std.secret", HOOK["secret"])  # fmt: skip
    body = b"[1]"
    headers = {k.replace("_", "-"): v for k, v in signed(body, "msg", time.time()).items()}
    with daemon(*flags, cwd=tmp_path) as one:
        for _ in range(3):
            assert one.request("POST", "/v1/webhooks/std", body, headers)[0] == 202
            assert one.request("POST", "/v1/records", b"1", {"Idempotency-Key": "k"})[0] == 202
        assert one.until_settled()["accepted"] == 1 + 3


# -- secrets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["standard", "github", "stripe"])
@pytest.mark.parametrize("secret", ["whsec_", "whsec_c2hvcnQ=", "fifteen bytes !"])
def test_a_short_secret_is_named_and_not_taken(tmp_path: Path, kind: Any, secret: str) -> None:
    file = tmp_path / "secrets"
    file.write_text(f"{HOOK['secret']}\n{secret}\n")
    for more, where in (({"secret": secret}, "secret"), ({"file": str(file)}, "file: line 2")):
        problems: list[str] = []
        read_webhooks({"a": WebhookSettings(kind=kind, **more)}, problems)  # type: ignore[arg-type]
        (problem,) = problems
        assert problem.startswith(f"http.webhooks.a.{where}: ")
        assert "fewer than 16" in problem or "base64" in problem
        assert secret.removeprefix("whsec_") not in problem or secret == "whsec_"


def test_an_unset_variable_behind_the_prefix_does_not_start(tmp_path: Path) -> None:
    toml = 'http.webhooks.a = {kind = "standard", secret = "whsec_"}\n'
    (tmp_path / "ingestd.toml").write_text(toml)
    for command in (("check",), ("run", "--listen", "127.0.0.1:0", "--admin.listen", "")):
        run = ingestd(*command, cwd=tmp_path)
        assert (run.returncode, "fewer than 16" in run.stderr) == (78, True)


@pytest.mark.parametrize("nothing", [b"", b"\n"])
def test_the_hash_of_nothing_is_no_hash_of_a_token(tmp_path: Path, nothing: bytes) -> None:
    hashed = "sha256:" + hashlib.sha256(nothing).hexdigest()
    (tmp_path / "tokens").write_text(f"{SHOP}\n{hashed}\n")
    for line in (f'hash = "{hashed}"', 'file = "tokens"'):
        (tmp_path / "ingestd.toml").write_text(f"http.tokens.shop = {{{line}}}\n")
        run = ingestd("check", cwd=tmp_path)
        assert (run.returncode, "is the hash of no token" in run.stderr) == (78, True)


async def test_a_token_comes_in_any_of_the_usual_ways() -> None:
    ways = [
        {"X_API_Key": SHOP},
        {"x_api_key": f" {SHOP} "},
        basic(SHOP, ""),
        basic("shop", SHOP),
        bearer(SHOP),
        {**bearer(SHOP), "X_API_Key": "something of a proxy"},
    ]
    strange: list[dict[str, str]] = [
        {"X_API_Key": ""},
        {"X_API_Key": LOGS},
        {"X_API_Key": f"{SHOP}\r\nX-API-Key: {SHOP}"},
        {"X_API_Key": hash_of(SHOP)},
        basic(LOGS, ""),
        basic("", ""),
        {**bearer(LOGS), "X_API_Key": SHOP},
    ]
    async with serving(MemoryIntake(), tokens={"shop": {"token": SHOP}}) as source:
        for shown in ways:
            assert (await ask(source, b"1", **shown)).status == 202
        for shown in strange:
            reply = await ask(source, b"1", **shown)
            assert (reply.status, reply.slug) == (401, "unauthorized")
