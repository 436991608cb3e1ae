"""The ledger of the sink `kafka`: a topic with a row for each batch that was begun.

`sink.py` says why a worker that has read it to its end knows of each try.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from ingestd.handlers.batch import Blocked, Unavailable
from ingestd.host.kafka import LOGGER
from ingestd.sinks.kafka.brokers import is_there

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ROWS = 200_000
"""Newest rows that a worker knows."""
_DAYS = 7


class KafkaLedger:
    """The ids of the newest batches that a transaction was begun for, and what became of it."""

    def __init__(self, config: dict[str, Any], topic: str, timeout: float) -> None:
        from confluent_kafka import TopicPartition  # noqa: PLC0415

        self._at = partial(TopicPartition, topic, 0)
        self._timeout = timeout
        _make(config, topic)
        self._all = self._consumer(config, "read_uncommitted")
        self._committed: Any = None
        self._config = config
        self._seen: dict[str, int] = {}
        low, high = self._all.get_watermark_offsets(self._at(), timeout=timeout)
        self._next: int = max(low, high - 2 * _ROWS)  # each row has a mark behind it
        self._read(high)

    def find(self, names: Sequence[str]) -> dict[str, str] | None:
        """The row of the first of some batches that is committed; `None` if none is.

        Raises:
            Unavailable: that is not known yet.
        """
        self._read(self._all.get_watermark_offsets(self._at(), timeout=self._timeout)[1])
        for name in names:
            offset = self._seen.get(name)
            if offset is None:
                continue
            row = self._row(offset)
            if row is not None:
                return msgspec.json.decode(row, type=dict[str, str])
            del self._seen[name]
        return None

    def close(self) -> None:
        """Closes the consumers."""
        for one in (self._all, self._committed):
            if one is not None:
                one.close()

    def _read(self, high: int) -> None:
        """Reads on up to an offset, whatever is committed."""
        if self._next >= high:
            return
        for offset, message in self._from(self._all, self._next):
            if message is not None:
                self._seen[message.key().decode()] = offset
            self._next = offset + (message is not None)
            if self._next >= high:
                break
        while len(self._seen) > _ROWS:
            del self._seen[next(iter(self._seen))]

    def _row(self, offset: int) -> bytes | None:
        """The row at an offset if it is committed; `None` if it is aborted."""
        if self._committed is None:
            self._committed = self._consumer(self._config, "read_committed")
        for reached, message in self._from(self._committed, offset):
            if message is not None and reached == offset:
                row: bytes = message.value()
                return row
            if reached > offset:
                return None
        raise AssertionError  # pragma: no cover  `_from` ends with an exception

    def _from(self, consumer: Any, offset: int) -> Iterator[tuple[int, Any]]:
        """Offsets from one on, with their messages; and without one the end that was reached.

        Raises:
            Unavailable: nothing more came in time.
        """
        from confluent_kafka import KafkaException  # noqa: PLC0415

        end = time.monotonic() + self._timeout
        consumer.assign([self._at(offset)])
        try:
            while (left := end - time.monotonic()) > 0:
                message = consumer.poll(left)
                if message is None:
                    break
                error = message.error()
                if error is None:
                    yield message.offset(), message
                elif error.name() == "_PARTITION_EOF":
                    yield message.offset(), None
                else:
                    raise KafkaException(error)
        finally:
            consumer.unassign()
        raise Unavailable("the ledger does not tell yet what became of an earlier try")

    @staticmethod
    def _consumer(config: dict[str, Any], isolation: str) -> Any:
        from confluent_kafka import Consumer  # noqa: PLC0415

        more = {
            "group.id": "ingestd", "enable.auto.commit": False, "isolation.level": isolation,
            "enable.partition.eof": True, "auto.offset.reset": "earliest", "fetch.wait.max.ms": 5,
        }  # fmt: skip
        return Consumer({**config, **more}, logger=LOGGER)


def _make(config: dict[str, Any], topic: str) -> None:
    """Makes the ledger's topic unless it is there.

    Raises:
        Blocked: it is not there and cannot be made.
    """
    from confluent_kafka import KafkaException  # noqa: PLC0415
    from confluent_kafka.admin import AdminClient, NewTopic  # noqa: PLC0415

    admin = AdminClient({**config, "allow.auto.create.topics": False}, logger=LOGGER)
    if is_there(admin, topic):
        return
    settings = {
        "cleanup.policy": "compact,delete",
        "retention.ms": str(_DAYS * 86400 * 1000),
    }
    new = NewTopic(topic, 1, config=settings)
    try:
        admin.create_topics([new], operation_timeout=10)[topic].result(15)
    except KafkaException as error:
        if error.args[0].name() == "TOPIC_ALREADY_EXISTS":
            return
        raise Blocked(f"the topic {topic} cannot be made: {error.args[0].str()}") from None
