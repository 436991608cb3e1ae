"""Signed deliveries: the signature authenticates, so they need no token.

Checked on the bytes as they came, before anything is parsed or decompressed. The sender's id of a
delivery becomes its idempotency key, so one that is delivered again is accepted once.

standard: Standard Webhooks 1.0, https://www.standardwebhooks.com
github:   https://docs.github.com/webhooks/using-webhooks/validating-webhook-deliveries
stripe:   https://docs.stripe.com/webhooks#verify-manually
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ingestd.base.append import WEBHOOK, scoped
from ingestd.codecs.json import is_json
from ingestd.http import problem
from ingestd.http.credentials import read_lines
from ingestd.http.problem import Problem
from ingestd.sources.http.decode import ValueCodec
from ingestd.sources.http.endpoints.base import (
    SIGNATURE,
    Delivery,
    Description,
    Endpoint,
    RouteSpec,
    Target,
)
from ingestd.sources.http.headers import take_fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.http.settings import WebhookSettings
    from ingestd.sources.http.endpoints.base import BodyCodec, EndpointContext, Head

WEBHOOKS = "/v1/webhooks"
_ID = re.compile(r"[!-~]{1,255}", re.ASCII)
_SECONDS = re.compile(r"[0-9]{1,12}", re.ASCII)
_WHSEC = "whsec_"
_SIGNATURES_MAX = 20
SECRET_BYTES_MIN = 16
"""Of a secret, decoded; Standard Webhooks asks for 24, GitHub and Stripe make longer ones."""


class Signed(NamedTuple):
    """Signature headers of a delivery.

    Attributes:
        id: the sender's; empty if it is in the body.
        at: when it was signed, as it was written; `None` if that is not said.
        prefix: what is signed before the body.
        signatures: one of them has to fit.
        encoded: how they are written.
    """

    id: str
    at: str | None
    prefix: str
    signatures: Sequence[str]
    encoded: str = "hex"


class Webhook:
    """One `[http.webhooks.NAME]`.

    Args:
        name: of it.
        settings: of it.
        keys: the secrets as HMAC takes them; any of them is good.
    """

    def __init__(self, name: str, settings: WebhookSettings, keys: Sequence[bytes]) -> None:
        self.name = name
        self.keys = keys
        self._kind = settings.kind
        self._tolerance = settings.tolerance

    def check(self, headers: Mapping[str, str], wire: bytes, now: float) -> Delivery:
        """Verifies the signature and its time.

        Args:
            headers: of the request; whatever their case.
            wire: the body as it came.
            now: seconds since the epoch.

        Raises:
            Problem: 401, or 400 if a delivery of this kind has an id in its body and this has none.
        """
        signed = _READERS[self._kind](headers)
        if not self._fits(signed, wire):
            raise _wrong("it was not made with a secret that is known here, or the body is another")
        if signed.at is not None:
            self._check_time(float(signed.at), now)
        delivery_id = signed.id or _id_in(wire)
        key = scoped(f"{WEBHOOK} {self.name}", delivery_id)
        if self._kind == "github":
            # Its id is not signed: another body under the same id is somebody else's.
            return Delivery(key, take_fingerprint(wire, "", ""))
        return Delivery(key, take_fingerprint(b"", key, ""))

    def _fits(self, signed: Signed, wire: bytes) -> bool:
        fits = False
        for key in self.keys:
            mac = hmac.new(key, signed.prefix.encode(), hashlib.sha256)
            mac.update(wire)
            digest = mac.digest()
            right = (
                base64.b64encode(digest) if signed.encoded == "base64" else digest.hex().encode()
            )
            for signature in signed.signatures:
                fits |= hmac.compare_digest(right, signature.encode())
        return fits

    def _check_time(self, at: float, now: float) -> None:
        if abs(now - at) > self._tolerance:
            when = "ago" if at < now else "ahead"
            raise _wrong(
                f"it was made {abs(now - at):.0f} s {when}; tolerance is {self._tolerance:g} s"
            )


class DeliveryCodec(ValueCodec):
    """A signed delivery: one JSON text, one record.

    Args:
        webhook: the one it is sent to.
        headers: of the request.
    """

    verifies = True

    def __init__(self, webhook: Webhook, headers: Mapping[str, str]) -> None:
        self._webhook = webhook
        self._headers = headers

    def verify(self, wire: bytes) -> Delivery:
        """See `BodyCodec`."""
        return self._webhook.check(self._headers, wire, time.time())


class WebhooksEndpoint(Endpoint):
    """Signed deliveries to `POST /v1/webhooks/{webhook}`.

    Args:
        context: has their settings.
    """

    settings = None
    keep_headers = (
        "Webhook-Id", "Webhook-Timestamp",
        "X-GitHub-Event", "X-GitHub-Delivery", "X-GitHub-Hook-ID",
    )  # fmt: skip

    def __init__(self, context: EndpointContext) -> None:
        settings = context.settings.webhooks
        secrets = read_webhooks(settings, context.problems)
        self._webhooks = {name: Webhook(name, one, secrets[name]) for name, one in settings.items()}
        targets = {
            name: Target(one.pipeline or context.default, f"{WEBHOOK} {name}")
            for name, one in settings.items()
        }
        path = f"{WEBHOOKS}/{{webhook}}"
        self.routes = [RouteSpec(path, targets, auth=SIGNATURE)] if targets else []

    def open(self, head: Head) -> BodyCodec:
        """See `Endpoint`."""
        said = head.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if is_json(said):
            return DeliveryCodec(self._webhooks[head.value], head.headers)
        detail = (
            f"{said[:80]!r}; set the content type of the webhook to application/json at its sender"
        )
        raise Problem(problem.MEDIA_TYPE, detail, headers={"Accept": "application/json"})

    def describe(self, route: RouteSpec, target: str, form: Format | None) -> Description:  # noqa: ARG002
        """See `Endpoint`."""
        return Description("application/json (a signed delivery is one record)", _OPERATION)


_OPERATION = {
    "operationId": "deliver",
    "summary": "Deliver to a webhook by name",
    "description": (
        "A signed delivery (Standard Webhooks, GitHub or Stripe) is one record. The signature is"
        " checked on the body as it comes; one that does not fit is 401. A delivery that comes"
        " again is accepted once and gets the first one's answer."
    ),
    "parameters": [
        {"$ref": f"#/components/parameters/{name}"}
        for name in ("ContentEncoding", "RequestId", "TraceParent")
    ],
    "requestBody": {
        "description": (
            "The delivery as its sender signs it; any `application/…+json` is read the same."
        ),
        "required": True,
        "content": {"application/json": {"schema": {}}},
    },
}


def read_webhooks(
    settings: Mapping[str, WebhookSettings], problems: list[str]
) -> dict[str, list[bytes]]:
    """The secrets of every webhook, as HMAC takes them.

    Args:
        settings: by name.
        problems: gets a line for everything that is wrong.
    """
    return {name: list(_keys(name, webhook, problems)) for name, webhook in settings.items()}


def _keys(name: str, webhook: WebhookSettings, problems: list[str]) -> Iterable[bytes]:
    key = f"http.webhooks.{name}"
    written = []
    if secret := webhook.secret.get_secret_value():
        written.append((f"{key}.secret", secret))
    if webhook.file:
        lines = read_lines(webhook.file, f"{key}.file", problems)
        written += [(f"{key}.file: line {number}", line) for number, line in lines]
    for where, secret in written:
        try:
            decoded = _decode(secret, webhook.kind)
        except ValueError as error:
            problems.append(f"{where}: {error}")
        else:
            yield decoded


def _decode(secret: str, kind: str) -> bytes:
    """A secret as HMAC takes it.

    Raises:
        ValueError: it is none; the message does not quote it.
    """
    decoded = secret.encode()
    if kind == "standard":
        try:
            decoded = base64.b64decode(secret.removeprefix(_WHSEC), validate=True)
        except (binascii.Error, ValueError):
            raise ValueError(f"should be {_WHSEC} and base64") from None
    if len(decoded) < SECRET_BYTES_MIN:
        # The empty one above all, which a variable that is not set leaves behind its prefix.
        raise ValueError(
            f"{len(decoded)} bytes, fewer than {SECRET_BYTES_MIN}: it could be guessed"
        )
    return decoded


# -- headers ---------------------------------------------------------------------------------------


def _standard(headers: Mapping[str, str]) -> Signed:
    delivery_id = _one(headers, "webhook-id", _ID)
    at = _one(headers, "webhook-timestamp", _SECONDS)
    versions = [part.partition(",") for part in headers.get("webhook-signature", "").split(" ")]
    signatures = [signature for version, _, signature in versions if version == "v1"]
    return Signed(delivery_id, at, f"{delivery_id}.{at}.", _some(signatures), "base64")


def _github(headers: Mapping[str, str]) -> Signed:
    delivery_id = _one(headers, "x-github-delivery", _ID)
    algorithm, _, signature = headers.get("x-hub-signature-256", "").partition("=")
    return Signed(delivery_id, None, "", _some([signature] if algorithm == "sha256" else []))


def _stripe(headers: Mapping[str, str]) -> Signed:
    parts = [part.strip().partition("=") for part in headers.get("stripe-signature", "").split(",")]
    times = [value for key, _, value in parts if key == "t"]
    if len(times) != 1 or not _SECONDS.fullmatch(times[0]):
        raise _wrong("Stripe-Signature has no time")
    signatures = _some([value for key, _, value in parts if key == "v1"])
    return Signed("", times[0], f"{times[0]}.", signatures)


_READERS = {"standard": _standard, "github": _github, "stripe": _stripe}


def _one(headers: Mapping[str, str], name: str, form: re.Pattern[str]) -> str:
    value = headers.get(name, "")
    if not form.fullmatch(value):
        raise _wrong(f"{name} is missing, or can't be read")
    return value


def _some(signatures: Sequence[str]) -> Sequence[str]:
    signatures = [signature for signature in signatures if signature.isascii()][:_SIGNATURES_MAX]
    if not signatures:
        raise _wrong("there is none of a kind that is known here")
    return signatures


def _wrong(detail: str) -> Problem:
    scheme = {"WWW-Authenticate": 'Signature realm="ingestd"'}
    return Problem(problem.SIGNATURE_INVALID, detail, headers=scheme)


class _Event(msgspec.Struct):
    id: str


_EVENT = msgspec.json.Decoder(_Event)


def _id_in(wire: bytes) -> str:
    """The id of an event, which is in the body and thereby signed."""
    try:
        event_id = _EVENT.decode(wire).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        event_id = ""
    if not _ID.fullmatch(event_id):
        raise Problem(problem.MALFORMED, "the body is not an event: a JSON object with an id")
    return event_id
