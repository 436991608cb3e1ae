"""What the parser lets pass and this server does not: heads that others may read differently.

Where two servers in a row disagree about where a request ends, the rest of it becomes a request of
its own ("request smuggling"). llhttp refuses most of such heads; here is the rest.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from aiohttp import HttpVersion10, HttpVersion11

if TYPE_CHECKING:
    from aiohttp.http import RawRequestMessage

_VERSIONS = (HttpVersion11, HttpVersion10)
# RFC 3986: what may stand in host and port; without the comma, which joins two of them.
_HOST = re.compile(r"[A-Za-z0-9._~!$&'()*+;=%:\[\]-]*")


def fault(message: RawRequestMessage) -> str:
    """Why a head is not taken, in a few words that quote nothing; empty if it is."""
    if message.version not in _VERSIONS:
        return "only HTTP/1.1 and HTTP/1.0 are spoken"
    headers = message.headers
    coding = headers.get("Transfer-Encoding")
    if coding is not None:
        if message.version < HttpVersion11:
            return "Transfer-Encoding needs HTTP/1.1"  # RFC 9112, 6.1
        if coding.strip(" \t").lower() != "chunked" or not coding.isascii():
            return "Transfer-Encoding can only be chunked"
        if "Content-Length" in headers:
            return "Content-Length beside Transfer-Encoding"
    if not _HOST.fullmatch(headers.get("Host", "")):
        return "Host is not a host"
    return ""
