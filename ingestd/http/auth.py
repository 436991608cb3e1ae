"""Authentication and authorization of requests, before anything of a body is read.

A token identifies its principal: as a bearer token, with HTTP Basic, or in `X-API-Key` where there
is no `Authorization`. Without a token a verified certificate does, by `client_certificate`; if
there are no tokens at all, every certificate may send everything. All other requests are refused,
unless no credentials are configured.

"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Protocol

from ingestd.base.logging import get_logger
from ingestd.config.network import ANY_ORIGIN, Hosts, authority_of, is_foreign
from ingestd.http import problem
from ingestd.http.admission import RateLimiter
from ingestd.http.credentials import (
    API_KEY,
    IN_BODY,
    TOKEN_SCHEMES,
    TokenScheme,
    has_expired,
    names_in,
    principal_of_certificate,
)
from ingestd.http.peer import peer_of
from ingestd.http.problem import Problem
from ingestd.http.settings import ALL, demands_proof, demands_signatures_alone

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ingestd.http.credentials import Tokens
    from ingestd.http.request import Request
    from ingestd.http.settings import HttpSettings, TokenSettings

    Ways = Sequence[str | TokenScheme]

log = get_logger()

DENIED_SECONDS = 10.0
"""Interval of log lines about refused requests: no client can fill the log."""
ANONYMOUS = "anonymous"
"""The principal of all requests without credentials."""
ONLY_DELIVERIES = (
    "there are webhooks and no tokens: only signed deliveries are accepted. To accept records too,"
    " set a token (http.tokens.NAME.hash) or http.allow_anonymous = true"
)
_UNKNOWN = (
    "it is not known here: no http.tokens.NAME.hash belongs to it (ingestd token prints hashes)"
)
_CHALLENGE = 'Bearer realm="ingestd"{}, Basic realm="ingestd", charset="UTF-8"'


class Credentials(Protocol):
    """The credentials that requests are held against; a reload replaces them.

    Attributes:
        tokens: the tokens, and the names in certificates, of each client.
        authorities: digests of the certificates of CAs of client certificates.
    """

    @property
    def tokens(self) -> Tokens: ...  # noqa: D102 - see the class
    @property
    def authorities(self) -> frozenset[bytes]: ...  # noqa: D102


class Principal:
    """The sender of a request, its permissions and its rate limits.

    Args:
        name: of the token or webhook; empty if it has none.
        pipelines: where it may send to; `None` for everywhere.
        limits: shared by all requests of this name.
        monotonic: seconds that do not go back.
        id: whose requests these are, for what is kept apart: keys, and what is held.
        client: the name of the token, certificate or webhook, for people; `name` if not given.
    """

    __slots__ = ("_limits", "_monotonic", "client", "id", "name", "pipelines")

    def __init__(
        self,
        name: str = "",
        pipelines: frozenset[str] | None = None,
        limits: RateLimiter | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        id: str = ANONYMOUS,  # noqa: A002
        *,
        client: str | None = None,
    ) -> None:
        self.name = name
        self.client = name if client is None else client
        self.id = id
        self.pipelines = pipelines
        self._limits = limits
        self._monotonic = monotonic

    def authorize(self, pipeline: str) -> None:
        """Checks that it may send to a pipeline.

        Raises:
            Problem: 403.
        """
        if self.pipelines is not None and pipeline not in self.pipelines:
            raise self.forbidden()

    def forbidden(self) -> Problem:
        """The problem of a request that it may not send."""
        return Problem(problem.FORBIDDEN, f"{self.name} may not send here")

    def wait(self) -> float:
        """Seconds until it may send again; 0 if it may now."""
        return self._limits.wait(self._monotonic())[0] if self._limits is not None else 0.0

    def check(self) -> None:
        """Checks its rate limits.

        Raises:
            Problem: 429, with the seconds until it may.
        """
        if self._limits is None:
            return
        seconds, setting = self._limits.wait(self._monotonic())
        if seconds > 0:
            detail = f"more than http.tokens.{self.name}.{setting}"
            raise Problem(problem.RATE_LIMITED, detail, headers=problem.retry_after(seconds))

    def charge(self, records: int, size: int) -> None:
        """Charges records, and their decompressed bytes, to its rate limits."""
        if self._limits is not None:
            self._limits.charge(records, size, self._monotonic())


def _is_unix(request: Request) -> bool:
    """Returns True if it came over a Unix socket, which no browser reaches."""
    sock = request.transport.get_extra_info("socket") if request.transport is not None else None
    return sock is not None and sock.family == socket.AF_UNIX


def _rates(token: TokenSettings) -> tuple[int, int]:
    return token.records_per_second, token.bytes_per_second


class DenialLog:
    """Counts refused requests in few lines of the log.

    Args:
        monotonic: seconds that do not go back.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._count = 0
        self._due = 0.0

    def count(self, peer: str) -> None:
        """Counts a refused request of a peer."""
        self._count += 1
        now = self._monotonic()
        if now >= self._due:
            log.info("requests_denied", count=self._count, last=peer)
            self._count, self._due = 0, now + DENIED_SECONDS


