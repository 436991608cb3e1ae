"""Schemes of webhook signatures, one class each. No I/O.

`SCHEMES` is the one list of them: a new one is a class here, its name there, and a section of
`docs/clients/webhooks.md`. What a scheme does is chosen by the settings alone; where a header names
an algorithm (`twilio`), it chooses among those that are safe with the same secret.

standard: Standard Webhooks 1.0, https://www.standardwebhooks.com, and Svix's names of its headers
github:   https://docs.github.com/webhooks/using-webhooks/validating-webhook-deliveries
gitlab:   https://docs.gitlab.com/user/project/integrations/webhooks, secret and signing tokens
stripe:   https://docs.stripe.com/webhooks#verify-manually
shopify:  https://shopify.dev/docs/apps/build/webhooks
slack:    https://docs.slack.dev/authentication/verifying-requests-from-slack
twilio:   https://www.twilio.com/docs/usage/webhooks/webhooks-security, and its shared keys
sendgrid: https://www.twilio.com/docs/sendgrid/for-developers/tracking-events, signed event webhook
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import msgspec

from ingestd.codecs.forms import parse_form, to_object
from ingestd.http import problem
from ingestd.http.problem import Problem
from ingestd.http.signatures import (
    ID,
    SECONDS,
    TEXT,
    Scheme,
    Signed,
    SignedRequest,
    after_prefix,
    digest_of,
    fits,
    forged,
    id_at,
    long_enough,
    readable,
    single,
    wrong,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ingestd.http.settings import WebhookSettings

_WHSEC = "whsec_"
_MILLISECONDS = re.compile(r"[0-9]{1,13}", re.ASCII)
_MILLISECONDS_FROM = 10**11
"""A larger time is in milliseconds: as seconds it would be in the year 5138."""
_URL = re.compile(r"https?://[^\s/:?#@]+(:[0-9]{1,5})?(/[^\s?#]*)?", re.ASCII)
_TEMPLATE = re.compile(r"\{(body|timestamp|id)\}")


class StandardScheme(Scheme):
    """Standard Webhooks, under its own names or Svix's."""

    timed = True
    encoding = "base64"
    event_headers: Sequence[str] = ("Webhook-Id", "Webhook-Timestamp", "Svix-Id", "Svix-Timestamp")

    def key(self, secret: str) -> Any:
        """See `Scheme`."""
        try:
            return long_enough(base64.b64decode(secret.removeprefix(_WHSEC), validate=True))
        except binascii.Error:
            raise ValueError(f"should be {_WHSEC} and base64") from None

    def read(self, request: SignedRequest) -> Signed:
        """See `Scheme`."""
        headers = request.headers
        # All of one sender's names: the id of one beside the signature of the other is forged.
        names = "svix" if "svix-id" in headers and "webhook-id" not in headers else "webhook"
        delivery_id = single(headers, f"{names}-id", ID)
        at = single(headers, f"{names}-timestamp", SECONDS)
        listed = single(headers, f"{names}-signature", TEXT)
        versions = [part.partition(",") for part in listed.split(" ")]
        signatures = [signature for version, _, signature in versions if version == "v1"]
        head = f"{delivery_id}.{at}.".encode()
        return Signed(readable(signatures), (head, request.wire), delivery_id, float(at), True)


class GithubScheme(Scheme):
    """The hexadecimal HMAC of the body."""

    event_headers = ("X-GitHub-Event", "X-GitHub-Delivery", "X-GitHub-Hook-ID")

    def read(self, request: SignedRequest) -> Signed:
        """See `Scheme`."""
        delivery_id = single(request.headers, "x-github-delivery", ID)
        shown = single(request.headers, "x-hub-signature-256", TEXT)
        return Signed(after_prefix("sha256=", shown), (request.wire,), delivery_id)


class StripeScheme(Scheme):
    """Time and signatures in one header, and the id in the body."""

    timed = True

    def read(self, request: SignedRequest) -> Signed:
        """See `Scheme`."""
        shown = single(request.headers, "stripe-signature", TEXT)
        parts = [part.strip().partition("=") for part in shown.split(",")]
        times = [value for key, _, value in parts if key == "t"]
        if len(times) != 1 or not SECONDS.fullmatch(times[0]):
            raise wrong("Stripe-Signature has no time")
        signatures = readable([value for key, _, value in parts if key == "v1"])
        return Signed(
            signatures, (f"{times[0]}.".encode(), request.wire), at=float(times[0]), id_signed=True
        )

    def find_id(self, request: SignedRequest, signed: Signed) -> str:  # noqa: ARG002
        """See `Scheme`."""
        return id_at(("id",), request.wire)


