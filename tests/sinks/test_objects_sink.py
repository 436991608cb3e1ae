"""The sink `objects` in a local folder, and against a server that honours If-None-Match."""

from __future__ import annotations

import gzip
import importlib.util
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest

from ingestd.base.record import Records, Span
from ingestd.handlers.options import OptionError
from ingestd.handlers.outcome import Job
from ingestd.handlers.runner import HandlerConfig
from ingestd.sinks.objects import ObjectsOptions
from tests.sinks.contract.adapter import Worker, job
from tests.sinks.http_server import Answer, Asked, FakeServer
from tests.sinks.s3_server import BUCKET, KEY_ID, SECRET, MotoServer, need

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

AT = 1767225600.0 + 3 * 3600  # 2026-01-01T03
FOLDER = "dt=2026-01-01/hh=03"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("obstore", "pyarrow")),
        reason="obstore or pyarrow is missing: requirements/sinks.txt",
    ),
]


def worker(folder: Path, record_format: str = "json", **options: Any) -> Worker:
    given = {"url": f"file://{folder}/out", **options}
    return Worker(HandlerConfig("objects", given, record_format, "thread", "default", b"/x"))


def of(items: list[bytes], batch: int = 1, lineage: tuple[int, ...] = ()) -> Job:
    records, spans = Records.lines(items), [Span(1, 0, len(items))]
    return Job(f"j-{batch}", 1, records, spans, "j", AT, [f"j-{n}" for n in lineage])


def files(folder: Path) -> list[str]:
    out = folder / "out"
    return sorted(str(one.relative_to(out)) for one in out.rglob("*") if one.is_file())


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    from pyarrow import parquet

    return parquet.ParquetFile(folder / "out" / name).read().to_pylist()


@pytest.mark.parametrize(("compress", "suffix"), [("none", ""), ("gzip", ".gz"), ("zstd", ".zst")])
def test_ndjson_is_what_came(tmp_path: Path, compress: str, suffix: str) -> None:
    items = [b'{"a": 1}', b"[2]", b'"\xc3\xa9"']
    with worker(tmp_path, compress=compress) as sink:
        for _ in range(2):
            assert sink.run(of(items)).failure is None
    assert files(tmp_path) == [f"{FOLDER}/j-1.ndjson{suffix}"]
    content = (tmp_path / "out" / FOLDER / f"j-1.ndjson{suffix}").read_bytes()
    if compress == "gzip":
        content = gzip.decompress(content)
    elif compress == "zstd":
        zstd = pytest.importorskip("backports.zstd")
        content = zstd.decompress(content)
    assert content == b"\n".join(items) + b"\n"


@pytest.mark.parametrize("record_format", ["text", "bytes"])
@pytest.mark.parametrize("kind", ["ndjson", "parquet"])
def test_text_and_bytes(tmp_path: Path, record_format: str, kind: str) -> None:
    with worker(tmp_path, record_format, format=kind, compress="none") as sink:
        assert sink.run(of([b"a", b"b"])).failure is None
    name = f"{FOLDER}/j-1.{kind}"
    if kind == "ndjson":
        assert (tmp_path / "out" / name).read_bytes() == b'"a"\n"b"\n'
    else:
        wanted = ["a", "b"] if record_format == "text" else [b"a", b"b"]
        assert [row["record"] for row in rows(tmp_path, name)] == wanted


def test_columns_are_pinned_by_the_first_batch(tmp_path: Path) -> None:
    first = [b'{"n":1,"x":1,"s":"a","b":true,"o":{"p":[1]}}', b'{"n":2,"x":2.5,"z":null}']
    later = [b'{"n":3,"new":{"q":1},"z":1}', b'{"n":"4"}', b'{"n":5,"x":7,"o":"text"}', b"6",
             b'{"n":9223372036854775808}']  # fmt: skip
    with worker(tmp_path, format="parquet") as sink:
        assert sink.run(of(first)).rejections == []
    with worker(tmp_path, format="parquet") as sink:
        for _ in range(2):
            result = sink.run(of(later, 2))
            assert result.failure is None
            assert [one.index for one in result.rejections] == [1, 3, 4]
    pinned = json.loads((tmp_path / "out" / "_schema.json").read_text())
    assert pinned == {"n": "int64", "x": "double", "s": "text", "b": "bool", "o": "json"}
    one, two = rows(tmp_path, f"{FOLDER}/j-1.parquet")
    assert one == {"n": 1, "x": 1.0, "s": "a", "b": True, "o": '{"p":[1]}', "_extra": None}
    assert (two["x"], two["_extra"]) == (2.5, '{"z":null}')
    three, five = rows(tmp_path, f"{FOLDER}/j-2.parquet")
    assert json.loads(three["_extra"]) == {"new": {"q": 1}, "z": 1}
    assert (five["x"], five["o"]) == (7.0, '"text"')


