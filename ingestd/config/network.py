"""Addresses, hosts, origins and URLs as people write them in the settings."""

from __future__ import annotations

import ipaddress
import json
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ingestd.base.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable


_PORT_MAX = 65535


def split_address(address: str) -> tuple[str, int]:
    """Host (IPv6 without its brackets) and port of `HOST:PORT`.

    No host is every interface; port 0 lets the kernel choose.

    Raises:
        ValueError: not of this form; the message says what is.
    """
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    readable = (
        colon
        and not any(c.isspace() or c in "[]/" for c in host)
        and bracketed == (":" in host)
        and port.isascii()
        and port.isdigit()
        and len(port) <= 5
    )
    if not readable or int(port) > _PORT_MAX:
        raise ValueError(
            f"{address[:60]!r} is not an address: HOST:PORT, like 127.0.0.1:8080 or [::1]:8080"
        )
    return host, int(port)


def check_address(value: str) -> str:
    """An address as it is.

    Raises:
        ValueError: it is none; the message says why.
    """
    split_address(value)
    return value


def is_loopback(address: str) -> bool:
    """Returns True if only this machine can reach `HOST:PORT`; of names, for `localhost` alone."""
    host = split_address(address)[0]
    try:
        return is_loopback_ip(host)
    except ValueError:
        return host.lower() == "localhost"


def is_loopback_ip(host: str) -> bool:
    """Returns True for loopback IP addresses, also one of IPv4 written as IPv6.

    Raises:
        ValueError: it is none.
    """
    address = ipaddress.ip_address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def show_address(host: str, port: int) -> str:
    """`HOST:PORT`, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_listen(text: str, setting: str) -> tuple[str, int]:
    """Splits a listen address; a wrong one is a `ConfigError`.

    Args:
        text: the setting's value.
        setting: its dotted name, for the message.

    Raises:
        ConfigError: it is no address.
    """
    try:
        return split_address(text)
    except ValueError as error:
        raise ConfigError(problem=f"{setting}: {error}") from None


# -- hosts -----------------------------------------------------------------------------------------
#
# A page in a browser may send requests to any address of this machine, and one whose name suddenly
# means 127.0.0.1 may read the answers, because to the browser they are its own (DNS rebinding).
# Such a request carries the name in `Host`: an IP address needs no name to be rebound, so those
# are always good, and `localhost` never leaves the machine (RFC 6761, 6.3).

ANY = "*"
_NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*", re.ASCII)
_ABSOLUTE = re.compile(r"https?://([^/?#]*)", re.IGNORECASE)
_KNOWN_MAX = 256


def check_hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    """Names of hosts as settings write them, or `*` for any; as they are.

    Raises:
        ValueError: one would never be matched.
    """
    for host in hosts:
        if host != ANY and not _NAME.fullmatch(host):
            raise ValueError(
                f"{host[:80]!r} is no name of a host: small letters, without a port, or * for any"
            )
    return hosts


def authority_of(target: str, host: str) -> str:
    """The host and port that a request is for (RFC 9112, 3.3).

    Args:
        target: as the request line has it; the authority in a whole URL counts more than `Host`.
        host: the value of `Host`; empty if there is none.
    """
    if target[:1] == "/":
        return host
    absolute = _ABSOLUTE.match(target)
    return absolute[1] if absolute else host


class Hosts:
    """Knows by which names an address may be asked for.

    Args:
        names: beside IP addresses and `localhost`; with `*` every name is good.

    Attributes:
        known: authorities that were found to be good, some of them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(name.lower() for name in names)
        self.known: set[str] = {""}  # no browser leaves Host out

    def know(self, authority: str) -> bool:
        """Returns True if a host, with or without a port, is one of them."""
        if authority in self.known:
            return True
        good = ANY in self._names or self._is_good(authority)
        if good and len(self.known) < _KNOWN_MAX:
            self.known.add(authority)
        return good

    def _is_good(self, authority: str) -> bool:
        name, colon, port = authority.lower().rpartition(":")
        if not (colon and port.isdigit()):
            name = authority.lower().removesuffix(":")
        name = name.removesuffix(".")
        if name == "localhost" or name.endswith(".localhost") or name in self._names:
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True


# -- origins ---------------------------------------------------------------------------------------

ANY_ORIGIN = "*"
_ORIGIN = re.compile(
    r"[a-z][a-z0-9+.-]*://(?:[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(?::[1-9][0-9]{0,4})?",
    re.ASCII,
)
_USUAL_PORTS = {"http": ":80", "https": ":443"}


def check_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Origins as a browser writes them into `Origin`, or `*` alone; as they are.

    Raises:
        ValueError: one would never be matched, or would match what nobody means.
    """
    for origin in origins:
        if origin == ANY_ORIGIN:
            if len(origins) > 1:
                raise ValueError('"*" means every origin and stands alone')
        elif origin == "null":
            raise ValueError('"null" is what every sandboxed frame and every local file says')
        elif not _ORIGIN.fullmatch(origin) or origin.endswith(_usual_port(origin)):
            raise ValueError(
                f"{origin[:80]!r} is no origin as browsers send it: scheme://host or"
                " scheme://host:port, in small letters, without the usual port and without a path"
            )
    return origins


def _usual_port(origin: str) -> str:
    return _USUAL_PORTS.get(origin.partition(":")[0], "//")


def is_foreign(origin: str, site: str, authority: str) -> bool:
    """Returns True if a browser sends a request for a page of another origin.

    Args:
        origin: `Origin`; empty if there is none.
        site: `Sec-Fetch-Site`; empty if there is none.
        authority: host and port that the request is for.
    """
    if origin:
        return origin.partition("://")[2].lower() != authority.lower()
    return site in ("cross-site", "same-site")


# -- URLs ------------------------------------------------------------------------------------------

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
    """Checks that it is an http or https URL with a host.

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
