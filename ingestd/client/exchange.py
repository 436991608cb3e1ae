"""One request to a daemon: encoding, the connection, and the meaning of answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import time
from codecs import BOM_UTF8
from email.utils import parsedate_to_datetime
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import quote, urlsplit

from ingestd.base.errors import IngestdError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ANSWER_MAX = 256 * 1024
RETRY_AFTER_MAX = 3600.0
RETRIED = frozenset({401, 403, 404, 408, 409, 421, 425, 429})
"""Beside 5xx. Tokens, paths and names can be mended meanwhile: the records are not at fault."""

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class BufferFull(IngestdError):  # noqa: N818 - read as what happened
    """The buffer has no room for the record."""

    message = "{size} bytes do not fit into the buffer of {limit} bytes"


class ClientClosed(IngestdError):  # noqa: N818
    """The client takes no more records."""

    message = "the client is closed"


class Counts(NamedTuple):
    """Records of a client in this process.

    Attributes:
        sent: that `send` took or dropped.
        accepted: that a daemon has on its disk.
        invalid: that can never be accepted.
        dropped: at the bound of the buffer, at a deadline, or for a final answer.
    """

    sent: int = 0
    accepted: int = 0
    invalid: int = 0
    dropped: int = 0

    @property
    def pending(self) -> int:
        """Records in the buffer, those that are being posted included."""
        return self.sent - self.accepted - self.invalid - self.dropped


class Verdict(NamedTuple):
    """Meaning of an answer for the records of its request.

    Attributes:
        kind: of what happens to them.
        reason: for logs and callbacks.
        after: seconds that the daemon asks to wait.
        at_once: the connection had been closed while it was idle: no failure of the daemon's.
        invalid: index and reason of records that it told apart.
        unnamed: invalid records that it only counted.
        shrinks: of what a request had too much for any request to this daemon.
    """

    kind: Literal["accepted", "invalid", "split", "dropped", "retry"]
    reason: str = ""
    after: float = 0.0
    at_once: bool = False
    invalid: Mapping[int, str] = MappingProxyType({})
    unnamed: int = 0
    shrinks: Literal["", "bytes", "records"] = ""


_SHRINKS: Mapping[str, Literal["", "bytes", "records"]] = {
    "mostly-invalid": "",
    "record-too-large": "",
    "too-many-records": "records",
}
"""Problems of requests that are sent in halves, and do not have too many bytes."""


def judge(status: int, retry_after: str, content: bytes, count: int) -> Verdict:
    """Interprets the answer to a request of `count` records."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):
        told = None
    told = told if isinstance(told, dict) else {}
    reason = f"{status} {told.get('detail') or told.get('title') or ''}".rstrip()
    problem = str(told.get("type", "")).rpartition(":")[2]
    errors = told.get("errors") if isinstance(told.get("errors"), list) else []
    named = {
        one["index"]: f"{one.get('reason')}: {one.get('detail')}"
        for one in errors or ()
        if isinstance(one, dict) and type(at := one.get("index")) is int and at in range(count)
    }
    if 200 <= status < 300:
        accepted, invalid = told.get("accepted"), told.get("invalid")
        if isinstance(accepted, int) and isinstance(invalid, int) and accepted + invalid == count:
            unnamed = max(0, invalid - len(named))
            return Verdict("accepted", next(iter(named.values()), ""), 0.0, False, named, unnamed)
        return Verdict("retry", f"{status}, and the answer is no daemon's")
    if status in RETRIED or status >= 500:
        return Verdict("retry", reason, _seconds(retry_after))
    if status == 413 or problem == "mostly-invalid":
        shrinks = _SHRINKS.get(problem, "bytes")
        return Verdict("split" if count > 1 else "invalid", reason, shrinks=shrinks)
    if status == 400 and (count == 1 or problem == "malformed"):
        return Verdict("invalid", reason, invalid=named)
    return Verdict("dropped", reason)