def test_keys_without_number_are_no_columns(tmp_path: Path) -> None:
    items = [b'{"k%d":%d}' % (n, n) for n in range(3000)]
    with worker(tmp_path, format="parquet") as sink:
        assert sink.run(of(items)).failure is None
    assert len(json.loads((tmp_path / "out" / "_schema.json").read_bytes())) == 500
    found = rows(tmp_path, f"{FOLDER}/j-1.parquet")
    assert found[499]["k499"] == 499
    assert json.loads(found[2999]["_extra"]) == {"k2999": 2999}


def test_both_ways_to_a_table_give_the_same(tmp_path: Path) -> None:
    plain = [b'{"n":%d,"s":"2026-01-01","d":%d}' % (n, n) for n in range(50)]
    columns = {"n": "int64", "s": "text", "d": "double"}
    with worker(tmp_path, format="parquet", columns=columns) as sink:
        assert sink.run(of(plain)).failure is None
        assert sink.run(of([*plain, b'{"q":1}'], 2)).failure is None
    fast = rows(tmp_path, f"{FOLDER}/j-1.parquet")
    slow = rows(tmp_path, f"{FOLDER}/j-2.parquet")
    assert fast == slow[:-1]
    from pyarrow import parquet

    folder = tmp_path / "out" / FOLDER
    schemas = [parquet.ParquetFile(folder / f"j-{n}.parquet").schema_arrow for n in (1, 2)]
    assert schemas[0] == schemas[1]


def test_columns_widen_only_when_it_is_said(tmp_path: Path) -> None:
    with worker(tmp_path, format="parquet", columns={"n": "int64"}) as sink:
        assert sink.run(of([b'{"n":1}'])).failure is None
    with worker(tmp_path, format="parquet", columns={"n": "double", "m": "text"}) as sink:
        assert sink.run(of([b'{"n":1.5,"m":"a"}'], 2)).failure is None
    pinned = json.loads((tmp_path / "out" / "_schema.json").read_text())
    assert pinned == {"n": "double", "m": "text"}
    with worker(tmp_path, format="parquet", columns={"m": "bool"}) as sink:
        failure = sink.run(of([b'{"m":true}'], 3)).failure
        assert failure is not None
        assert failure.reason == "blocked"
        assert [one.level for one in sink.check()][-1] == "error"


@pytest.mark.parametrize("kind", ["ndjson", "parquet"])
def test_partitions(tmp_path: Path, kind: str) -> None:
    items = [b'{"u":"a/..","n":1}', b'{"u":7,"n":2}', b'{"n":3}', b'{"u":"a/..","n":4}']
    with worker(tmp_path, partition_by="u", format=kind, compress="none") as sink:
        for _ in range(2):
            assert sink.run(of(items)).failure is None
        assert sink.run(of(items[:2], 2, (1,))).failure is None  # a part of it
    found = [name for name in files(tmp_path) if not name.startswith("_")]
    assert found == sorted(
        f"{FOLDER}/u={value}/j-1.{kind}" for value in ("7", "a%2F..", "__HIVE_DEFAULT_PARTITION__")
    )


def test_partitions_are_bounded(tmp_path: Path) -> None:
    items = [b'{"u":%d}' % n for n in range(20)]
    with worker(tmp_path, partition_by="u", partitions_max=10, compress="none") as sink:
        assert sink.run(of(items)).failure is None
        assert sink.run(of(items[:5], 2, (1,))).failure is None
    assert files(tmp_path) == [f"{FOLDER}/_many/j-1.ndjson"]


def test_a_value_that_is_too_long_for_a_name_is_cut(tmp_path: Path) -> None:
    values = ["é" * 100, "😀" * 64, "a b" * 66, "x" * 200]
    items = [b'{"u":"%b"}' % value.encode() for value in values]
    with worker(tmp_path, partition_by="u", compress="none") as sink:
        assert sink.run(of([*items, b'{"u":1}'])).failure is None
    found = {unquote(name.split("/")[-2]).removeprefix("u=") for name in files(tmp_path)}
    assert found == {"é" * 42, "😀" * 21, "a b" * 50 + "a", "x" * 200, "1"}


