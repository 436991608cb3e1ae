"""Signed deliveries, first with what the senders publish as examples, then at the real daemon."""

from __future__ import annotations

import base64
import gzip
import hashlib
import hmac
import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.http.problem import Problem
from ingestd.http.settings import WebhookSettings
from ingestd.sources.http.endpoints.webhooks import Webhook, read_webhooks
from tests.access import test_webhook_schemes as schemes
from tests.daemon.harness import Daemon, daemon, written
from tests.service.tools import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

WHSEC = "whsec_plJ3nmyCDGBKInavdOK15jsl"
NEW_WHSEC = "whsec_" + base64.b64encode(b"the secret after it").decode()
HUB = "It's a Secret to Everybody"
STRIPE = "whsec_stripe_takes_it_as_it_is"
S = schemes.SECRET
JSON = {"Content-Type": "application/json"}


def sha(key: bytes, *parts: bytes) -> Any:
    return hmac.new(key, b"".join(parts), hashlib.sha256)


def standard(body: bytes, delivery: str = "msg_1", at: int | None = None, secret: str = WHSEC):
    at = int(time.time()) if at is None else at
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signature = base64.b64encode(sha(key, f"{delivery}.{at}.".encode(), body).digest()).decode()
    return {
        "webhook-id": delivery,
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1a,AAAA v1,{signature}",
    }


def github(body: bytes, delivery: str = "7f2", secret: str = HUB) -> dict[str, str]:
    signature = sha(secret.encode(), body).hexdigest()
    return {"X-Hub-Signature-256": f"sha256={signature}", "X-GitHub-Delivery": delivery}


def stripe(body: bytes, at: int | None = None, secret: str = STRIPE) -> dict[str, str]:
    at = int(time.time()) if at is None else at
    signature = sha(secret.encode(), f"{at}.".encode(), body).hexdigest()
    return {"Stripe-Signature": f"t={at},v1={'0' * 64},v1={signature},v0=6ffbb59b2300aae63f272406"}


def webhook(kind: str, *secrets: str) -> Webhook:
    settings = WebhookSettings(kind=kind, secret=secrets[0])  # type: ignore[arg-type]
    problems: list[str] = []
    keys = [read_webhooks({"x": WebhookSettings(kind=kind, secret=s)}, problems)["x"][0]  # type: ignore[arg-type]
            for s in secrets]  # fmt: skip
    assert not problems
    return Webhook("x", settings, keys)


def check(hook: Webhook, headers: Mapping[str, str], body: bytes, now: float) -> str:
    from multidict import CIMultiDict

    try:
        return hook.check(CIMultiDict(headers), body, now).key
    except Problem as error:
        return error.kind.slug


# -- what the senders publish --------------------------------------------------------------------


def test_the_example_of_standard_webhooks() -> None:
    headers = {
        "webhook-id": "msg_loFOjxBNrRLzqYUf",
        "webhook-timestamp": "1731705121",
        "webhook-signature": "v1,rAvfW3dJ/X/qxhsaXPOyyCGmRKsaKWcsNccKXlIktD0=",
    }
    body = b'{"event_type":"ping","data":{"success":true}}'
    hook = webhook("standard", WHSEC)
    assert check(hook, headers, body, 1731705121) == "webhook x msg_loFOjxBNrRLzqYUf"
    assert check(hook, headers, body, 1731705121 + 300) == "webhook x msg_loFOjxBNrRLzqYUf"
    for late in (301, -301):
        assert check(hook, headers, body, 1731705121 + late) == "signature-invalid"
    assert check(hook, headers, body + b" ", 1731705121) == "signature-invalid"
    other = {**headers, "webhook-id": "msg_other"}
    assert check(hook, other, body, 1731705121) == "signature-invalid"
    assert check(webhook("standard", NEW_WHSEC), headers, body, 1731705121) == "signature-invalid"
    assert check(webhook("standard", NEW_WHSEC, WHSEC), headers, body, 1731705121) != (
        "signature-invalid"
    )


