"""A kept connection to one HTTP service, with checked addresses and a deadline for each answer.

The standard library's client does it: a worker calls a sink synchronously, and resolving, checking
the address, connecting and the deadline are in this file's own hands. Redirects are not followed
and the environment's proxies not used, for the requests carry secrets and records.
"""

from __future__ import annotations

import email.utils
import http.client
import io
import select
import socket
import ssl
import time
from datetime import UTC
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from ingestd.base.addresses import is_public
from ingestd.handlers.batch import Blocked, Unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from email.message import Message

ANSWER_BYTES_MAX = 1024 * 1024
"""Longest body of an answer that is read."""
RETRY_AFTER_MAX = 3600.0
"""Seconds; the longest `Retry-After` that is followed."""
_PROBLEM = "urn:ingestd:problem:"
_DETAIL_CHARS = 300
_PIECE = 256 * 1024
_LABEL_CHARS_MAX = 63


class HttpTarget(NamedTuple):
    """A URL, taken apart.

    Attributes:
        secure: https.
        host: a name or address, without brackets.
        port: of it.
        path: with the query.
        shown: for people, without the query.
    """

    secure: bool
    host: str
    port: int
    path: str
    shown: str


class HttpAnswer(NamedTuple):
    """An answer: status, headers, and the beginning of the body.

    Attributes:
        status: a number.
        headers: as they came.
        body: at most `ANSWER_BYTES_MAX`.
    """

    status: int
    headers: Message
    body: bytes

    @property
    def document(self) -> dict[str, Any]:
        """The body as a JSON object; empty if it is none."""
        if "json" not in self.headers.get("Content-Type", "").lower():
            return {}
        try:
            found = msgspec.json.decode(self.body)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def problem(self) -> str:
        """The type of an ingestd's problem, such as `unknown-pipeline`; else empty."""
        kind = self.document.get("type")
        is_ours = isinstance(kind, str) and kind.startswith(_PROBLEM)
        return str(kind).removeprefix(_PROBLEM) if is_ours else ""

    @property
    def retry_after(self) -> float | None:
        """Seconds of its `Retry-After`, bounded; `None` without one."""
        return parse_retry_after(self.headers.get("Retry-After", ""), RETRY_AFTER_MAX)

    def __str__(self) -> str:
        document = self.document
        told = document.get("detail") or document.get("title") or document.get("message") or ""
        if not isinstance(told, str) or not told:
            told = self.body[:_DETAIL_CHARS].decode(errors="replace")
        return f"{self.status} {' '.join(told.split())[:_DETAIL_CHARS]}".strip()


def parse_retry_after(text: str, longest: float) -> float | None:
    """Returns the seconds of a `Retry-After`, a number or a date; `None` if it is neither.

    https://www.rfc-editor.org/rfc/rfc9110#section-5.6.7: a date without a zone is in UTC, too.
    """
    text = text.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:12]), longest)
    try:
        found = email.utils.parsedate_to_datetime(text)
        wait = (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, wait), longest)


