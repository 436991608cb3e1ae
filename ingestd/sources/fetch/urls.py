"""Reads the list of URLs from the settings, a file or standard input."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO
from urllib.parse import unquote

from yarl import URL

from ingestd.base.errors import ConfigError
from ingestd.config.network import check_url, show_url
from ingestd.sources.descriptors import open_reader
from ingestd.sources.fetch.position import key_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ingestd.sources.fetch import FetchSettings

URLS_MAX = 10_000
LIST_BYTES_MAX = 16 * 1024**2
STDIN = "-"
_HINT = "reading URLs from the terminal, one a line; end with Ctrl-D\n"
_COMMENT = re.compile(r"(^|\s)#.*")  # a fragment has no white space before it
_AS_IT_IS = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]*", re.ASCII)


class Link(NamedTuple):
    """One URL to download.

    Attributes:
        key: the name of its position.
        url: without user, password and fragment.
        shown: as logs may have it.
        headers: for its own origin only.
    """

    key: str
    url: URL
    shown: str
    headers: Mapping[str, str]


async def read_links(
    settings: FetchSettings, *, fd: int = 0, stderr: TextIO | None = None
) -> list[Link]:
    """Reads all URLs, each once, in their order.

    Args:
        settings: of the source.
        fd: standard input.
        stderr: where the hint for a terminal goes.

    Raises:
        ConfigError: the list can't be read, holds something else, none, or too many.
    """
    urls = list(settings.urls)
    if settings.file:
        name = "standard input" if settings.file == STDIN else settings.file
        if settings.file == STDIN:
            text = await _read_stdin(fd, stderr or sys.stderr)
        else:
            text = await asyncio.to_thread(_read_file, Path(settings.file))
        urls.extend(_lines(text, name))
        if not urls:
            raise ConfigError(problem=f"fetch.file: there is no URL in {name}")
    links = {link.key: link for link in _links(urls, settings.headers)}
    if len(links) > URLS_MAX:
        raise ConfigError(problem=f"fetch: {len(links)} URLs are more than {URLS_MAX}")
    return list(links.values())


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LIST_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or "it is no file's name"
        raise ConfigError(problem=f"fetch.file: cannot read {path}: {problem}") from None


async def _read_stdin(fd: int, stderr: TextIO) -> bytes:
    reader = open_reader(fd)
    if os.isatty(fd):
        print(_HINT, end="", file=stderr, flush=True)
    text = bytearray()
    try:
        while len(text) <= LIST_BYTES_MAX and (data := await reader.read()):
            text += data
    except OSError as error:
        problem = f"fetch.file: cannot read standard input: {error.strerror}"
        raise ConfigError(problem=problem) from None
    finally:
        reader.close()
    return bytes(text)


def _lines(text: bytes, name: str) -> Iterator[str]:
    if len(text) > LIST_BYTES_MAX:
        raise ConfigError(problem=f"fetch.file: {name} is larger than {LIST_BYTES_MAX} bytes")
    try:
        lines = text.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(problem=f"fetch.file: {name} is not UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        url = _COMMENT.sub("", line).strip()
        if url:
            try:
                check_url(url)
            except ValueError as error:
                problem = f"fetch.file: {name}, line {number}: {error}"
                raise ConfigError(problem=problem) from None
            yield url


def _links(urls: Iterable[str], headers: Mapping[str, str]) -> Iterator[Link]:
    for written in urls:
        try:
            url = as_url(written).with_fragment(None)
            plain = url.with_user(None)
        except ValueError:
            raise ConfigError(problem=f"fetch: {show_url(written)!r} is not a URL") from None
        yield Link(key_of(str(plain)), plain, show_url(str(plain)), _with_credentials(url, headers))


def as_url(written: str) -> URL:
    """Parses a URL and keeps it as written where possible: signed ones must not be changed.

    Raises:
        ValueError: it is none.
    """
    return URL(written, encoded=_AS_IT_IS.fullmatch(written) is not None)


def _with_credentials(url: URL, headers: Mapping[str, str]) -> Mapping[str, str]:
    """User and password as a header; one that is set for all URLs goes before."""
    has_own = any(name.lower() == "authorization" for name in headers)
    if has_own or (url.raw_user is None and url.raw_password is None):
        return headers
    pair = f"{unquote(url.raw_user or '')}:{unquote(url.raw_password or '')}"
    basic = base64.b64encode(pair.encode()).decode()
    return {**headers, "Authorization": f"Basic {basic}"}