def test_the_example_of_github() -> None:
    headers = {
        "X-Hub-Signature-256": (
            "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
        ),
        "X-GitHub-Delivery": "72d3162e-cc78-11e3-81ab-4c9367dc0958",
    }
    hook = webhook("github", HUB)
    assert check(hook, headers, b"Hello, World!", 0) == (
        "webhook x 72d3162e-cc78-11e3-81ab-4c9367dc0958"
    )
    assert check(hook, headers, b"Hello, World", 0) == "signature-invalid"
    sha1 = {"X-Hub-Signature": "sha1=01dc10d0c83e72ed246219cdd91669667fe2ca59"}
    assert check(hook, headers | {"X-Hub-Signature-256": ""} | sha1, b"Hello, World!", 0) == (
        "signature-invalid"
    )


@pytest.mark.parametrize(
    ("kind", "headers"),
    [
        ("standard", {}),
        ("standard", {"webhook-signature": "v1,"}),
        ("standard", {"webhook-signature": "", "webhook-timestamp": "x" * 10}),
        ("standard", {"webhook-timestamp": "-1"}),
        ("standard", {"webhook-timestamp": "9" * 400}),
        ("standard", {"webhook-id": ""}),
        ("standard", {"webhook-id": "a b"}),
        ("github", {"X-Hub-Signature-256": "sha256="}),
        ("github", {"X-Hub-Signature-256": "sha256=\xe9"}),
        ("github", {"X-GitHub-Delivery": ""}),
        ("github", {"X-GitHub-Delivery": "x" * 256}),
        ("stripe", {"Stripe-Signature": ""}),
        ("stripe", {"Stripe-Signature": "t=1,t=2,v1=00"}),
        ("stripe", {"Stripe-Signature": "v1=00"}),
        ("stripe", {"Stripe-Signature": "t=\u0661,v1=00"}),
    ],
)
def test_headers_that_say_nothing_good(kind: str, headers: dict[str, str]) -> None:
    body = b'{"id":"evt_1"}'
    makers = {"standard": standard, "github": github, "stripe": stripe}
    secrets = {"standard": WHSEC, "github": HUB, "stripe": STRIPE}
    hook = webhook(kind, secrets[kind])
    right = makers[kind](body)  # type: ignore[operator]
    assert check(hook, right, body, time.time()).startswith("webhook x ")
    wrong = {**right, **headers} if headers else {}
    assert check(hook, wrong, body, time.time()) == "signature-invalid"


def test_a_secret_that_is_none_is_named_and_not_shown() -> None:
    problems: list[str] = []
    read_webhooks({"x": WebhookSettings(kind="standard", secret="whsec_not/base64!")}, problems)
    assert problems == ["http.webhooks.x.secret: should be whsec_ and base64"]


# -- at the daemon -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Path]]:
    folder = tmp_path_factory.mktemp("webhooks")
    (folder / "standard").write_text(f"{WHSEC}\n{NEW_WHSEC}\n")
    (folder / "ingestd.toml").write_text(
        f"""
        pipelines.hub = {{}}
        http.webhooks.std = {{ kind = "standard", file = "standard" }}
        http.webhooks.hub = {{ kind = "github", secret = "{HUB}", pipeline = "hub" }}
        http.webhooks.pay = {{ kind = "stripe", secret = "{STRIPE}" }}
        http.webhooks.slack = {{ kind = "slack", secret = "{S}" }}
        http.webhooks.mail = {{ kind = "sendgrid", secret = "{schemes.public(schemes.KEY)}" }}
        http.webhooks.x = {{ kind = "twilio", secret = "{S}", public_url = "{schemes.URL}" }}
        http.webhooks.other = {{ kind = "hmac", secret = "{S}", signature_header = "X-S" }}
        http.request_bytes_max = "8MiB"
        record_bytes_max = "4MiB"
        """
    )
    with daemon(cwd=folder) as running:
        yield running, folder


def post(door: Daemon, name: str, body: bytes, **headers: Any) -> tuple[int, str, dict[str, str]]:
    named = {**JSON, **headers.pop("signed"), **headers}
    status, answered, answer = door.request("POST", f"/v1/webhooks/{name}", body, named)
    return status, answer.get("type", "").rpartition(":")[2], answered


def accepted(door: Daemon, pipeline: str = "default") -> int:
    return int(door.status()["pipelines"][pipeline]["accepted"])


def test_a_delivery_is_one_record_whatever_is_in_it(there: Any) -> None:
    door, folder = there
    body = json.dumps([{"n": 1}, {"n": 2}]).encode()
    assert post(door, "hub", body, signed=github(body, "array"))[0] == 202
    assert accepted(door, "hub") == 1
    assert not accepted(door)
    door.until_settled("hub")
    lines = [p.read_bytes() for p in (folder / "ingestd-data").rglob("*.jsonl")]
    assert lines == [body + b"\n"]