def _seconds(retry_after: str) -> float:
    """The wait that a `Retry-After` asks for: seconds or a date; 0 if it is neither."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if retry_after.isdigit():
            return min(RETRY_AFTER_MAX, float(retry_after))
        left = parsedate_to_datetime(retry_after).timestamp() - time.time()
        return max(0.0, min(RETRY_AFTER_MAX, left))
    return 0.0


class DaemonConnection:
    """One connection to a daemon, made when it is needed and kept."""

    def __init__(
        self, url: str, pipeline: str, ca: str | None, certificate: str | tuple[str, str] | None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("the URL of a daemon is http://HOST:PORT or https://HOST:PORT")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("the URL of a daemon has no user, query or fragment; there is `token`")
        if parts.scheme == "http" and (ca or certificate):
            raise ValueError("`ca` and `certificate` need an https URL")
        if not all("!" <= character <= "~" for character in parts.path):
            raise ValueError("the path in the URL of a daemon has visible ASCII characters only")
        if "/v1/records" in parts.path:
            raise ValueError(
                "the URL of a daemon ends before /v1/records, which the client adds;"
                " `pipeline` names a pipeline"
            )
        self.address = f"{parts.hostname}:{parts.port or parts.scheme}"
        self._path = f"{parts.path.rstrip('/')}/v1/records"
        self._path += f"/{quote(pipeline, safe='')}" if pipeline else ""
        make: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=ca)
            if certificate:
                pair = (certificate,) if isinstance(certificate, str) else certificate
                context.load_cert_chain(*pair)
            make = partial(http.client.HTTPSConnection, context=context)
        self._make = partial(make, parts.hostname, parts.port)
        try:
            self._http = self._make()
        except http.client.InvalidURL as error:
            raise ValueError(str(error)) from None

    def post(self, body: bytes, headers: dict[str, str], timeout: float, count: int) -> Verdict:
        """Posts a request once, and interprets its answer or the failure to get one."""
        was_open = self._http.sock is not None
        try:
            self._http.timeout = timeout
            if was_open:
                self._http.sock.settimeout(timeout)
            else:
                self._http.connect()
            # A refusal may come before the body was read: the answer counts, not the broken pipe.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._http.request("POST", self._path, body, headers)
            answer = self._http.getresponse()
            content = _content(answer)
            whole = answer.isclosed()
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            return Verdict("retry", f"{type(error).__name__}: {error}", at_once=was_open)
        if answer.will_close or not whole:
            self.close()
        return judge(answer.status, answer.headers.get("Retry-After", ""), content, count)

    def close(self) -> None:
        """Closes the connection; the next request makes a new one."""
        self._http.close()

    def renew(self) -> None:
        """Leaves the connection to the parent process.

        Only the descriptor is closed: the locks of the buffers on it may be held for ever.
        """
        left, self._http = self._http.sock, self._make()
        if left is not None:
            with contextlib.suppress(OSError):
                os.close(left.detach())

    def interrupt(self) -> None:
        """Ends a request that another thread waits for."""
        with contextlib.suppress(OSError, TypeError):  # there is none
            # Not the method of `SSLSocket`: it takes the TLS state away from the other thread.
            socket.socket.shutdown(self._http.sock, socket.SHUT_RDWR)


def _content(answer: http.client.HTTPResponse) -> bytes:
    """Reads what an answer says, up to `ANSWER_MAX`.

    Raises:
        http.client.HTTPException: a part of it, which may mean something else, or an informational
            one, behind which the answer comes.
    """
    if answer.status < 200:
        raise http.client.HTTPException(f"{answer.status} before the answer")
    content = answer.read(ANSWER_MAX)
    if answer.length and len(content) < ANSWER_MAX:
        raise http.client.IncompleteRead(content, answer.length)
    return content


def encoded(record: Any) -> bytes:
    """One record as a line without its end."""
    if not isinstance(record, bytes | bytearray | memoryview):
        return _encode(record).encode()
    # An LF in JSON is white space. A daemon skips a byte order mark, but only before all records.
    data = bytes(record).replace(b"\n", b" ").strip()
    while data.startswith(BOM_UTF8):
        data = data.removeprefix(BOM_UTF8).strip()
    if not data:
        raise ValueError("a record is at least one JSON value")
    return data
