"""librdkafka's mock cluster: brokers on real sockets that take messages and transactions.

`test.mock.num.brokers` makes such a cluster inside a client; here it is made by the library's own
functions, which can also stop brokers, delay answers and set errors. It is not Kafka: it keeps
little, and makes no topics for an admin client.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Read(NamedTuple):
    topic: str
    partition: int
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]
    at: int
    offset: int


class _Mem(ctypes.Structure):
    _fields_ = (("at", ctypes.c_char_p), ("size", ctypes.c_size_t))


class _Header(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("value", ctypes.c_char_p),
        ("size", ctypes.c_ssize_t),
    )


class _Fact(ctypes.Union):
    _fields_ = (
        ("text", ctypes.c_char_p),
        ("memory", _Mem),
        ("header", _Header),
        ("room", ctypes.c_char * 64),
    )


class _Argument(ctypes.Structure):
    """`rd_kafka_vu_t`: a fact of a message, by its kind: 1 topic, 4 value, 9 header."""

    _fields_ = (("kind", ctypes.c_int), ("fact", _Fact))


_INT, _POINTER, _TEXT = ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "rd_kafka_conf_new": (_POINTER, []),
    "rd_kafka_conf_set": (_INT, [_POINTER, _TEXT, _TEXT, _TEXT, ctypes.c_size_t]),
    "rd_kafka_new": (_POINTER, [_INT, _POINTER, _TEXT, ctypes.c_size_t]),
    "rd_kafka_destroy": (None, [_POINTER]),
    "rd_kafka_produceva": (_POINTER, [_POINTER, ctypes.POINTER(_Argument), ctypes.c_size_t]),
    "rd_kafka_flush": (_INT, [_POINTER, _INT]),
    "rd_kafka_mock_cluster_new": (_POINTER, [_POINTER, _INT]),
    "rd_kafka_mock_cluster_destroy": (None, [_POINTER]),
    "rd_kafka_mock_cluster_bootstraps": (_TEXT, [_POINTER]),
    "rd_kafka_mock_topic_create": (_INT, [_POINTER, _TEXT, _INT, _INT]),
    "rd_kafka_mock_topic_set_error": (None, [_POINTER, _TEXT, _INT]),
    "rd_kafka_mock_broker_set_down": (_INT, [_POINTER, ctypes.c_int32]),
    "rd_kafka_mock_broker_set_up": (_INT, [_POINTER, ctypes.c_int32]),
    "rd_kafka_mock_broker_set_rtt": (_INT, [_POINTER, ctypes.c_int32, _INT]),
    "rd_kafka_mock_push_request_errors_array": (
        None, [_POINTER, ctypes.c_int16, ctypes.c_size_t, _POINTER],
    ),
}  # fmt: skip
PRODUCE = 0
"""The number of the request that produces."""


def _library() -> Any:
    found = importlib.util.find_spec("confluent_kafka")
    if found is None or found.origin is None:
        pytest.skip("needs confluent-kafka: pip install 'ingestd[kafka]'")
    files = Path(found.origin).parents[1].glob("confluent_kafka.libs/librdkafka*")
    library = ctypes.CDLL(str(next(files)))
    for name, (gives, takes) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = gives, takes
    return library


class Cluster:
    """Some brokers; topics are made by hand."""

    def __init__(self, brokers: int = 1) -> None:
        self._lib = _library()
        self.numbers = range(1, brokers + 1)
        said = ctypes.create_string_buffer(512)
        conf = self._lib.rd_kafka_conf_new()
        self._lib.rd_kafka_conf_set(conf, b"log_level", b"0", said, 512)
        self._client = self._lib.rd_kafka_new(0, conf, said, 512)
        assert self._client, said.value
        self._cluster = self._lib.rd_kafka_mock_cluster_new(self._client, brokers)
        self.bootstrap: str = self._lib.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def make(self, topic: str, partitions: int = 1) -> None:
        replicas = len(self.numbers)
        assert self._lib.rd_kafka_mock_topic_create(
            self._cluster, topic.encode(), partitions, replicas) == 0  # fmt: skip

    def produce_with_header(self, topic: str, payload: bytes, name: bytes) -> None:
        """Produces a message with a header of any name, which Python's client cannot."""
        said = ctypes.create_string_buffer(512)
        conf = self._lib.rd_kafka_conf_new()
        for key, value in ((b"bootstrap.servers", self.bootstrap.encode()), (b"log_level", b"0")):
            self._lib.rd_kafka_conf_set(conf, key, value, said, 512)
        producer = self._lib.rd_kafka_new(0, conf, said, 512)
        assert producer, said.value
        facts = (
            _Argument(1, _Fact(text=topic.encode())),
            _Argument(4, _Fact(memory=_Mem(payload, len(payload)))),
            _Argument(9, _Fact(header=_Header(name, b"x", 1))),
        )
        arguments = (_Argument * len(facts))(*facts)
        assert not self._lib.rd_kafka_produceva(producer, arguments, len(facts))
        assert self._lib.rd_kafka_flush(producer, 60_000) == 0
        self._lib.rd_kafka_destroy(producer)

    def set_error(self, topic: str, error: int) -> None:
        self._lib.rd_kafka_mock_topic_set_error(self._cluster, topic.encode(), error)

    def set_up(self, up: bool) -> None:
        change = "up" if up else "down"
        for number in self.numbers:
            getattr(self._lib, f"rd_kafka_mock_broker_set_{change}")(self._cluster, number)

    def delay(self, milliseconds: int) -> None:
        for number in self.numbers:
            self._lib.rd_kafka_mock_broker_set_rtt(self._cluster, number, milliseconds)

    def fail(self, request: int, *errors: int) -> None:
        """The next requests of a kind are answered with these errors; 0 is none."""
        array = (ctypes.c_int * len(errors))(*errors)
        self._lib.rd_kafka_mock_push_request_errors_array(
            self._cluster, request, len(errors), array
        )

    def read(self, topic: str) -> list[Read]:
        """All that is committed in a topic."""
        from confluent_kafka import Consumer, TopicPartition

        reader = Consumer({
            "bootstrap.servers": self.bootstrap, "group.id": "t", "enable.partition.eof": True,
            "isolation.level": "read_committed", "auto.offset.reset": "earliest", "log_level": 0,
        })  # fmt: skip
        try:
            partitions = list(reader.list_topics(topic, timeout=60).topics[topic].partitions)
            reader.assign([TopicPartition(topic, one, 0) for one in partitions])
            found, ended = [], set()
            while len(ended) < len(partitions):
                message = reader.poll(60)
                assert message is not None, "no answer"
                if message.error() is not None:
                    assert message.error().name() == "_PARTITION_EOF", message.error()
                    ended.add(message.partition())
                    continue
                found.append(Read(
                    topic, message.partition(), message.key(), message.value(),
                    message.headers() or [], message.timestamp()[1], message.offset(),
                ))  # fmt: skip
            return found
        finally:
            reader.close()

    def close(self) -> None:
        self._lib.rd_kafka_mock_cluster_destroy(self._cluster)
        self._lib.rd_kafka_destroy(self._client)
