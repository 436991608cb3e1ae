"""Problem documents (RFC 9457), one type a reason."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import msgspec

from ingestd.base.errors import (
    Draining,
    IngestdError,
    JournalFailed,
    KeyInFlight,
    KeyReused,
    KeysUnsupported,
    NeverFits,
    Overloaded,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ingestd.base.record import InvalidRecord

ERRORS_MAX = 100
"""Refused records that an answer lists."""


class ProblemType(NamedTuple):
    """One kind of problem.

    Attributes:
        slug: the end of its type, `urn:ingestd:problem:<slug>`; never changes.
        status: the HTTP status.
        title: the same words every time.
        closes: the connection cannot or should not go on.
    """

    slug: str
    status: int
    title: str
    closes: bool = False


BAD_REQUEST = ProblemType("bad-request", 400, "Bad Request", closes=True)
CORRUPT = ProblemType("corrupt-encoding", 400, "Invalid Content-Encoding")
EMPTY = ProblemType("empty", 400, "No Records")
MALFORMED = ProblemType("malformed", 400, "Malformed Records")
MOSTLY_INVALID = ProblemType("mostly-invalid", 400, "Mostly Invalid Records")
NOT_STRICT = ProblemType("not-strict", 400, "Strict Handling Failed")
UNAUTHORIZED = ProblemType("unauthorized", 401, "Unauthorized")
SIGNATURE_INVALID = ProblemType("signature-invalid", 401, "Invalid Signature")
FORBIDDEN = ProblemType("forbidden", 403, "Forbidden")
FOREIGN_ORIGIN = ProblemType("foreign-origin", 403, "Origin Not Allowed")
MISDIRECTED = ProblemType("misdirected", 421, "Misdirected Request")
NOT_FOUND = ProblemType("not-found", 404, "Not Found")
UNKNOWN_PIPELINE = ProblemType("unknown-pipeline", 404, "Pipeline Not Found")
METHOD = ProblemType("method-not-allowed", 405, "Method Not Allowed")
TIMEOUT = ProblemType("body-timeout", 408, "Request Body Timeout", closes=True)
HEADER_TIMEOUT = ProblemType("header-timeout", 408, "Request Header Timeout", closes=True)
NO_LENGTH = ProblemType("length-required", 411, "Length Required")
PAYLOAD_TOO_LARGE = ProblemType("payload-too-large", 413, "Payload Too Large", closes=True)
RATIO = ProblemType("inflate-ratio", 413, "Compression Ratio Too High")
RECORD_TOO_LARGE = ProblemType("record-too-large", 413, "Record Too Large")
TOO_MANY_RECORDS = ProblemType("too-many-records", 413, "Too Many Records")
MEDIA_TYPE = ProblemType("unsupported-media-type", 415, "Unsupported Media Type")
ENCODING = ProblemType("unsupported-encoding", 415, "Unsupported Content-Encoding")
EXPECTATION = ProblemType("expectation-failed", 417, "Expectation Failed", closes=True)
KEY_INVALID = ProblemType("idempotency-key-invalid", 400, "Invalid Idempotency-Key")
KEY_IN_FLIGHT = ProblemType("idempotency-key-in-flight", 409, "Idempotency-Key In Use")
KEY_REUSED = ProblemType("idempotency-key-reused", 422, "Idempotency-Key Reused")
OVER_SHARE = ProblemType("over-share", 429, "Client Share Exceeded")
RATE_LIMITED = ProblemType("rate-limited", 429, "Too Many Requests")
CLIENT_CONNECTIONS = ProblemType(
    "client-connections", 429, "Too Many Client Connections", closes=True
)
OVERLOADED = ProblemType("overloaded", 503, "Pipeline Overloaded")
HEADERS_TOO_LARGE = ProblemType("headers-too-large", 431, "Request Header Fields Too Large", True)
INTERNAL = ProblemType("internal", 500, "Internal Server Error", closes=True)
BUSY = ProblemType("busy", 503, "Server Overloaded")
CONNECTIONS = ProblemType("too-many-connections", 503, "Too Many Connections", closes=True)
DRAINING = ProblemType("draining", 503, "Shutting Down", closes=True)
JOURNAL_FAILED = ProblemType("journal-failed", 503, "Journal Failed", closes=True)

KEYS_UNSUPPORTED = ProblemType(
    "idempotency-unsupported", 422, "This pipeline remembers no Idempotency-Key"
)

KINDS = tuple(kind for kind in list(globals().values()) if isinstance(kind, ProblemType))


class Problem(IngestdError):  # noqa: N818 - the RFC's word
    """A request is answered with a problem document."""

    message = "{detail}"

    def __init__(
        self,
        kind: ProblemType,
        detail: str,
        *,
        refused: Sequence[InvalidRecord] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail=detail)
        self.kind = kind
        self.detail = detail
        self.refused = refused
        self.headers = headers or {}
        self.members: dict[str, int] = {}  # more that the document says, as RFC 9457 allows
        self.without_credentials = False  # a 401 to a request that showed none

    def __reduce__(self) -> tuple[object, ...]:
        """By its own arguments; see the base class."""
        return (_rebuild, (self.kind, self.detail, self.refused, self.headers))

    def body(self) -> bytes:
        """The problem as `application/problem+json`."""
        members: dict[str, Any] = {
            "type": f"urn:ingestd:problem:{self.kind.slug}",
            "title": self.kind.title,
            "status": self.kind.status,
            "detail": self.detail,
        }
        members |= self.members
        if self.refused:
            members["errors"] = list_errors(self.refused)
        return msgspec.json.encode(members)


def _rebuild(
    kind: ProblemType, detail: str, refused: Sequence[InvalidRecord], headers: Mapping[str, str]
) -> Problem:
    return Problem(kind, detail, refused=refused, headers=headers)


def list_errors(refused: Sequence[InvalidRecord]) -> list[dict[str, Any]]:
    """The first `ERRORS_MAX` refused records, as an answer lists them."""
    return [
        {"index": one.index, "reason": one.reason, "detail": one.detail}
        for one in refused[:ERRORS_MAX]
    ]


Explained = (
    Overloaded | NeverFits | Draining | JournalFailed | KeyInFlight | KeyReused | KeysUnsupported
)
EXPLAINED = get_args(Explained)


def explain(error: Explained) -> Problem:
    """The problem that tells a client why its records were not taken."""
    if isinstance(error, KeyInFlight):
        return Problem(KEY_IN_FLIGHT, str(error), headers=retry_after(1.0))
    if isinstance(error, KeysUnsupported):
        return Problem(KEYS_UNSUPPORTED, str(error))
    if isinstance(error, KeyReused):
        # The key may become free again: the other request is not accepted yet.
        headers = retry_after(1.0) if error.in_progress else None
        return Problem(KEY_REUSED, str(error), headers=headers)
    if isinstance(error, Overloaded):
        return Problem(OVERLOADED, str(error), headers=retry_after(error.retry_after))
    if isinstance(error, NeverFits):
        return Problem(PAYLOAD_TOO_LARGE, str(error))
    if isinstance(error, Draining):
        return Problem(DRAINING, str(error), headers=retry_after(1.0))
    # Not str(error): it names a path on this machine.
    return Problem(JOURNAL_FAILED, "the journal has failed", headers=retry_after(10.0))


def draining() -> Problem:
    """Returns the problem of all requests while the daemon drains."""
    return explain(Draining())


def retry_after(seconds: float) -> dict[str, str]:
    """`Retry-After` in whole seconds, at least 1."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
