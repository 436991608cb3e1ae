"""`_bulk` as its clients see it: a real server, intakes in memory; and the codec by itself."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.errors import Overloaded
from ingestd.codecs import bulk as codec
from ingestd.codecs.bulk import BulkError, BulkReader, TooManyDocuments
from ingestd.sources.targets import TargetTable, table_problems
from tests.peak import peak
from tests.sources.endpoints.endpoint_tools import KeyIntake, serving_endpoint
from tests.sources.source_tools import Reply, connected

if TYPE_CHECKING:
    from ingestd.sources.http.source import HttpSource

NDJSON = "application/x-ndjson"
TOKEN = "token-of-the-tests-0123456789-abcdef"
TOKENS = {"shop": {"token": TOKEN}}


def lines(*values: Any) -> bytes:
    return b"".join(
        value + b"\n" if isinstance(value, bytes) else json.dumps(value).encode() + b"\n"
        for value in values
    )


async def send(
    source: HttpSource,
    body: bytes = b"",
    path: str = "/_bulk",
    method: str = "POST",
    **headers: str,
) -> Reply:
    async with connected(source) as client:
        headers = {"Content_Type": NDJSON, "User_Agent": "tests", **headers}
        head = [f"{method} /elastic{path} HTTP/1.1", "Host: localhost"]
        head += [f"{k.replace('_', '-')}: {v}" for k, v in headers.items() if v]
        head += [f"Content-Length: {len(body)}", "", ""]
        client.send("\r\n".join(head).encode() + body)
        reply = await client.reply(bodiless=method == "HEAD")
        assert reply.headers["x-elastic-product"] == "Elasticsearch"
        return reply


async def test_documents_become_records_with_their_metadata() -> None:
    intake = KeyIntake()
    body = lines(
        {"index": {"_index": "logs", "_id": "a", "routing": "r"}}, b'{"n": 1}',
        {"create": {}}, b'{"n":2}',
        {"index": {"_id": 7}}, {},
    )  # fmt: skip
    async with serving_endpoint("elasticsearch", intake) as source:
        reply = await send(source, body, "/web%20x/_bulk?refresh=true&filter_path=took")
    assert reply.status == 200
    assert reply.body.startswith(b'{"took":0,"errors":false,"items":[')
    assert [json.loads(item) for item in intake.items] == [
        {"@metadata": {"_index": "logs", "_id": "a", "routing": "r"}, "n": 1},
        {"@metadata": {"_index": "web x"}, "n": 2},
        {"@metadata": {"_index": "web x", "_id": 7}},
    ]
    assert reply.json["items"] == [
        {"index": {"_index": "logs", "_id": "a", "routing": "r", "status": 201}},
        {"create": {"_index": "web x", "status": 201}},
        {"index": {"_index": "web x", "_id": 7, "status": 201}},
    ]


async def test_without_a_field_for_metadata_a_record_is_the_document_as_it_came() -> None:
    intake = KeyIntake()
    body = lines({"index": {}}, b'{"n": 1}', {"create": {}}, b"{}")
    async with serving_endpoint("elasticsearch", intake, own={"metadata_field": ""}) as source:
        for content_type in (
            "application/vnd.elasticsearch+x-ndjson; compatible-with=9", "application/json",
            "application/x-ndjson; charset=utf-8", "",
        ):  # fmt: skip
            intake.runs.clear()
            reply = await send(source, body, method="PUT", Content_Type=content_type)
            assert (reply.status, reply.json["errors"]) == (200, False)
            assert intake.items == [b'{"n": 1}', b"{}"]
        gzipped = await send(source, gzip.compress(body + body), Content_Encoding="gzip")
        assert len(gzipped.json["items"]) == 4
        assert (await send(source, body, Content_Type="text/plain")).json["error"]["type"] == (
            "media_type_header_exception"
        )


async def test_each_action_has_an_item_of_its_own() -> None:
    intake = KeyIntake(record_bytes_max=100)
    body = lines(
        {"create": {"_index": "a"}}, {"n": 1},
        {"delete": {"_index": "a", "_id": "x"}},
        {"update": {"_index": "a", "_id": "y"}}, {"doc": {"n": 2}},
        {"index": {"_index": "a"}}, b'{"n": }',
        {"index": {"_index": "a"}}, b"[1]",
        {"index": {"_index": "a"}}, {"n": "x" * 100},
        b"", b" ",
        {"index": {"_index": "a"}}, {"n": 3},
    )  # fmt: skip
    async with serving_endpoint("elasticsearch", intake) as source:
        answer = (await send(source, body)).json
    assert answer["errors"] is True
    assert [next(iter(item)) for item in answer["items"]] == [
        "create", "delete", "update", "index", "index", "index", "index",
    ]  # fmt: skip
    told = [next(iter(item.values())) for item in answer["items"]]
    assert [item["status"] for item in told] == [201, 400, 400, 400, 400, 413, 201]
    assert [item.get("error", {}).get("type", "") for item in told] == [
        "", "illegal_argument_exception", "illegal_argument_exception",
        "document_parsing_exception", "document_parsing_exception",
        "content_too_long_exception", "",
    ]  # fmt: skip
    assert told[1]["_id"] == "x"
    assert [json.loads(item)["n"] for item in intake.items] == [1, 3]
    assert [one.reason for one in intake.refused] == ["malformed", "malformed", "too_large"]


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"", 400, "illegal_argument_exception"),
        (b"\n\n", 400, "illegal_argument_exception"),
        (lines({"n": 1}, {"n": 2}), 400, "illegal_argument_exception"),
        (lines({"index": {}}, {"n": 1}, {"n": 2}), 400, "illegal_argument_exception"),
        (lines({"index": {}}), 400, "illegal_argument_exception"),
        (lines({"index": {}}, b""), 400, "illegal_argument_exception"),
        (lines({"index": {}, "create": {}}, {}), 400, "illegal_argument_exception"),
        (lines({"index": []}, {}), 400, "illegal_argument_exception"),
        (lines({"index": {"_id": []}}, {}), 400, "illegal_argument_exception"),
        (lines({"index": {"_index": "x" * 256}}, {}), 400, "illegal_argument_exception"),
        (lines({"index": {"_id": "x" * 513}}, {}), 400, "illegal_argument_exception"),
        (lines(b'{"index":{"_id":"\xff"}}', {}), 400, "illegal_argument_exception"),
        (lines(b"[" * 5000, {}), 400, "illegal_argument_exception"),
        *(
            (lines(form % (b"[" * deep + b"]" * deep), {}), 400, "illegal_argument_exception")
            for form in (b'{"create":{"_index":"a","x":%b}}', b'{"index": {"x":%b}}')
            for deep in (127, 980, 5000)
        ),
        (lines(*[{"delete": {}}] * 11), 413, "content_too_long_exception"),
        (lines(*[{"index": {"_id": "a"}}, {"n": 1}] * 11), 413, "content_too_long_exception"),
        (lines(*[{"index": {}}, {"n": 1}] * 500), 413, "content_too_long_exception"),
        (b"\n" * 5000, 413, "content_too_long_exception"),
    ],
)
async def test_bodies_that_cannot_be_read(body: bytes, status: int, kind: str) -> None:
    intake = KeyIntake()
    async with serving_endpoint("elasticsearch", intake, records_max=10) as source:
        reply = await send(source, body)
    assert (reply.status, reply.json["status"], reply.json["error"]["type"]) == (
        status, status, kind,
    )  # fmt: skip
    assert reply.json["error"]["root_cause"][0]["reason"]
    assert not intake.runs


async def test_an_index_has_a_pipeline_and_each_part_an_answer_of_its_own() -> None:
    default, web, day = (
        KeyIntake(),
        KeyIntake("web"),
        KeyIntake("day"),
    )
    own = {"indexes": {"web": "web", "logs-*": "day"}}
    ids = itertools.count()

    def body() -> bytes:
        names = ("web", "other", "logs-2026.11.29", "web")
        return lines(*[
            line for name in names
            for line in ({"create": {"_index": name, "_id": f"{next(ids)}"}}, {"at": name})
        ])  # fmt: skip

    async with serving_endpoint("elasticsearch", default, web, day, own=own) as source:
        for spaced in (False, True):  # cut as a whole, and line by line
            sent = body() if spaced else body().replace(b": ", b":").replace(b", ", b",")
            for intake in (default, web, day):
                intake.runs.clear()
            web.errors = [Overloaded(what="the journal", retry_after=7.0)]
            answer = (await send(source, sent)).json
            assert answer["errors"] is True
            assert [item["create"]["status"] for item in answer["items"]] == [429, 201, 201, 429]
            assert (
                answer["items"][0]["create"]["error"]["type"] == "es_rejected_execution_exception"
            )
            answer = (await send(source, sent)).json  # again, whole: what was accepted is not twice
            assert [item["create"]["status"] for item in answer["items"]] == [201] * 4
            assert [len(one.items) for one in (default, web, day)] == [1, 2, 1]
        for intake in (default, web, day):
            intake.errors = [Overloaded(what="the journal", retry_after=7.0)]
        reply = await send(source, body())
        assert (reply.status, reply.headers["retry-after"]) == (503, "7")
        assert reply.json["error"]["type"] == "es_rejected_execution_exception"
        for intake in (default, web, day):
            intake.errors = [Overloaded(what="the journal", retry_after=7.0)]
        reply = await send(source, body(), User_Agent="")  # as of rsyslog
        assert (reply.status, reply.body) == (503, b"the journal is full\n")


@pytest.mark.parametrize("spaced", [False, True])  # cut as a whole, and line by line
@pytest.mark.parametrize("deduplicate", [False, True])
async def test_a_document_with_an_id_is_accepted_once(spaced: bool, deduplicate: bool) -> None:
    intake = KeyIntake()

    async def put(*pairs: tuple[str, str, int], path: str = "/_bulk") -> list[int]:
        values = [({op: {"_index": "x", "_id": name}}, {"n": n}) for op, name, n in pairs]
        body = lines(*[line for pair in values for line in pair])
        if not spaced:
            body = body.replace(b": ", b":").replace(b", ", b",")
        assert not (await send(source, body, path)).json["errors"]
        found = [json.loads(item)["n"] for item in intake.items]
        intake.runs.clear()
        return found

    own = {"deduplicate": deduplicate}
    async with serving_endpoint("elasticsearch", intake, own=own) as source:
        assert await put(("create", "a", 1), ("create", "b", 2)) == [1, 2]
        assert await put(("create", "b", 3), ("create", "c", 4), ("create", "c", 4)) == [4]
        again = [("index", "v", 1), ("index", "v", 2), ("index", "v", 1)]
        assert await put(*again) == ([1, 2] if deduplicate else [1, 2, 1])
        assert await put(*again) == ([] if deduplicate else [1, 2, 1])
        assert await put(("create", "", 5), ("create", "", 5)) == [5, 5]


async def test_tokens_in_the_ways_of_its_clients() -> None:
    intake = KeyIntake()
    body = lines({"index": {}}, {"n": 1})
    pair = base64.b64encode(f"id:{TOKEN}".encode()).decode()
    basic = base64.b64encode(f"shop:{TOKEN}".encode()).decode()
    async with serving_endpoint("elasticsearch", intake, tokens=TOKENS) as source:
        for shown in (f"ApiKey {TOKEN}", f"apikey {pair}", f"Basic {basic}", f"Bearer {TOKEN}"):
            assert (await send(source, body, Authorization=shown)).status == 200
            assert (await send(source, path="/", method="HEAD", Authorization=shown)).status == 200
        for wrong in (f"ApiKey {TOKEN[1:]}", "ApiKey", "ApiKey !", f"Basic {pair}"):
            reply = await send(source, body, Authorization=wrong)
            assert (reply.status, reply.json["error"]["type"]) == (401, "security_exception")
        assert (await send(source, body)).headers["www-authenticate"]
        assert (await send(source, path="/", method="GET")).status == 401
    assert len(intake.items) == 4


async def test_probes_of_clients_are_answered() -> None:
    async with serving_endpoint("elasticsearch", KeyIntake(), own={"version": "8.1.2"}) as source:
        for path in ("", "/", "/?pretty"):
            assert (await send(source, path=path, method="HEAD")).status == 200
            about = (await send(source, path=path, method="GET")).json
            assert about["version"]["number"] == "8.1.2"
            assert about["tagline"] == "You Know, for Search"
        for path, key in (
            ("/_license?human=false", "license"), ("/_xpack", "features"),
            ("/_nodes/http", "nodes"), ("/_nodes/_all/http", "nodes"),
            ("/_cluster/health?timeout=1s", "status"),
        ):  # fmt: skip
            assert key in (await send(source, path=path, method="GET")).json
        for path in (
            "/_ilm/policy/logs", "/_index_template/logs", "/_template/logs", "/_ingest/pipeline/x",
            "/_component_template/x", "/_data_stream/logs", "/logstash", "/_alias/logs",
        ):  # fmt: skip
            assert (await send(source, path=path, method="HEAD")).status == 200
            reply = await send(source, b'{"template": {}}', path, "PUT")
            assert reply.json == {"acknowledged": True}
        for path in ("/_search", "/logs/_search", "/_bulk", "/a/b/c"):
            reply = await send(source, path=path, method="GET")
            assert reply.status in {404, 405}
            assert reply.json["status"] == reply.status
        async with connected(source) as client:  # what a client puts is read over
            for _ in range(2):
                client.send(
                    b"PUT /elastic/logs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
                )
                assert (await client.reply()).status == 200


def test_a_table_of_targets() -> None:
    table = TargetTable({"a-*-b": "one", "exact": "two", "*": "three", "a-x": "never"})
    assert [table.find(name) for name in ("a-1-b", "a--b", "a-b", "exact", "", "a-x")] == [
        "one", "one", "three", "two", "three", "never",
    ]  # fmt: skip
    assert TargetTable({"*a*a": "x"}).find("a" * 300) == ""
    assert TargetTable({"*a*ab": "x"}).find("aab") == "x"
    found = table_problems("t", {"a": "no", "b": "text", "c": "default"}, FORMATS, "json")
    assert [key for key, _ in found] == ["t.a", "t.b"]


FORMATS = {"default": "json", "text": "text"}

# -- the codec -------------------------------------------------------------------------------------


def reader(index: str = "", field: str = "m", **more: int) -> BulkReader:
    bounds = more.get("record_bytes_max", 200), more.get("depth_max", 6)
    return BulkReader(
        index,
        field,
        find=lambda name: "other" if name == "b" else "",
        bounds=lambda _: bounds,
        records_max=more.get("records_max", 50),
        names_versions=bool(more.get("names_versions")),
    )


def read(one: BulkReader, body: bytes, *, whole: bool) -> Any:
    """What was made of a body: parts with their records, and the answer; or its error."""
    try:
        found = one.read(body) if whole else one._walk(body.replace(b"\r\n", b"\n"))
    except (BulkError, TooManyDocuments) as error:
        return type(error)
    parts = sorted(
        (part.to, part.ids.each if part.ids else (), tuple(part.places),
         tuple(part.parsed.records.items()),
         tuple((one.reason, one.payload) for one in part.parsed.refused))
        for part in found.parts
    )  # fmt: skip
    return parts, json.loads(found.answer), [json.loads(one) for one in found.items]


actions = st.sampled_from(
    [
        b'{"index":{}}', b'{"create":{"_index":"b"}}', b'{"index":{"_index":"a","_id":"1"}}',
        b'{"index":{"_index":"b","_id":"2"}}', b'{"index":{"_id":"3"}}', b'{"index":{"_id":null}}',
        b'{"index":{"_index":"b"}}', b' {"index" : {"_id" : 4} }', b'{"delete":{"_id":"5"}}',
        b'{"update":{"_id":"6"}}', b'{"index":{"_id":"}"}}', b'{"index":{"a":{}}}', b'{"index":1}',
        b'{"index":{},"index":{}}', b'{"index":{"_index":"a"}}{"index":{"_index":"a"}}', b"", b" ",
    ]
)  # fmt: skip
documents = st.sampled_from(
    [
        b"{}", b"{ }", b'{"a":1}', b' {"a":1}', b'{"a":[[[[[[1]]]]]]}', b'{"a":"\xc3\xa9"}', b"[]",
        b'{"a":"\xff"}', b'{"a":', b"1", b'{"a":"%b"}' % (b"x" * 200), b'{"a":1}{"b":2}', b"",
        b'{"x":{"index":{}}', b'"y":1}}', b'{"index":{}}', b'{"m":2,"a":1}\r',
    ]
)  # fmt: skip
usual = st.tuples(actions.filter(lambda one: b'"index":{"_i' in one), documents.filter(
    lambda one: one in {b'{"a":1}', b'{"a":"\xc3\xa9"}', b"{}"}
))  # fmt: skip
pairs = st.lists(st.one_of(usual, usual, st.tuples(actions, documents)), max_size=8)
loose = st.lists(st.one_of(actions, documents), max_size=8)


@given(
    st.one_of(pairs.map(lambda some: [line for pair in some for line in pair]), loose),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.sampled_from(["", "a", 'b"\\']),
    st.sampled_from(["", "m"]),
    st.integers(0, 1),
)
def test_all_ways_read_a_body_alike(
    some: list[bytes], end: bytes, ended: bool, index: str, field: str, names: int
) -> None:
    body = end.join(some) + (end if ended else b"")
    one = reader(index, field, names_versions=names)
    assert read(one, body, whole=True) == read(one, body, whole=False)


@given(actions, st.lists(documents, min_size=1, max_size=4), st.sampled_from(["", "m"]))
def test_the_same_action_before_each_document(action: bytes, some: list[bytes], field: str) -> None:
    body = b"".join(b"%b\n%b\n" % (action, one) for one in some)
    one = reader("", field)
    assert read(one, body, whole=True) == read(one, body, whole=False)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    read(reader(), body, whole=True)
    read(reader(), b'{"index":{}}\n' + body, whole=True)


def test_usual_bodies_are_cut_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(codec.BulkReader, "_walk", never)
    docs = [b'{"n":%d}' % n for n in range(20)]
    for form in (
        b'{"index":{"_index":"a","_id":"%d"}}', b'{"create":{"_id":"%d"}}', b'{"index":{}}',
        b'{ "index" : { "_index" : "a" } }',
    ):  # fmt: skip
        body = b"".join(
            b"%b\n%b\n" % (form % n if b"%" in form else form, doc) for n, doc in enumerate(docs)
        )
        found = reader("path").read(body)
        assert found.parts[0].parsed.records.count == 20
        assert found == reader("path").read_quickly(body)


@pytest.mark.parametrize(
    "body",
    [
        b"\n" * 2**20, b"{" * 2**20, b'{"delete":{}}\n' * 2**17, b'{"index":{}}\n' * 2**17,
        b'{"index":{}}\n{}\n' * 2**17, b'{"index":' * 2**17, b'{"index":{}}\n' + b"[" * 2**20,
    ],
)  # fmt: skip
def test_hostile_bodies_take_little_memory(body: bytes) -> None:
    one = reader(records_max=10_000)
    with peak() as most:
        read(one, body, whole=True)
    assert most.bytes < 5 * len(body)


def test_an_answer_is_not_many_times_as_long_as_its_request() -> None:
    body = b'{"index":{}}\n-\n' * 1000
    found = reader("x" * 20, records_max=1000).read(body)
    assert len(found.answer) < 10 * len(body)
    assert len(found.parts[0].parsed.refused) == codec.LISTED_MAX
    assert found.parts[0].parsed.total == 1000
