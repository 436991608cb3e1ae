"""Access to the admin address: which pages may ask, which tokens may read and change.

* Probes and the files of the console are open to every request, as they hold nothing of records.
* Reading is open on a loopback address, unless `admin.token_required` says otherwise; anywhere
  else it takes a token of `[admin.tokens]`. `/v1/status` is open everywhere while there are no
  tokens, as it was before there could be any; who shows none there sees the kinds of errors only.
* Changing takes a token with the role `admin`, everywhere, and a body of JSON, which no page of
  another origin can send without being asked about it first.
* A request that a proxy passed on comes from elsewhere, wherever the proxy is.

A page in a browser on this machine reaches a loopback address too: `Host` keeps out pages whose
name was made to mean this machine, `Origin` and `Sec-Fetch-Site` keep out all other foreign ones.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from ingestd.base.errors import ConfigError
from ingestd.config.network import Hosts, authority_of, is_foreign
from ingestd.http import problem
from ingestd.http.auth import DenialLog
from ingestd.http.credentials import API_KEY, TOKEN_SCHEMES, read_tokens
from ingestd.http.problem import Problem

if TYPE_CHECKING:
    from ingestd.admin.connection import AdminRequest
    from ingestd.settings import AdminSettings

_CHALLENGE = 'Bearer realm="ingestd admin"{}'
_FORWARDED = ("forwarded", "x-forwarded-", "x-real-ip", "via")
"""Beginnings of headers that proxies set; some set X-Forwarded-Proto alone."""
_TO_CHANGE = (
    "changing something needs a token with the role admin: [admin.tokens.NAME] with its hash and"
    ' role = "admin" (ingestd token makes one)'
)
_TO_READ = "reading needs a token of [admin.tokens.NAME]"


class Need(enum.Enum):
    """Right that a page needs."""

    PROBE = "open: health, metrics, the files of the console"
    STATUS = "open while there are no tokens, else as reading"
    READ = "a token, beyond a loopback address"
    CHANGE = "a token with the role admin"


class AdminAccess:
    """Decides on each request; a reload makes another one.

    Args:
        settings: `[admin]`.
        local: only this machine can reach the address.
        denials: logs refused requests; that of the one before, if there was one.

    Raises:
        ConfigError: a file of tokens can't be read, or a name has a token of another.
    """

    def __init__(
        self, settings: AdminSettings, *, local: bool, denials: DenialLog | None = None
    ) -> None:
        problems: list[str] = []
        self._tokens = read_tokens(settings.tokens, problems, "admin.tokens")
        if problems:
            raise ConfigError(problem="\n".join(problems))
        self._settings = settings
        self._local = local
        self._hosts = Hosts(settings.hosts) if local or settings.hosts else None
        self.denials = denials or DenialLog()

    def check_page(self, request: AdminRequest, need: Need) -> None:
        """Refuses requests that a foreign page may have sent from a browser.

        Raises:
            Problem: 421, 403 or 415.
        """
        headers = request.headers
        authority = authority_of(request.target, headers.get("host", ""))
        if self._hosts and not self._hosts.know(authority) and not request.is_unix:
            detail = "Host is neither an IP address nor localhost nor one of admin.hosts"
            raise Problem(problem.MISDIRECTED, detail)
        site, changes = headers.get("sec-fetch-site", ""), need is Need.CHANGE
        if headers.get("sec-fetch-mode") == "navigate" and not changes:
            # A link may be followed from anywhere: no page sees what its reader gets to see.
            site = ""
        guarded = self._local or need in {Need.READ, Need.CHANGE}
        if guarded and is_foreign(headers.get("origin", ""), site, authority):
            raise Problem(problem.FOREIGN_ORIGIN, "pages of other origins may not use this address")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if changes and kind != "application/json":
            raise Problem(problem.MEDIA_TYPE, "send a change with Content-Type: application/json")

    def authorize(self, request: AdminRequest, need: Need) -> str:
        """Checks that a request may do what it asks for.

        Returns:
            The name of its token; empty if it showed none and needs none.

        Raises:
            Problem: 401 or 403.
        """
        if need is Need.PROBE or (need is Need.STATUS and not self._settings.tokens):
            return ""
        headers = request.headers
        shown = headers.get("authorization", "")
        key = headers.get(API_KEY.lower(), "")
        if shown or key:
            tokens = self._tokens
            owner = tokens.owner_by(shown, TOKEN_SCHEMES) if shown else tokens.owner_of(key)
            if owner is None:
                raise self._deny(request, "the token is not known here", ', error="invalid_token"')
            if need is Need.CHANGE and self._settings.tokens[owner].role != "admin":
                self.denials.count(request.peer)
                raise Problem(problem.FORBIDDEN, f"{owner} may only read; {_TO_CHANGE}")
            return owner
        if need is Need.CHANGE:
            raise self._deny(request, _TO_CHANGE)
        if self._settings.token_required or not self.is_local(request):
            raise self._deny(request, _TO_READ)
        return ""

    def still_allows(self, request: AdminRequest, need: Need) -> bool:
        """Returns True if a request that was let in would be let in now, as the same principal."""
        try:
            return self.authorize(request, need) == request.principal
        except Problem:
            return False

    def is_local(self, request: AdminRequest) -> bool:
        """Returns True if the request is of this machine."""
        return self._local and not any(name.startswith(_FORWARDED) for name in request.headers)

    def shows_errors(self, request: AdminRequest) -> bool:
        """Returns True if the texts of handlers' errors, which may quote a record, may be shown."""
        return bool(request.principal) or self.is_local(request)

    def shows_payloads(self, request: AdminRequest) -> bool:
        """Returns True if payloads of records may be in the answer; see `admin.payloads`."""
        if self._settings.payloads == "loopback":
            return self.is_local(request)
        return self._settings.payloads == "always"

    def may_tap(self, request: AdminRequest) -> bool:
        """Returns True if records may be shown as they pass: beyond this machine, to admins."""
        token = self._settings.tokens.get(request.principal)
        trusted = token is not None and token.role == "admin"
        return self.shows_payloads(request) and (trusted or self.is_local(request))

    def _deny(self, request: AdminRequest, detail: str, error: str = "") -> Problem:
        self.denials.count(request.peer)
        challenge = {"WWW-Authenticate": _CHALLENGE.format(error)}
        return Problem(problem.UNAUTHORIZED, detail, headers=challenge)
