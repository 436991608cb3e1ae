"""CORS: what lets the pages of other origins read our answers in a browser. No I/O.

It is no access control: it only says what a browser may show to a page. Who is no browser does not
ask, and a request that needs no preflight has been carried out by the time the browser decides.
https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.config.network import ANY_ORIGIN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ingestd.sources.http.routes import Resource

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
