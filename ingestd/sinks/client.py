"""HTTP client of sinks: one kept connection, bounded answers, errors in the classes of a sink.

`HttpOptions` has the options that all such sinks share, `HttpPeer` sends requests with them, and
`refuse` raises what the status of an answer means where the sink itself knows nothing better.

* Synchronous, for a thread or process worker; it opens nothing before the first request.
* What a request does must be safe to do twice: one whose kept connection turned out to be gone is
  sent again on a new one, and one that an address cannot take goes to the next address.
* No redirect is followed and no proxy of the environment is used: what is sent carries a secret.
"""

from __future__ import annotations

import base64
import gzip
import http.client
import time
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, NoReturn
from urllib.parse import urlsplit

from msgspec import Meta

from ingestd.handlers.batch import Blocked, Unavailable
from ingestd.handlers.options import Seconds, Secret
from ingestd.handlers.text import one_line
from ingestd.sinks.base import TlsOptions
from ingestd.sinks.connection import HttpConnection, HttpTarget, is_host, parse_retry_after, told

if TYPE_CHECKING:
    from collections.abc import Mapping

REPLY_BYTES_MAX = 128 * 1024 * 1024
"""Longest body of an answer that is read."""
RETRY_AFTER_MAX = 300.0
"""Longest wait that is taken from a `Retry-After`, seconds."""
_SAID_CHARS = 500


class HttpOptions(TlsOptions, frozen=True, kw_only=True):
    """Options of a sink that speaks HTTP."""

    url: Annotated[
        str,
        Meta(
            description="address, `https://host:port`, a path may follow; of several, with commas"
            " between them, the next one is taken when one cannot be reached"
        ),
    ]
    username: Annotated[str | None, Meta(description="name for Basic authentication")] = None
    password: Annotated[Secret | None, Meta(description="password of `username`")] = None
    compress: Annotated[
        Literal["none", "gzip"], Meta(description="compression of what is sent")
    ] = "none"
    timeout: Annotated[
        Seconds,
        Meta(description="bound of one request; keep it below `executor.timeout`"),
    ] = Seconds(30)
    tls_verify: Annotated[bool, Meta(description="check the server's certificate and its name")] = (
        True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.url.split(","):
            _origin(text)
        if (self.username is None) != (self.password is None):
            raise ValueError("username: username and password belong together")
        if self.timeout <= 0:
            raise ValueError("timeout: it has to be more than 0")


class HttpReply(NamedTuple):
    """An answer, read whole.

    Attributes:
        origin: address that gave it, for people.
        status: of HTTP.
        headers: by name in lower case.
        body: as it came.
    """

    origin: str
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The beginning of the body in one line, for people."""
        return one_line(self.body[: 4 * _SAID_CHARS].decode("utf-8", "replace"), _SAID_CHARS)


class HttpPeer:
    """Sends requests to one of some addresses, over a connection that is kept.

    Args:
        options: addresses, authentication, TLS.
        headers: sent with every request.
    """

    def __init__(self, options: HttpOptions, headers: Mapping[str, str]) -> None:
        self._connections = [_connection(text, options) for text in options.url.split(",")]
        self._timeout = float(options.timeout)
        self._gzips = options.compress == "gzip"
        self._headers = {"User-Agent": "ingestd", **headers}
        if options.username is not None:
            pair = f"{options.username}:{options.password}".encode()
            self._headers["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"

    def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> HttpReply:
        """Sends one request and reads the answer, whatever its status is.

        Args:
            method: of HTTP.
            path: behind the address's own path, with the query; ASCII.
            body: is sent with gzip if the options say so.
            headers: beside those of all requests.

        Raises:
            Unavailable: no address gave an answer in time.
            Blocked: a certificate is not trusted, or a file of TLS cannot be used.
        """
        sent = {**self._headers, **(headers or {})}
        if self._gzips and body:
            body, sent["Content-Encoding"] = gzip.compress(body, 1), "gzip"
        end = time.monotonic() + self._timeout
        tries = len(self._connections) + self._connections[0].is_open
        while True:
            tries -= 1
            one = self._connections[0]
            was_open, shown = one.is_open, one.target.shown
            try:
                status, found, content = one.exchange(
                    method, one.target.path + path, body, sent, end
                )
            except (OSError, http.client.HTTPException) as error:
                one.close()
                if not was_open:
                    self._connections.append(self._connections.pop(0))
                if tries > 0 and time.monotonic() < end:
                    continue
                raise Unavailable(f"{shown}: {told(error)}") from error
            headers = {name.lower(): value for name, value in found.items()}
            return HttpReply(shown, status, headers, content)

    def close(self) -> None:
        """Closes the connection; the next request opens one again."""
        for one in self._connections:
            one.close()


def refuse(reply: HttpReply, said: str = "") -> NoReturn:
    """Raises what the status of an answer that is no success means for a sink.

    Args:
        reply: the answer.
        said: for people, instead of the beginning of its body.

    Raises:
        Unavailable: it is overloaded, perhaps with a time to wait, or something between here and
            there is down.
        Blocked: a right or the resource is missing, or it is another service.
        RuntimeError: anything else, such as 400 and 500, which a single record may cause.
    """
    told = f"{reply.origin}: {reply.status} {said or reply.text}".rstrip()
    if reply.status in {408, 425, 429, 502, 503, 504}:
        wait = parse_retry_after(reply.headers.get("retry-after", ""), RETRY_AFTER_MAX)
        raise Unavailable(told, wait)
    if 300 <= reply.status < 400 or reply.status in {401, 403, 404, 405, 406, 407, 415, 421}:
        raise Blocked(told)
    raise RuntimeError(told)


def _connection(text: str, options: HttpOptions) -> HttpConnection:
    return HttpConnection(
        _origin(text),
        connect_timeout=options.timeout,
        timeout=options.timeout,
        allow_private=True,
        tls=options.tls_files,
        tls_verify=options.tls_verify,
        answer_bytes_max=REPLY_BYTES_MAX,
    )


def _origin(text: str) -> HttpTarget:
    """One address.

    Raises:
        ValueError: it is none; the message does not contain it, for a password may be in it.
    """
    try:
        parts = urlsplit(text.strip())
        port = parts.port
    except ValueError:
        raise ValueError("url: it is no address") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname or not text.isascii():
        raise ValueError("url: an address begins with http:// or https:// and has a host")
    if not is_host(parts.hostname) or port == 0:
        raise ValueError("url: there is no host of that name, or no such port")
    if "@" in parts.netloc:
        raise ValueError("url: the name and the password are the options username and password")
    if parts.query or parts.fragment or any(one <= " " for one in text.strip()):
        raise ValueError("url: nothing but a path may follow the address")
    is_tls = parts.scheme == "https"
    port, path = port or (443 if is_tls else 80), parts.path.rstrip("/")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    shown = f"{parts.scheme}://{host}:{port}{path}"
    return HttpTarget(is_tls, parts.hostname, port, path, shown)