class HttpConnection:
    """One connection to one service, kept open between requests. Not thread-safe.

    Args:
        target: the service.
        connect_timeout: of connecting, TLS included, seconds.
        timeout: from the first byte of a request to its whole answer, seconds.
        allow_private: allows addresses that are not public.
        tls: PEM files: certificates to trust, a client certificate, its key; `None` without.
        tls_verify: checks the certificate and its name.
        answer_bytes_max: a longer body is an error, or read so far.
        truncates: it is read so far.
    """

    def __init__(
        self,
        target: HttpTarget,
        *,
        connect_timeout: float,
        timeout: float,
        allow_private: bool,
        tls: tuple[str | None, str | None, str | None] = (None, None, None),
        tls_verify: bool = True,
        answer_bytes_max: int = ANSWER_BYTES_MAX,
        truncates: bool = False,
    ) -> None:
        self.target = target
        self._tls_verify = tls_verify
        self._answer_bytes_max, self._truncates = answer_bytes_max, truncates
        self._connect_timeout, self._timeout = connect_timeout, timeout
        self._allow_private = allow_private
        self._tls = tls
        self._socket: socket.socket | None = None
        self._http: http.client.HTTPConnection | None = None

    @property
    def is_open(self) -> bool:
        """The connection is kept from an earlier request."""
        return self._socket is not None

    def send(self, method: str, body: bytes, headers: Mapping[str, str]) -> HttpAnswer:
        """Sends a request to the target's path and reads the answer.

        Raises:
            Unavailable: there is no answer.
            Blocked: the address is not allowed, or the certificate is not trusted.
        """
        end = time.monotonic() + self._timeout
        while True:
            was_open = self.is_open
            try:
                return self.exchange(method, self.target.path, body, headers, end)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                # The service may have closed a kept connection while nothing was sent.
                if not was_open or isinstance(error, TimeoutError):
                    raise Unavailable(f"{self.target.shown}: {told(error)}") from None

    def close(self) -> None:
        """Closes the connection."""
        sock, self._socket, self._http = self._socket, None, None
        if sock is not None:
            sock.close()

    def exchange(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], end: float
    ) -> HttpAnswer:
        """Sends one request, once, and reads the answer; what fails has to be closed.

        Args:
            method: of HTTP.
            path: with the query; ASCII.
            body: as it is sent.
            headers: beside `Host` and `Content-Length`.
            end: `time.monotonic()` at which the answer has to be complete.

        Raises:
            OSError, http.client.HTTPException: there is no answer.
            Blocked: the address is not allowed, or the certificate is not trusted.
        """
        if self._socket is not None and _has_leftover(self._socket):
            self.close()  # it would be taken for the answer to this request
        if self._socket is None or self._http is None:
            self._socket = self._connect(end)
            self._http = http.client.HTTPConnection(self.target.host, self.target.port)
            self._http.response_class = _FinalResponse
            # `Host` is what stands in the URL: some proxies know no name with a port.
            self._http.default_port = 443 if self.target.secure else 80
        connection, is_whole = self._http, True
        connection.sock = _SocketUntil(self._socket, end)
        try:
            connection.request(method, path, body or None, dict(headers))
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
            # The last two are what TLS makes of the others. It may have answered before it had all,
            # with 413, and that answer can be read.
            is_whole = False
        try:
            answer = connection.getresponse()
            content = answer.read(self._answer_bytes_max + 1)
        except ValueError as error:  # a chunk of a negative length
            raise http.client.HTTPException(f"a broken answer: {error}") from error
        if is_long := len(content) > self._answer_bytes_max:
            if not self._truncates:
                raise http.client.HTTPException("the answer is too long")
        elif answer.length:  # `read` of so many bytes does not say it
            raise http.client.IncompleteRead(b"", answer.length)
        if answer.will_close or not is_whole or is_long or answer.status < 200:
            self.close()
        return HttpAnswer(answer.status, answer.headers, content[: self._answer_bytes_max])

    def _connect(self, end: float) -> socket.socket:
        target = self.target
        found = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        # The address that is checked is the one that is connected to, so a name that resolves to
        # something else a moment later gains nothing.
        allowed = [one for one in found if self._allow_private or is_public(str(one[4][0]))]
        if found and not allowed:
            raise Blocked(
                f"{target.shown}: a private or special address; allow_private = true allows it"
            )
        problem: OSError | None = None
        for family, kind, proto, _, address in allowed:
            sock = socket.socket(family, kind, proto)
            try:
                sock.settimeout(max(min(self._connect_timeout, end - time.monotonic()), 0.001))
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return self._encrypted(sock) if target.secure else sock
            except OSError as error:
                sock.close()
                problem = error
            except BaseException:
                sock.close()
                raise
        raise problem or OSError("its name has no address")

    def _encrypted(self, sock: socket.socket) -> socket.socket:
        trusted, certificate, key = self._tls
        try:
            context = ssl.create_default_context(cafile=trusted)
            if certificate:  # with a password it would ask the terminal
                context.load_cert_chain(certificate, key, password=lambda: b"")
        except (OSError, ValueError) as error:
            problem = f"TLS: the files of tls_ca, tls_certificate and tls_key: {told(error)}"
            raise Blocked(problem) from None
        if not self._tls_verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            return context.wrap_socket(sock, server_hostname=self.target.host)
        except ssl.SSLCertVerificationError as error:
            raise Blocked(f"{self.target.shown}: {error.verify_message}") from None


