"""What to ask for from a position, and what the answer's head means for it. Pure."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from ingestd.sources.fetch.failure import Again, Changed, GivenUp
from ingestd.sources.fetch.position import Position, start_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from yarl import URL

_CODINGS = {"": "identity", "x-gzip": "gzip"}
_READ = frozenset({"identity", "gzip", "deflate", "zstd"})
_BY_NAME = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_BY_TYPE = {
    "application/gzip": "gzip",
    "application/x-gzip": "gzip",
    "application/zstd": "zstd",
    "application/x-zstd": "zstd",
}
EVENT_STREAM = "text/event-stream"
_SEVERAL_PARTS = "multipart/byteranges"
_LENGTH_DIGITS_MAX = 19
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
_UNSATISFIED = re.compile(r"bytes \*/(\d{1,19})", re.ASCII)
_AGAIN = frozenset({408, 421, 425, 429})
_NEVER = frozenset({501, 505, 510, 511})


class Take(NamedTuple):
    """A body to read.

    Attributes:
        position: where its first byte that is taken lies.
        skip: bytes after decompression that come before it.
        length: of the body as it is sent, if its head says so.
        whole: the body reaches to the end of the resource.
        changed: it is a new version of something that was accepted before, or begun.
    """

    position: Position
    skip: int = 0
    length: int | None = None
    whole: bool = True
    changed: bool = False


class Finished(NamedTuple):
    """Nothing to read: all of it is accepted, in the version that the position names."""

    position: Position


def headers_for(
    position: Position, *, url: URL, ranges: bool, endless: bool = False
) -> dict[str, str]:
    """What to ask for.

    Args:
        position: where the URL stands.
        url: what is asked for.
        ranges: the rest alone may be asked for.
        endless: it is a stream. It would hold the window that zstd needs for as long as it lasts.
    """
    is_packed = _by_name(url) is not None
    headers = {"Accept-Encoding": "gzip" if endless else "gzip, zstd"}
    if is_packed:
        headers["Accept-Encoding"] = "identity"
    if position.event_id:
        headers["Last-Event-ID"] = position.event_id
    if position.done:
        if position.etag:
            headers["If-None-Match"] = position.etag
        if position.modified:
            headers["If-Modified-Since"] = position.modified
    elif ranges and position.can_range:
        headers["Range"] = f"bytes={position.offset}-"
        headers["If-Range"] = position.strong
        headers["Accept-Encoding"] = "identity"
    return headers


def judge(
    status: int,
    headers: Mapping[str, str],
    *,
    asked: Mapping[str, str],
    position: Position,
    encoding: str,
) -> Take | Finished:
    """What an answer means.

    Args:
        status: its status.
        headers: its headers.
        asked: what `headers_for` gave.
        position: where the URL stands.
        encoding: of its body, see `encoding_of`.

    Raises:
        Changed: the rest that came is not of the version that was begun.
        Again: it may succeed another time.
        GivenUp: it would not.
    """
    here = start_of(headers, encoding)
    ranged = "Range" in asked
    if status == HTTPStatus.OK:
        if _names_a_part(headers):
            raise Again("the server answered 200 with a Content-Range that is not the whole")
        return _whole(here, position, content_length(headers))
    if status == HTTPStatus.PARTIAL_CONTENT and ranged:
        return _part(headers, here, position)
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and ranged:
        if _is_at_the_end(headers, here, position):
            return Finished(replace(position, done=True))
        raise Changed
    if status == HTTPStatus.NOT_MODIFIED and position.done:
        return Finished(position)
    if status in (HTTPStatus.NO_CONTENT, HTTPStatus.RESET_CONTENT):
        if position.offset and not position.done:
            raise Again(f"the server answered {status} in place of the rest")
        return Finished(position)  # a stream of events ends like this; nothing is written down
    raise _refusal(status)


def _whole(here: Position, position: Position, length: int | None) -> Take | Finished:
    same = position.same_version(here)
    if here.encoding == "identity" and length:
        here = replace(here, size=length)
    if position.done:
        return Finished(position) if same else Take(here, length=length, changed=same is False)
    if not position.offset:
        here = replace(here, event_id=position.event_id, records=position.records)
        return Take(here, length=length)
    if same is False:
        return Take(here, length=length, changed=True)
    begun = replace(here, offset=position.offset, crc=position.crc, records=position.records)
    return Take(begun, skip=position.offset, length=length)


def _names_a_part(headers: Mapping[str, str]) -> bool:
    """Whether a `Content-Range`, which has no meaning in a 200, contradicts it."""
    found = _RANGE.fullmatch(headers.get("Content-Range", ""))
    return found is not None and (int(found[1]) > 0 or found[3] != str(int(found[2]) + 1))


def _part(headers: Mapping[str, str], here: Position, position: Position) -> Take:
    found = _RANGE.fullmatch(headers.get("Content-Range", ""))
    if not found or here.encoding != "identity" or media_type(headers) == _SEVERAL_PARTS:
        raise Changed
    first, last = int(found[1]), int(found[2])
    total = None if found[3] == "*" else int(found[3])
    length = last - first + 1
    fits = first == position.offset and length > 0 and (total is None or last < total)
    # A head that contradicts itself says nothing about the end of its body.
    if not fits or content_length(headers) not in (None, length):
        raise Changed
    if not _continues(position, here, total):
        raise Changed
    return Take(position, length=length, whole=total == last + 1)


def _continues(position: Position, here: Position, total: int | None) -> bool:
    """Whether a part is of the version that was begun: RFC 9110, 15.3.7.3, and the size."""
    if position.etag and here.etag:
        same: bool | None = position.etag == here.etag
    else:
        same = position.same_version(here)
    if same is False or (total and position.size and total != position.size):
        return False
    return same is True or (total is not None and total == position.size)


def _is_at_the_end(headers: Mapping[str, str], here: Position, position: Position) -> bool:
    """Whether a 416 says that nothing comes behind what was accepted."""
    found = _UNSATISFIED.fullmatch(headers.get("Content-Range", ""))
    if not found or position.same_version(here) is False:
        return False
    return int(found[1]) == position.offset and position.size in (0, position.offset)


def _refusal(status: int) -> Again | GivenUp:
    name = HTTPStatus(status).phrase if status in _STATUSES else ""
    reason = f"the server answered {status} {name}".rstrip()
    passes = status in _AGAIN or (status >= HTTPStatus.INTERNAL_SERVER_ERROR)
    return Again(reason) if passes and status not in _NEVER else GivenUp(reason)


_STATUSES = frozenset(HTTPStatus)


def encoding_of(headers: Mapping[str, str], *urls: URL) -> str:
    """How a body is compressed: as the header says, else as a name does, else its type.

    Args:
        headers: of the answer.
        urls: what was asked for, and where redirects led to.

    Raises:
        GivenUp: it is not read.
    """
    coding = headers.get("Content-Encoding", "").strip().lower()
    coding = _CODINGS.get(coding, coding)
    if coding not in _READ:
        raise GivenUp("its Content-Encoding is none of gzip, deflate, zstd")
    if coding != "identity":
        return coding
    for url in urls:
        if named := _by_name(url):
            return named
    return _BY_TYPE.get(media_type(headers), "identity")


def media_type(headers: Mapping[str, str]) -> str:
    """`Content-Type` without its parameters."""
    return headers.get("Content-Type", "").partition(";")[0].strip().lower()


def content_length(headers: Mapping[str, str]) -> int | None:
    """How long a body is as it is sent; `None` if its head does not say so."""
    text = headers.get("Content-Length", "").strip()
    is_number = text.isascii() and text.isdigit() and len(text) <= _LENGTH_DIGITS_MAX
    return int(text) if is_number and not _is_chunked(headers) else None


def ends_by_itself(headers: Mapping[str, str]) -> bool:
    """Whether the end of a body can be told from a connection that broke."""
    return _is_chunked(headers) or content_length(headers) is not None


def _is_chunked(headers: Mapping[str, str]) -> bool:
    return "chunked" in headers.get("Transfer-Encoding", "").lower()


def _by_name(url: URL) -> str | None:
    name = url.path.lower()
    return next((coding for end, coding in _BY_NAME.items() if name.endswith(end)), None)
