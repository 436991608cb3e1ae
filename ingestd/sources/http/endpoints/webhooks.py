"""Signed deliveries: the signature authenticates, so they need no token.

Checked on the bytes as they came, before anything is parsed or decompressed, by the scheme of the
webhook's kind (`ingestd.http.signatures`). The sender's id of a delivery becomes its idempotency
key, so one that is delivered again is accepted once.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import msgspec

from ingestd.base.append import WEBHOOK, scoped
from ingestd.base.record import Records
from ingestd.codecs.forms import FORM, FORM_BYTES_MAX, parse_form, to_object
from ingestd.codecs.json import is_json
from ingestd.codecs.lines import Parsed
from ingestd.http import problem
from ingestd.http.credentials import read_lines
from ingestd.http.problem import Problem
from ingestd.http.response import JSON, Response
from ingestd.http.schemes import SCHEMES
from ingestd.http.signatures import SignedRequest, check_time, media_type
from ingestd.sources.http.decode import DocumentCodec, ValueCodec
from ingestd.sources.http.endpoints.base import (
    SIGNATURE,
    BodyCodec,
    Decoded,
    Delivery,
    Description,
    Endpoint,
    RouteSpec,
    Target,
)
from ingestd.sources.http.headers import take_fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from multidict import MultiMapping

    from ingestd.base.record import Format
    from ingestd.http.settings import WebhookSettings
    from ingestd.sources.http.endpoints.base import BodyLimits, EndpointContext, Head
    from ingestd.sources.http.result import IngestResult

WEBHOOKS = "/v1/webhooks"
_JSON_TYPE = "application/json"


class Webhook:
    """One `[http.webhooks.NAME]`.

    Args:
        name: of it.
        settings: of it.
        keys: the secrets as its scheme takes them; any of them is good.

    Attributes:
        scheme: of its kind.
    """

    def __init__(self, name: str, settings: WebhookSettings, keys: Sequence[Any]) -> None:
        self.name = name
        self.keys = keys
        self.scheme = SCHEMES[settings.kind](settings)
        self._tolerance = settings.tolerance

    def check(
        self, headers: MultiMapping[str], wire: bytes, now: float, target: str = ""
    ) -> Delivery | None:
        """Verifies the signature and its time.

        Args:
            headers: of the request; whatever their case.
            wire: the body as it came.
            now: seconds since the epoch.
            target: as the request line has it.

        Returns:
            Its id; `None` if nothing tells it from another delivery.

        Raises:
            Problem: 401, or 400 if a delivery of this kind has an id in its body and this has none.
        """
        request = SignedRequest(headers, wire, target)
        signed = self.scheme.verify(request, self.keys)
        if signed.at is not None:
            check_time(signed.at, now, self._tolerance)
        delivery_id = self.scheme.find_id(request, signed)
        if not delivery_id:
            return None
        key = scoped(f"{WEBHOOK} {self.name}", delivery_id)
        if signed.id_signed:
            return Delivery(key, take_fingerprint(b"", key, ""))
        # Another body under the same id is somebody else's.
        return Delivery(key, take_fingerprint(wire, "", ""))


class DeliveryCodec(BodyCodec):
    """A signed delivery: a JSON text or a form, and mostly one record.

    Args:
        webhook: the one it is sent to.
        head: of the request.
    """

    verifies = True

    def __init__(self, webhook: Webhook, head: Head) -> None:
        self._webhook = webhook
        self._head = head
        self._records: BodyCodec = DocumentCodec() if webhook.scheme.each else ValueCodec()
        self._is_form = media_type(head.headers.get("Content-Type", "")) == FORM

    def verify(self, wire: bytes) -> Delivery | None:
        """See `BodyCodec`."""
        headers = cast("MultiMapping[str]", self._head.headers)
        return self._webhook.check(headers, wire, time.time(), self._head.target)

    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """See `BodyCodec`."""
        if self._is_form:
            return self._records.decode(_form_as_json(body), limits)
        return self._question(body) or self._records.decode(body, limits)

    def decode_quickly(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded] | None:
        """See `BodyCodec`."""
        if self._is_form:
            return super().decode_quickly(body, limits)
        return self._question(body) or self._records.decode_quickly(body, limits)

    def _question(self, body: bytes) -> Sequence[Decoded]:
        """Returns a part without records if the body asks for an answer; nothing if it does not."""
        question = self._webhook.scheme.question(body)
        return (Decoded(Parsed(Records.lines([]), []), notes=question),) if question else ()


def _form_as_json(body: bytes) -> bytes:
    if len(body) > FORM_BYTES_MAX:
        detail = f"{len(body)} bytes, more than the {FORM_BYTES_MAX} of a form"
        raise Problem(problem.RECORD_TOO_LARGE, detail)
    try:
        fields = parse_form(body)
    except ValueError as error:
        raise Problem(problem.MALFORMED, str(error)) from None
    if not fields:
        raise Problem(problem.EMPTY, "the form has no field")
    return to_object(fields)


class WebhooksEndpoint(Endpoint):
    """Signed deliveries to `POST /v1/webhooks/{webhook}`.

    Args:
        context: has their settings.
    """

    settings = None

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
        kept = [name for one in self._webhooks.values() for name in one.scheme.event_headers]
        self.keep_headers = tuple(dict.fromkeys(kept))

    def open(self, head: Head) -> BodyCodec:
        """See `Endpoint`."""
        webhook = self._webhooks[head.value]
        said = media_type(head.headers.get("Content-Type", ""))
        if is_json(said) or (said == FORM and webhook.scheme.forms):
            return DeliveryCodec(webhook, head)
        takes = f"{_JSON_TYPE}, {FORM}" if webhook.scheme.forms else _JSON_TYPE
        detail = f"{said[:80]!r}; set the content type of the webhook to {_JSON_TYPE} at its sender"
        raise Problem(problem.MEDIA_TYPE, detail, headers={"Accept": takes})

    def answer(self, result: IngestResult, head: Head) -> Response:
        """See `Endpoint`."""
        status = self._webhooks[head.value].scheme.status
        if result.parts and result.parts[0].notes:
            return Response(200, JSON, msgspec.json.encode({"challenge": result.parts[0].notes}))
        if status == 202 or result.waiter is not None:
            return result.response()
        return Response(status, b"text/plain" if status == 200 else b"", b"")

    def describe(self, route: RouteSpec, target: str, form: Format | None) -> Description:  # noqa: ARG002
        """See `Endpoint`."""
        schemes = [one.scheme for one in self._webhooks.values()]
        forms = [FORM] if any(one.forms for one in schemes) else []
        body = {
            "description": (
                "The delivery as its sender signs it; any `application/…+json` is read the same."
            ),
            "required": True,
            "content": {kind: {"schema": {}} for kind in (_JSON_TYPE, *forms)},
        }
        answers = {str(one.status) for one in schemes} - {"202"}
        responses = {status: {"description": _ACCEPTED[status]} for status in sorted(answers)}
        takes = " or ".join((_JSON_TYPE, *forms))
        return Description(
            f"{takes} (a signed delivery is one record)",
            {**_OPERATION, "requestBody": body, "responses": responses},
        )


_ACCEPTED = {
    "200": "Accepted, with no body (Slack), or the challenge of a check of the URL",
    "204": "Accepted (Twilio)",
}
_OPERATION = {
    "operationId": "deliver",
    "summary": "Deliver to a webhook by name",
    "description": (
        "A delivery that its sender signs, in the scheme of the webhook, is one record (SendGrid:"
        " one record an event). The signature is checked on the body as it comes; one that does"
        " not fit is 401. A delivery that comes again is accepted once and gets the first one's"
        " answer. A form becomes an object; the values of a name that comes again are an array."
    ),
    "parameters": [
        {"$ref": f"#/components/parameters/{name}"}
        for name in ("ContentEncoding", "RequestId", "TraceParent")
    ],
}


def read_webhooks(
    settings: Mapping[str, WebhookSettings], problems: list[str]
) -> dict[str, list[Any]]:
    """The secrets of every webhook, as its scheme takes them.

    Args:
        settings: by name.
        problems: gets a line for everything that is wrong.
    """
    return {name: list(_keys(name, webhook, problems)) for name, webhook in settings.items()}


def _keys(name: str, webhook: WebhookSettings, problems: list[str]) -> Iterable[Any]:
    key = f"http.webhooks.{name}"
    scheme = SCHEMES[webhook.kind](webhook)
    written = []
    if secret := webhook.secret.get_secret_value():
        written.append((f"{key}.secret", secret))
    if webhook.file:
        lines = read_lines(webhook.file, f"{key}.file", problems)
        written += [(f"{key}.file: line {number}", line) for number, line in lines]
    for where, secret in written:
        try:
            decoded = scheme.key(secret)
        except ValueError as error:
            problems.append(f"{where}: {error}")
        else:
            yield decoded