class ShopifyScheme(Scheme):
    """The HMAC of the body in base64."""

    encoding = "base64"
    event_headers = (
        "X-Shopify-Topic", "X-Shopify-Shop-Domain", "X-Shopify-API-Version", "X-Shopify-Webhook-Id",
        "X-Shopify-Event-Id", "X-Shopify-Triggered-At",
    )  # fmt: skip

    def read(self, request: SignedRequest) -> Signed:
        """See `Scheme`."""
        delivery_id = single(request.headers, "x-shopify-webhook-id", ID)
        shown = single(request.headers, "x-shopify-hmac-sha256", TEXT)
        return Signed(readable([shown]), (request.wire,), delivery_id)


class _SlackBody(msgspec.Struct):
    type: str = ""
    event_id: str = ""
    challenge: str = ""


class SlackScheme(Scheme):
    """Events, slash commands and interactions. An answer with a body would be shown to people."""

    timed = True
    forms = True
    event_headers = ("X-Slack-Retry-Num", "X-Slack-Retry-Reason", "X-Slack-Request-Timestamp")
    status = 200

    def read(self, request: SignedRequest) -> Signed:
        """See `Scheme`."""
        at = single(request.headers, "x-slack-request-timestamp", SECONDS)
        shown = single(request.headers, "x-slack-signature", TEXT)
        signed = (f"v0:{at}:".encode(), request.wire)
        return Signed(after_prefix("v0=", shown), signed, at=float(at), id_signed=True)

    def find_id(self, request: SignedRequest, signed: Signed) -> str:
        """The event's; Slack tries nothing else again, so the same time and body are a replay."""
        body = self._read(request.wire)  # whatever type it came with: that is not signed
        if self._asks(body) and not request.is_form:
            return ""
        return body.event_id if ID.fullmatch(body.event_id) else digest_of(*signed.signed)

    def question(self, body: bytes) -> str:
        """See `Scheme`."""
        read = self._read(body)
        return read.challenge if self._asks(read) else ""

    @staticmethod
    def _read(body: bytes) -> _SlackBody:
        try:
            return msgspec.json.decode(body, type=_SlackBody)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return _SlackBody()

    @staticmethod
    def _asks(body: _SlackBody) -> bool:
        return body.type == "url_verification" and 0 < len(body.challenge) <= 1024


class TwilioScheme(Scheme):
    """The URL as Twilio has it, with the sorted fields of a form or the hash of a JSON body.

    Twilio would take an answer with a body for TwiML.
    """

    own = ("public_url",)
    forms = True
    status = 204
    encoding = "base64"
    algorithms: ClassVar = {"HMAC_SHA1": "sha1", "HMAC_SHA256": "sha256"}
    body_bytes_max = 64 * 1024
    """Of a form, whose fields are read before the sender is known."""

    @classmethod
    def problems(cls, settings: WebhookSettings) -> Iterator[tuple[str, str]]:
        """See `Scheme`."""
        found = _URL.fullmatch(settings.public_url)
        if not found or int((found[1] or ":0")[1:]) > 65535:
            yield "public_url", "should be the URL that Twilio sends to, without a query"

    def verify(self, request: SignedRequest, keys: Sequence[Any]) -> Signed:
        """See `Scheme`."""
        headers = request.headers
        shown = readable([single(headers, "x-twilio-signature", TEXT)])
        rule = single(headers, "x-twilio-webhooks-signature-settings", TEXT)
        named = [part.strip().removeprefix("algorithm=") for part in rule.split(",")
                 if part.strip().startswith("algorithm=")] or ["HMAC_SHA1"]  # fmt: skip
        algorithm = self.algorithms.get(named[0]) if len(named) == 1 else None
        if algorithm is None:
            raise wrong("X-Twilio-Webhooks-Signature-Settings names another algorithm")
        fields = self._fields(request)
        query = request.target.partition("?")[2]
        for url in _with_and_without_port(self.settings.public_url):
            signed = ((f"{url}?{query}" if query else url) + fields).encode("utf-8", "replace")
            if fits(keys, Signed(shown, (signed,)), algorithm, self.encoding):
                # Nothing tells a retry from a caller who presses the same key again but this.
                token = headers.get("i-twilio-idempotency-token", "")
                return Signed(shown, (signed,), token if ID.fullmatch(token) else "")
        raise forged()

    def _fields(self, request: SignedRequest) -> str:
        """Returns what is signed behind the URL; the hash of a body is in the URL."""
        query = request.target.partition("?")[2]
        if "bodySHA256" in query:
            if hashlib.sha256(request.wire).hexdigest() != _hash_in(query):
                raise wrong("bodySHA256 is not that of the body")
            return ""
        if not request.is_form:
            raise wrong("a body that is no form needs bodySHA256 in the URL")
        # The fields are signed, not the bytes, which decompressed would be other fields.
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise wrong("a form with a Content-Encoding cannot be verified")
        if len(request.wire) > self.body_bytes_max:
            raise wrong(f"the form has more than {self.body_bytes_max} bytes")
        try:
            fields = parse_form(request.wire)
        except ValueError as error:
            raise wrong(str(error)) from None
        return "".join(f"{name}{value}" for name, value in sorted(set(fields)))


