"""The sink `kafka` produces a message a record, at least once or in transactions exactly once.

Without `exactly_once` the producer is idempotent: a message that the client itself sends again is
in the log once. A batch that comes again after a crash or a lost answer is there twice, and each
message has its record's id in a header to tell that by.

With `exactly_once` a batch is one transaction: its messages, and a row in the ledger topic under
the batch's id. Before it produces, a worker reads the ledger to its end, whatever is committed:

* No row under the ids of the batch: no earlier try can be committed any more. A try writes its row
  before it asks for the commit, and the worker that made it has ended, or this batch would not be
  here.
* A row: its transaction is committed, aborted or still open. The worker reads the ledger as far as
  is committed until that is known. An open one ends when its worker comes back under the same
  `transactional.id`, or with the transaction's timeout.

A `transactional.id` is made of the journal's id, the pipeline's name and a number that no other
worker of the data directory has. A worker that starts aborts with it what the last one left open.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ingestd.handlers.batch import Batch, Blocked, Unavailable
from ingestd.handlers.context import Context
from ingestd.handlers.options import Extra
from ingestd.handlers.outcome import SinkFinding
from ingestd.handlers.text import one_line
from ingestd.host.kafka import CONNECT_SECONDS, LOGGER
from ingestd.sinks.base import BatchHints, ids_of
from ingestd.sinks.kafka.brokers import ledger_findings, topic_findings
from ingestd.sinks.kafka.ledger import KafkaLedger
from ingestd.sinks.kafka.options import (
    KafkaMessage,
    KafkaMessages,
    KafkaOptions,
    client_config,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

_HERE = Context()
_ROUNDS_MAX = 16
"""Tries of one call, each without the records that the broker refused in those before."""
_BLOCKING = frozenset({
    "TOPIC_AUTHORIZATION_FAILED", "CLUSTER_AUTHORIZATION_FAILED", "GROUP_AUTHORIZATION_FAILED",
    "TRANSACTIONAL_ID_AUTHORIZATION_FAILED", "SASL_AUTHENTICATION_FAILED", "_AUTHENTICATION",
    "UNSUPPORTED_SASL_MECHANISM", "ILLEGAL_SASL_STATE", "SECURITY_DISABLED", "_SSL",
    "UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_TOPIC", "TOPIC_EXCEPTION",
    "_INVALID_ARG", "_UNSUPPORTED_FEATURE", "UNSUPPORTED_VERSION", "MSG_SIZE_TOO_LARGE",
    "INVALID_TIMESTAMP", "INVALID_TRANSACTION_TIMEOUT", "POLICY_VIOLATION",
})  # fmt: skip
"""Errors that last until an operator acts."""
_TOPICS = frozenset({
    "UNKNOWN_TOPIC_OR_PART", "_UNKNOWN_TOPIC", "TOPIC_EXCEPTION", "TOPIC_AUTHORIZATION_FAILED",
})  # fmt: skip
"""Errors of one topic, which are a record's where it names the topic."""
_TOO_LARGE = "MSG_SIZE_TOO_LARGE"
_ALONE_BYTES = 32 * 1024
"""A message of this size is sent alone where the broker called one that it came with too large."""
_DIFFERENT = "_INVALID_DIFFERENT_RECORD"
_RECORDS = frozenset({"INVALID_RECORD", _DIFFERENT})
_PURGED = frozenset({"_PURGE_QUEUE", "_PURGE_INFLIGHT"})
"""Errors of messages that were good and went with their transaction: when it has to be aborted for
another one, and again when a partition had a refused message in the transaction before."""
_AGAIN = _PURGED | {_DIFFERENT}