UNIDENTIFIED = Principal()
"""The principal of a request whose token is in its body, until that was read."""


class Authenticator:
    """Lets requests in, or not.

    Args:
        settings: of the http source.
        access: what the files that they name say.
        local: whether only this machine can reach it. A client without credentials there may still
            be a browser with a page of any origin, so `Host` and `Origin` are looked at.
        before: the one whose place it takes: what a token owes it goes on owing.
        monotonic: seconds that do not go back.
        now: seconds since the epoch.
    """

    def __init__(
        self,
        settings: HttpSettings,
        access: Credentials,
        *,
        local: bool = True,
        before: Authenticator | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.access = access
        self._monotonic = monotonic
        self._now = now
        owed = before.limits if before is not None else {}
        self.limits: dict[tuple[str, int, int], RateLimiter] = {
            (name, *_rates(token)): owed.get((name, *_rates(token)))
            or RateLimiter(*_rates(token), monotonic())
            for name, token in settings.tokens.items()
            if any(_rates(token))
        }
        self._principals = {
            name: Principal(
                name,
                None if ALL in token.pipelines else frozenset(token.pipelines),
                self.limits.get((name, *_rates(token))),
                monotonic,
                f"token {name}",
            )
            for name, token in settings.tokens.items()
        }
        unsaid = settings.allow_anonymous or not demands_proof(settings)
        self._anybody = Principal() if unsaid else None
        self._shields = unsaid and local
        self._origins = frozenset(settings.cors_origins)
        self._hosts = Hosts(settings.hosts) if self._shields or settings.hosts else None
        self._missing = "the request has none"
        if demands_signatures_alone(settings):
            self._missing = ONLY_DELIVERIES
        # The CA decides which clients are authenticated, unless tokens name certificates.
        certified = bool(settings.tls.client_ca) and not settings.tokens
        self._takes_certificates = certified
        self._denials = DenialLog(monotonic)

    def admit(self, request: Request, pipeline: str, schemes: Ways = TOKEN_SCHEMES) -> Principal:
        """Authenticates a request, and authorizes it for a pipeline.

        Args:
            request: the one.
            pipeline: where it sends to.
            schemes: the ways to show a token that count.

        Raises:
            Problem: 401 if that can't be told, 403 if it may not send to the pipeline, 429 if it
                has sent too much.
        """
        principal = self.identify(request, pipeline, schemes)
        principal.check()
        return principal

    def identify(self, request: Request, pipeline: str, schemes: Ways = TOKEN_SCHEMES) -> Principal:
        """Does the same, however much the principal has sent.

        Raises:
            Problem: 401 if that can't be told, 403 if it may not send to the pipeline.
        """
        principal = self._who(request, schemes)
        self._authorize(request, principal, pipeline)
        return principal

    def identify_by(self, request: Request, token: str, pipeline: str) -> Principal:
        """Identifies the principal of a request by the token in its body; see `IN_BODY`.

        Args:
            request: the one.
            token: as it is in the body; empty if there is none.
            pipeline: where it sends to.

        Raises:
            Problem: 401, 403 or 429.
        """
        if not token:
            raise self._deny(request, self._missing, "")
        principal = self._known(request, self.access.tokens.owner_of(token))
        self._authorize(request, principal, pipeline)
        principal.check()
        return principal

    def _authorize(self, request: Request, principal: Principal, pipeline: str) -> None:
        try:
            principal.authorize(pipeline)
        except Problem:
            self._denials.count(peer_of(request))
            raise

    def decides_by_head(self, request: Request) -> bool:
        """Returns True if the bytes of its head alone decided that a request was let in."""
        if self._hosts is not None and _is_unix(request):
            return False
        return self._anybody is not None or not request.protocol.has_certificate

    def explain_unknown(self, request: Request, schemes: Ways) -> Problem:
        """Returns the answer of a pipeline that does not exist.

        Only a principal that may send to all pipelines learns that there is none.
        """
        try:
            principal = self._who(request, schemes)
        except Problem as refusal:
            return refusal
        if principal.pipelines is not None:
            self._denials.count(peer_of(request))
            return principal.forbidden()
        return Problem(
            problem.UNKNOWN_PIPELINE, "no pipeline has this name; each has a table [pipelines.NAME]"
        )

    def check_host(self, request: Request) -> None:
        """Checks that the request is for a name of this server.

        Raises:
            Problem: 421.
        """
        hosts, target = self._hosts, request.raw_path
        if hosts is None:
            return
        host = request.headers.get("Host", "")
        if host in hosts.known and target[:1] == "/":
            return  # as nearly always, without further calls
        authority = authority_of(target, host)
        if hosts.know(authority) or _is_unix(request):
            return
        detail = "Host is neither an IP address nor localhost nor one of http.hosts"
        raise Problem(problem.MISDIRECTED, detail)

    def _check_origin(self, request: Request) -> None:
        """Refuses requests of pages of foreign origins.

        Raises:
            Problem: 403.
        """
        headers = request.headers
        origin = ", ".join(headers.getall("Origin", ()))  # no browser sends two
        site = headers.get("Sec-Fetch-Site", "")
        if ANY_ORIGIN in self._origins or origin in self._origins:
            return
        if is_foreign(origin, site, authority_of(request.raw_path, headers.get("Host", ""))):
            raise Problem(problem.FOREIGN_ORIGIN, "it is not among http.cors_origins")

    def _who(self, request: Request, schemes: Ways) -> Principal:
        self.check_host(request)
        headers = request.headers
        if self._anybody is not None:
            if self._shields and ("Origin" in headers or "Sec-Fetch-Site" in headers):
                self._check_origin(request)
            return self._anybody
        if schemes is not TOKEN_SCHEMES:
            for scheme in schemes:
                if isinstance(scheme, TokenScheme):
                    token = scheme.read(headers, request.raw_path)
                    if token is not None:
                        return self._known(request, self.access.tokens.owner_of(token))
        if "Authorization" in headers:
            shown = headers.getall("Authorization")
            owner = self.access.tokens.owner_by(shown[0], schemes) if len(shown) == 1 else None
        elif API_KEY in headers and "key" in schemes:
            shown = headers.getall(API_KEY)
            owner = self.access.tokens.owner_of(shown[0]) if len(shown) == 1 else None
        else:
            return self._certified(request, schemes)
        return self._known(request, owner)

    def _known(self, request: Request, owner: str | None) -> Principal:
        """The principal of a name; `None` is a token that has none."""
        if owner is None:
            raise self._deny(request, _UNKNOWN, ', error="invalid_token"')
        return self._principals[owner]

    def _certified(self, request: Request, schemes: Ways) -> Principal:
        """Returns the principal of a certificate, for a request without a token."""
        transport = request.transport
        certificate = transport.get_extra_info("peercert") if transport is not None else None
        if IN_BODY in schemes and not certificate:
            return UNIDENTIFIED
        if not certificate:
            raise self._deny(request, self._missing, "")
        if has_expired(certificate, self._now()):
            raise self._deny(request, "the certificate has expired", "")
        if not request.protocol.authorities <= self.access.authorities:
            why = "an authority has gone since the certificate was verified; connect anew"
            raise self._deny(request, why, "")
        owner = self.access.tokens.owner_of_certificate(certificate)
        if owner is not None:
            return self._principals[owner]
        if not self._takes_certificates:
            raise self._deny(request, self._missing, "")
        principal = principal_of_certificate(certificate)
        client = next(iter(names_in(certificate)), "")
        return Principal(principal, id=principal, client=client)

    def _deny(self, request: Request, why: str, error: str) -> Problem:
        self._denials.count(peer_of(request))
        challenge = {"WWW-Authenticate": _CHALLENGE.format(error)}
        found = Problem(problem.UNAUTHORIZED, f"a token is needed; {why}", headers=challenge)
        found.without_credentials = not error
        return found