class GitlabScheme(StandardScheme):
    """A signing token (Standard Webhooks, `whsec_…`), or a secret token that is shown as it is."""

    event_headers = (
        "X-Gitlab-Event", "X-Gitlab-Event-UUID", "X-Gitlab-Webhook-UUID", "X-Gitlab-Instance",
        "Webhook-Id", "Webhook-Timestamp",
    )  # fmt: skip

    def key(self, secret: str) -> Any:
        """A pair: of the key of a signing token and the digest of a secret token one is empty."""
        if secret.startswith(_WHSEC):
            return super().key(secret), b""
        return b"", hashlib.sha256(long_enough(secret.encode())).digest()

    def verify(self, request: SignedRequest, keys: Sequence[Any]) -> Signed:
        """See `Scheme`. A signing token is never taken as a secret token."""
        signing = [key for key, _ in keys if key]
        if signing and "webhook-signature" in request.headers:
            return super().verify(request, signing)
        shown = single(request.headers, "x-gitlab-token", TEXT)
        digest = hashlib.sha256(shown.encode("utf-8", "surrogateescape")).digest()
        found = False
        for _, token in keys:
            found |= hmac.compare_digest(digest, token)
        if not found:
            raise forged()
        if key := single(request.headers, "idempotency-key", TEXT):
            delivery_id = key if ID.fullmatch(key) else digest_of(key.encode("utf-8", "replace"))
            return Signed((), (request.wire,), delivery_id)
        # Deliveries that one delivery led to have its UUID: GitLab finds circles by it.
        event = single(request.headers, "x-gitlab-event-uuid", ID)
        return Signed((), (request.wire,), digest_of(event.encode(), b"\0", request.wire))


class SendgridScheme(Scheme):
    """ECDSA over P-256 with the public key of the settings; a body is an array of events."""

    timed = True
    each = True

    def key(self, secret: str) -> Any:
        """See `Scheme`."""
        try:
            from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415  an extra
            from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415
                load_der_public_key,
            )
        except ImportError:
            raise ValueError("needs cryptography: pip install 'ingestd[webhooks]'") from None
        try:
            key = load_der_public_key(base64.b64decode(secret, validate=True))
        except Exception:  # noqa: BLE001 - of several classes, one of them not documented
            key = None
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise ValueError("should be the public key as SendGrid shows it: base64 of P-256")
        return key

    def verify(self, request: SignedRequest, keys: Sequence[Any]) -> Signed:
        """See `Scheme`."""
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415  an extra
        from cryptography.hazmat.primitives.asymmetric import ec, utils  # noqa: PLC0415
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415

        prefix = "x-twilio-email-event-webhook"
        at = single(request.headers, f"{prefix}-timestamp", SECONDS)
        shown = single(request.headers, f"{prefix}-signature", TEXT)
        digest = hashlib.sha256(at.encode())
        digest.update(request.wire)
        try:
            signature = base64.b64decode(shown, validate=True)
        except ValueError:
            raise forged() from None
        for key in keys:
            try:
                key.verify(signature, digest.digest(), ec.ECDSA(utils.Prehashed(SHA256())))
            except InvalidSignature:
                continue
            # Each try may be signed anew; the events in it have ids of their own.
            delivery_id = digest_of(request.wire)
            return Signed((), (), delivery_id, float(at), True)
        raise forged()


