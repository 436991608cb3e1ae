"""The sink `clickhouse`: what it asks and sends, and with the engine itself what is stored."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.record import Records, Span
from ingestd.handlers.call import call, close
from ingestd.handlers.load import load
from ingestd.handlers.options import OptionError
from ingestd.handlers.outcome import Job, Result
from ingestd.sinks.clickhouse import ClickHouseOptions
from tests.sinks.clickhouse_server import ChdbServer, FakeClickHouse, failed
from tests.sinks.http_server import BREAK, Answer, FakeServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ingestd.handlers.outcome import SinkFinding

needs_engine = pytest.mark.slow


@pytest.fixture
def fake() -> Iterator[FakeClickHouse]:
    one = FakeClickHouse()
    yield one
    one.stop()


@pytest.fixture
def engine() -> Iterator[Callable[..., ChdbServer]]:
    made: list[ChdbServer] = []

    def engine(definition: str, **more: Any) -> ChdbServer:
        made.append(ChdbServer(definition, **more))
        return made[-1]

    yield engine
    for one in made:
        one.drop()


def write(
    server: FakeServer, items: Sequence[Any], batch: int = 1, *, first: int = 0,
    lineage: Sequence[str] = (), form: str = "json", lines: bool = False, **opts: Any,
) -> Result:  # fmt: skip
    """One call with a batch."""
    raw = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in items]
    spec = load("clickhouse", record_format=form, executor="thread")
    sink = spec.create(options(server, **opts))
    records = Records.lines(raw) if lines else Records.sized(raw)
    spans = [Span(1, first, len(raw))]
    result = call(spec, sink, Job(f"j-{batch}", 1, records, spans, "j", 0.0, list(lineage)))
    assert close(spec, sink) is None
    return result


def options(server: FakeServer, **opts: Any) -> dict[str, Any]:
    given = {"url": server.url, "table": "t", "username": "u", "password": "p", **opts}
    if isinstance(server, ChdbServer):
        given["database"] = server.database
    return given


def findings(server: FakeServer, **opts: Any) -> list[SinkFinding]:
    spec = load("clickhouse", record_format="json", executor="thread")
    sink: Any = spec.create(options(server, **opts))
    found = list(sink.check())
    close(spec, sink)
    return found


def errors(result: Result) -> list[tuple[int, str]]:
    assert result.failure is None, result.failure
    return [(one.index, one.error) for one in result.rejections]


def reason(result: Result) -> str:
    assert result.failure is not None
    return result.failure.reason


# -- requests --------------------------------------------------------------------------------------


def test_an_insert(fake: FakeClickHouse) -> None:
    items = [{"n": 1}, b"{}", b' {\n"n":2}']
    assert errors(write(fake, items, database="d`b", settings={"insert_quorum": "2"})) == []
    ((query, body),) = fake.inserted
    assert query["query"] == "INSERT INTO `d\\`b`.`t` FORMAT JSONEachRow"
    wanted = {
        "insert_deduplication_token": "j-1", "async_insert": "0", "wait_end_of_query": "1",
        "input_format_parallel_parsing": "0", "insert_quorum": "2", "database": "d`b",
        "input_format_skip_unknown_fields": "0", "date_time_input_format": "best_effort",
    }  # fmt: skip
    assert wanted.items() <= query.items()
    assert [json.loads(line) for line in body.splitlines()] == [
        {"_id": "j.1.0", "n": 1}, {"_id": "j.1.1"}, {"_id": "j.1.2", "n": 2}]  # fmt: skip


def test_a_table_without_ids_gets_rows_as_they_came(fake: FakeClickHouse) -> None:
    fake.columns = ["n"]
    assert errors(write(fake, [b'{"n":1}', b'{"n": 2}'], lines=True, lineage=["j-0"])) == []
    assert fake.inserted[0][1] == b'{"n":1}\n{"n": 2}\n'


def test_what_is_no_object_is_rejected(fake: FakeClickHouse) -> None:
    assert [place for place, _ in errors(write(fake, [b"1", {"n": 1}, b"[1]"]))] == [0, 2]


def test_text_and_bytes(fake: FakeClickHouse) -> None:
    fake.columns = ["message"]
    assert errors(write(fake, [b"a\nb", b"\xff"], form="bytes")) == []
    assert fake.inserted[0][1] == b'{"message":"a\\nb"}\n{"base64":"/w=="}\n'


def row_error(number: int) -> Answer:
    return failed(
        27,
        f"Cannot parse input: expected '\"' before: 'geheim\"}}\\n': (while reading the"
        f" value of key n): (at row {number})\n: While executing X. (CANNOT_PARSE)",
    )


def test_rows_that_the_server_names_are_refused_alone(fake: FakeClickHouse) -> None:
    # The question for the table and for its columns come first.
    fake.script.extend([None, None, row_error(2), row_error(2), row_error(3)])
    refused = errors(write(fake, [{"n": n} for n in range(5)]))
    assert [place for place, _ in refused] == [1, 2, 4]
    assert "while reading the value of key n" in refused[0][1]
    assert "geheim" not in refused[0][1]
    ((query, body),) = fake.inserted
    assert [json.loads(line)["n"] for line in body.splitlines()] == [0, 3]
    assert query["insert_deduplication_token"] == "j-1"


@pytest.mark.parametrize("number", [0, 6, 99])
def test_a_number_that_no_row_has_is_the_batchs(fake: FakeClickHouse, number: int) -> None:
    fake.script.extend([None, None, row_error(number)])
    assert reason(write(fake, [{"n": n} for n in range(5)])) == "raised"


def test_a_number_that_goes_back_is_the_batchs(fake: FakeClickHouse) -> None:
    fake.script.extend([None, None, row_error(3), row_error(1)])
    assert reason(write(fake, [{"n": n} for n in range(5)])) == "raised"


def test_a_connection_that_breaks_at_the_answer_asks_again_under_the_same_token(
    fake: FakeClickHouse,
) -> None:
    fake.script.extend([None, None, BREAK])
    assert errors(write(fake, [{"n": 1}])) == []
    first, second = fake.inserted
    assert first == second


@pytest.mark.slow
def test_too_many_rows_that_cannot_be_read_split_the_batch(fake: FakeClickHouse) -> None:
    fake.script.extend([None, None, *[row_error(1)] * 101])
    result = write(fake, [{"n": n} for n in range(200)])
    assert reason(result) == "raised"
    assert "more than 100 rows" in result.failure.error


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (failed(60, "Table d.t does not exist"), "blocked"),
        (failed(497, "Not enough privileges"), "blocked"),
        (failed(516, "Authentication failed"), "blocked"),
        (failed(115, "Unknown setting x"), "blocked"),
        (failed(252, "Too many parts (3000)"), "unavailable"),
        (failed(252, "Too many partitions for single INSERT block (more than 100)"), "raised"),
        (failed(241, "Memory limit exceeded"), "unavailable"),
        (failed(999, "Keeper: Connection loss"), "unavailable"),
        (failed(49, "Logical error"), "raised"),
        (Answer(503, b"no healthy upstream"), "unavailable"),
        (Answer(429, b"", (("Retry-After", "2"),)), "unavailable"),
        (Answer(413), "raised"), (Answer(404, b"<html>"), "blocked"),
        (Answer(200, b"Code: 241. DB::Exception: Memory limit exceeded",
                (("X-ClickHouse-Exception-Code", "241"),)), "unavailable"),
        # The status goes before the insert fails, as with send_progress_in_http_headers.
        (Answer(200, b"Code: 241. DB::Exception: Memory limit exceeded"), "unavailable"),
        (Answer(200, b"\r\n__exception__\r\nabcdefghijklmnop\r\nCode: 252. DB::Exception: Too many"
                b" parts (3000)\r\n"), "unavailable"),
        (Answer(200, b"what a proxy says"), "raised"),
    ],
)  # fmt: skip
def test_classes_of_errors(fake: FakeClickHouse, answer: Answer, what: str) -> None:
    fake.script.extend([None, None, answer])
    result = write(fake, [{"n": 1}])
    assert reason(result) == what
    assert result.rejections == []


@pytest.mark.parametrize(
    ("engine", "definition", "server_window", "columns", "problem"),
    [
        ("MergeTree", "", 0, ["_id"], "MODIFY SETTING"),
        ("ReplacingMergeTree", "", 100, ["n"], "no column _id"),
        ("MergeTree", "SETTINGS non_replicated_deduplication_window = 0", 100, ["_id"], "MODIFY"),
        ("Memory", "", 100, ["_id"], "engine Memory"),
        ("Distributed", "", 100, ["_id"], "engine Distributed"),
        ("MergeTree", "SETTINGS non_replicated_deduplication_window = 9", 0, ["_id"], ""),
        ("MergeTree", "SETTINGS index_granularity = 8192", 100, ["_id"], ""),
        ("ReplicatedMergeTree", "", 1000, ["_id"], ""),
        ("ReplicatedMergeTree", "SETTINGS replicated_deduplication_window = 0", 9, ["_id"], "no"),
        ("SharedMergeTree", "", 1000, ["_id"], ""),
    ],
)  # fmt: skip
def test_exactly_once_is_refused_where_it_cannot_be(
    fake: FakeClickHouse, engine: str, definition: str, server_window: int, columns: list[str],
    problem: str,
) -> None:  # fmt: skip
    fake.engine, fake.definition, fake.columns = engine, definition, columns
    fake.server_window = server_window
    result = write(fake, [{"n": 1}], exactly_once=True)
    found = findings(fake, exactly_once=True)
    if problem:
        assert reason(result) == "blocked"
        assert problem in result.failure.error
        assert [one.level for one in found] == ["info", "info", "error"]
        assert findings(fake)[-1].level == "warning"
    else:
        assert errors(result) == []
        assert [one.level for one in found] == ["info", "info"]
    assert errors(write(fake, [{"n": 1}])) == []  # at least once, it may be


def test_check_tells_of_views(fake: FakeClickHouse) -> None:
    fake.views, fake.server_window = 2, 100
    assert "2 materialized views" in findings(fake)[-1].text


def test_a_table_that_is_not_there(fake: FakeClickHouse) -> None:
    fake.is_there = False
    assert reason(write(fake, [{"n": 1}])) == "blocked"


@pytest.mark.parametrize(
    "options",
    [{"table": ""}, {"database": ""}, {"settings": {"async_insert": "1"}},
     {"settings": {"password": "x"}}],
)  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        ClickHouseOptions.of(url="http://x", **options)


# -- the engine ------------------------------------------------------------------------------------


@needs_engine
def test_types(engine) -> None:
    server = engine(
        "i Int64, u UInt64, f Float64, d Decimal(38, 10), s String, t DateTime64(3, 'UTC'),"
        " day Date, b Bool, a Array(Int32), m Map(String, Int64), o Nullable(Int32), x UUID,"
        " j JSON, e Enum('a' = 1, 'b' = 2)"
    )
    record = {
        "i": -(2**63), "u": 2**64 - 1, "f": 1.5, "d": "12345678901234567890.5", "s": "é\0\n\"",
        "t": "2026-01-31T09:00:00.123Z", "day": "2026-01-31", "b": True, "a": [1, 2],
        "m": {"k": 1}, "o": None, "x": "61f0c404-5cb3-11e7-907b-a6006ad3dba0",
        "j": {"a": {"b": [1, "x"]}}, "e": "b",
    }  # fmt: skip
    assert errors(write(server, [record])) == []
    (row,) = server.rows()
    assert (int(row["i"]), int(row["u"]), row["s"]) == (-(2**63), 2**64 - 1, 'é\0\n"')
    assert (row["t"], row["a"], row["o"]) == ("2026-01-31 09:00:00.123", [1, 2], None)
    assert (row["b"], row["e"], row["m"]) == (True, "b", {"k": row["m"]["k"]})


@needs_engine
@pytest.mark.parametrize("bad", [
    {"n": "x"}, {"n": 1.5}, {"n": {}}, {"n": 1, "t": "no time"},
    {"n": 1, "new": 1}, {"n": 1, "_id": "mine"}, b'{"n":1', {"n": -5},
])  # fmt: skip
def test_what_does_not_fit_costs_one_record(engine, bad: Any) -> None:
    server = engine("n Int64, t DateTime, _id String, CONSTRAINT c CHECK n >= 0")
    items = [{"n": n} for n in range(1000)]
    items[700] = bad
    refused = errors(write(server, items))
    assert [place for place, _ in refused] == [700]
    assert refused[0][1]
    assert len(server.rows()) == 999
    assert errors(write(server, items)) == refused
    assert len(server.rows()) == 999


@needs_engine
def test_unknown_fields_can_be_left_out(engine) -> None:
    server = engine("n Int64")
    assert errors(write(server, [{"n": 1, "new": 2}], unknown_fields="skip")) == []
    assert server.rows() in ([{"n": 1}], [{"n": "1"}])


@needs_engine
def test_a_large_block_is_one_block(engine) -> None:
    server = engine("n Int64, _id String")
    items = [b'{"n":%d}' % n for n in range(200_000)]
    for _ in range(2):
        assert errors(write(server, items, lines=True)) == []
    (count,) = server.sql(f"SELECT count() AS c FROM {server.database}.t").splitlines()
    assert int(json.loads(count)["c"]) == 200_000


@needs_engine
def test_partitions_are_known_one_by_one(engine) -> None:
    server = engine("n Int64, _id String")
    server.sql(
        f"CREATE TABLE {server.database}.p (n Int64, _id String) ENGINE = MergeTree ORDER BY n"
        " PARTITION BY n % 7 SETTINGS non_replicated_deduplication_window = 1000"
    )
    for _ in range(2):
        assert errors(write(server, [{"n": n} for n in range(100)], table="p")) == []
    (count,) = server.sql(f"SELECT count() AS c FROM {server.database}.p").splitlines()
    assert int(json.loads(count)["c"]) == 100


@needs_engine
def test_without_a_window_a_batch_is_there_twice_and_check_says_so(engine) -> None:
    server = engine("n Int64, _id String", window=0)
    for _ in range(2):
        assert errors(write(server, [{"n": 1}])) == []
    assert len(server.rows()) == 2
    assert [one.level for one in findings(server)] == ["info", "info", "warning"]
    assert reason(write(server, [{"n": 1}], exactly_once=True)) == "blocked"


@needs_engine
def test_a_part_asks_which_of_its_records_are_there(engine) -> None:
    server = engine("n Int64, _id String")
    items = [{"n": n} for n in range(30_000)]
    assert errors(write(server, items)) == []
    assert errors(write(server, items[:20_000], 2, lineage=["j-1"])) == []
    assert errors(write(server, items[20_000:], 3, first=20_000, lineage=["j-1"])) == []
    assert len(server.rows()) == 30_000
