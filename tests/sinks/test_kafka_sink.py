"""The sink `kafka`: messages, errors and transactions, with the brokers that librdkafka brings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.record import Records, Span
from ingestd.handlers.call import call, close
from ingestd.handlers.load import load
from ingestd.handlers.options import OptionError
from ingestd.handlers.outcome import Job, Result
from ingestd.sinks.kafka.ledger import KafkaLedger
from ingestd.sinks.kafka.options import KafkaOptions
from tests.sinks.kafka_cluster import PRODUCE, Cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from ingestd.handlers.outcome import SinkFinding

needs_brokers = pytest.mark.slow
AT = 1_700_000_000.0
INVALID_RECORD, TOO_LARGE, NOT_ENOUGH_REPLICAS, NOT_ALLOWED = 87, 10, 19, 29
NO_TOPIC, NO_NAME = 3, 17


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    one = Cluster(3)
    one.make("t", 4)
    one.make("ledger")
    yield one
    one.close()


class Sink:
    """The sink in one worker."""

    def __init__(self, cluster: Cluster, folder: Path, form: str = "json", **opts: Any) -> None:
        self.spec = load("kafka", record_format=form, executor="thread")
        options = {
            "brokers": cluster.bootstrap, "topic": "t", "ledger_topic": "ledger",
            "timeout": "30s", **opts,
        }  # fmt: skip
        self.sink: Any = self.spec.create(options, pipeline="clicks", data_dir=str(folder))

    def write(self, items: Sequence[Any], batch: int = 1, lineage: Sequence[str] = ()) -> Result:
        raw = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in items]
        spans = [Span(1, 0, len(raw))]
        return call(self.spec, self.sink, Job(
            f"j-{batch}", 1, Records.sized(raw), spans, "j", AT, list(lineage)))  # fmt: skip

    def check(self) -> list[SinkFinding]:
        return list(self.sink.check())

    def close(self) -> None:
        assert close(self.spec, self.sink) is None


@pytest.fixture
def sink(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., Sink]]:
    made: list[Sink] = []

    def sink(form: str = "json", **opts: Any) -> Sink:
        made.append(Sink(cluster, tmp_path, form, **opts))
        return made[-1]

    yield sink
    for one in made:
        one.close()


def errors(result: Result) -> list[tuple[int, str]]:
    assert result.failure is None, result.failure
    return [(one.index, one.error) for one in result.rejections]


def reason(result: Result) -> str:
    assert result.failure is not None
    return result.failure.reason


@needs_brokers
def test_a_message(cluster: Cluster, sink) -> None:
    one = sink(key="{user.id}", headers={"id": "{_id}", "b": "{_batch} of {_pipeline}", "x": "{x}"})
    assert errors(one.write([b'{"user": {"id": 7},\n "n": 1.50}'])) == []
    (read,) = cluster.read("t")
    assert (read.key, read.value) == (b"7", b'{"user": {"id": 7},\n "n": 1.50}')
    assert read.headers == [("id", b"j.1.0"), ("b", b"j-1 of clicks")]
    assert read.at == AT * 1000


@needs_brokers
def test_records_with_one_key_are_in_one_partition(cluster: Cluster, sink) -> None:
    items = [{"user": f"u{n % 5}", "n": n} for n in range(100)]
    assert errors(sink(key="{user}").write(items)) == []
    found: dict[bytes | None, list[tuple[int, int]]] = {}
    for read in cluster.read("t"):
        found.setdefault(read.key, []).append((read.partition, json.loads(read.value)["n"]))
    assert len(found) == 5
    for places in found.values():
        assert len({partition for partition, _ in places}) == 1
        assert [n for _, n in places] == sorted(n for _, n in places)


@needs_brokers
def test_a_topic_by_field(cluster: Cluster, sink) -> None:
    cluster.make("log-a")
    items = [{"kind": "a"}, {"kind": "a b"}, {"n": 1}, 5, {"kind": {}}, b"1e999"]
    rejected = errors(sink(topic="log-{kind}", key="{kind}").write(items))
    assert [place for place, _ in rejected] == [1, 2, 3, 4, 5]
    assert [one.value for one in cluster.read("log-a")] == [b'{"kind": "a"}']


@needs_brokers
@pytest.mark.parametrize("exactly_once", [False, True])
@pytest.mark.parametrize("error", [NO_TOPIC, NO_NAME, NOT_ALLOWED])
def test_a_topic_of_a_record_that_takes_no_message_costs_that_record(
    cluster: Cluster, sink, error: int, exactly_once: bool
) -> None:
    """Also in each later batch, until the topic is there."""
    cluster.make("log-a")
    cluster.make("log-b")
    cluster.set_error("log-b", error)
    one = sink(topic="log-{kind}", exactly_once=exactly_once, timeout="10s")
    for batch in (1, 2):
        ((place, why),) = errors(one.write([{"n": batch, "kind": kind} for kind in "aba"], batch))
        assert place == 1
        assert "topic log-b: " in why
    if exactly_once:
        again = sink(topic="log-{kind}", exactly_once=True)
        assert len(errors(again.write([{"n": 2, "kind": kind} for kind in "aba"], 2))) == 1
    cluster.set_error("log-b", 0)
    assert errors(one.write([{"n": 3, "kind": "b"}], 3)) == []
    assert [json.loads(read.value)["n"] for read in cluster.read("log-b")] == [3]
    # The brokers of the tests show what an aborted transaction wrote.
    there = [json.loads(read.value)["n"] for read in cluster.read("log-a")]
    assert sorted(set(there)) == [1, 2]
    if not exactly_once:
        assert there == [1, 1, 2, 2]


@needs_brokers
def test_a_topic_that_is_not_there_can_be_waited_for(cluster: Cluster, sink) -> None:
    cluster.set_error("log-b", NO_TOPIC)
    one = sink(topic="log-{kind}", unknown_topic="wait", timeout="10s")
    result = one.write([{"kind": "b"}])
    assert reason(result) == "blocked"
    assert result.failure is not None
    assert "log-b" in result.failure.error


@needs_brokers
def test_a_record_without_a_key(cluster: Cluster, sink) -> None:
    assert errors(sink(key="{user}").write([{"n": 1}, {"user": None}])) == []
    assert [one.key for one in cluster.read("t")] == [None, None]


@needs_brokers
def test_bytes_go_as_they_are(cluster: Cluster, sink) -> None:
    assert errors(sink("bytes", key="{_id}").write([b"\xff\n", b""])) == []
    assert sorted((one.key, one.value) for one in cluster.read("t")) == [
        (b"j.1.0", b"\xff\n"), (b"j.1.1", b"")]  # fmt: skip


@needs_brokers
@pytest.mark.parametrize("exactly_once", [False, True])
def test_a_record_that_the_broker_refuses(cluster: Cluster, sink, exactly_once: bool) -> None:
    one = sink(exactly_once=exactly_once)
    assert errors(one.write([{"n": 0}], 1)) == []
    cluster.fail(PRODUCE, INVALID_RECORD)
    refused = errors(one.write([{"n": 1}], 2))
    assert [place for place, _ in refused] == [0]
    assert "record" in refused[0][1]
    if exactly_once:  # its answer was lost: it is not taken for done
        again = sink(exactly_once=True)
        assert errors(again.write([{"n": 1}], 2)) == refused
    assert [one.value for one in cluster.read("t")] == [b'{"n": 0}']


@needs_brokers
@pytest.mark.parametrize(("error", "what"), [(TOO_LARGE, "blocked"), (NOT_ALLOWED, "blocked")])
def test_errors_of_the_topic_block(cluster: Cluster, sink, error: int, what: str) -> None:
    cluster.fail(PRODUCE, error)
    assert reason(sink().write([{"n": 1}])) == what


@needs_brokers
def test_a_transaction_behind_one_with_a_refused_record_is_made_again(
    cluster: Cluster, sink
) -> None:
    """librdkafka aborts it: the partition's sequence has a gap."""
    cluster.make("one")
    one = sink(topic="one", exactly_once=True)
    cluster.fail(PRODUCE, INVALID_RECORD)
    assert [place for place, _ in errors(one.write([{"n": 1}], 1))] == [0]
    assert errors(one.write([{"n": 2}, {"n": 3}], 2)) == []
    assert [json.loads(read.value)["n"] for read in cluster.read("one")] == [2, 3]