def test_no_token_is_needed_here_and_one_is_elsewhere(there: Any) -> None:
    door, _ = there
    assert door.post(b"1")[0] == 401
    assert door.request("POST", "/v1/webhooks/nobody", b"1")[0] == 404
    assert door.request("GET", "/v1/webhooks/hub")[0] == 405


def test_each_is_accepted_once_also_if_it_is_signed_anew(there: Any) -> None:
    door, _ = there
    before = accepted(door)
    body = b'{"order": 1}'
    now = int(time.time())
    for at, secret in ((now, WHSEC), (now - 100, WHSEC), (now, NEW_WHSEC)):
        status, _, headers = post(door, "std", body, signed=standard(body, "msg_a", at, secret))
        assert status == 202
        assert ("idempotent-replayed" in headers) == ((at, secret) != (now, WHSEC))
    # The sender says that it is the same one; its first form counts.
    other = b'{"order": 1, "again": true}'
    assert post(door, "std", other, signed=standard(other, "msg_a"))[0] == 202
    assert accepted(door) == before + 1
    event, again = b'{"id": "evt_1", "pending": 2}', b'{"id": "evt_1", "pending": 1}'
    assert post(door, "pay", event, signed=stripe(event))[0] == 202
    assert post(door, "pay", again, signed=stripe(again))[0] == 202
    assert accepted(door) == before + 2


def test_another_body_under_an_id_that_is_not_signed_is_another_request(there: Any) -> None:
    door, _ = there
    before = accepted(door, "hub")
    for body, status in ((b'{"a": 1}', 202), (b'{"a": 2}', 422), (b'{"a": 1}', 202)):
        assert post(door, "hub", body, signed=github(body, "same"))[0] == status
    assert accepted(door, "hub") == before + 1


def test_a_clients_key_is_not_a_deliverys(there: Any) -> None:
    door, _ = there
    before = accepted(door, "hub")
    for delivery in ("k1", "k2"):
        key = {"Idempotency-Key": "one"}
        assert post(door, "hub", b"{}", signed=github(b"{}", delivery), **key)[0] == 202
    assert accepted(door, "hub") == before + 2


def test_what_is_not_signed_as_it_should_be_is_401_and_not_kept(there: Any) -> None:
    door, _ = there
    before = accepted(door), accepted(door, "hub")
    body = b'{"id": "evt_9"}'
    now = int(time.time())
    for name, signed in (
        ("std", {}),
        ("std", standard(body, secret="whsec_" + base64.b64encode(b"guessed").decode())),
        ("std", standard(b"{}")),
        ("std", standard(body, at=now - 400)),
        ("std", standard(body, at=now + 400)),
        ("hub", github(body, secret="guessed")),
        ("hub", standard(body)),
        ("pay", stripe(body, at=now - 400)),
        ("pay", stripe(b"{}")),
    ):
        status, slug, headers = post(door, name, body, signed=signed)
        assert (status, slug) == (401, "signature-invalid")
        assert "www-authenticate" in headers
    # Also where it could not be parsed: that is not for strangers to learn.
    assert post(door, "hub", b"{", signed=github(b"}"))[1] == "signature-invalid"
    assert (accepted(door), accepted(door, "hub")) == before


def test_what_is_signed_and_no_json_is_refused_as_elsewhere(there: Any) -> None:
    door, _ = there
    assert post(door, "hub", b"{", signed=github(b"{", "x1"))[:2] == (400, "malformed")
    assert post(door, "pay", b"{}", signed=stripe(b"{}"))[:2] == (400, "malformed")
    body = b"payload=%7B%7D"
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    status, _, answer = door.request(
        "POST", "/v1/webhooks/hub", body, {**form, **github(body, "x2")}
    )
    assert status == 415
    assert "application/json" in answer["detail"]
    status, slug, _ = post(
        door, "hub", b"{}", signed=github(b"{}", "x3"), **{"Content-Type": "application/hal+json"}
    )
    assert status == 202, slug


def test_the_signature_is_that_of_the_bytes_on_the_wire(there: Any) -> None:
    door, _ = there
    body = b'{"a": 1}'
    wire = gzip.compress(body)
    encoded = {"Content-Encoding": "gzip"}
    assert post(door, "hub", wire, signed=github(wire, "gz"), **encoded)[0] == 202
    assert post(door, "hub", wire, signed=github(body, "gz2"), **encoded)[0] == 401


