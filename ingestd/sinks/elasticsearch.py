"""The sink `elasticsearch` creates documents in Elasticsearch or OpenSearch, each exactly once.

A document's `_id` is its record's id and the operation is `create`, so a document that is there
already is answered with 409, which is done. That holds within one index: its name has the time at
which the batch was accepted, which is the same in every try, and never the clock.

Each record has a status of its own in the answer. What is postponed (429, 503) is sent again, a few
times in the same call; if it still is, the batch comes again, and what is stored is answered with
409. A document that does not fit the mapping becomes a dead letter.
"""

from __future__ import annotations

import random
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import msgspec
from msgspec import Meta

from ingestd.handlers.batch import Batch, Blocked, Unavailable
from ingestd.handlers.context import Context
from ingestd.handlers.options import Secret, Size
from ingestd.handlers.outcome import SinkFinding
from ingestd.handlers.text import one_line
from ingestd.sinks.base import BatchHints
from ingestd.sinks.client import HttpOptions, HttpPeer, refuse
from ingestd.sinks.tables import objects_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ingestd.sinks.client import HttpReply

_HERE = Context()
_NDJSON = {"Content-Type": "application/x-ndjson"}
_JSON = {"Content-Type": "application/json"}
# An answer without what is not looked at is a third as long.
_FILTER = (
    "filter_path=items.*.status,items.*.error.type,items.*.error.reason,items.*.error.caused_by"
)
_WAITS = (0.5, 1.0, 2.0)
"""Seconds between the tries of postponed records in one call, at most."""
_ERROR_CHARS = 600
# A value of the document itself, which is the dead letter's payload and no part of its reason.
_PREVIEW = re.compile(r"\.? Preview of field's value: '.*'", re.DOTALL)
_INDEX_NAME = re.compile(r"[^A-Z\\/*?\"<>| ,#:\x00-\x20]+")
_BLOCKING = (
    "index_not_found_exception", "cluster_block_exception", "index_closed_exception",
    "invalid_index_name_exception", "security_exception", "validation_exception",
)  # fmt: skip
"""Types of errors that are the index's and no document's."""
_BLOCKING_REASONS = ("pipeline with id [", "no write index is defined", "no such index")


class ElasticsearchOptions(HttpOptions, frozen=True, kw_only=True):
    """Options of the sink `elasticsearch`."""

    index: Annotated[
        str,
        Meta(
            description="index, alias or data stream; `%Y %m %d %H %j %G %V` are those of the time"
            " (UTC) at which the batch was accepted, `{pipeline}` is the pipeline's name"
        ),
    ] = "ingestd-{pipeline}-%Y.%m.%d"
    api_key: Annotated[
        Secret | None, Meta(description="encoded API key, instead of a name and a password")
    ] = None
    ingest_pipeline: Annotated[
        str | None, Meta(description="ingest pipeline of the cluster that documents go through")
    ] = None
    request_bytes_max: Annotated[
        Size, Meta(description="bytes of one `_bulk` request before compression")
    ] = Size(10 * 1024 * 1024)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.api_key is not None and self.username is not None:
            raise ValueError("api_key: give either api_key or username and password")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key: it is one line of ASCII")
        try:
            name = index_of(self.index, "x", datetime.now(UTC))
        except (KeyError, ValueError, IndexError):
            name = ""
        if not _INDEX_NAME.fullmatch(name) or name[0] in "-_+." or len(name.encode()) > 200:
            raise ValueError(f"index: {self.index!r} is no name of an index")


class _Cause(msgspec.Struct):
    type: str = ""
    reason: str | None = None


class _Error(msgspec.Struct):
    type: str = ""
    reason: str | None = None
    caused_by: _Cause | None = None

    def __str__(self) -> str:
        told = f"{self.type}: {self.reason or ''}"
        if self.caused_by is not None and self.caused_by.reason:
            told += f" ({self.caused_by.type}: {self.caused_by.reason})"
        return one_line(_PREVIEW.sub("", told), _ERROR_CHARS)


class _Item(msgspec.Struct):
    status: int
    error: _Error | None = None


class _Created(msgspec.Struct):
    create: _Item


class _BulkReply(msgspec.Struct):
    items: list[_Created]


