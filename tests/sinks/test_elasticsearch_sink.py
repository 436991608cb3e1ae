"""The sink `elasticsearch`: which documents are there, and what is asked of the cluster."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.record import Records, Span
from ingestd.handlers.call import call, close
from ingestd.handlers.load import load
from ingestd.handlers.options import OptionError
from ingestd.handlers.outcome import Job, Result
from ingestd.sinks import elasticsearch
from ingestd.sinks.elasticsearch import ElasticsearchOptions
from tests.sinks.elasticsearch_server import FakeElasticsearch
from tests.sinks.http_server import BREAK, Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ingestd.handlers.outcome import SinkFinding

NOON = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC
BUSY = (429, {"type": "es_rejected_execution_exception", "reason": "rejected"})


@pytest.fixture
def cluster() -> Iterator[FakeElasticsearch]:
    one = FakeElasticsearch()
    yield one
    one.stop()


@pytest.fixture
def write(cluster: FakeElasticsearch) -> Callable[..., Result]:
    """One call with a batch."""

    def write(
        items: Sequence[Any],
        *,
        at: float = NOON,
        form: str = "json",
        lines: bool = False,
        **opts: Any,
    ) -> Result:
        raw = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in items]
        spec = load("elasticsearch", record_format=form, executor="thread")
        sink = spec.create({"url": cluster.url, **opts}, pipeline="Clicks")
        records = Records.lines(raw) if lines else Records.sized(raw)
        result = call(spec, sink, Job("j-1", 1, records, [Span(1, 0, len(raw))], "j", at))
        assert close(spec, sink) is None
        return result

    return write


def findings(cluster: FakeElasticsearch, **opts: Any) -> list[SinkFinding]:
    spec = load("elasticsearch", record_format="json", executor="thread")
    sink: Any = spec.create({"url": cluster.url, **opts})
    found = list(sink.check())
    close(spec, sink)
    return found


def errors(result: Result) -> list[tuple[int, str]]:
    assert result.failure is None
    return [(one.index, one.error) for one in result.rejections]


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elasticsearch, "_WAITS", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("lines", [False, True])
def test_documents_have_the_ids_of_their_records(cluster, write, lines: bool) -> None:
    assert errors(write([{"n": 1}, {"n": 2, "text": "é \n"}], lines=lines)) == []
    assert cluster.indices == {
        "ingestd-clicks-2023.11.14": {"j.1.0": {"n": 1}, "j.1.1": {"n": 2, "text": "é \n"}}
    }


def test_the_index_is_of_the_time_of_acceptance(cluster, write) -> None:
    for at in (NOON, NOON + 7200):
        write([{"n": 1}], at=at, index="logs-{pipeline}-%Y.%m.%dt%H")
        write([{"n": 1}], at=at, index="logs-{pipeline}-%Y.%m.%dt%H")
    assert {name: len(one) for name, one in cluster.indices.items()} == {
        "logs-clicks-2023.11.14t22": 1, "logs-clicks-2023.11.15t00": 1}  # fmt: skip


def test_pretty_printed_json_is_one_line(cluster, write) -> None:
    assert errors(write([b'{\n  "n": 1,\r\n  "a": [\n]}', b' {"n":2}'])) == []
    assert cluster.documents == [{"n": 1, "a": []}, {"n": 2}]


def test_what_is_no_object_is_rejected(cluster, write) -> None:
    result = errors(write([b"1", {"n": 1}, b"[{}]", b'"x"', b"null"]))
    assert [place for place, _ in result] == [0, 2, 3, 4]
    assert cluster.documents == [{"n": 1}]


def test_text_and_bytes(cluster, write) -> None:
    write([b'say "hi"', b'{"x":1}'], form="text", lines=True, index="t")
    write([b"a\nb", b"\xff"], form="bytes", index="b")
    assert list(cluster.indices["t"].values()) == [{"message": 'say "hi"'}, {"message": '{"x":1}'}]
    assert list(cluster.indices["b"].values()) == [{"message": "a\nb"}, {"base64": "/w=="}]


def test_a_reason_does_not_have_the_documents_value(cluster, write) -> None:
    ((place, why),) = errors(write([{"n": 1}, {"n": "geheim"}]))
    assert place == 1
    assert "failed to parse field [n] of type [long]" in why
    assert "For input string" in why
    assert "geheim" not in why


def test_postponed_documents_alone_are_sent_again(cluster, write, no_waits) -> None:
    cluster.item_script = [None, BUSY, None, BUSY]
    assert errors(write([{"n": n} for n in range(4)])) == []
    assert sorted(one["n"] for one in cluster.documents) == [0, 1, 2, 3]
    assert [one.body.count(b"\n") // 2 for one in cluster.asked] == [4, 2]


def test_what_stays_postponed_comes_again_and_is_no_records_fault(cluster, write, no_waits) -> None:
    cluster.item_script = [None, *[BUSY] * 4]
    result = write([{"n": n} for n in range(2)])
    assert result.failure is not None
    assert result.failure.reason == "unavailable"
    assert "es_rejected_execution_exception" in result.failure.error
    assert errors(write([{"n": n} for n in range(2)])) == []
    assert len(cluster.documents) == 2


def test_an_error_of_the_cluster_counts_as_a_try(cluster, write) -> None:
    cluster.item_script = [(500, {"type": "null_pointer_exception", "reason": "x"})]
    result = write([{"n": 1}, {"n": 2}])
    assert result.failure is not None
    assert result.failure.reason == "raised"


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (403, {"type": "security_exception", "reason": "action is unauthorized"}),
        (403, {"type": "cluster_block_exception", "reason": "index [x] blocked by: …"}),
        (400, {"type": "validation_exception", "reason": "this action would add [2] shards"}),
        (400, {"type": "illegal_argument_exception", "reason": "pipeline with id [p] does not …"}),
        (400, {"type": "illegal_argument_exception", "reason": "no write index is defined for …"}),
    ],
)
def test_errors_of_the_index_block(cluster, write, status: int, error: dict[str, Any]) -> None:
    cluster.item_script = [(status, error)]
    result = write([{"n": 1}])
    assert result.failure is not None
    assert result.failure.reason == "blocked"
    assert error["type"] in result.failure.error


def test_requests_are_bounded(cluster, write) -> None:
    assert errors(write([{"n": n} for n in range(100)], request_bytes_max="1KiB")) == []
    assert len(cluster.documents) == 100
    assert max(len(one.body) for one in cluster.asked) <= 1024
    assert len(cluster.asked) > 3


def test_413_splits_and_is_remembered(cluster, write) -> None:
    cluster.body_bytes_max = 2000
    items: list[Any] = [{"n": n} for n in range(200)]
    items[70] = {"n": 70, "long": "x" * 3000}
    ((place, why),) = errors(write(items))
    assert place == 70
    assert "3" in why
    assert len(cluster.documents) == 199


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(503), "unavailable"), (Answer(429, b"", (("Retry-After", "3"),)), "unavailable"),
        (Answer(401), "blocked"), (Answer(200, b"<html>"), "blocked"),
        (Answer(200, b'{"items":[]}'), "blocked"), (Answer(400, b"{}"), "raised"),
        (BREAK, "unavailable"), (Answer(200, b'{"took":' + b"[" * 5000), "blocked"),
        (Answer(200, b'{"items":[{"create":{"status":1,"error":{"type":"\xff"}}}]}'), "blocked"),
    ],
)  # fmt: skip
def test_answers_to_a_whole_request(cluster, write, answer: Answer, reason: str) -> None:
    cluster.script.append(answer)
    result = write([{"n": 1}])
    assert result.failure is not None
    assert result.failure.reason == reason
    assert errors(write([{"n": 1}])) == []
    assert cluster.documents == [{"n": 1}]


def test_an_ingest_pipeline(cluster, write) -> None:
    write([{"n": 1}], ingest_pipeline="geo ip", compress="gzip")
    (asked,) = cluster.asked
    assert asked.path.endswith("&pipeline=geo%20ip")
    assert asked.headers["content-encoding"] == "gzip"


def test_check(cluster, write) -> None:
    assert [one.text for one in findings(cluster)] == ["elasticsearch 8.19.0"]
    write([{"n": 1}], index="here")
    assert [one.level for one in findings(cluster, index="here")] == ["info"]
    cluster.settings = {"index.translog.durability": "async", "index.blocks.write": "true"}
    assert {one.level for one in findings(cluster, index="here")} == {"info", "error", "warning"}
    cluster.settings, cluster.aliases = {}, {"alias": "here"}
    assert "rollover" in findings(cluster, index="alias")[-1].text
    cluster.auto_create = False
    assert "auto_create_index" in findings(cluster, index="nowhere")[-1].text


def test_check_of_rights(cluster) -> None:
    opts = {"username": "u", "password": "p"}
    assert [one.level for one in findings(cluster, **opts)] == ["info"]
    cluster.rights = {"create_doc"}
    assert "auto_configure" in findings(cluster, **opts)[-1].text
    cluster.distribution = "opensearch"
    assert [one.text for one in findings(cluster, **opts)] == ["opensearch 3.1.0"]


@pytest.mark.parametrize(
    "options",
    [{"index": "Upper"}, {"index": "a b"}, {"index": ""}, {"index": "-x"}, {"index": "x-%Q"},
     {"index": "x-{name}"}, {"index": "x{"}, {"index": "x" * 201},
     {"api_key": "k", "username": "u", "password": "p"}, {"api_key": "a\nb"}],
)  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        ElasticsearchOptions.of(url="http://x", **options)