def test_a_large_one_is_checked_too(there: Any) -> None:
    door, _ = there
    body = b'{"a": "' + b"x" * 3_000_000 + b'"}'
    assert post(door, "hub", body, signed=github(body, "large"))[0] == 202
    assert post(door, "hub", body + b" ", signed=github(body, "large2"))[0] == 401


def test_slack_gets_its_challenge_and_answers_without_a_body(there: Any) -> None:
    door, _ = there
    before, now = accepted(door), int(time.time())
    question = b'{"type": "url_verification", "challenge": "3eZ"}'
    for _ in range(2):
        answer = door.request(
            "POST", "/v1/webhooks/slack", question, {**JSON, **schemes.slack(question, now, "")}
        )
        assert (answer[0], answer[2]) == (200, {"challenge": "3eZ"})
        forged = {**JSON, **schemes.slack(question, now, "", schemes.OTHER)}
        assert door.request("POST", "/v1/webhooks/slack", question, forged)[0] == 401
    assert accepted(door) == before
    for body, kind in ((b'{"event_id": "Ev1"}', JSON), (b"command=%2Fx&text=", schemes.FORM_TYPE)):
        for replayed in (False, True):
            headers = {**kind, **schemes.slack(body, now, "")}
            status, told, content = door.request("POST", "/v1/webhooks/slack", body, headers)
            assert (status, content) == (200, b"")
            assert ("idempotent-replayed" in told) == replayed
    assert accepted(door) == before + 2


def test_twilio_and_sendgrid_and_any_other(there: Any) -> None:
    door, folder = there
    before, now = accepted(door), int(time.time())
    body = b"From=%2B1&Body=caf%C3%A9&Media=1&Media=2"
    for at, status in (("t1", 204), ("t1", 204), ("t2", 204)):
        headers = {**schemes.FORM_TYPE, **schemes.twilio(body, now, at)}
        assert door.request("POST", "/v1/webhooks/x", body, headers)[0] == status
    assert door.request("POST", "/v1/webhooks/x?a=1", body, headers)[0] == 401
    events = b'[{"event": "open"}, {"event": "click"}]'
    status, _, _ = post(door, "mail", events, signed=schemes.sendgrid(events, now, ""))
    assert status == 202
    assert post(door, "mail", events, signed=schemes.sendgrid(events, now + 1, ""))[0] == 202
    for _ in range(2):  # nothing tells these two from a retry
        signed = {"X-S": sha(S.encode(), b"{}").hexdigest()}
        assert post(door, "other", b"{}", signed=signed)[0] == 202
    assert accepted(door) == before + 2 + 2 + 2
    door.until_settled()
    lines = written(folder)
    form = '{"From":"+1","Body":"caf\u00e9","Media":["1","2"]}'.encode()
    assert (lines.count(form), lines.count(b'{"event": "open"}')) == (2, 1)


def test_what_is_not_a_form_of_theirs_is_refused(there: Any) -> None:
    door, _ = there
    now = int(time.time())
    for body, status in ((b"a&" * 2000, 400), (b"a=%FF", 400), (b"&", 400), (b"a" * 2**21, 413)):
        headers = {**schemes.FORM_TYPE, **schemes.slack(body, now, "")}
        assert door.request("POST", "/v1/webhooks/slack", body, headers)[0] == status
        headers = {**schemes.FORM_TYPE, "X-Twilio-Signature": "x" * 28}
        assert door.request("POST", "/v1/webhooks/x", body, headers)[0] == 401
    headers = {"Content-Type": "multipart/form-data", **schemes.slack(b"a", now, "")}
    status, told, _ = door.request("POST", "/v1/webhooks/slack", b"a", headers)
    assert (status, told["accept"]) == (415, f"application/json, {schemes.FORM}")


def test_secrets_are_read_again(there: Any) -> None:
    import signal

    door, folder = there
    (folder / "standard").write_text(NEW_WHSEC)
    door.terminate(signal.SIGHUP)
    door.event("reloaded")
    body = b"[]"
    assert post(door, "std", body, signed=standard(body, "msg_r"))[0] == 401
    assert post(door, "std", body, signed=standard(body, "msg_r", secret=NEW_WHSEC))[0] == 202
    until(lambda: written(folder))
