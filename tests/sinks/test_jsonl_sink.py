from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.errors import HandlerLoadError
from ingestd.base.record import Records, Span
from ingestd.handlers.call import call, close
from ingestd.handlers.context import Context
from ingestd.handlers.load import load
from ingestd.handlers.outcome import Job
from ingestd.sinks.jsonl import JsonlOptions, JsonlSink, lines
from ingestd.sinks.sqlite import SqliteOptions, SqliteSink
from tests.real_input import real_input

ROOT = Path(__file__).parents[2]


def read(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(path.glob("*.jsonl")))


def test_json_lines_go_as_they_came_without_a_copy() -> None:
    records = Records.lines([b'{"a": 1}', b" [2] ", b'"\\u00e9"', b"1\r"])
    assert lines(records, "json") is records.payload


def test_pretty_json_becomes_one_line_each() -> None:
    pretty = [json.dumps({"a": [1, "\n\r"], "b": {}}, indent=2).encode(), b"[\r\n1]\n", b"2"]
    out = lines(Records.sized(pretty), "json")
    assert out.count(b"\n") == 3
    assert b"\r" not in out
    assert [json.loads(line) for line in out.splitlines()] == [json.loads(item) for item in pretty]


@pytest.mark.parametrize("layout", [Records.lines, Records.sized])
@pytest.mark.parametrize("record_format", ["text", "bytes"])
def test_text_and_bytes_become_json(layout, record_format) -> None:
    out = lines(layout([b'say "hi"', "é\u2028".encode(), b"\xff\x00", b""]), record_format)
    assert [json.loads(line) for line in out.split(b"\n")[:-1]] == [
        'say "hi"',
        "é\u2028",
        {"base64": "/wA="},
        "",
    ]


@given(st.lists(st.binary(max_size=20), max_size=10))
def test_any_bytes_are_one_line_each(items: list[bytes]) -> None:
    assert lines(Records.sized(items), "bytes").count(b"\n") == len(items)


JSON = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.lists(JSON, max_size=8), st.sampled_from([None, 0, 1, "\t"]))
def test_any_json_means_the_same_afterwards(values: list[object], indent) -> None:
    out = lines(Records.sized([json.dumps(v, indent=indent).encode() for v in values]), "json")
    assert [json.loads(line) for line in out.split(b"\n")[:-1]] == values


@pytest.mark.parametrize(
    ("context", "options", "folder"),
    [
        (Context(data_dir="{tmp}/d"), {}, "d/out"),
        (Context("clicks", data_dir="{tmp}/d"), {}, "d/out/clicks"),
        (Context(data_dir="{tmp}/d"), {"path": "{tmp}/elsewhere"}, "elsewhere"),
    ],
)
def test_where_it_writes(tmp_path, batch, context, options, folder) -> None:
    place = Context(context.pipeline, "json", context.data_dir.format(tmp=tmp_path))
    sink = JsonlSink(
        JsonlOptions.of(**{k: v.format(tmp=tmp_path) for k, v in options.items()}), context=place
    )
    sink(batch([b"1"]))
    sink.close()
    assert read(tmp_path / folder) == b"1\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compress": "lz4"}, "compress: 'lz4' is not none, gzip or zstd"),
        ({"rotate_bytes": "12 parsecs"}, "rotate_bytes: '12 parsecs' is not a size"),
        ({"rotate_bytes": 0}, "rotate_bytes: 0 is not"),
        ({"rotate_bytes": True}, "rotate_bytes: True is not"),
        ({"rotate_bytes": 1.5}, "rotate_bytes: 1.5 is not"),
        ({"path": ""}, "path: '' is not"),
        ({"path": 5}, "path: 5 is not"),
        ({"rotate_byte": 5}, "has no option 'rotate_byte'; did you mean 'rotate_bytes'?"),
        ({"context": 5}, "'context' is filled in by ingestd"),
    ],
)
def test_options_that_make_no_sense(options, says) -> None:
    spec = load("jsonl", record_format="json", executor="thread")
    with pytest.raises(HandlerLoadError) as caught:
        spec.create(options)
    assert says in str(caught.value)
    assert not [thread for thread in threading.enumerate() if "compressor" in thread.name]


def test_sizes_as_people_write_them(tmp_path: Path, batch) -> None:
    sink = JsonlSink(JsonlOptions.of(path=str(tmp_path), rotate_bytes="1KiB"))
    sink(batch([b"1" * 1000]))
    sink(batch([b"2" * 22]))
    assert len(list(tmp_path.glob("*.jsonl"))) == 1
    sink(batch([b"3"]))
    sink.close()
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


