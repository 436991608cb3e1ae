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
# RFC 9112, 3.2.2 and RFC 9110, 4.2.4: http and https alone, and no user information.
_ABSOLUTE = re.compile(r"https?://[A-Za-z0-9._~!$&'()*+;=%:\[\]-]+(?:[/?].*)?", re.IGNORECASE)
LENGTH_DIGITS_MAX = 20
"""Digits of a `Content-Length`. More of them are leading zeros or more than 64 bits."""


def fault(message: RawRequestMessage) -> str:
    """Why a head is not taken, in a few words that quote nothing; empty if it is."""
    if message.version not in _VERSIONS:
        return "only HTTP/1.1 and HTTP/1.0 are spoken"
    target = message.path
    usual = target[:1] == "/" and "#" not in target
    if not usual and (detail := _target_fault(message)):
        return detail
    headers = message.headers
    if len(headers.get("Content-Length", "")) > LENGTH_DIGITS_MAX:
        return "Content-Length has too many digits"
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


def _target_fault(message: RawRequestMessage) -> str:
    """Why the target of a request is none of the four forms that RFC 9112, 3.2 has."""
    target = message.path
    if "#" in target:
        return "the request's target has a fragment"
    if target[:1] == "/" or target == "*" or message.method == "CONNECT":
        return ""
    return "" if _ABSOLUTE.fullmatch(target) else "the request's target is no http URL"


def line_is_spaced(data: bytes, message: RawRequestMessage) -> bool:
    """Whether more than one space parts the words of a request line (RFC 9112, 3).

    Args:
        data: begins with the request line, or with something else.
        message: the request.
    """
    if data[:1] in (b"\r", b"\n"):
        data = data.lstrip(b"\r\n")
    end = data.find(b"\n")
    if data.find(b"  ", 0, end) < 0:
        return False
    words = data[:end].rstrip(b"\r").split(b" ")
    line = f"{message.method} {message.path}".encode("utf-8", "surrogateescape")
    return b" ".join(filter(None, words[:-1])) == line
