"""`traceparent`: the trace that a request is part of, for log and envelope. No I/O.

https://www.w3.org/TR/trace-context/#traceparent-header
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ingestd.base.envelope import NAME_CHARACTERS_MAX, Envelope, pack
from ingestd.http import problem
from ingestd.http.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from multidict import MultiMapping

    from ingestd.base.append import AppendCounts

HEADER = "traceparent"
STATE_HEADER = "tracestate"
TRACE_FIELDS = ("trace_id", "parent_id")
"""Fields of `read_trace`."""
_VALUE = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})(?P<parent>[0-9a-f]{16})"
    r"-[0-9a-f]{2}(?P<more>-.*)?",
    re.ASCII,
)


def read_trace(values: Sequence[str]) -> dict[str, str]:
    """`trace_id` and `parent_id`, from all the `traceparent`s of a request; nothing if it is none.

    A version that is not known yet may have more behind what is known (4.3 there).
    """
    match = _VALUE.fullmatch(values[0]) if len(values) == 1 else None
    if match is None or (match["more"] and match["version"] == "00"):
        return {}
    return {"trace_id": match["trace"], "parent_id": match["parent"]}


class RequestTracer(Protocol):
    """Traces requests with records; on the event loop.

    Attributes:
        counts: makes the counts of an endpoint.
    """

    @property
    def counts(self) -> Callable[[], AppendCounts]: ...  # noqa: D102  see the class

    def wants(self) -> bool:
        """Tells if a request without a trace is to have a span: it goes the ordinary way then."""
        ...

    def begin(self, method: str, path: str, pipeline: str, trace: Mapping[str, str]) -> str:
        """Begins the span of a request, in its task; returns its `traceparent`, or nothing.

        Args:
            method: of the request.
            path: the template of its route.
            pipeline: its name.
            trace: `traceparent` and `tracestate` of the client; empty without a valid one.
        """
        ...

    def end(self, status: int, problem: str) -> None:
        """Ends the span of the request that this task has, if any.

        Args:
            status: of the answer; 499 if the client has left.
            problem: the slug of its problem, or empty.
        """
        ...


# -- envelopes -------------------------------------------------------------------------------------

_KNOWN_MAX = 256


class RequestEnvelopes:
    """Packs the envelopes of requests to one endpoint; usual ones once for many requests.

    Args:
        source: its name.
        endpoint: its name.
        keep: names of request headers that are kept.
    """

    def __init__(self, source: str, endpoint: str, keep: Iterable[str]) -> None:
        self._source, self._endpoint = source, endpoint
        self._keep = tuple(dict.fromkeys(name.lower() for name in keep))
        self._known: dict[tuple[str, str], bytes] = {}

    def of(self, headers: MultiMapping[str], client: str) -> bytes:
        """Returns the packed envelope of a request.

        Args:
            headers: of the request, in any case.
            client: the principal's name.
        """
        content_type = headers.get("Content-Type", "")
        if self._keep or HEADER in headers:
            trace = headers.getall(HEADER, ())
            kept = {name: ", ".join(headers.getall(name)) for name in self._keep if name in headers}
            traceparent = trace[0] if trace and read_trace(trace) else ""
            if kept or traceparent:
                return self._packed(client, content_type, kept, traceparent)
        packed = self._known.get((client, content_type))
        if packed is None:
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            packed = self._packed(client, content_type, {}, "")
            self._known[client, content_type[:NAME_CHARACTERS_MAX]] = packed
        return packed

    def _packed(
        self, client: str, content_type: str, headers: dict[str, str], traceparent: str
    ) -> bytes:
        return pack(
            Envelope(self._source, self._endpoint, client, content_type, headers, traceparent)
        )


# -- `Prefer` (RFC 7240) ---------------------------------------------------------------------------

PREFER_HEADER = "Prefer"
APPLIED = "Preference-Applied"

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - the RFC's word
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_WORD = rf"(?:{_TOKEN}|{_QUOTED})"
_PREFERENCE = re.compile(
    rf"[ \t]*(?P<name>{_TOKEN})(?:[ \t]*=[ \t]*(?P<value>{_WORD})?)?[ \t]*"
    rf"(?:;[ \t]*(?:{_TOKEN}(?:[ \t]*=[ \t]*{_WORD}?)?)?[ \t]*)*"
)


class Preferences(NamedTuple):
    """Preferences of a client that are supported.

    Attributes:
        wait: seconds that it would wait to hear what becomes of its records.
        strict: no record is to be accepted if one of them can't be.
    """

    wait: int | None = None
    strict: bool = False

    def applied(self) -> dict[str, str]:
        """The header that says which preferences were followed."""
        names = [f"wait={self.wait}"] if self.wait is not None else []
        names += ["handling=strict"] if self.strict else []
        return {APPLIED: ", ".join(names)} if names else {}


NOTHING = Preferences()


def parse_prefer(values: Sequence[str], wait_max: float) -> Preferences:
    """All the `Prefer`s of a request; what is not known or can't be read is ignored (RFC 7240, 2).

    Args:
        values: the headers as they came.
        wait_max: no wait is longer, in seconds.
    """
    known: dict[str, str] = {}
    for value in values:
        at = 0
        while found := _PREFERENCE.match(value, at):
            # Of a preference that comes twice only the first counts.
            known.setdefault(found["name"].lower(), (found["value"] or "").strip('"').lower())
            at = found.end()
            if value[at : at + 1] != ",":
                break
            at += 1
    seconds = _seconds(known.get("wait", ""), int(wait_max)) if wait_max else None
    return Preferences(seconds, known.get("handling") == "strict")


def _seconds(digits: str, longest: int) -> int | None:
    """A delta-seconds, at most `longest`; nothing if it is none. Any number of digits is read."""
    if not (digits.isascii() and digits.isdigit()):
        return None
    significant = digits.lstrip("0")
    # Python refuses to convert thousands of digits, and longer is larger anyway.
    return (
        longest if len(significant) > len(str(longest)) else min(int(significant or "0"), longest)
    )


# -- `Idempotency-Key` -----------------------------------------------------------------------------
#
# The header is an RFC 8941 string, as the HTTP API working group's draft "The Idempotency-Key HTTP
# Header Field" has it; the bare form that most clients send is read too, and means the same key.

IDEMPOTENCY_HEADER = "Idempotency-Key"
REPLAYED = {"Idempotent-Replayed": "true"}
KEY_CHARACTERS_MAX = 255

_IDEMPOTENCY_QUOTED = re.compile(r'"((?:[!#-\[\]-~]|\\["\\])*)"', re.ASCII)
_BARE = re.compile(r"[!#-+\--:<-\[\]-~]*", re.ASCII)  # visible, but for " , ; and \
_VISIBLE = re.compile(r"[!-~]+", re.ASCII)
_ESCAPED = re.compile(r"\\(.)")


def parse_key(values: Sequence[str]) -> str:
    """The key, from all the `Idempotency-Key`s of a request (at least one).

    Raises:
        Problem: 400.
    """
    if len(values) > 1:
        raise Problem(problem.KEY_INVALID, "there is more than one")
    value = values[0].strip(" \t")
    quoted = _IDEMPOTENCY_QUOTED.fullmatch(value)
    if quoted is not None:
        key = _ESCAPED.sub(r"\1", quoted[1])
    elif _BARE.fullmatch(value):
        key = value
    else:
        detail = 'it is a string in quotes ("…") or one word, of visible ASCII characters'
        raise Problem(problem.KEY_INVALID, detail)
    if not 1 <= len(key) <= KEY_CHARACTERS_MAX:
        raise Problem(problem.KEY_INVALID, f"it has 1 to {KEY_CHARACTERS_MAX} characters")
    return key


def safe_key(key: str) -> str:
    """A key of a protocol's own as keys are written here: itself, or its digest."""
    if len(key) <= KEY_CHARACTERS_MAX and _VISIBLE.fullmatch(key):
        return key
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()


def take_fingerprint(wire: bytes, content_type: str, encoding: str) -> bytes:
    """16 bytes that another body, `Content-Type` or `Content-Encoding` does not have.

    Args:
        wire: the body as it came.
        content_type: as it came.
        encoding: what it is encoded with.
    """
    head = f"{encoding}\0{content_type}\0".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(head, digest_size=16)
    digest.update(wire)
    return digest.digest()