def test_no_integer_is_rounded(tmp_path: Path) -> None:
    with worker(tmp_path, format="parquet", columns={"a": "double"}) as sink:
        for batch, number in enumerate([1, 1e300, 2**60, 2**53 + 1, 10**400]):
            assert sink.run(of([b'{"a":%b}' % json.dumps(number).encode()], batch)).failure is None
    found = [rows(tmp_path, f"{FOLDER}/j-{batch}.parquet")[0] for batch in range(5)]
    assert [row["a"] for row in found] == [1, 1e300, 2**60, None, None]
    assert [json.loads(row["_extra"]) for row in found[3:]] == [{"a": 2**53 + 1}, {"a": 10**400}]
    with worker(tmp_path / "b", format="parquet") as sink:  # columns of the first batch
        assert sink.run(of([b'{"a":1}', b'{"a":9223372036854775808}'])).failure is None
    found = rows(tmp_path / "b", f"{FOLDER}/j-1.parquet")
    assert [row["a"] for row in found] == ["1", "9223372036854775808"]


def test_a_record_that_cannot_be_decoded_costs_no_other(tmp_path: Path) -> None:
    with worker(tmp_path, format="parquet") as sink:
        result = sink.run(of([b'{"u":1}', b'{"u":1e999}', b'{"u":2}']))
    assert (result.failure, [one.index for one in result.rejections]) == (None, [1])


def test_a_part_writes_what_its_ancestor_has_not(tmp_path: Path) -> None:
    with worker(tmp_path, partition_by="u", compress="none") as sink:
        assert sink.run(of([b'{"u":1}'], 1)).failure is None
        assert sink.run(of([b'{"u":1}', b'{"u":2}'], 2, (1,))).failure is None
    assert files(tmp_path) == [f"{FOLDER}/u=1/j-1.ndjson", f"{FOLDER}/u=2/j-2.ndjson"]