@needs_brokers
@pytest.mark.parametrize("exactly_once", [False, True])
def test_a_record_that_is_too_large_for_its_topic_costs_itself(
    cluster: Cluster, sink, exactly_once: bool
) -> None:
    cluster.make("one")
    one = sink(topic="one", exactly_once=exactly_once, properties={"linger.ms": "2000"})
    # The first message of a partition after an abort aborts the next transaction, too.
    cluster.fail(PRODUCE, TOO_LARGE, *[0] * (1 + exactly_once), TOO_LARGE)
    items = [{"n": 0}, {"n": "x" * 40_000}, {"n": 2}]
    ((place, why),) = errors(one.write(items))
    assert place == 1
    assert "topic one: " in why
    assert "large" in why
    found = [json.loads(read.value)["n"] for read in cluster.read("one")]
    # The brokers of the tests show what an aborted transaction wrote.
    assert found[-2:] == [0, 2]
    assert exactly_once or len(found) == 2
    cluster.fail(PRODUCE, TOO_LARGE, TOO_LARGE)
    assert reason(one.write([items[0]], 2)) == "blocked"


@needs_brokers
def test_what_passes_is_tried_again_by_the_client(cluster: Cluster, sink) -> None:
    cluster.fail(PRODUCE, NOT_ENOUGH_REPLICAS, NOT_ENOUGH_REPLICAS)
    assert errors(sink().write([{"n": 1}])) == []
    assert len(cluster.read("t")) == 1


@needs_brokers
def test_at_least_once_and_the_id_tells(cluster: Cluster, sink) -> None:
    for _ in range(2):
        assert errors(sink().write([{"n": 1}])) == []
    assert [one.headers for one in cluster.read("t")] == [[("ingestd-id", b"j.1.0")]] * 2


