"""Resources by path, and CORS. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from ingestd.config.network import ANY_ORIGIN
from ingestd.http import problem
from ingestd.http.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


T_co = TypeVar("T_co", covariant=True)

SERVER = "*"
"""The target of an `OPTIONS` that asks about the server and not about a resource (RFC 9110)."""

PREFLIGHT = "Access-Control-Request-Method"
"""The header of an `OPTIONS` that a browser sends before another request."""
ALL_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
READ = ("GET", "HEAD", "OPTIONS")
ASK = ("OPTIONS",)
ANY_SEGMENT = "*"
BELOW = "/**"
_SEGMENTS_MAX = 8
"""Of a path that is not in the table as it is: each is three more look-ups."""


class Resource(NamedTuple, Generic[T_co]):
    """Resource of a path.

    Attributes:
        methods: what may be done with it, in the order of `Allow`.
        what: the thing itself, for its handler.
        alone: it does not stand for the paths below its own, although that ends with `/`.
    """

    methods: tuple[str, ...]
    what: T_co
    alone: bool = False

    @property
    def allow(self) -> str:
        """The value of `Allow`."""
        return ", ".join(self.methods)


NO_PATH = "there is no such path at this address; / and /openapi.json list the paths"


def find(
    table: Mapping[str, Resource[T_co]], method: str, target: str, elsewhere: str = ""
) -> Resource[T_co]:
    """Returns the resource of a request; one look-up for a target that is a path alone.

    Args:
        table: the resources by path, `*` for the server as a whole. A path that ends with `/` also
            stands for the paths below it that are not in the table, one that ends with `BELOW` for
            these alone, and `*` as a segment for any other segment.
        method: of the request.
        target: as the request line has it: a path with or without a query, or a whole URL.
        elsewhere: what another address of the daemon answers, for the detail of a 404.

    Raises:
        Problem: 404, or 405 with `Allow`.
    """
    resource = table.get(target)
    if resource is None:
        resource = look_up(table, method, target)
    if resource is None:
        raise Problem(problem.NOT_FOUND, NO_PATH + elsewhere)
    if method not in resource.methods:
        detail = f"this path takes {resource.allow}, not {method[:20]}"
        raise Problem(problem.METHOD, detail, headers={"Allow": resource.allow})
    return resource


def look_up(table: Mapping[str, Resource[T_co]], method: str, target: str) -> Resource[T_co] | None:
    """Returns the resource of a target that may be more than a path, for any method."""
    path = path_of(target, method)
    if path in table:
        return table[path]
    segments = path.split("/", _SEGMENTS_MAX)
    for place in range(1, len(segments)):
        pattern = "/".join((*segments[:place], ANY_SEGMENT, *segments[place + 1 :]))
        if segments[place] and (resource := table.get(pattern)) is not None:
            return resource
    for count in range(len(segments) - 1, 1, -1):
        above = "/".join(segments[:count])
        resource = table.get(f"{above}/")
        if resource is None or resource.alone:
            resource = table.get(above + BELOW)
        if resource is not None:
            return resource
    return None


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


# -- CORS ------------------------------------------------------------------------------------------
#
# It is no access control: it only says what a browser may show to a page. Other programs do not
# ask, and a request that needs no preflight has been carried out by the time the browser
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
    """The headers for browsers.

    Args:
        origins: whose pages may read; at least one, or `*` alone.
        sent: headers that their requests may have, beside the usual ones.
        shown: headers of answers that they may read, beside the usual ones.
    """

    def __init__(
        self, origins: Sequence[str], sent: Sequence[str] = (), shown: Sequence[str] = ()
    ) -> None:
        self._sent = ", ".join(sorted({*_SENT, *sent}, key=str.lower))
        readable = ", ".join(sorted({*_SHOWN, *shown}, key=str.lower))
        readers = {"Access-Control-Expose-Headers": readable}
        self._any = ANY_ORIGIN in origins
        self._allowed = {
            origin: {"Access-Control-Allow-Origin": origin, **readers, "Vary": "Origin"}
            for origin in origins
        }
        # A cache must not give the answer for one origin, or for none, to another.
        self._others = {"Vary": "Origin"}
        if self._any:
            self._others = {"Access-Control-Allow-Origin": ANY_ORIGIN, **readers}

    def headers(self, origin: str) -> dict[str, str]:
        """For any answer to a request from an origin (empty if it says none)."""
        return self._others if self._any else self._allowed.get(origin, self._others)

    def preflight(self, origin: str, methods: Sequence[str]) -> dict[str, str]:
        """Adds headers for the preflight request of a browser.

        Args:
            origin: of the page.
            methods: that the resource takes.
        """
        if not self._any and origin not in self._allowed:
            return {}
        return {
            "Access-Control-Allow-Methods": ", ".join(methods),
            "Access-Control-Allow-Headers": self._sent,
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
    if cors is None or PREFLIGHT not in headers:
        return allow
    return allow | cors.preflight(headers.get("Origin", ""), resource.methods)