class KafkaSink:
    """Produces each batch and waits for all acknowledgements, with `acks=all`.

    The value of a message is the record as it came, its time is that of the batch's acceptance.
    """

    EXTRA = Extra("kafka", ("confluent_kafka",))
    BATCH = BatchHints(records_max=20_000, bytes_max=16 * 1024 * 1024, age_max=1.0)

    def __init__(self, options: KafkaOptions, context: Context = _HERE) -> None:
        self._options = options
        self._context = context
        self._timeout = float(options.timeout)
        self._messages = KafkaMessages(options, context)
        names_topic = self._messages.topic is None and options.unknown_topic == "reject"
        self._of_records = _RECORDS | (_TOPICS if names_topic else set())
        if options.exactly_once:
            self._of_records |= _PURGED
        self._open: Any = None
        self._ledger: KafkaLedger | None = None
        self._slot: int | None = None
        self._last_error: Any = None

    def __call__(self, batch: Batch[bytes]) -> None:
        """Produces the batch, and with `exactly_once` unless it is there.

        Raises:
            Unavailable: not all is acknowledged, or the outcome of a transaction is not known.
            Blocked: a topic or a right is missing.
            RuntimeError: the broker refuses records without an end.
        """
        from confluent_kafka import KafkaException  # noqa: PLC0415  an extra

        messages = list(self._messages.of(batch))
        if not messages:
            return
        try:
            producer = self._producer(batch)
            at = int(batch.accepted_at.timestamp() * 1000)
            if self._ledger is None:
                refused = self._deliver(producer, batch, messages, at)
            else:
                found = self._ledger.find(ids_of(batch))
                refused = self._commit(producer, batch, messages, at) if found is None else found
        except KafkaException as error:
            raise self._class_of(error.args[0]) from None
        for place, name in enumerate(batch.ids) if refused else ():
            if name in refused:
                batch.reject(place, refused[name])

    def close(self) -> None:
        """Gives up what is not delivered; an open transaction is aborted by the next worker."""
        producer, self._open = self._open, None
        ledger, self._ledger = self._ledger, None
        if producer is not None:
            with suppress(Exception):  # it may be in a fatal state
                producer.purge()
                producer.flush(0.1)
        if ledger is not None:
            ledger.close()
        if self._slot is not None:
            os.close(self._slot)
            self._slot = None

    # -- producing -----------------------------------------------------------------------------

    def _send(
        self,
        producer: Any,
        messages: Sequence[KafkaMessage],
        at: int,
        alone: Collection[int] = (),
    ) -> dict[int, Any]:
        """Produces messages and waits for all of them.

        Args:
            producer: of this worker.
            messages: in order.
            at: their time, milliseconds.
            alone: places of those that share no request with others: the broker refuses what comes
                together as too large, and only of one alone it is known that it is.

        Returns:
            The errors of those that the broker refuses, by place.

        Raises:
            KafkaException: an error that is no record's.
        """
        failed: dict[int, Any] = {}
        for run in _runs(messages, alone):
            failed |= self._send_run(producer, run, at)
            if failed and self._ledger is not None:
                break  # the transaction takes no more
        is_known = _suspects(failed, messages) <= set(alone)
        self._look_at(failed, messages, alone if is_known else None)
        return failed

    def _look_at(
        self,
        failed: dict[int, Any],
        messages: Sequence[KafkaMessage],
        alone: Collection[int] | None,
    ) -> None:
        """Raises an error that is no record's.

        Args:
            failed: errors by place.
            messages: those that were sent.
            alone: places of those of which it is known what is too large; `None` where one that
                is large has to be tried alone first.
        """
        from confluent_kafka import KafkaException  # noqa: PLC0415

        for one in messages if failed else ():
            error = failed.get(one.place)
            if error is None or error.name() in self._of_records:
                continue
            if error.name() == _TOO_LARGE and (alone is None or one.place in alone):
                continue
            if error.name() in _TOPICS:
                raise Blocked(f"topic {one.topic}: {error.name()}: {error.str()}")
            raise KafkaException(error)

    def _send_run(self, producer: Any, messages: Sequence[KafkaMessage], at: int) -> dict[int, Any]:
        """Produces messages and waits for all of them; gives errors by place."""
        from confluent_kafka import KafkaException  # noqa: PLC0415

        failed: dict[int, Any] = {}

        def told(place: int, error: Any, _: Any) -> None:
            if error is not None:
                failed[place] = error

        end = time.monotonic() + self._timeout
        is_asked = False
        for number, one in enumerate(messages):
            report = partial(told, one.place)
            while True:
                try:
                    producer.produce(one.topic, one.value, one.key, on_delivery=report,
                                     timestamp=at, headers=one.headers)  # fmt: skip
                    break
                except BufferError:
                    if time.monotonic() > end:
                        raise Unavailable("the queue of messages stays full") from None
                    producer.poll(0.1)
                except KafkaException as error:
                    if error.args[0].name() not in _TOPICS:
                        raise
                    if is_asked:
                        failed[one.place] = error.args[0]
                        break
                    # What was not there once stays so for minutes, unless the brokers are asked.
                    producer.list_topics(timeout=CONNECT_SECONDS)
                    is_asked = True
            if number % 1000 == 0:
                producer.poll(0)
        if left := producer.flush(max(0.0, end - time.monotonic()) + 1):
            raise Unavailable(f"{left} of {len(messages)} messages are not acknowledged in time")
        return failed

    def _deliver(
        self, producer: Any, batch: Batch[bytes], messages: list[KafkaMessage], at: int
    ) -> dict[str, str]:
        """Produces without a transaction; gives reasons of records that are refused, by id."""
        refused: dict[str, str] = {}
        alone: set[int] = set()
        left = messages
        for _ in range(_ROUNDS_MAX):
            failed = self._send(producer, left, at, alone)
            refused |= _reasons(failed, left, batch.ids, alone)
            left = [one for one in left if _comes_again(failed, one, alone)]
            if not left:
                return refused
            alone |= _suspects(failed, left)
        raise RuntimeError("the broker refuses records again and again")

    def _commit(
        self, producer: Any, batch: Batch[bytes], messages: list[KafkaMessage], at: int
    ) -> dict[str, str]:
        """Produces a batch and its row in the ledger in one transaction.

        Returns:
            The reasons of records that are refused, by id, as they stand in the row.

        Raises:
            KafkaException: an error that is no record's, such as one of the ledger.
        """
        from confluent_kafka import KafkaException  # noqa: PLC0415

        refused: dict[str, str] = {}
        alone: set[int] = set()
        left = messages
        end = time.monotonic() + 2 * self._timeout
        for _ in range(_ROUNDS_MAX):
            producer.begin_transaction()
            failed = self._send(producer, left, at, alone)
            if not failed:
                row = KafkaMessage(
                    -1, self._options.ledger_topic, batch.id.encode(),
                    msgspec.json.encode(refused), [],
                )  # fmt: skip
                if lost := self._send(producer, [row], at):
                    raise KafkaException(lost[row.place])
                self._end(producer, end)
                return refused
            producer.abort_transaction(self._timeout)
            refused |= _reasons(failed, left, batch.ids, alone)
            left = [
                one for one in left if one.place not in failed or _comes_again(failed, one, alone)
            ]
            alone |= _suspects(failed, left)
        if _PURGED.issuperset(error.name() for error in failed.values()):
            raise Unavailable("the transaction is aborted again and again")
        raise RuntimeError("the broker refuses records again and again")

    def _end(self, producer: Any, end: float) -> None:
        """Commits; what is interrupted is taken up again, as librdkafka asks for."""
        from confluent_kafka import KafkaException  # noqa: PLC0415

        while True:
            try:
                producer.commit_transaction(max(0.1, end - time.monotonic()))
            except KafkaException as error:
                if not error.args[0].retriable() or time.monotonic() > end:
                    raise
            else:
                return

    # -- connection ----------------------------------------------------------------------------

    def _producer(self, batch: Batch[bytes]) -> Any:
        """The producer, connected; its ledger is read."""
        from confluent_kafka import Producer  # noqa: PLC0415

        if self._open is not None:
            return self._open
        options = self._options
        more = {
            "partitioner": "murmur2_random",  # as Java's client
            "topic.metadata.propagation.max.ms": 5000, "queue.buffering.max.messages": 1_000_000,
            **options.properties,
            "acks": "all", "enable.idempotence": True, "compression.type": options.compression,
            "message.max.bytes": int(options.message_bytes_max),
            "message.timeout.ms": int(self._timeout * 1000),
            "delivery.report.only.error": True,
        }  # fmt: skip
        if options.exactly_once:
            more["transactional.id"] = self._transactional_id(batch)
            more["transaction.timeout.ms"] = max(10_000, int(self._timeout * 2000))
        producer = Producer(self._config(**more), logger=LOGGER)
        try:
            self._look(producer)
            if options.exactly_once:
                producer.init_transactions(self._timeout)
                self._ledger = KafkaLedger(self._config(), options.ledger_topic, self._timeout)
        except BaseException:
            producer.poll(0)  # what its threads met
            raise
        self._open = producer
        return producer

    def _look(self, producer: Any) -> None:
        """Asks for the topic, which tells soon if the brokers do not answer."""
        from confluent_kafka import KafkaException  # noqa: PLC0415

        # A topic that records name is not asked for: any answer tells that the brokers are there.
        topic = self._messages.topic
        asked = {} if topic is None else {"topic": topic}
        topics = producer.list_topics(**asked, timeout=CONNECT_SECONDS).topics
        one = topics.get(topic)
        error = one.error if one is not None else None
        if error is not None and error.name() in {"TOPIC_AUTHORIZATION_FAILED", "TOPIC_EXCEPTION"}:
            raise KafkaException(error)

    def _transactional_id(self, batch: Batch[bytes]) -> str:
        """A name that no other worker has, and that the next life's workers have again."""
        folder = Path(self._context.data_dir)
        journal, pipeline = batch.id.rpartition("-")[0], self._context.pipeline
        for number in range(4096):
            path = folder / f"kafka-{pipeline}-{number}.lock"
            slot = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(slot)
                continue
            self._slot = slot
            return f"ingestd-{journal}-{pipeline}-{number}"
        raise Blocked(f"too many workers of this pipeline write to {folder}")

    def _config(self, **more: object) -> dict[str, Any]:
        options = self._options
        return {**client_config(options, self._note), **options.properties, **more}

    def _note(self, error: Any) -> None:
        if error.name() != "_ALL_BROKERS_DOWN":
            self._last_error = error

    def _class_of(self, error: Any) -> Exception:
        """The class of a sink's errors that an error of Kafka's belongs to."""
        last = self._last_error
        told = f"{error.name()}: {error.str()}"
        if last is not None:
            told += f" ({last.name()}: {last.str()})"
        told = one_line(told, 600)
        is_lasting = error.name() in _BLOCKING or (last is not None and last.name() in _BLOCKING)
        return Blocked(told) if is_lasting else Unavailable(told)

    # -- check ---------------------------------------------------------------------------------

    def check(self) -> Iterator[SinkFinding]:
        """Asks the brokers for the topics, their replicas and their settings.

        Raises:
            Unavailable: they do not answer.
            Blocked: they refuse the name and the password.
        """
        from confluent_kafka import KafkaException  # noqa: PLC0415
        from confluent_kafka.admin import AdminClient  # noqa: PLC0415

        admin = None
        try:
            admin = AdminClient(self._config(**{"allow.auto.create.topics": False}), logger=LOGGER)
            found = admin.list_topics(timeout=CONNECT_SECONDS)
            yield SinkFinding("info", f"brokers: {len(found.brokers)}")
            if self._messages.topic is not None:
                yield from topic_findings(admin, self._messages.topic, self._options)
            if self._options.exactly_once:
                yield from ledger_findings(admin, self._options.ledger_topic)
        except KafkaException as error:
            if admin is not None:
                admin.poll(0)  # what its threads met
            raise self._class_of(error.args[0]) from None