def transaction(cluster: Cluster, name: str) -> Any:
    """A transaction of another worker that has its row for the batch j-1 in the ledger."""
    from confluent_kafka import Producer

    other = Producer({"bootstrap.servers": cluster.bootstrap, "transactional.id": name})
    other.init_transactions(60)
    other.begin_transaction()
    other.produce("t", b'{"n": 1}')
    other.produce("ledger", b"{}", b"j-1")
    assert other.flush(60) == 0
    return other


@needs_brokers
def test_a_transaction_that_was_committed_is_done(cluster: Cluster, sink) -> None:
    transaction(cluster, "other").commit_transaction(60)
    assert errors(sink(exactly_once=True).write([{"n": 1}])) == []
    assert errors(sink(exactly_once=True).write([{"n": 1}], 2, ["j-1"])) == []
    assert len(cluster.read("t")) == 1


class Isolated:
    """A consumer that does what brokers do for `read_committed`, and the mock cluster does not.

    Args:
        inner: the consumer.
        aborted: offsets that are never given.
        stable: the end of what is decided; nothing from here on is given yet.
    """

    def __init__(self, inner: Any, aborted: Sequence[int] = (), stable: int = 10**9) -> None:
        self.inner, self.aborted, self.stable = inner, aborted, stable

    def poll(self, timeout: float) -> Any:
        while (message := self.inner.poll(min(timeout, 0.5))) is not None:
            if message.offset() not in self.aborted and message.offset() < self.stable:
                return message
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.fixture
def isolated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def isolated(**how: Any) -> None:
        def consumer(config: dict[str, Any], isolation: str) -> Any:
            made = real(config, isolation)
            return Isolated(made, **how) if isolation == "read_committed" else made

        monkeypatch.setattr(KafkaLedger, "_consumer", staticmethod(consumer))

    real = KafkaLedger._consumer
    return isolated


@needs_brokers
@pytest.mark.parametrize("more", [0, 1])
def test_a_transaction_that_was_aborted_is_not(cluster: Cluster, sink, isolated, more: int) -> None:
    transaction(cluster, "other").abort_transaction(60)
    (row,) = (one.offset for one in cluster.read("ledger"))
    isolated(aborted=[row])
    one = sink(exactly_once=True)
    if more:  # rows behind it
        assert errors(one.write([{"n": 3}], 3)) == []
    assert errors(one.write([{"n": 2}])) == []
    assert [one.value for one in cluster.read("t")].count(b'{"n": 2}') == 1
    assert [one.key for one in cluster.read("ledger")][-1] == b"j-1"
    assert errors(one.write([{"n": 2}])) == []  # and now it is
    assert [one.value for one in cluster.read("t")].count(b'{"n": 2}') == 1


@needs_brokers
def test_a_transaction_that_is_open_is_waited_for(cluster: Cluster, sink, isolated) -> None:
    other = transaction(cluster, "other")
    (row,) = (one.offset for one in cluster.read("ledger"))
    isolated(stable=row)
    failed = sink(exactly_once=True, timeout="1s").write([{"n": 2}])
    assert reason(failed) == "unavailable"
    assert "earlier try" in failed.failure.error
    other.commit_transaction(60)
    isolated()
    assert errors(sink(exactly_once=True).write([{"n": 2}])) == []
    assert [one.value for one in cluster.read("t")] == [b'{"n": 1}']


@needs_brokers
def test_each_worker_has_a_name_of_its_own_and_the_next_life_has_it_again(
    cluster: Cluster, sink, tmp_path: Path
) -> None:
    first, second = sink(exactly_once=True), sink(exactly_once=True)
    for number in range(1, 7):
        assert errors((first, second)[number % 2].write([{"n": number}], number)) == []
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "kafka-clicks-0.lock", "kafka-clicks-1.lock"]  # fmt: skip
    first.close()
    third = sink(exactly_once=True)
    assert errors(third.write([{"n": 7}], 7)) == []
    assert len(list(tmp_path.iterdir())) == 2
    assert len(cluster.read("t")) == 7


@needs_brokers
def test_check(cluster: Cluster, sink) -> None:
    assert [one.text for one in sink(exactly_once=True).check()] == ["brokers: 3"]
    assert [one.level for one in sink(topic="nosuch").check()] == ["info", "warning"]
    cluster.make("many", 2)
    assert "partitions" in sink(exactly_once=True, ledger_topic="many").check()[-1].text
    cluster.set_error("t", NOT_ALLOWED)
    assert [one.level for one in sink().check()] == ["info", "error"]


@pytest.mark.parametrize(
    "options",
    [{"brokers": " "}, {"topic": "a b"}, {"topic": ""}, {"ledger_topic": "ä"},
     {"properties": {"acks": "1"}}, {"properties": {"sasl.password": "x"}},
     {"properties": {"ssl.key.pem": "x"}},
     {"properties": {"message.timeout.ms": "1"}}, {"security": "sasl_ssl"}, {"username": "x"},
     {"timeout": "10ms"}],
)  # fmt: skip
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        KafkaOptions.of(**{"brokers": "b:9092", **options})
