"""URLs as people write them, and as they may be shown: without what may be a secret in them."""

from __future__ import annotations

import json
import re
from urllib.parse import urlsplit

URL_CHARS_MAX = 8192
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
_HEADER_CHARS_MAX = 8192
# A comma may be part of a URL: it only separates where white space or the next URL follows.
_BETWEEN = re.compile(r",?\s+|,(?=[A-Za-z][A-Za-z0-9+.-]*://)", re.ASCII)
_OWN_HEADERS = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-length",
        "expect",
        "host",
        "if-match",
        "if-modified-since",
        "if-none-match",
        "if-range",
        "if-unmodified-since",
        "last-event-id",
        "range",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""What the source says itself."""


def split_urls(value: object) -> object:
    """A list of URLs, from one or from text with white space or commas between them.

    Raises:
        ValueError: not a list, or one of them is not a URL.
    """
    urls = value
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            urls = json.loads(value)  # as a variable or a flag has an array
        except (ValueError, RecursionError):
            urls = None
    elif isinstance(value, str):
        urls = [one for one in _BETWEEN.split(value) if one]
    if not isinstance(urls, list | tuple) or not all(isinstance(url, str) for url in urls):
        raise ValueError(
            "should be a list of URLs: an array of text, or text with spaces between them"
        )
    for url in urls:
        check_url(url)
    return tuple(urls)


def check_url(url: str) -> None:
    """Whether it is an http or https URL with a host.

    Raises:
        ValueError: it is not; the message says why, and holds no secret of it.
    """
    shown = repr(_show_unreadable(url))
    if len(url) > URL_CHARS_MAX:
        raise ValueError(f"a URL has more than {URL_CHARS_MAX} characters: {shown}")
    if any(c.isspace() or not c.isprintable() for c in url):
        raise ValueError(f"{shown} has white space or control characters in it")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"{shown} is not a URL") from None
    if "://" not in url:
        raise ValueError(f"{shown} is not a URL: it begins with http:// or https://")
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{shown} is not http or https")
    if not host:
        raise ValueError(f"{shown} has no host")


def show_url(url: str) -> str:
    """A URL without user, password, query and fragment; `?…` for a query that was there."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return _show_unreadable(url)
    place = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{place}{parts.path}" + ("?…" if parts.query else "")


def _show_unreadable(text: str) -> str:
    """Something that may be no URL: what may be a user or a query is left out."""
    text = re.split(r"[?#]", text, maxsplit=1)[0]
    scheme, mark, rest = text.partition("://")
    shown = scheme + mark + rest.rpartition("@")[2] if mark else text.rpartition("@")[2]
    return shown if len(shown) <= 80 else f"{shown[:80]}…"


def check_headers(value: object) -> object:
    """Headers of requests: names that are the user's to say, text without line ends.

    Raises:
        ValueError: one is not; the message holds no value.
    """
    if not isinstance(value, dict):
        raise ValueError("should be a table: name = value")  # noqa: TRY004  pydantic wants it so
    for name, text in value.items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ValueError(f"{str(name)[:60]!r} is not the name of a header")
        if name.lower() in _OWN_HEADERS:
            raise ValueError(f"{name} is a header that ingestd sets itself")
        if not isinstance(text, str) or len(text) > _HEADER_CHARS_MAX:
            raise ValueError(f"the value of {name} should be text")
        if not text.isprintable():
            raise ValueError(f"the value of {name} has control characters in it")
    return value