def _runs(
    messages: Sequence[KafkaMessage], alone: Collection[int]
) -> Iterator[Sequence[KafkaMessage]]:
    """Messages in order, in runs that may share requests."""
    if not alone:
        yield messages
        return
    for is_alone, run in groupby(messages, key=lambda one: one.place in alone):
        if is_alone:
            yield from ([one] for one in run)
        else:
            yield list(run)


def _reasons(
    failed: dict[int, Any],
    messages: Sequence[KafkaMessage],
    names: Sequence[str],
    alone: Collection[int],
) -> dict[str, str]:
    """The reasons of the records that are refused for what they are, by id."""
    found = {}
    for one in messages:
        error = failed.get(one.place)
        if error is not None and not _comes_again(failed, one, alone):
            is_of_topic = error.name() in _TOPICS or error.name() == _TOO_LARGE
            about = f"topic {one.topic}: " if is_of_topic else ""
            found[names[one.place]] = one_line(about + error.str(), 300)
    return found


def _comes_again(failed: dict[int, Any], one: KafkaMessage, alone: Collection[int]) -> bool:
    """Tells if a message is refused that may be a good one, for what it came with."""
    error = failed.get(one.place)
    if error is None:
        return False
    is_unclear = error.name() == _TOO_LARGE and one.place not in alone
    return error.name() in _AGAIN or is_unclear


def _suspects(failed: dict[int, Any], messages: Sequence[KafkaMessage]) -> set[int]:
    """The places of messages that may be too large."""
    return {
        one.place
        for one in messages
        if one.place in failed
        and failed[one.place].name() == _TOO_LARGE
        and len(one.value) >= _ALONE_BYTES
    }
