"""`_bulk` of Elasticsearch and OpenSearch below `/elastic`, and what their clients ask before it.

`codecs/bulk.py` reads the bodies.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import msgspec
from pydantic import Field

from ingestd.base.record import Records
from ingestd.codecs.bulk import (
    INDEX_CHARACTERS_MAX,
    Bulk,
    BulkError,
    BulkReader,
    TooManyDocuments,
    fail,
    make_answer,
)
from ingestd.codecs.lines import Parsed
from ingestd.config.units import Switch  # noqa: TC001 - the model needs it
from ingestd.http import problem
from ingestd.http.credentials import TOKEN_SCHEMES, TokenScheme, is_token
from ingestd.http.problem import Problem
from ingestd.http.response import JSON, Response
from ingestd.http.routing import path_of
from ingestd.sources.http.decode import too_many
from ingestd.sources.http.endpoints.base import (
    ANY,
    QUICK_BYTES,
    BodyCodec,
    Decoded,
    Description,
    Endpoint,
    EndpointSettings,
    RouteSpec,
    Target,
)
from ingestd.sources.targets import Targets, TargetTable, table_problems

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ingestd.base.record import Format
    from ingestd.sources.http.endpoints.base import BodyLimits, EndpointContext, Head
    from ingestd.sources.http.result import IngestResult, PartResult

PREFIX = "/elastic"
_PRODUCT = {"X-Elastic-Product": "Elasticsearch"}
_TYPES = frozenset(
    {
        "application/x-ndjson",
        "application/ndjson",
        "application/json",
        "application/vnd.elasticsearch+x-ndjson",
        "application/vnd.elasticsearch+json",
        "",
    }
)
_encode = msgspec.json.encode


class ElasticsearchSettings(EndpointSettings):
    """`[http.endpoints.elasticsearch]`."""

    indexes: Targets = Field(
        default_factory=dict,
        description="pipeline of the documents of an index; * in its name is any characters",
    )
    metadata_field: str = Field(
        "@metadata",
        max_length=255,
        description='field of a record with the _index and _id of its action; "" leaves them out',
    )
    deduplicate: Switch = Field(
        False,
        description="true: a document that is indexed again with the same _id and content is"
        " accepted once, among the last http.idempotency_ids_max; created ones always are",
    )
    version: str = Field(
        "9.1.0",
        pattern=r"^[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}$",
        description="version of Elasticsearch that clients are told",
    )


# -- bodies ----------------------------------------------------------------------------------------


class _Notes(NamedTuple):
    """Facts of a part for the answer.

    Attributes:
        bulk: the whole body.
        places: of the part's records among the items of the answer.
    """

    bulk: Bulk
    places: Sequence[int] = ()


class BulkCodec(BodyCodec):
    """Pairs of lines.

    Args:
        index: that of the path; empty if it has none.
        field: of records, for what their actions say; empty for none.
        targets: pipelines by index.
        names_versions: see `BulkReader`.
    """

    routes = True

    def __init__(
        self, index: str, field: str, targets: TargetTable, *, names_versions: bool = False
    ) -> None:
        self._names_versions = names_versions
        self._index = index
        self._field = field
        self._targets = targets

    def decode(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded]:
        """See `BodyCodec`."""
        try:
            bulk = self._reader(limits).read(body)
        except TooManyDocuments:
            raise too_many(limits) from None
        except BulkError as error:
            raise Problem(problem.MALFORMED, str(error)) from None
        return _parts_of(bulk)

    def decode_quickly(self, body: bytes, limits: BodyLimits) -> Sequence[Decoded] | None:
        """See `BodyCodec`."""
        if bulk := self._reader(limits).read_quickly(body):
            return _parts_of(bulk)
        return self.decode(body, limits) if len(body) < QUICK_BYTES else None

    def _reader(self, limits: BodyLimits) -> BulkReader:
        def bounds(to: str) -> tuple[int, int]:
            one = limits.by_pipeline.get(to, limits) if to else limits
            return one.record_bytes_max, one.depth_max

        return BulkReader(
            self._index,
            self._field,
            find=self._targets.find,
            bounds=bounds,
            records_max=limits.records_max,
            names_versions=self._names_versions,
        )


def _parts_of(bulk: Bulk) -> Sequence[Decoded]:
    empty = Parsed(Records.lines([]), [])
    return [
        Decoded(part.parsed, part.to, notes=_Notes(bulk, part.places), ids=part.ids)
        for part in bulk.parts
    ] or [Decoded(empty, notes=_Notes(bulk))]


# -- credentials -----------------------------------------------------------------------------------


def _read_api_key(headers: Mapping[str, str], _target: str) -> str | None:
    """`ApiKey TOKEN`, or base64 of `NAME:TOKEN` as clients make it of a pair."""
    word, _, value = headers.get("Authorization", "").partition(" ")
    if word.lower() != "apikey":
        return None
    value = value.strip(" ")
    try:
        token = base64.b64decode(value, validate=True).decode("ascii").partition(":")[2]
    except (binascii.Error, ValueError):
        token = ""
    return token if is_token(token) else value


_API_KEY = TokenScheme("apikey", _read_api_key, {"type": "http", "scheme": "ApiKey"})
_AUTH = (_API_KEY, *TOKEN_SCHEMES)


# -- the endpoint ----------------------------------------------------------------------------------

_ERROR_TYPES = {
    401: "security_exception",
    403: "security_exception",
    404: "resource_not_found_exception",
    406: "media_type_header_exception",
    413: "content_too_long_exception",
    429: "es_rejected_execution_exception",
    503: "es_rejected_execution_exception",
}
_BUSY = {429, 503}
_PROBES = ("GET", "HEAD", "PUT")
_REFRESHES = ("/_refresh", "/{index}/_refresh")
_PROBED = (
    "", "/", "/_cluster/health", "/_cluster/health/{index}", "/_license", "/_xpack",
    "/_nodes", "/_nodes/{node}", "/_nodes/{node}/http", "/_ilm/policy", "/_ilm/policy/{policy}",
    "/_index_template", "/_index_template/{template}", "/_template", "/_template/{template}",
    "/_component_template/{template}", "/_data_stream/{stream}",
    "/_ingest/pipeline", "/_ingest/pipeline/{id}", "/_alias/{alias}", "/_cat/{what}", "/{index}",
)  # fmt: skip
"""Paths that clients ask, see `docs/clients/elasticsearch.md`; nothing of what they put is kept."""


class ElasticsearchEndpoint(Endpoint):
    """`_bulk` below `/elastic`.

    Args:
        context: the daemon.
    """

    settings = ElasticsearchSettings
    formats = ("json",)
    prefix = PREFIX
    request_headers = ("X-Elastic-Client-Meta",)
    response_headers = ("X-Elastic-Product",)

    def __init__(self, context: EndpointContext) -> None:
        own: ElasticsearchSettings = context.own
        self._targets = TargetTable(own.indexes)
        self._field, self._names_versions = own.metadata_field, own.deduplicate
        self._about = _about(own.version)
        here, any_of = {"": Target(context.default)}, {ANY: Target(context.default)}
        self.routes = [
            RouteSpec(f"{PREFIX}/_bulk", here, ("POST", "PUT"), _AUTH),
            RouteSpec(f"{PREFIX}/{{index}}/_bulk", any_of, ("POST", "PUT"), _AUTH),
            *(
                RouteSpec(PREFIX + path, any_of if "{" in path else here, (), _AUTH, _PROBES)
                for path in _PROBED
            ),
            *(
                RouteSpec(
                    PREFIX + path, any_of if "{" in path else here, (), _AUTH, ("GET", "POST")
                )
                for path in _REFRESHES
            ),
        ]

    @classmethod
    def check(cls, own: Any, formats: Mapping[str, Format]) -> Iterable[tuple[str, str]]:
        """See `Endpoint`."""
        return table_problems("indexes", own.indexes, formats, "json")

    def open(self, head: Head) -> BodyCodec:
        """See `Endpoint`."""
        said = head.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if said not in _TYPES:
            detail = f"Content-Type header [{said[:80]}] is not supported"
            raise Problem(problem.MEDIA_TYPE, detail)
        index = unquote(head.value)
        if len(index) > INDEX_CHARACTERS_MAX:
            detail = f"the index has more than {INDEX_CHARACTERS_MAX} characters"
            raise Problem(problem.BAD_REQUEST, detail)
        return BulkCodec(index, self._field, self._targets, names_versions=self._names_versions)

    def answer(self, result: IngestResult, head: Head) -> Response:  # noqa: ARG002
        """See `Endpoint`."""
        notes: _Notes = result.parts[0].notes  # type: ignore[assignment]
        body = notes.bulk.answer
        if any(part.problem is not None or part.rejected for part in result.parts):
            items = notes.bulk.items or _ITEMS.decode(body).items
            body = _with_problems(list(map(bytes, items)), result.parts)
        return Response(200, JSON, body, _PRODUCT)

    def error(self, problem: Problem, head: Head) -> Response:
        """See `Endpoint`."""
        status, kind = _status_of(problem)
        if status in _BUSY and "User-Agent" not in head.headers:
            # rsyslog, which names itself nowhere, drops what is answered with an error in JSON,
            # and sends again what has an answer that it cannot read.
            text = problem.detail.encode() + b"\n"
            return Response(status, b"text/plain", text, {**problem.headers, **_PRODUCT})
        cause = {"type": kind, "reason": problem.detail}
        body = _encode({"error": {"root_cause": [cause], **cause}, "status": status})
        return Response(status, JSON, body, {**problem.headers, **_PRODUCT})

    def probe(self, head: Head) -> Response:
        """See `Endpoint`."""
        path = path_of(head.target, head.method).removeprefix(PREFIX).rstrip("/")
        body = b"{}" if head.method != "PUT" else b'{"acknowledged":true}'
        if path.endswith("/_refresh"):
            body = b'{"_shards":{"total":1,"successful":1,"failed":0}}'
        for start, about in self._about:
            if path == start or (start and path.startswith(f"{start}/")):
                body = about
        if head.value == path[1:] and path.startswith("/_"):
            raise Problem(problem.NOT_FOUND, f"no handler found for uri [{path[:80]}]")
        return Response(200, JSON, body, _PRODUCT)

    def describe(self, route: RouteSpec, target: str, form: Format | None) -> Description:  # noqa: ARG002
        """See `Endpoint`."""
        example = """-H 'Content-Type: application/x-ndjson' --data-binary @bulk.ndjson"""
        examples = [("A _bulk body of Elasticsearch", example)] if not route.variable else []
        return Description(
            "application/x-ndjson (pairs of an action and a document)", _OPERATION, examples
        )


def _status_of(found: Problem) -> tuple[int, str]:
    """The status and the type of an error."""
    status = found.kind.status
    if found.kind is problem.MEDIA_TYPE:
        status = 406
    elif found.kind is problem.KEY_IN_FLIGHT:
        status = 429  # the same body is being accepted: clients send it again, and get its answer
    return status, _ERROR_TYPES.get(status, "illegal_argument_exception")


class _Items(msgspec.Struct):
    items: list[msgspec.Raw]


_ITEMS = msgspec.json.Decoder(_Items)


def _with_problems(items: Sequence[bytes], parts: Sequence[PartResult]) -> bytes:
    """The answer where some parts, or records of them, were not accepted."""
    told = list(items)
    for part in parts:
        notes: _Notes = part.notes  # type: ignore[assignment]
        if part.problem is not None:
            status, kind = _status_of(part.problem)
            if status in _BUSY:
                status = 429  # of an item this is what clients send again
            for place in notes.places:
                told[place] = fail(items[place], status, kind, part.problem.detail)
        for one in part.rejected:
            place = notes.places[one.index]
            told[place] = fail(items[place], 400, "document_parsing_exception", one.error)
    return make_answer(b",".join(told), errors=True)


def _about(version: str) -> Sequence[tuple[str, bytes]]:
    """Bodies of answers to probes, by the beginnings of paths."""
    build = {
        "number": version,
        "build_flavor": "default",
        "build_type": "docker",
        "build_hash": "unknown",
        "build_date": "2025-01-01T00:00:00.000Z",
        "build_snapshot": False,
        "lucene_version": "10.0.0",
        "minimum_wire_compatibility_version": "8.18.0",
        "minimum_index_compatibility_version": "8.0.0",
    }
    cluster = {"cluster_name": "ingestd"}
    answers: dict[str, Any] = {
        "": {
            "name": "ingestd",
            **cluster,
            "cluster_uuid": "ingestd",
            "version": build,
            "tagline": "You Know, for Search",
        },
        "/_cluster/health": {
            **cluster,
            "status": "green",
            "timed_out": False,
            "number_of_nodes": 1,
            "number_of_data_nodes": 1,
        },
        "/_license": {"license": {"status": "active", "type": "basic", "uid": "ingestd"}},
        "/_xpack": {
            "license": {"status": "active", "type": "basic", "mode": "basic"},
            "features": {"ilm": {"available": True, "enabled": True}},
        },
        "/_nodes": {"_nodes": {"total": 0, "successful": 0, "failed": 0}, **cluster, "nodes": {}},
    }
    return [(path, _encode(answer)) for path, answer in answers.items()]


_OPERATION = {
    "summary": "Create documents with _bulk",
    "description": (
        "Pairs of lines, an action and a document. `index` and `create` add a record, `update` and"
        " `delete` are answered with 400 in their items. The answer has an item for each action."
    ),
    "requestBody": {
        "required": True,
        "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
    },
}