class _FinalResponse(http.client.HTTPResponse):
    """An answer with a whole head, behind all interim ones.

    The base class passes over 100 alone. Another one that is taken for the answer leaves the answer
    to the next request, whose records are not stored then. And where a connection ends in a head,
    the base class takes it for the end of the head, and what the body would have said for nothing.
    """

    def __init__(self, sock: _SocketUntil, *rest: Any, **more: Any) -> None:
        super().__init__(sock, *rest, **more)  # type: ignore[arg-type]
        self._until = sock

    def begin(self) -> None:
        """Reads the head of the answer; the base class does nothing once it has headers."""
        super().begin()
        while HTTPStatus.SWITCHING_PROTOCOLS < self.status < HTTPStatus.OK:
            self.headers = None  # type: ignore[assignment]
            super().begin()
        if self._until.is_ended:  # a whole head is known by its last line
            raise http.client.HTTPException("the head of the answer is cut off")


def _has_leftover(sock: socket.socket) -> bool:
    """Returns True if something came, or the connection was ended, without a request."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


class _SocketUntil:
    """A socket with a deadline for all that is sent and received; closing it leaves it open.

    Attributes:
        is_ended: the other side sends nothing more.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline
        self.is_ended = False

    def sendall(self, data: bytes) -> None:
        for start in range(0, len(data), _PIECE):  # of TLS, each piece has the timeout
            self.limit()
            self._sock.sendall(memoryview(data)[start : start + _PIECE])

    def makefile(self, *_: object) -> io.BufferedReader:
        return io.BufferedReader(_ReaderUntil(self, self._sock), 64 * 1024)

    def limit(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)

    def close(self) -> None:
        return  # the client closes before it has read an answer that ends the connection


class _ReaderUntil(io.RawIOBase):
    """Reads from a socket until a deadline."""

    def __init__(self, until: _SocketUntil, sock: socket.socket) -> None:
        self._until = until
        self._sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._until.limit()
        size = self._sock.recv_into(buffer)
        self._until.is_ended = not size
        return size


def target_of(url: str) -> HttpTarget:
    """Takes a URL apart.

    Raises:
        ValueError: it is none, or has a user or password in it, which the message does not show.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError("url: it is not a URL") from None
    if parts.scheme not in {"http", "https"} or not host or port == 0:
        raise ValueError("url: it has to be an http or https URL")
    if not (url.isascii() and url.isprintable() and " " not in url and is_host(host)):
        raise ValueError("url: it has a character or a host name that cannot be in a URL")
    if parts.username is not None or parts.password is not None:
        raise ValueError("url: no user or password belongs in it; take token")
    secure = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    shown = f"{parts.scheme}://{parts.netloc}{parts.path or '/'}"
    return HttpTarget(secure, host, port or (443 if secure else 80), path, shown)


def is_host(host: str) -> bool:
    """Returns True if each part of a name has 1 to 63 characters; no other name can be resolved.

    https://www.rfc-editor.org/rfc/rfc1035#section-2.3.4
    """
    return all(0 < len(part) <= _LABEL_CHARS_MAX for part in host.removesuffix(".").split("."))


def told(error: Exception) -> str:
    """One line without what was sent."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
