"""What is where: paths, and the methods that each takes. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from ingestd.config.network import ANY_ORIGIN
from ingestd.http import problem
from ingestd.http.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


T_co = TypeVar("T_co", covariant=True)

RECORDS = "/v1/records"
WEBHOOKS = "/v1/webhooks"
ANY_PIPELINE = f"{RECORDS}/"
"""What stands for the pipelines that do not exist. They take what the others take: whether there
is one is not for everybody to know, so that is said later."""
SERVER = "*"
"""The target of an `OPTIONS` that asks about the server and not about a resource (RFC 9110)."""

READ = ("GET", "HEAD", "OPTIONS")
WRITE = ("POST", "OPTIONS")
ASK = ("OPTIONS",)


class Resource(NamedTuple, Generic[T_co]):
    """What a path names.

    Attributes:
        methods: what may be done with it, in the order of `Allow`.
        what: the thing itself, for whoever does it.
    """

    methods: tuple[str, ...]
    what: T_co

    @property
    def allow(self) -> str:
        """The value of `Allow`."""
        return ", ".join(self.methods)


def find(table: Mapping[str, Resource[T_co]], method: str, target: str) -> Resource[T_co]:
    """The resource that a request is for; one look-up for who writes its path alone.

    Args:
        table: the resources by path, `*` for the server as a whole.
        method: of the request.
        target: as the request line has it: a path with or without a query, or a whole URL.

    Raises:
        Problem: 404, or 405 with `Allow`.
    """
    resource = table.get(target)
    if resource is None:
        path = path_of(target, method)
        if path not in table and path.startswith(ANY_PIPELINE):
            path = ANY_PIPELINE
        resource = table.get(path)
        if resource is None:
            detail = f"records go to {RECORDS} or {RECORDS}/{{pipeline}}"
            raise Problem(problem.NOT_FOUND, detail)
    if method not in resource.methods:
        detail = f"{method[:20]} is not among {resource.allow}"
        raise Problem(problem.METHOD, detail, headers={"Allow": resource.allow})
    return resource


def path_of(target: str, method: str) -> str:
    """The path of a request's target, without the query, as it was written.

    A URL without a path means `/`, and the server as a whole to `OPTIONS` (RFC 9112, 3.2.4).
    """
    path = target.partition("#")[0].partition("?")[0]
    if path[:1] == "/":
        return path
    _, is_url, rest = path.partition("://")
    if not is_url:
        return path
    _, slash, path = rest.partition("/")
    return slash + path or (SERVER if method == "OPTIONS" else "/")


# -- CORS: what lets the pages of other origins read our answers in a browser ----------------------
#
# No I/O.
#
# It is no access control: it only says what a browser may show to a page. Who is no browser does
# not ask, and a request that needs no preflight has been carried out by the time the browser
# decides. https://fetch.spec.whatwg.org/#http-cors-protocol

MAX_AGE = 7200
"""Seconds that a browser may remember a preflight; none remembers one for longer than that or a
day."""

_SENT = (
    "Authorization",
    "Content-Encoding",
    "Content-Type",
    "Idempotency-Key",
    "Prefer",
    "traceparent",
    "tracestate",
    "X-API-Key",
    "X-Request-Id",
)
_SHOWN = (
    "Accept",
    "Accept-Encoding",
    "Allow",
    "ETag",
    "Idempotent-Replayed",
    "Preference-Applied",
    "Retry-After",
    "WWW-Authenticate",
    "X-Request-Id",
)


class Cors:
    """What is said to browsers.

    Args:
        origins: whose pages may read; at least one, or `*` alone.
    """

    def __init__(self, origins: Sequence[str]) -> None:
        shown = {"Access-Control-Expose-Headers": ", ".join(_SHOWN)}
        self._any = ANY_ORIGIN in origins
        self._allowed = {
            origin: {"Access-Control-Allow-Origin": origin, **shown, "Vary": "Origin"}
            for origin in origins
        }
        # A cache must not give the answer for one origin, or for none, to another.
        self._others = {"Vary": "Origin"}
        if self._any:
            self._others = {"Access-Control-Allow-Origin": ANY_ORIGIN, **shown}

    def headers(self, origin: str) -> dict[str, str]:
        """For any answer to a request from an origin (empty if it says none)."""
        return self._others if self._any else self._allowed.get(origin, self._others)

    def preflight(self, origin: str, methods: Sequence[str]) -> dict[str, str]:
        """What is more in the answer to an `OPTIONS` of a browser that asks first.

        Args:
            origin: that asks.
            methods: that the resource takes.
        """
        if not self._any and origin not in self._allowed:
            return {}
        return {
            "Access-Control-Allow-Methods": ", ".join(methods),
            "Access-Control-Allow-Headers": ", ".join(_SENT),
            "Access-Control-Max-Age": str(MAX_AGE),
        }


def tell_options(
    resource: Resource[object], headers: Mapping[str, str], cors: Cors | None
) -> dict[str, str]:
    """The headers of the answer to `OPTIONS`: what may be done with a resource, and by which pages.

    Args:
        resource: that was asked about.
        headers: of the request.
        cors: what is said to browsers, if anything is.
    """
    allow = {"Allow": resource.allow}
    if cors is None or "Access-Control-Request-Method" not in headers:
        return allow
    return allow | cors.preflight(headers.get("Origin", ""), resource.methods)