@pytest.mark.parametrize("executor", ["thread", "process"])
@pytest.mark.parametrize(
    ("record_format", "item", "line"),
    [("json", b'{"a":1}', b'{"a":1}\n'), ("text", b"a", b'"a"\n'), ("bytes", b"a", b'"a"\n')],
)
def test_through_the_loader(tmp_path, executor, record_format, item, line) -> None:
    spec = load("jsonl", record_format=record_format, executor=executor)
    sink = spec.create({}, data_dir=str(tmp_path))
    result = call(spec, sink, Job("j-1", 1, Records.lines([item]), [Span(1, 0, 1)], "j"))
    assert (result.rejections, result.failure) == ([], None)
    assert close(spec, sink) is None
    assert read(tmp_path / "out") == line


def test_a_disk_that_fails_is_a_failure_with_its_name(tmp_path: Path) -> None:
    spec = load("jsonl", record_format="json", executor="thread")
    (tmp_path / "out").write_text("")
    sink = spec.create({}, data_dir=str(tmp_path))
    result = call(spec, sink, Job("j-1", 1, Records.lines([b"1"]), [Span(1, 0, 1)], "j"))
    assert result.failure is not None
    assert "Error: " in result.failure.error
    assert str(tmp_path / "out") in result.failure.error
    assert close(spec, sink) is None


WRITER = """
import sys
from ingestd.base.record import Records, Span
from ingestd.handlers.batch import Batch
from ingestd.handlers.outcome import Job
from ingestd.sinks.jsonl import JsonlOptions, JsonlSink
sink = JsonlSink(JsonlOptions.of(path=sys.argv[1], rotate_bytes=20_000))
for number in range(40):
    items = [b'{"writer":"%s","batch":%d,"place":%d}' % (sys.argv[2].encode(), number, place)
             for place in range(25)]
    name = f"{sys.argv[2]}-{number}"
    sink(Batch(items, Job(name, 1, Records.lines(items), [Span(1, 0, 25)], "j")))
sink.close()
"""


def test_threads_and_processes_write_to_one_folder(tmp_path: Path, batch) -> None:
    """8 threads and 3 processes: every line whole, each there once, batches in one piece."""
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, f"p{n}"], cwd=ROOT)
        for n in range(3)
    ]

    def write(name: bytes) -> None:
        sink = JsonlSink(JsonlOptions.of(path=tmp_path, rotate_bytes=20_000))
        for number in range(40):
            text = b'{"writer":"%s","batch":%d,"place":%d}'
            sink(batch([text % (name, number, place) for place in range(25)]))
        sink.close()

    threads = [threading.Thread(target=write, args=(b"t%d" % n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in processes] == [0, 0, 0]

    found = []
    for file in tmp_path.glob("*.jsonl"):
        assert file.stat().st_size <= 20_000
        rows = [json.loads(line) for line in file.read_bytes().splitlines()]
        assert len(rows) % 25 == 0
        for start in range(0, len(rows), 25):
            whole = rows[start : start + 25]
            assert {(r["writer"], r["batch"]) for r in whole} == {
                (whole[0]["writer"], whole[0]["batch"])
            }
            assert [r["place"] for r in whole] == list(range(25))
        found += [(r["writer"], r["batch"], r["place"]) for r in rows]
    assert len(found) == len(set(found)) == 11 * 40 * 25


@pytest.mark.parametrize(
    ("name", "record_format"), [("nginxplus.ndjson", "json"), ("apache.log", "text")]
)
def test_real_records_come_out_as_they_went_in(tmp_path, batch, name, record_format) -> None:
    raw = real_input(name).read_bytes()
    items = raw.split(b"\n")[:-1]
    sink = JsonlSink(JsonlOptions.of(path=tmp_path), context=Context(record_format=record_format))
    for start in range(0, len(items), 100):
        sink(batch(items[start : start + 100]))
    sink.close()
    written = read(tmp_path)
    if record_format == "json":
        assert written == raw
    else:
        decoded = [json.loads(line) for line in written.split(b"\n")[:-1]]
        assert decoded == [item.decode() for item in items]


def findings(path: Path) -> list[list[tuple[str, str]]]:
    """What both sinks of a folder find."""
    sinks = (
        JsonlSink(JsonlOptions(path=str(path))),
        SqliteSink(SqliteOptions(path=str(path / "out.db"))),
    )
    return [[tuple(one) for one in sink.check()] for sink in sinks]


def test_a_check_finds_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert findings(tmp_path / "new" / "folder") == [[], []]
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    fault = ("error", f"{tmp_path}/file is a file and not a folder")
    assert findings(tmp_path / "file" / "below") == [[fault], [fault]]
    # Root, as whom tests may run, may write everywhere.
    monkeypatch.setattr("os.access", lambda *_: False)
    fault = ("error", f"{tmp_path} can't be written to by the user with the id {os.geteuid()}")
    assert findings(tmp_path / "new") == [[fault], [fault]]