def test_a_folder_that_cannot_be_written_blocks(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with worker(tmp_path) as sink:
        failure = sink.run(of([b"1"])).failure
        assert failure is not None
        assert failure.reason in {"blocked", "unavailable"}


def test_a_store_that_honours_if_none_match(tmp_path: Path) -> None:
    need("moto")
    server = MotoServer()
    try:
        options = {
            "url": f"s3://{BUCKET}/a/b", "endpoint": server.endpoint, "region": "us-east-1",
            "access_key_id": KEY_ID, "secret_access_key": SECRET, "format": "parquet",
        }  # fmt: skip
        with worker(tmp_path, **options) as sink:
            assert [one.level for one in sink.check()] == ["info"]
            for _ in range(2):
                assert sink.run(job(range(100))).failure is None
            assert sink.run(job(range(50), 2, [1])).failure is None
            assert [one.level for one in sink.check()] == ["info", "info"]
        import obstore
        from obstore.store import from_url

        store = from_url(options["url"], config={
            "endpoint": server.endpoint, "access_key_id": KEY_ID, "secret_access_key": SECRET,
            "region": "us-east-1"}, client_options={"allow_http": True})  # fmt: skip
        names = [one["path"] for page in obstore.list(store) for one in page]
        assert [name for name in names if "parquet" in name] == ["dt=1970-01-01/hh=00/j-1.parquet"]
        with worker(tmp_path, **{**options, "url": "s3://nosuch/x"}) as sink:
            failure = sink.run(job(range(10))).failure
            assert failure is not None
            assert failure.reason == "blocked"
    finally:
        server.server.stop()


class ScriptedS3(FakeServer):
    """Creates and reads objects; of one that is not there it says what `missing` is."""

    missing = 404

    def answer(self, asked: Asked) -> Answer:
        about = (("ETag", '"1"'), ("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT"))
        there = {one.path for one in self.created}
        if asked.method == "PUT" and asked.path not in there:
            self.created.append(asked)
            return Answer(200, b"", about)
        if asked.method == "PUT":
            return Answer(412)
        found = [one.body for one in self.created if one.path == asked.path]
        return Answer(200, found[0], about) if found else Answer(self.missing)

    def __init__(self) -> None:
        self.created: list[Asked] = []
        super().__init__()


@pytest.fixture
def s3() -> Iterator[ScriptedS3]:
    server = ScriptedS3()
    yield server
    server.stop()


def s3_options(server: ScriptedS3, **options: Any) -> dict[str, Any]:
    return {
        "url": f"s3://{BUCKET}/a", "endpoint": server.url, "region": "us-east-1",
        "access_key_id": KEY_ID, "secret_access_key": SECRET, **options,
    }  # fmt: skip


def test_a_write_that_collides_with_another_one_is_not_done(tmp_path: Path, s3: ScriptedS3) -> None:
    """S3 says 409 while another request writes the object, which may be broken off."""
    s3.script.append(Answer(409, b"<Error><Code>ConditionalRequestConflict</Code></Error>"))
    with worker(tmp_path, **s3_options(s3)) as sink:
        failure = sink.run(of([b"1"])).failure
        assert failure is not None
        assert (failure.reason, s3.created) == ("unavailable", [])
        assert sink.run(of([b"1"])).failure is None
        assert sink.run(of([b"1"])).failure is None
    assert len(s3.created) == 1


def test_a_missing_right_to_list_is_found_before_it_is_needed(
    tmp_path: Path, s3: ScriptedS3
) -> None:
    """Without `s3:ListBucket` S3 says 403 of what is not there."""
    s3.missing = 403
    with worker(tmp_path, **s3_options(s3)) as sink:
        assert any(one.level == "error" and "ListBucket" in one.text for one in sink.check())
        failure = sink.run(of([b"1"], 2, (1,))).failure
        assert failure is not None
        assert failure.reason == "blocked"
        assert "ListBucket" in failure.error


def test_columns_of_an_endless_object_are_not_read(tmp_path: Path, s3: ScriptedS3) -> None:
    about = (("ETag", '"1"'), ("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT"))
    s3.script.append(Answer(200, bytes(8 * 1024**2), about))
    with worker(tmp_path, **s3_options(s3, format="parquet")) as sink:
        failure = sink.run(of([b'{"a":1}'])).failure
        assert failure is not None
        assert failure.reason == "blocked"
        assert "_schema.json: more than" in failure.error


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        ({"url": f"s3://{BUCKET}/a", "region": "x"}, {"AWS_ENDPOINT_URL": "minio:9000"}),
        ({"url": "az://container/a"}, {}),
    ],
)
def test_no_record_is_given_up_for_a_client_that_cannot_be_made(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    variables: dict[str, str],
) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        **variables,
    }.items():
        monkeypatch.setenv(name, value)
    with worker(tmp_path, **options) as sink:
        failure = sink.run(of([b"1"])).failure
        assert failure is not None
        assert failure.reason == "blocked"


def test_duckdb_reads_it(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    with worker(tmp_path, format="parquet") as sink:
        for batch in range(3):
            assert sink.run(job(range(batch * 10, batch * 10 + 10), batch + 1)).failure is None
    found = duckdb.sql(f"SELECT count(*), sum(n) FROM '{tmp_path}/out/**/*.parquet'").fetchall()
    assert found == [(30, sum(range(30)))]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({}, "url"),
        ({"url": "ftp://x/"}, "url"),
        ({"url": "file://x/y"}, "url"),
        ({"url": "s3://id:hidden@x/"}, "url"),
        ({"url": "s3://x", "access_key_id": "x"}, "access_key_id"),
        ({"url": "s3://x", "path": "../y"}, "path"),
        ({"url": "s3://x", "columns": {"a": "int64"}}, "columns"),
        ({"url": "s3://x", "columns": {"a": "int7"}}, "columns"),
        ({"url": "s3://x", "partitions_max": 0}, "partitions_max"),
        ({"url": "s3://x", "timeout": "0s"}, "timeout"),
        ({"url": "s3://x", "endpoint": "minio:9000"}, "endpoint"),
        ({"url": "s3://x", "endpoint": "https:///x"}, "endpoint"),
        ({"url": "s3://x", "endpoint": "https://me:hidden@x"}, "endpoint"),
        ({"url": "s3://x", "access_key_id": "a\n", "secret_access_key": "hidden"}, "access_key_id"),
        ({"url": "s3://x", "path": "a//b"}, "path"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], part: str) -> None:
    with pytest.raises(OptionError, match=part) as caught:
        ObjectsOptions.of(**options)
    assert "hidden" not in str(caught.value)
