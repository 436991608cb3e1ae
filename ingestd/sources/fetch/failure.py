"""Failures of downloads, with reasons that hold no secrets.

Messages of the HTTP client can hold whole URLs, so none of them is ever shown.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import aiohttp
from aiohttp.http_exceptions import LineTooLong

from ingestd.sources.fetch.safety import ForbiddenAddress

if TYPE_CHECKING:
    import ssl


HEADER_BYTES_MAX = 64 * 1024
"""The longest header of an answer. Servers bound their own: 8 to 64 KiB are usual."""


class TryAgain(Exception):  # noqa: N818 - names the consequence
    """It failed, and may succeed another time.

    Attributes:
        reason: one line.
        after: seconds that the server asks to wait; `None` if it says nothing.
    """

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after = after


class ResponseMismatch(TryAgain):
    """A range did not come as requested: the whole resource has to be."""


class DownloadFailed(Exception):  # noqa: N818
    """It failed, and would fail again.

    Attributes:
        reason: one line.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ResourceChanged(Exception):  # noqa: N818
    """It is another version than the one whose beginning was accepted."""


class Reconnect(Exception):  # noqa: N818 - names the consequence
    """A stream ended as streams do, and is requested again.

    Attributes:
        after: seconds to wait.
    """

    def __init__(self, after: float) -> None:
        super().__init__()
        self.after = after


def explain(error: Exception) -> TryAgain | DownloadFailed:
    """Maps an error of the HTTP client to a failure of ours."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return _not_connected(error)
    if isinstance(error, TimeoutError):
        return TryAgain("no connection within fetch.connect_timeout")
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return TryAgain("the connection was closed before an answer came")
    if isinstance(error, aiohttp.ClientPayloadError):
        return TryAgain("the body was cut short")
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return TryAgain(f"the proxy answered {error.status}")
    if _is_too_long(error):
        return DownloadFailed(f"a header of its answer is longer than {HEADER_BYTES_MAX} bytes")
    if isinstance(error, aiohttp.ClientResponseError):
        return TryAgain("the answer is not HTTP as it should be")
    if isinstance(error, aiohttp.InvalidURL):
        return DownloadFailed("it is not a URL that can be asked for")
    if isinstance(error, OSError):
        return TryAgain(f"the connection broke: {_words(error)}")
    return TryAgain("the connection broke")


def _is_too_long(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, LineTooLong):
        error = error.__cause__
    return error is not None


def _not_connected(error: aiohttp.ClientConnectorError) -> TryAgain | DownloadFailed:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return DownloadFailed(
            f"its certificate is not valid: {_certificate(error.certificate_error)}"
        )
    cause = error.os_error
    if isinstance(cause, ForbiddenAddress):
        return DownloadFailed("its address is private or special (see fetch.allow_private)")
    if isinstance(error, aiohttp.ClientSSLError):
        return TryAgain("TLS failed")
    if isinstance(error, aiohttp.ClientConnectorDNSError) or isinstance(cause, socket.gaierror):
        return TryAgain("its host is not known")
    return TryAgain(f"no connection: {_words(cause)}")


def _certificate(error: Exception | ssl.SSLCertVerificationError) -> str:
    return getattr(error, "verify_message", "") or "it can't be verified"


def _words(error: OSError) -> str:
    # Not its own text, which may be made of anything.
    return os.strerror(error.errno) if error.errno and error.errno > 0 else type(error).__name__