class HmacScheme(Scheme):
    """An HMAC that the settings describe."""

    own = ("signature_header", "signature_prefix", "algorithm", "encoding", "signed",
           "timestamp_header", "id_header", "id_field")  # fmt: skip
    forms = True

    def __init__(self, settings: WebhookSettings) -> None:
        super().__init__(settings)
        self.timed = bool(settings.timestamp_header)
        self.algorithm, self.encoding = settings.algorithm, settings.encoding
        self._template = _TEMPLATE.split(settings.signed)

    @classmethod
    def problems(cls, settings: WebhookSettings) -> Iterator[tuple[str, str]]:
        """See `Scheme`."""
        if not settings.signature_header:
            yield "signature_header", "is needed by the kind hmac"
        names = _TEMPLATE.split(settings.signed)[1::2]
        if settings.signed.count("{") != len(names) or names.count("body") != 1:
            yield "signed", "should have {body} once, and of {timestamp} and {id} those it needs"
        for name, key in (("timestamp", "timestamp_header"), ("id", "id_header")):
            if name in names and not getattr(settings, key):
                yield "signed", f"has {{{name}}}, which needs {key}"
        if settings.timestamp_header and "timestamp" not in names:
            # It could be any time, so it would protect from nothing.
            yield "timestamp_header", "names a time that is not in signed"
        if settings.id_header and settings.id_field:
            yield "id_field", "does not go with id_header"

    def read(self, request: SignedRequest) -> Signed:
        """See `Scheme`."""
        settings, headers = self.settings, request.headers
        shown = single(headers, settings.signature_header, TEXT)
        known = {"body": request.wire}
        at = delivery_id = ""
        if settings.timestamp_header:
            at = single(headers, settings.timestamp_header, _MILLISECONDS)
            known["timestamp"] = at.encode()
        if settings.id_header:
            delivery_id = single(headers, settings.id_header, ID)
            known["id"] = delivery_id.encode()
        signatures = after_prefix(settings.signature_prefix, shown)
        if self.encoding == "hex":
            signatures = [signature.lower() for signature in signatures]
        pieces = [known[part] if odd % 2 else part.encode()
                  for odd, part in enumerate(self._template)]  # fmt: skip
        seconds = float(at or 0) / (1000 if float(at or 0) >= _MILLISECONDS_FROM else 1)
        id_signed = "id" in self._template[1::2] or not settings.id_header
        return Signed(signatures, pieces, delivery_id, seconds if at else None, id_signed)

    def find_id(self, request: SignedRequest, signed: Signed) -> str:
        """The one of the settings; without one a signed time and the same body are a replay."""
        if self.settings.id_field:
            path = self.settings.id_field.split(".")
            try:
                body = to_object(parse_form(request.wire)) if request.is_form else request.wire
            except ValueError as error:
                raise Problem(problem.MALFORMED, str(error)) from None
            return id_at(path, body)
        return signed.id or (digest_of(*signed.signed) if self.timed else "")


SCHEMES: dict[str, type[Scheme]] = {
    "standard": StandardScheme,
    "github": GithubScheme,
    "stripe": StripeScheme,
    "shopify": ShopifyScheme,
    "slack": SlackScheme,
    "twilio": TwilioScheme,
    "gitlab": GitlabScheme,
    "sendgrid": SendgridScheme,
    "hmac": HmacScheme,
}


def problems_of_scheme(settings: WebhookSettings) -> Iterator[tuple[str, str]]:
    """Finds settings that a webhook's kind cannot use: (key in its table, problem) for each."""
    scheme = SCHEMES[settings.kind]
    for kind, other in SCHEMES.items():
        for key in other.own if other is not scheme else ():
            if getattr(settings, key) != type(settings).model_fields[key].default:
                yield key, f"is for the kind {kind}, not for {settings.kind}"
    yield from scheme.problems(settings)


def _with_and_without_port(url: str) -> Iterable[str]:
    """A URL with its port and without: senders differ about the usual one."""
    parts = urlsplit(url)
    name = parts.netloc.rpartition(":")[0] if parts.port else parts.netloc
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return (parts._replace(netloc=name).geturl(), parts._replace(netloc=f"{name}:{port}").geturl())


def _hash_in(query: str) -> str:
    """The parameter `bodySHA256` of a query; empty if there is none that could be meant."""
    try:
        found = parse_qs(query, keep_blank_values=True, max_num_fields=100)
    except ValueError:
        return ""
    hashes = found.get("bodySHA256", ())
    return hashes[0].lower() if len(hashes) == 1 else ""