_decode = msgspec.json.Decoder(_BulkReply).decode
_encode = msgspec.json.Encoder().encode
_Part = list[tuple[int, bytes]]
"""Records of one request: place in the batch, and the two lines that create it."""


class ElasticsearchSink:
    """Creates a document a record with requests to `_bulk`.

    A JSON object is a document as it came. Text becomes `{"message": "…"}`; bytes too, or
    `{"base64": "…"}` where they are no UTF-8. Any other JSON value becomes a dead letter.
    """

    BATCH = BatchHints(records_max=10_000, bytes_max=8 * 1024 * 1024, age_max=5.0)

    def __init__(self, options: ElasticsearchOptions, context: Context = _HERE) -> None:
        key = options.api_key
        self._peer = HttpPeer(options, {"Authorization": f"ApiKey {key}"} if key else {})
        self._asks_rights = bool(key or options.username)
        self._index = options.index
        self._query = _FILTER
        if options.ingest_pipeline:
            self._query += f"&pipeline={quote(options.ingest_pipeline, safe='')}"
        self._context = context
        self._bytes_max = int(options.request_bytes_max)

    def __call__(self, batch: Batch[bytes]) -> None:
        """Creates the documents that are not there yet, and rejects those that do not fit.

        Raises:
            Unavailable: the cluster is down or overloaded; what it stored is known to it.
            Blocked: the index, a right or an ingest pipeline is missing.
            RuntimeError: an error of the cluster's that a record may have caused.
        """
        index = index_of(self._index, self._context.pipeline, batch.accepted_at)
        path = f"/{quote(index, safe='')}/_bulk?{self._query}"
        for part in self._parts(batch):
            left, why = self._create(path, batch, part)
            for wait in _WAITS:
                if not left:
                    break
                time.sleep(wait * random.uniform(0.5, 1))  # noqa: S311
                left, why = self._create(path, batch, left)
            if left:
                raise Unavailable(f"{len(left)} of {len(batch)} records are postponed: {why}")

    def close(self) -> None:
        """Closes the connection."""
        self._peer.close()

    # -- documents -----------------------------------------------------------------------------

    def _parts(self, batch: Batch[bytes]) -> Iterator[_Part]:
        """Runs of records that one request takes."""
        part: _Part = []
        size = 0
        names = batch.ids
        for place, document in objects_of(batch, self._context.record_format):
            action = b'{"create":{"_id":%b}}\n%b\n' % (_encode(names[place]), document)
            if part and size + len(action) > self._bytes_max:
                yield part
                part, size = [], 0
            part.append((place, action))
            size += len(action)
        if part:
            yield part

    def _create(self, path: str, batch: Batch[bytes], part: _Part) -> tuple[_Part, str]:
        """Sends a run, in halves where it is too large; gives what is postponed, and why."""
        left, waiting, why = [part], [], ""
        while left:
            some = left.pop()
            body = b"".join([action for _, action in some])
            reply = self._peer.request("POST", path, body, _NDJSON)
            if reply.status == 413:
                if len(some) == 1:
                    batch.reject(some[0][0], f"the cluster takes no document of {len(body)} bytes")
                    continue
                middle = len(some) // 2
                left += [some[middle:], some[:middle]]
                self._bytes_max = min(self._bytes_max, len(body) // 2)
                continue
            postponed, told = _judge(batch, some, _items_of(reply, len(some)))
            waiting += postponed
            why = told or why
        return waiting, why

    # -- check ---------------------------------------------------------------------------------

    def check(self) -> Iterator[SinkFinding]:
        """Asks the cluster what it is, and for the index, its settings, and the rights to write.

        Raises:
            Unavailable: it cannot be reached.
            Blocked: it does not take the name and the password, or is another service.
        """
        about = self._ask("/")
        version = about.get("version")
        if not isinstance(version, dict):
            yield SinkFinding("error", "the address answers, but not as Elasticsearch does")
            return
        product = version.get("distribution", "elasticsearch")
        yield SinkFinding("info", f"{product} {version.get('number', '?')}")
        index = index_of(self._index, self._context.pipeline, datetime.now(UTC))
        reply = self._peer.request("GET", f"/{quote(index, safe='')}/_settings?flat_settings=true")
        is_there = reply.status == 200
        if is_there:
            yield from _findings_of(index, _object(reply))
        elif reply.status == 404:
            yield from self._missing(index)
        else:
            yield SinkFinding("info", f"the settings of {index} cannot be read: {reply.status}")
        if self._asks_rights and product == "elasticsearch":
            yield from self._rights(index, is_there=is_there)

    def _ask(self, path: str) -> dict[str, Any]:
        reply = self._peer.request("GET", path)
        if reply.status != 200:
            refuse(reply)
        return _object(reply)

    def _missing(self, index: str) -> Iterator[SinkFinding]:
        path = "/_cluster/settings?include_defaults=true&flat_settings=true"
        reply = self._peer.request("GET", path)
        answer = _object(reply) if reply.status == 200 else {}
        for kind in ("transient", "persistent", "defaults"):
            found = str(answer.get(kind, {}).get("action.auto_create_index", "")).lower()
            if found == "false":
                text = f"there is no index {index}, and action.auto_create_index is false"
                yield SinkFinding("error", text)
            if found:
                return

    def _rights(self, index: str, *, is_there: bool) -> Iterator[SinkFinding]:
        wanted = ["create_doc"] if is_there else ["create_doc", "auto_configure"]
        body = _encode({"index": [{"names": [index], "privileges": wanted}]})
        reply = self._peer.request("POST", "/_security/user/_has_privileges", body, _JSON)
        if reply.status != 200:  # security is off
            return
        has = _object(reply).get("index", {}).get(index, {})
        missing = [name for name in wanted if has.get(name) is False]
        if missing:
            yield SinkFinding("error", f"no right {' and '.join(missing)} on {index}")


def index_of(template: str, pipeline: str, at: datetime) -> str:
    """The name of an index at a time.

    Raises:
        ValueError: the template has something else in braces or behind a `%`.
    """
    if re.search(r"%(?![YmdHjGV])|\{(?!pipeline\})|(?<!\{pipeline)\}", template):
        raise ValueError("unknown placeholder")
    return at.strftime(template).replace("{pipeline}", pipeline.lower())


def _items_of(reply: HttpReply, count: int) -> list[_Item]:
    """The outcome of each document of a request.

    Raises:
        Blocked: the answer is none of `_bulk`.
    """
    if reply.status != 200:
        refuse(reply)
    try:
        items = [one.create for one in _decode(reply.body).items]
    except (ValueError, RecursionError):
        items = []
    if len(items) != count:
        raise Blocked(f"{reply.origin} does not answer as _bulk does: {reply.text}")
    return items


def _judge(batch: Batch[bytes], part: _Part, items: list[_Item]) -> tuple[_Part, str]:
    """Rejects what does not fit; gives what is postponed, and why.

    Raises:
        Blocked: the index refuses all documents.
        RuntimeError: an error of the cluster's.
    """
    postponed: _Part = []
    why = ""
    for one, item in zip(part, items, strict=True):
        status, error = item.status, item.error or _Error()
        if 200 <= status < 300 or status == 409:
            continue
        if status in {429, 502, 503, 504}:
            postponed.append(one)
            why = why or f"{status} {error}"
        elif status in {401, 403, 404} or _is_of_index(error):
            raise Blocked(f"{status} {error}")
        elif status >= 500:
            raise RuntimeError(f"{status} {error}")
        else:
            batch.reject(one[0], str(error))
    return postponed, why


def _is_of_index(error: _Error) -> bool:
    reason = error.reason or ""
    return error.type in _BLOCKING or reason.startswith(_BLOCKING_REASONS)


def _object(reply: HttpReply) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(reply.body)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _findings_of(index: str, answer: dict[str, Any]) -> Iterator[SinkFinding]:
    for name, found in answer.items():
        settings = found.get("settings", {}) if isinstance(found, dict) else {}
        for key in ("write", "read_only", "read_only_allow_delete"):
            if str(settings.get(f"index.blocks.{key}", "")).lower() == "true":
                yield SinkFinding("error", f"{name} takes no documents: index.blocks.{key} is true")
        if str(settings.get("index.translog.durability", "")).lower() == "async":
            text = f"{name} syncs its log later (index.translog.durability is async): what it said"
            yield SinkFinding("warning", f"{text} it has may be gone after a crash")
    if index not in answer:
        text = f"{index} is an alias or a data stream: a record that comes again after a rollover"
        yield SinkFinding("warning", f"{text} is stored in the new index as well")
