"""HTTP client of downloads: redirects, headers by origin, checked connections, whole bodies."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple
from urllib import request

import aiohttp
import async_timeout
from aiohttp import ClientTimeout, DummyCookieJar, TCPConnector

from ingestd import __version__
from ingestd.base.addresses import is_public
from ingestd.codecs.compression import Corrupt, Inflater, TooMuch, WindowTooLarge, mib
from ingestd.sources.fetch.failure import (
    HEADER_BYTES_MAX,
    DownloadFailed,
    ResponseMismatch,
    TryAgain,
    explain,
)
from ingestd.sources.fetch.safety import Resolver, open_socket
from ingestd.sources.fetch.urls import as_url

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping

    from aiohttp import ClientResponse, ClientSession
    from aiohttp.abc import AbstractResolver
    from yarl import URL

    from ingestd.sources.fetch import FetchSettings
    from ingestd.sources.fetch.concurrency import InflightBudget
    from ingestd.sources.fetch.urls import Link

READ_BYTES = 256 * 1024
"""About half of what one connection may hold unread."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {"User-Agent": f"ingestd/{__version__}", "Accept": "*/*"}


class DownloadClient:
    """Sends the requests of one source.

    Args:
        settings: bounds, and what is allowed.
        allowed: tells if an address may be connected to; `fetch.allow_private` decides by default.
        resolver: resolves names; the system's resolver by default.
    """

    def __init__(
        self,
        settings: FetchSettings,
        *,
        allowed: Callable[[str], bool] | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._settings = settings
        self._allowed = allowed or (_any if settings.allow_private else is_public)
        self._resolver = resolver
        self._through: ClientSession | None = None

    async def start(self) -> None:
        """Opens the sessions, which need a running loop."""
        self._direct = self._session(self._allowed, self._resolver)
        if self._settings.trust_env:
            # A proxy is often at a private address; it checks the addresses behind it.
            self._through = self._session(_any, None)

    def _session(
        self, allowed: Callable[[str], bool], resolver: AbstractResolver | None
    ) -> ClientSession:
        connector = TCPConnector(
            limit=0,  # the source bounds its downloads
            resolver=Resolver(allowed, resolver),
            use_dns_cache=False,  # a host that moved is found at the next connection
            socket_factory=open_socket(allowed),
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=DummyCookieJar(),
            timeout=ClientTimeout(total=None, connect=self._settings.connect_timeout),
            auto_decompress=False,
            read_bufsize=READ_BYTES,
            max_line_size=HEADER_BYTES_MAX,
            max_field_size=HEADER_BYTES_MAX,
            trust_env=False,  # which would send credentials from ~/.netrc, too
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
        )

    async def close(self) -> None:
        """Closes every connection."""
        for session in (self._direct, self._through):
            if session is not None:
                await session.close()

    @asynccontextmanager
    async def get(self, link: Link, headers: Mapping[str, str]) -> AsyncIterator[ClientResponse]:
        """Sends a GET and follows redirects; yields the answer with its body unread.

        Args:
            link: the URL and its headers.
            headers: of this request; the link's own come on top for its origin.

        Raises:
            TryAgain: there is no answer.
            DownloadFailed: it can't be requested, or a redirect leads where none may.
        """
        url = link.url
        for _ in range(self._settings.redirects_max + 1):
            own = link.headers if url.origin() == link.url.origin() else {}
            response = await self._ask(url, {**_named(_HEADERS, own), **own, **headers})
            try:
                location = response.headers.get("Location")
                if response.status not in _REDIRECTS or location is None:
                    yield response
                    return
                url = next_url(url, location)
            finally:
                # What is left of its body is not worth waiting for.
                response.close()
        raise DownloadFailed(f"more than {self._settings.redirects_max} redirects")

    async def _ask(self, url: URL, headers: Mapping[str, str]) -> ClientResponse:
        settings = self._settings
        proxy = proxy_for(url) if settings.trust_env else None
        session = self._through if proxy and self._through else self._direct
        try:
            async with async_timeout.timeout(settings.connect_timeout + settings.silence_timeout):
                return await session.get(url, headers=headers, allow_redirects=False, proxy=proxy)
        except aiohttp.ServerTimeoutError as error:
            raise explain(error) from None
        except TimeoutError:
            raise TryAgain("no answer within fetch.silence_timeout") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise explain(error) from None


def _named(defaults: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The defaults that the link does not override."""
    said = {name.lower() for name in own}
    return {name: value for name, value in defaults.items() if name.lower() not in said}


def next_url(url: URL, location: str) -> URL:
    """The target of a redirect.

    Raises:
        DownloadFailed: to another scheme, from https to http, or nowhere.
    """
    try:
        target = url.join(as_url(location)).with_fragment(None)
        if target.scheme in ("http", "https"):
            target = target.with_user(None)
        is_whole = target.host is not None and target.port is not None
    except ValueError:
        raise DownloadFailed("it redirects to something that is not a URL") from None
    if target.scheme not in ("http", "https"):
        raise DownloadFailed("it redirects to something that is not http or https")
    if not is_whole:
        raise DownloadFailed("it redirects to something that is not a URL")
    if url.scheme == "https" and target.scheme == "http":
        raise DownloadFailed("it redirects from https to http")
    return target


def proxy_for(url: URL) -> str | None:
    """The proxy that the environment names for a URL (`https_proxy`, `all_proxy`, `no_proxy`)."""
    proxies = request.getproxies_environment()
    place = f"{url.host}:{url.port}"
    if request.proxy_bypass_environment(place, proxies):  # type: ignore[attr-defined]
        return None
    return proxies.get(url.scheme) or proxies.get("all")


def _any(_address: str) -> bool:
    return True


# -- bodies ----------------------------------------------------------------------------------------
#
# Reads the body of a download: bounded, decompressed in pieces, with a timeout, and whole.
#
# A body is whole if its length agrees, if its chunks ended properly, or if what is compressed in it
# ended. Only where its head announces none of these may the end of the connection be its end: then
# some of it must have come, and what came is all that can be known.

_NO_BOUND = 1 << 62
_WINDOW_MIN = 64 * 1024


class Ending(NamedTuple):
    """Facts that tell the end of a body.

    Attributes:
        length: bytes as they are sent, if its head or its range says so.
        framed: its head announces its end: by a length, or by chunks.
        endless: it is a stream, which may end anywhere, and whose bytes are not bounded.
    """

    length: int | None
    framed: bool
    endless: bool = False


async def pieces(
    content: aiohttp.StreamReader,
    encoding: str,
    settings: FetchSettings,
    *,
    ending: Ending,
    windows: InflightBudget,
    read: Callable[[int], None],
) -> AsyncGenerator[bytes, None]:
    """Yields the decompressed body in pieces, each as soon as it arrives.

    Args:
        content: the body, unread.
        encoding: `identity`, or how it is compressed.
        settings: the bounds.
        ending: facts that tell its end.
        windows: the memory for zstd windows.
        read: called with the size of each read.

    Raises:
        TryAgain: it was cut short, is corrupt, or nothing came for too long.
        DownloadFailed: it is larger than it may be.
    """
    inflater = None
    if encoding != "identity":
        bytes_max = _NO_BOUND if ending.endless else settings.decompressed_bytes_max
        inflater = Inflater(encoding, bytes_max, window_max=0)
    window = _Window(windows, settings.window_max, waits=not ending.endless)
    total = 0
    try:
        while wire := await _read(content, settings.silence_timeout):
            total += len(wire)
            read(len(wire))
            _check_size(total, ending, settings, packed=inflater is not None)
            if inflater is None:
                yield wire
                continue
            more: bytes | None = wire
            while more is not None:
                try:
                    for piece in inflater.feed(more):
                        yield piece
                    more = None
                except WindowTooLarge as large:
                    inflater.window_max = await window.grow(large.window)
                    more = b""
        if not ending.endless:
            _check_end(total, ending)
        if inflater is not None and total:
            inflater.finish()
    except Corrupt as error:
        raise TryAgain(str(error)) from None
    except TooMuch:
        raise DownloadFailed("it is larger than fetch.decompressed_bytes_max") from None
    finally:
        window.close()


def _check_size(total: int, ending: Ending, settings: FetchSettings, *, packed: bool) -> None:
    """Raises if more came than may come."""
    if ending.endless:
        return
    if ending.length is not None and total > ending.length:
        raise ResponseMismatch("more came than its Content-Range says")
    if total > settings.response_bytes_max:
        raise DownloadFailed("it is larger than fetch.response_bytes_max")
    if total > settings.decompressed_bytes_max and not packed:
        raise DownloadFailed("it is larger than fetch.decompressed_bytes_max")


def _check_end(total: int, ending: Ending) -> None:
    """Raises if less came than has to come; see the module."""
    if ending.length is not None and total < ending.length:
        raise TryAgain(f"the body was cut short: {total} of {ending.length} bytes came")
    if not total and not ending.framed:
        raise TryAgain("the connection was closed behind the head, which gives no length")


class _Window:
    """The memory that one body has for its zstd window.

    Args:
        budget: of all bodies.
        bytes_max: of one.
        waits: for memory of others; a stream may never release it.
    """

    def __init__(self, budget: InflightBudget, bytes_max: int, *, waits: bool) -> None:
        self._budget = budget
        self._bytes_max = bytes_max
        self._waits = waits
        self._held = 0

    async def grow(self, size: int) -> int:
        """Takes memory for a window, after that of the frame before is released.

        Returns:
            Bytes that a window may need now.
        """
        if size > self._bytes_max:
            raise DownloadFailed(
                f"it needs a zstd window of {mib(size)}, more than "
                f"fetch.window_max = {mib(self._bytes_max)}"
            )
        self.close()
        size = max(size, _WINDOW_MIN)
        while self._budget.used and not self._budget.has(size):
            if not self._waits:
                raise TryAgain("there is no memory left for its zstd window (see fetch.window_max)")
            await self._budget.freed()
        self._budget.take(size)
        self._held = size
        return size

    def close(self) -> None:
        """Releases the memory."""
        held, self._held = self._held, 0
        self._budget.take(-held)


async def _read(content: aiohttp.StreamReader, silence: float) -> bytes:
    try:
        async with async_timeout.timeout(silence):
            return await content.readany()
    except TimeoutError:
        raise TryAgain("no byte came within fetch.silence_timeout") from None
    except (aiohttp.ClientError, OSError, RuntimeError) as error:
        raise explain(error) from None
