"""Every scheme of webhook signatures: what senders publish, and forgeries of all kinds."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import sys
import tomllib
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from ingestd.codecs.forms import FORM, FORM_BYTES_MAX, parse_form, to_object
from ingestd.http.problem import Problem
from ingestd.http.schemes import SCHEMES
from ingestd.http.settings import HttpSettings, WebhookSettings, problems_of, signatures_valid
from ingestd.sources.http.endpoints.base import BodyLimits, EndpointContext, Head
from ingestd.sources.http.endpoints.webhooks import Webhook, WebhooksEndpoint, read_webhooks
from ingestd.sources.http.result import IngestResult, PartResult
from tests.daemon.harness import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ingestd.sources.http.endpoints.base import Delivery

NOW = 1_700_000_000
SECRET = "a secret of the tests, 32 bytes."
OTHER = "another secret, of 32 bytes too."
WHSEC = "whsec_" + base64.b64encode(SECRET.encode()).decode()
WHSEC_OTHER = "whsec_" + base64.b64encode(OTHER.encode()).decode()
KEY, KEY_OTHER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
URL = "https://hooks.example.com/v1/webhooks/x"
FORM_TYPE = {"Content-Type": f"{FORM}; charset=UTF-8"}
HMAC = {
    "signature_header": "X-Sign", "signature_prefix": "sha512:", "algorithm": "sha512",
    "signed": "{timestamp}\n{id}\n{body}", "timestamp_header": "X-Time", "id_header": "X-Id",
}  # fmt: skip
SEVEN = b'{"a":"7"}'
Headers = dict[str, str]


def public(key: ec.EllipticCurvePrivateKey) -> str:
    der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(der).decode()


def mac(*parts: bytes, secret: str = SECRET, algorithm: str = "sha256") -> Any:
    return hmac.new(secret.encode(), b"".join(parts), algorithm)


def b64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


# -- one signer a scheme: (body, time, id, another secret) → headers -----------------------------


def standard(body: bytes, at: int, name: str, secret: str = SECRET, of: str = "webhook") -> Headers:
    signature = b64(mac(f"{name}.{at}.".encode(), body, secret=secret).digest())
    return {f"{of}-id": name, f"{of}-timestamp": str(at), f"{of}-signature": f"v1,{signature}"}


def svix(body: bytes, at: int, name: str, secret: str = SECRET) -> Headers:
    return standard(body, at, name, secret, "svix")


def github(body: bytes, at: int, name: str, secret: str = SECRET) -> Headers:
    signature = mac(body, secret=secret).hexdigest()
    return {"X-Hub-Signature-256": f"sha256={signature}", "X-GitHub-Delivery": name}


def stripe(body: bytes, at: int, name: str, secret: str = SECRET) -> Headers:
    return {"Stripe-Signature": f"t={at},v1={mac(b'%d.' % at, body, secret=secret).hexdigest()}"}


def shopify(body: bytes, at: int, name: str, secret: str = SECRET) -> Headers:
    signature = b64(mac(body, secret=secret).digest())
    return {"X-Shopify-Hmac-SHA256": signature, "X-Shopify-Webhook-Id": name}


def slack(body: bytes, at: int, name: str, secret: str = SECRET) -> Headers:
    signature = mac(b"v0:%d:" % at, body, secret=secret).hexdigest()
    return {"X-Slack-Request-Timestamp": str(at), "X-Slack-Signature": f"v0={signature}"}


def twilio(body: bytes, at: int, name: str, secret: str = SECRET) -> Headers:
    fields = "".join(k + v for k, v in sorted(parse_form(body)))
    signature = b64(mac(URL.encode(), fields.encode(), secret=secret, algorithm="sha1").digest())
    return {"X-Twilio-Signature": signature, "I-Twilio-Idempotency-Token": name, **FORM_TYPE}


def gitlab(body: bytes, at: int, name: str, secret: str = SECRET) -> Headers:
    return {"X-Gitlab-Token": secret, "Idempotency-Key": name, "X-Gitlab-Event-UUID": "same"}


def sendgrid(body: bytes, at: int, name: str, secret: str = SECRET) -> Headers:
    key = KEY if secret == SECRET else KEY_OTHER
    signature = b64(key.sign(b"%d" % at + body, ec.ECDSA(hashes.SHA256())))
    prefix = "X-Twilio-Email-Event-Webhook"
    return {f"{prefix}-Timestamp": str(at), f"{prefix}-Signature": signature}


def any_hmac(body: bytes, at: int, name: str, secret: str = SECRET) -> Headers:
    signed = mac(f"{at}\n{name}\n".encode(), body, secret=secret, algorithm="sha512")
    return {"X-Sign": f"sha512:{signed.hexdigest()}", "X-Time": str(at), "X-Id": name}


SIGNERS: dict[str, tuple[str, Callable[..., Headers]]] = {
    "standard": ("standard", standard), "svix": ("standard", svix), "github": ("github", github),
    "stripe": ("stripe", stripe), "shopify": ("shopify", shopify), "slack": ("slack", slack),
    "twilio": ("twilio", twilio), "gitlab": ("gitlab", gitlab), "signed": ("gitlab", standard),
    "sendgrid": ("sendgrid", sendgrid), "hmac": ("hmac", any_hmac),
}  # fmt: skip
TIMED = {"standard", "svix", "stripe", "slack", "signed", "sendgrid", "hmac"}
WRITTEN = {
    "standard": (WHSEC, WHSEC_OTHER), "svix": (WHSEC, WHSEC_OTHER), "signed": (WHSEC, WHSEC_OTHER),
    "sendgrid": (public(KEY), public(KEY_OTHER)),
}  # fmt: skip


def own(kind: str) -> dict[str, Any]:
    return {"twilio": {"public_url": URL}, "hmac": HMAC}.get(kind, {})


def hook(kind: str, *secrets: str, **more: Any) -> Webhook:
    made = [WebhookSettings(kind=kind, secret=s, **(more or own(kind))) for s in secrets]  # type: ignore[arg-type]
    problems: list[str] = []
    keys = [key for one in made for key in read_webhooks({"x": one}, problems)["x"]]
    assert not problems
    return Webhook("x", made[0], keys)


def ask(
    one: Webhook, headers: Mapping[str, str], body: bytes, now: float = NOW, target: str = ""
) -> Delivery | None:
    return one.check(CIMultiDict(headers), body, now, target)


def refused(*args: Any, **more: Any) -> str:
    """The slug of the problem; a delivery that is taken fails the test."""
    with pytest.raises(Problem) as found:
        ask(*args, **more)
    return found.value.kind.slug


def body_of(name: str) -> bytes:
    return b"Body=a+b&From=%2B1" if name == "twilio" else b'{"id":"evt_1","event_id":"Ev1"}'


@pytest.mark.parametrize("name", SIGNERS)
def test_a_scheme_takes_what_is_signed_and_nothing_else(name: str) -> None:
    kind, sign = SIGNERS[name]
    secret, another = WRITTEN.get(name, (SECRET, OTHER))
    one, body = hook(kind, secret), body_of(name)
    right = sign(body, NOW, "d1")
    assert ask(one, right, body) == ask(one, right, body)
    assert refused(one, {}, body) == "signature-invalid"
    assert refused(one, sign(body, NOW, "d1", OTHER), body) == "signature-invalid"
    if name != "gitlab":  # a secret token says nothing of the body
        assert refused(one, right, body + b"1") == "signature-invalid"
        assert refused(one, right, b"") == "signature-invalid"
    # Of several secrets each is good: so they are changed without a gap.
    both = hook(kind, another, secret)
    assert ask(both, right, body) == ask(one, right, body)
    assert ask(both, sign(body, NOW, "d1", OTHER), body) is not None
    # The time, where it is signed.
    for late in (-300, 300):
        assert ask(one, right, body, NOW + late)
    if name in TIMED:
        for late in (-301, 301, -(10**9), 10**9):
            assert refused(one, right, body, NOW + late) == "signature-invalid"
    else:
        assert ask(one, right, body, NOW + 10**6)


@pytest.mark.parametrize("name", SIGNERS)
def test_a_scheme_refuses_headers_that_are_bent(name: str) -> None:
    kind, sign = SIGNERS[name]
    one, body = hook(kind, WRITTEN.get(name, (SECRET,))[0]), body_of(name)
    right = sign(body, NOW, "d1")
    free = {"Content-Type", "I-Twilio-Idempotency-Token", "X-Gitlab-Event-UUID"}
    unsigned = {"X-GitHub-Delivery", "X-Shopify-Webhook-Id", "Idempotency-Key"}
    for header in set(right) - free:
        value = right[header]
        flipped = value[:-1] + ("A" if value[-1] != "A" else "B")
        bent = ["", value[:-1], value * 2, value[1:], value + "\udce9", "é" + value, "\u0661", "0",
                flipped, "x" * 5000, "v1,", "sha256=", "="]  # fmt: skip
        for other in bent if header not in unsigned else ():
            if name == "stripe" and other == value * 2:
                continue  # the right one is in it
            assert refused(one, {**right, header: other}, body) == "signature-invalid", other
        without = {k: v for k, v in right.items() if k != header}
        if header != "Idempotency-Key":
            assert refused(one, without, body) == "signature-invalid"
        # Of two values another program may read the other one.
        for pair in ((value, "x"), ("x", value), (value, value)):
            double = CIMultiDict(without)
            for each in pair:
                double.add(header, each)
            with pytest.raises(Problem, match="more than once"):
                one.check(double, body, NOW)


@pytest.mark.parametrize("name", SIGNERS)
def test_a_delivery_is_the_same_if_it_is_tried_again(name: str) -> None:
    kind, sign = SIGNERS[name]
    one, body = hook(kind, WRITTEN.get(name, (SECRET,))[0]), body_of(name)
    first = ask(one, sign(body, NOW, "d1"), body)
    again = ask(one, sign(body, NOW + 60, "d1"), body, NOW + 60)
    assert first is not None
    assert first == again
    other = b'{"id":"evt_2","event_id":"Ev2"}' if name != "twilio" else b"Body=c"
    found = ask(one, sign(other, NOW, "d2"), other)
    assert found is not None
    assert found.key != first.key


# -- what senders publish ------------------------------------------------------------------------


def test_the_example_of_slack() -> None:
    body = (
        b"token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow"
        b"&channel_id=G8PSS9T3V&channel_name=foobar&user_id=U2CERLKJA&user_name=roadrunner"
        b"&command=%2Fwebhook-collect&text=&response_url=https%3A%2F%2Fhooks.slack.com%2Fcommands"
        b"%2FT1DC2JH3J%2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN"
        b"&trigger_id=398738663015.47445629121.803a0bc887a14d10d2c447fce8b6703c"
    )
    headers = {
        "X-Slack-Request-Timestamp": "1531420618",
        "X-Slack-Signature": "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503",
        **FORM_TYPE,
    }
    one = hook("slack", "8f742231b10e8888abcd99yyyzzz85a5")
    assert ask(one, headers, body, 1531420618) == ask(one, headers, body, 1531420700)


@pytest.mark.parametrize("port", ["", ":443"])
def test_the_example_of_twilio(port: str) -> None:
    fields = {"CallSid": "CA1234567890ABCDE", "Caller": "+14158675309", "Digits": "1234",
              "From": "+14158675309", "To": "+18005551212"}  # fmt: skip
    body = urlencode(fields).encode()
    headers = {"X-Twilio-Signature": "RSOYDt4T1cUTdK1PDd93/VVr8B8=", **FORM_TYPE}
    url = f"https://mycompany.com{port}/myapp.php"
    one = Webhook("x", WebhookSettings(kind="twilio", public_url=url), [b"12345"])
    # No id tells a retry from the same key pressed again, so it is not taken for one.
    assert ask(one, headers, body, target="/v1/webhooks/x?foo=1&bar=2") is None
    for target in ("/", "/?foo=1", "/?bar=2&foo=1", "/?foo=1&bar=2&bar=2"):
        assert refused(one, headers, body, target=target) == "signature-invalid"


def test_the_example_of_sendgrids_library() -> None:
    key = (
        "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE83T4O/n84iotIvIW4mdBgQ/7dAfSmpqIM8kF9mN1flpVKS3GRqe62"
        "gw+2fNNRaINXvVpiglSI8eNEc6wEA3F+g=="
    )
    body = (
        b'[{"email":"hello@world.com","event":"dropped","reason":"Bounced Address",'
        b'"sg_event_id":"ZHJvcC0xMDk5NDkxOS1MUnpYbF9OSFN0T0doUTRrb2ZTbV9BLTA",'
        b'"sg_message_id":"LRzXl_NHStOGhQ4kofSm_A.filterdrecv-p3mdw1-756b745b58-kmzbl-18-5F5FC76C-9'
        b'.0","smtp-id":"<LRzXl_NHStOGhQ4kofSm_A@ismtpd0039p1iad1.sendgrid.net>",'
        b'"timestamp":1600112492}]\r\n'
    )
    headers = {
        "X-Twilio-Email-Event-Webhook-Timestamp": "1600112502",
        "X-Twilio-Email-Event-Webhook-Signature": (
            "MEUCIGHQVtGj+Y3LkG9fLcxf3qfI10QysgDWmMOVmxG0u6ZUAiEAyBiXDWzM+uOe5W0JuG+luQAbPIqHh89M1"
            "5TluLtEZtM="
        ),
    }
    assert ask(hook("sendgrid", key), headers, body, 1600112502)


# -- each scheme's own ---------------------------------------------------------------------------


def test_the_names_of_two_senders_are_not_mixed() -> None:
    one, body = hook("standard", WHSEC), b"{}"
    ours, theirs = standard(body, NOW, "a"), svix(body, NOW, "b")
    assert str(ask(one, {**theirs, **ours}, body)).startswith("Delivery(key='webhook x a'")
    forged = {**theirs, "webhook-id": "c"}
    assert refused(one, forged, body) == "signature-invalid"
    assert refused(one, {**forged, "svix-id": "c"}, body) == "signature-invalid"


@pytest.mark.parametrize("name", ["github", "shopify", "gitlab", "twilio"])
def test_an_id_that_is_not_signed_belongs_to_its_body(name: str) -> None:
    kind, sign = SIGNERS[name]
    one = hook(kind, SECRET)
    found = [ask(one, sign(body, NOW, "d1"), body) for body in (b"a=1", b"a=2")]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0].key == found[1].key
    assert found[0].fingerprint != found[1].fingerprint


def test_gitlabs_secret_token_and_signing_token() -> None:
    body = b"{}"
    both, signing = hook("gitlab", SECRET, WHSEC), hook("gitlab", WHSEC)
    assert ask(both, gitlab(body, NOW, "a"), body)
    assert ask(both, standard(body, NOW, "a"), body)
    assert ask(both, {**gitlab(body, NOW, "a"), **standard(body, NOW, "a")}, body)
    # A signature that does not fit is not made good by a token, and no signing token is one.
    wrong = {**gitlab(body, NOW, "a"), **standard(body, NOW, "a", OTHER)}
    assert refused(both, wrong, body) == "signature-invalid"
    for shown in (WHSEC, SECRET, "", WHSEC.removeprefix("whsec_")):
        assert refused(signing, {"X-Gitlab-Token": shown, "Idempotency-Key": "a"}, body)
    # GitLab before 17: deliveries that one delivery led to share its UUID.
    old = {"X-Gitlab-Token": SECRET, "X-Gitlab-Event-UUID": "u"}
    one, two = ask(both, old, b"1"), ask(both, old, b"2")
    assert one is not None
    assert two is not None
    assert one.key != two.key
    assert ask(both, old, b"1") == one
    assert ask(both, {**old, "Idempotency-Key": "é\udce9" * 200}, body)


def test_what_slack_asks_is_answered_and_no_record() -> None:
    one = hook("slack", SECRET)
    question = b'{"type":"url_verification","challenge":"3eZbrw","token":"x"}'
    assert ask(one, slack(question, NOW, ""), question) is None
    endpoint, head = built("slack")
    (part,) = endpoint.open(head).decode(question, BodyLimits(10, 1000))
    assert part.parsed.total == 0
    told = endpoint.answer(IngestResult(0, parts=[PartResult("p", notes=part.notes)]), head)
    assert (told.status, told.body) == (200, b'{"challenge":"3eZbrw"}')
    assert endpoint.answer(IngestResult(1), head)[:3] == (200, b"text/plain", b"")
    # What only looks like it is a record.
    for body in (b'{"type":"url_verification"}', b'{"type":1}', b"[]",
                 b'{"type":"url_verification","challenge":"%b"}' % (b"x" * 2000)):  # fmt: skip
        (part,) = endpoint.open(head).decode(body, BodyLimits(10, 10_000))
        assert part.parsed.total == 1
    # Slash commands have no id: the same bytes at the same time are a replay, later ones are not.
    body = b"command=%2Fx"
    first = ask(one, {**slack(body, NOW, ""), **FORM_TYPE}, body)
    assert first is not None
    assert first == ask(one, {**slack(body, NOW, ""), **FORM_TYPE}, body)
    assert first != ask(one, {**slack(body, NOW + 1, ""), **FORM_TYPE}, body)
    # The type is not signed: a delivery that comes again under another one is the same.
    body = body_of("slack")
    as_form = ask(one, {**slack(body, NOW, ""), **FORM_TYPE}, body)
    assert ask(one, slack(body, NOW, ""), body) == as_form
    assert ask(one, {**slack(question, NOW, ""), **FORM_TYPE}, question) is not None


def built(kind: str, content_type: str = "application/json") -> tuple[WebhooksEndpoint, Head]:
    secret = WRITTEN.get(kind, (SECRET,))[0]
    one = {"kind": kind, "secret": secret, **own(kind)}
    problems: list[str] = []
    context = EndpointContext(HttpSettings(webhooks={"x": one}), {"p": "json"}, "p", problems)  # type: ignore[dict-item]
    endpoint = WebhooksEndpoint(context)
    assert not problems
    headers = CIMultiDict({"Content-Type": content_type})
    return endpoint, Head("POST", "/v1/webhooks/x", headers, "x", "json")


def test_twilio_json_and_shared_keys() -> None:
    one, body = hook("twilio", SECRET), b'{"a":1}'
    query = f"bodySHA256={hashlib.sha256(body).hexdigest()}"
    url = f"{URL}?{query}".encode()
    sha1 = b64(mac(url, algorithm="sha1").digest())
    sha256 = b64(mac(url).digest())
    rule = "X-Twilio-Webhooks-Signature-Settings"
    target = f"/v1/webhooks/x?{query}"
    assert ask(one, {"X-Twilio-Signature": sha1}, body, target=target) is None
    shared = {"X-Twilio-Signature": sha256, rule: "key=k1,algorithm=HMAC_SHA256"}
    assert ask(one, shared, body, target=target) is None
    for headers in (
        {"X-Twilio-Signature": sha256}, {**shared, "X-Twilio-Signature": sha1},
        {**shared, rule: "algorithm=none"}, {**shared, rule: "algorithm=HMAC_MD5"},
        {**shared, rule: "algorithm=HMAC_SHA256,algorithm=HMAC_SHA1"},
        {**shared, rule: "algorithm="}, {**shared, rule: "algorithm=hmac_sha256"},
    ):  # fmt: skip
        assert refused(one, headers, body, target=target) == "signature-invalid", headers
    # The signature is that of the URL alone: no other body goes with it, in whatever form.
    headers = {"X-Twilio-Signature": sha1}
    for other, kind in ((b"", {}), (b'{"a":2}', {}), (b"", FORM_TYPE), (b"&&", FORM_TYPE)):
        assert refused(one, {**headers, **kind}, other, target=target) == "signature-invalid"
    for more in ("&bodySHA256=", f"&{query}", "&x" * 200):
        assert refused(one, headers, body, target=target + more) == "signature-invalid"
    assert refused(one, headers, body) == "signature-invalid"


def test_twilios_forms_are_bounded_and_not_compressed() -> None:
    one = hook("twilio", SECRET)
    for body in (b"a=" + b"1" * 70_000, b"a=%FF", b"\xff=1", b"a=1&" * 1500):
        try:
            headers = twilio(body, NOW, "x")
        except ValueError:
            headers = twilio(b"a=1", NOW, "x")
        assert refused(one, headers, body) == "signature-invalid"
    body = b"a=1"
    encoded = {**twilio(body, NOW, "x"), "Content-Encoding": "gzip"}
    assert refused(one, encoded, body) == "signature-invalid"
    # As its library does: the values of a name sorted, each once.
    body = b"b=2&a=2&a=1&a=2&c="
    signature = b64(mac(f"{URL}a1a2b2c".encode(), algorithm="sha1").digest())
    assert ask(one, {"X-Twilio-Signature": signature, **FORM_TYPE}, body) is None
    endpoint, head = built("twilio")
    assert endpoint.answer(IngestResult(1), head)[:3] == (204, b"", b"")


def test_sendgrid_wants_cryptography_and_a_key_of_its_curve(monkeypatch: Any) -> None:
    def problem(secret: str) -> str:
        problems: list[str] = []
        read_webhooks({"x": WebhookSettings(kind="sendgrid", secret=secret)}, problems)  # type: ignore[arg-type]
        return problems[0]

    other_curve = public(ec.generate_private_key(ec.SECP384R1()))
    for secret in (SECRET, "", "MFkw", other_curve, public(KEY)[:-8], "é"):
        assert not secret or problem(secret) == (
            "http.webhooks.x.secret: should be the public key as SendGrid shows it: base64 of P-256"
        )
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert problem(public(KEY)) == (
        "http.webhooks.x.secret: needs cryptography: pip install 'ingestd[webhooks]'"
    )


def test_each_event_of_sendgrid_is_a_record() -> None:
    endpoint, head = built("sendgrid")
    (part,) = endpoint.open(head).decode(b'[{"event":"open"},{"event":"click"}]', BodyLimits(9, 99))
    assert part.parsed.records.payload == b'{"event":"open"}\n{"event":"click"}\n'


# -- hmac, as the settings describe it -----------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "headers", "kind"),
    [
        # Gitea, Dropbox, Linear
        ({}, {"X-S": mac(SEVEN).hexdigest().upper()}, None),
        # Typeform
        (
            {"signature_prefix": "sha256=", "encoding": "base64", "id_field": "a"},
            {"X-S": "sha256=" + b64(mac(SEVEN).digest())}, "webhook x 7",
        ),
        # Frame.io
        (
            {"signature_prefix": "v0=", "signed": "v0:{timestamp}:{body}", "timestamp_header": "T"},
            {"X-S": "v0=" + mac(b"v0:%d:" % NOW, SEVEN).hexdigest(), "T": str(NOW)}, "digest",
        ),
        # Zendesk's order, in milliseconds
        (
            {"signed": "{body}.{timestamp}", "timestamp_header": "T", "id_header": "I"},
            {"X-S": mac(SEVEN, b".%d000" % NOW).hexdigest(), "T": f"{NOW}000", "I": "d"},
            "webhook x d",
        ),
        (
            {"algorithm": "sha1", "id_header": "I", "signed": "{id}{body}"},
            {"X-S": mac(b"d", SEVEN, algorithm="sha1").hexdigest(), "I": "d"}, "webhook x d",
        ),
    ],
)  # fmt: skip
def test_an_hmac_as_the_settings_describe_it(
    more: dict[str, str], headers: Headers, kind: str | None
) -> None:
    one = hook("hmac", SECRET, signature_header="X-S", **more)
    body = b'{"a":"7"}'
    found = ask(one, headers, body)
    assert (found is None) == (kind is None)
    assert found is None or kind in ("digest", found.key)
    assert refused(one, headers, b'{"a":"8"}') == "signature-invalid"
    if "timestamp_header" in more:
        assert refused(one, headers, body, NOW + 301) == "signature-invalid"
    # Neither a longer digest nor a shorter one, nor one in another form.
    digest = mac(body).digest()
    for shown in (digest.hex()[:40], mac(body, algorithm="sha512").hexdigest(), digest.hex() * 2):
        assert refused(one, {**headers, "X-S": more.get("signature_prefix", "") + shown}, body)


def test_an_id_in_the_body_is_found_wherever_it_is() -> None:
    one = hook("hmac", SECRET, signature_header="X-S", id_field="event.id")

    def key(body: bytes, **more: str) -> str:
        found = ask(one, {"X-S": mac(body).hexdigest(), **more}, body)
        assert found is not None
        return found.key

    assert key(b'{"event": {"x": [], "id": "e1"}}') == "webhook x e1"
    assert key(b'{"event": {"id": 17}}') == "webhook x 17"
    assert len(key('{"event": {"id": "\u00fc b"}}'.encode())) == len("webhook x ") + 64
    for body in (b"[]", b"{}", b'{"event":1}', b'{"event":{"id":null}}', b'{"event":{"id":""}}',
                 b"{", b"\xff", b"[" * 100_000, b""):  # fmt: skip
        assert refused(one, {"X-S": mac(body).hexdigest()}, body) == "malformed", body
    flat = hook("hmac", SECRET, signature_header="X-S", id_field="order")
    body = b"order=5&x=%20"
    found = ask(flat, {"X-S": mac(body).hexdigest(), **FORM_TYPE}, body)
    assert found is not None
    assert found.key == "webhook x 5"
    body = b"order=%ff"
    headers = {"X-S": mac(body).hexdigest(), **FORM_TYPE}
    assert refused(flat, headers, body) == "malformed"


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"kind": "hmac"}, "signature_header: is needed by the kind hmac"),
        ({"signed": "{bod}"}, "signed: should have {body} once"),
        ({"signed": "{body}{body}"}, "signed: should have {body} once"),
        ({"signed": "{body}{url}"}, "signed: should have {body} once"),
        ({"signed": "{body"}, "signed: should have {body} once"),
        ({"signed": "{id}{body}"}, "signed: has {id}, which needs id_header"),
        ({"signed": "{timestamp}{body}"}, "signed: has {timestamp}, which needs timestamp_header"),
        ({"timestamp_header": "T"}, "timestamp_header: names a time that is not in signed"),
        ({"id_header": "I", "id_field": "i"}, "id_field: does not go with id_header"),
        ({"kind": "twilio"}, "public_url: should be the URL"),
        ({"kind": "twilio", "public_url": "https://a/b?c"}, "public_url: should be the URL"),
        ({"kind": "twilio", "public_url": "https://a:99999/"}, "public_url: should be the URL"),
        ({"kind": "twilio", "public_url": "https://u:p@a/"}, "public_url: should be the URL"),
        ({"kind": "github", "public_url": URL}, "public_url: is for the kind twilio, not for"),
        ({"kind": "slack", "id_field": "a"}, "id_field: is for the kind hmac, not for slack"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(table: dict[str, str], says: str) -> None:
    usual = {} if "kind" in table else {"kind": "hmac", "signature_header": "X"}
    http = HttpSettings(webhooks={"x": {"secret": SECRET, **usual, **table}})  # type: ignore[dict-item]
    ((key, problem),) = problems_of(http, {"p": "json"}, "p")
    assert f"{key}: {problem}".startswith(f"webhooks.x.{says}")


def test_a_name_that_is_none_is_no_header() -> None:
    for name in ("X Sign", "X:", "é", "x" * 200):
        with pytest.raises(ValueError, match="name of a header"):
            WebhookSettings(kind="hmac", secret=SECRET, signature_header=name)  # type: ignore[arg-type]


def test_ids_are_kept_as_long_as_signatures_are_valid() -> None:
    def kept(kind: str, **more: str) -> float:
        table = {"kind": kind, "tolerance": "10m", **more}
        return signatures_valid(HttpSettings(webhooks={"x": table}))  # type: ignore[dict-item]

    for kind in SCHEMES:
        timed = kind in ("standard", "stripe", "slack", "gitlab", "sendgrid")
        assert (kept(kind) > 1200) == timed, kind
    assert kept("hmac", timestamp_header="T") > 1200


def test_no_header_that_is_kept_holds_a_secret() -> None:
    from ingestd.http.settings import secret_header

    for kind in SCHEMES:
        endpoint, _ = built(kind)
        assert not [name for name in endpoint.keep_headers if secret_header(name)]
        assert len(endpoint.keep_headers) <= 6


def linear(body: bytes, at: int, name: str) -> Headers:
    return {"Linear-Signature": mac(body).hexdigest(), "Linear-Delivery": name}


def frameio(body: bytes, at: int, name: str) -> Headers:
    signature = mac(b"v0:%d:" % at, body).hexdigest()
    return {"X-Frameio-Signature": f"v0={signature}", "X-Frameio-Request-Timestamp": str(at)}


def typeform(body: bytes, at: int, name: str) -> Headers:
    return {"Typeform-Signature": f"sha256={b64(mac(body).digest())}"}


def test_the_tables_of_the_page_work() -> None:
    """Each as it is printed, with a secret in place of the dots."""
    page = (ROOT / "docs" / "clients" / "webhooks.md").read_text()
    tables: dict[str, Any] = {}
    for block in re.findall(r"(?ms)^```toml\n(.*?)^```$", page):
        tables |= tomllib.loads(block)["http"]["webhooks"]
    signers = {
        "clerk": svix,
        "gitlab": standard,
        "linear": linear,
        "frameio": frameio,
        "typeform": typeform,
    }
    assert {table["kind"] for table in tables.values()} == set(SCHEMES)
    for name, table in tables.items():
        sign = signers.get(name) or SIGNERS[name][1]
        written = WHSEC if name in ("clerk", "gitlab") else WRITTEN.get(name, (SECRET,))[0]
        more = {"public_url": URL} if name == "twilio" else {}
        table |= {"secret": written, **more}
        http = HttpSettings(webhooks={name: table})
        assert not list(problems_of(http, {"p": "json"}, "p"))
        body = body_of(name)
        assert ask(hook_of(http.webhooks[name]), sign(body, NOW, "d1"), body)
    for kind in SCHEMES:
        endpoint, _ = built(kind)
        assert [name for name in endpoint.keep_headers if f"`{name}`" not in page] == []


def hook_of(table: WebhookSettings) -> Webhook:
    return Webhook("x", table, read_webhooks({"x": table}, [])["x"])


# -- forms ---------------------------------------------------------------------------------------


def test_a_form_is_one_object() -> None:
    body = b"a=1&b=x+y%26z&a=1&c&a=&=n&d[e]=%C3%A9&"
    assert json.loads(to_object(parse_form(body))) == {
        "a": ["1", "1", ""], "b": "x y&z", "c": "", "": "n", "d[e]": "é",
    }  # fmt: skip
    for kind in ("slack", "twilio", "hmac"):
        endpoint, head = built(kind, FORM)
        (part,) = endpoint.open(head).decode(b"a=1&a=%0A", BodyLimits(9, 99))
        assert part.parsed.records.payload == b'{"a":["1","\\n"]}\n'
    for kind in set(SCHEMES) - {"slack", "twilio", "hmac"}:
        endpoint, head = built(kind, FORM)
        with pytest.raises(Problem, match="application/json"):
            endpoint.open(head)


@pytest.mark.parametrize(
    ("body", "slug"),
    [
        (b"", "empty"), (b"&&&", "empty"), (b"a=%FF", "malformed"), (b"\xff", "malformed"),
        (b"a&" * 1000, "malformed"), (b"a=1&" * 4_000_000, "record-too-large"),
        (b"x" * (FORM_BYTES_MAX + 1), "record-too-large"),
        (b"a=" + b"%00" * 999, "record-too-large"),
    ],
)  # fmt: skip
def test_a_form_that_cannot_be_a_record(body: bytes, slug: str) -> None:
    endpoint, head = built("slack", FORM)
    with pytest.raises(Problem) as found:
        endpoint.open(head).decode(body, BodyLimits(9, 2000))
    assert found.value.kind.slug == slug


@given(st.lists(st.tuples(st.text(), st.text())))
@settings(max_examples=150)
def test_any_form_is_read_as_it_was_written(fields: list[tuple[str, str]]) -> None:
    fields = [(k.encode("utf-8", "ignore").decode(), v.encode("utf-8", "ignore").decode())
              for k, v in fields]  # fmt: skip
    assert parse_form(urlencode(fields).encode()) == fields
    found = json.loads(to_object(fields))
    assert set(found) == {name for name, _ in fields}


@given(st.sampled_from(sorted(SIGNERS)), st.binary(max_size=200), st.text(max_size=50), st.data())
@settings(max_examples=300)
def test_no_bytes_but_signed_ones_get_in(name: str, body: bytes, text: str, data: Any) -> None:
    kind, sign = SIGNERS[name]
    one = hook(kind, WRITTEN.get(name, (SECRET,))[0])
    right = sign(body_of(name), NOW, "d1")
    header = data.draw(st.sampled_from(sorted(right)))
    bent = {**right, header if data.draw(st.booleans()) else "X-Gitlab-Token": text}
    statuses = []
    try:
        ask(one, bent, body, target="/?" + text)
    except Problem as found:
        statuses.append(found.kind.status)
    assert statuses in ([400], [401]) or name == "gitlab" or body == body_of(name)


# -- what may not depend on the secret, and what is described --------------------------------------


@pytest.mark.parametrize("name", ["standard", "github", "stripe", "slack", "hmac", "gitlab"])
def test_every_secret_is_compared_whichever_fits(name: str, monkeypatch: Any) -> None:
    kind, sign = SIGNERS[name]
    secret, another = WRITTEN.get(name, (SECRET, OTHER))
    compared: list[bool] = []
    right = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(right(one, other))
        return compared[-1]

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for secrets in ((secret, another, another), (another, another, secret)):
        compared.clear()
        assert ask(hook(kind, *secrets), sign(body_of(name), NOW, "d"), body_of(name))
        assert sorted(compared) == [False, False, True]


def test_forms_and_answers_of_their_own_are_described() -> None:
    for kind, scheme in SCHEMES.items():
        endpoint, _ = built(kind)
        (route,) = endpoint.routes
        told = endpoint.describe(route, "x", "json").operation
        assert (FORM in told["requestBody"]["content"]) == scheme.forms
        assert list(told["responses"]) == [str(scheme.status)] * (scheme.status != 202)
