"""The source `kafka`: a consumer of a group, whose offsets follow what is settled.

One thread owns the consumer, because librdkafka blocks; the event loop accepts and settles. What
they share of a partition is a `PartitionWindow`: the messages from the first unsettled one on.

1. The stored offset of a partition is that of its first unsettled message. Offsets that were taken
   decide, not their neighbours: a compacted topic has gaps.
2. A partition is paused while its window is at its share of the bounds, so one record that is
   tried again for hours stops its own partition and no other.
3. A revoked partition waits until its window is empty, within `revoke_timeout`; what is left goes
   to the partition's next owner. A window that was revoked or lost takes and stores nothing more.
4. A drain takes nothing more and stays in the group: offsets follow while the pipeline settles, and
   `close` commits the last ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from ingestd.base.append import AppendCounts, sender_id
from ingestd.base.errors import ConfigError
from ingestd.base.logging import get_logger
from ingestd.handlers.outcome import SinkFinding
from ingestd.host.kafka import CONNECT_SECONDS, LOGGER, KafkaAccess
from ingestd.sources.base import Source
from ingestd.sources.brokers import (
    BrokerIntake,
    BrokerMessage,
    demand_package,
    keep_headers,
    pack_envelope,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ingestd.sources.base import SourceContext
    from ingestd.sources.kafka import KafkaSettings

log = get_logger()

POLL_SECONDS = 0.1
"""Longest wait of the thread for a message; stored offsets and pauses follow so soon."""
POLL_MESSAGES = 500
LOOK_SECONDS = 2.0
"""Interval of looks at the backlog, and at brokers that were down."""
AGAIN_SECONDS = 5.0
"""Wait before a new consumer where one failed for good."""
COMMIT_SECONDS = 2.0
"""How long the commit of partitions that go is tried again: what it leaves out is read twice."""
CLOSE_SECONDS = 5.0
_QUEUE_KIB_MIN = 1024


def client_config(settings: KafkaSettings) -> dict[str, Any]:
    """The configuration of any client of the source.

    Raises:
        ConfigError: its package is not installed.
    """
    demand_package("confluent_kafka", "kafka")
    access = KafkaAccess(
        ",".join(settings.brokers), settings.security, settings.sasl_mechanism,
        settings.username, settings.password.get_secret_value(),
        (settings.tls_ca, settings.tls_certificate, settings.tls_key),
    )  # fmt: skip
    return {**access.config(), **settings.properties}


class PartitionWindow:
    """The messages of one assignment of a partition that were taken and are not stored yet.

    Attributes:
        at: topic and partition.
        is_lost: it belongs to another consumer, or to nobody.
        is_paused: nothing more is fetched.
        bytes: of the messages.
    """

    def __init__(self, at: tuple[str, int]) -> None:
        self.at = at
        self.is_lost = self.is_paused = False
        self.bytes = 0
        self.floor: int | None = None
        self._stored: int | None = None
        self._lock = threading.Lock()
        self._order: deque[tuple[int, int]] = deque()
        self._open: set[int] = set()

    def __len__(self) -> int:
        return len(self._order)

    def take(self, offset: int, size: int) -> None:
        """Begins with a message, the next one of the partition."""
        with self._lock:
            self._order.append((offset, size))
            self._open.add(offset)
            self.bytes += size

    def settle(self, offsets: Iterable[int]) -> None:
        """Ends messages; the floor goes up to the first that is not settled."""
        with self._lock:
            self._open.difference_update(offsets)
            while self._order and self._order[0][0] not in self._open:
                offset, size = self._order.popleft()
                self.bytes -= size
                self.floor = offset + 1

    def take_floor(self) -> int | None:
        """The offset that is to be stored now, if it is another one than before."""
        if self.floor == self._stored:
            return None
        self._stored = self.floor
        return self.floor


class TakenMessage(NamedTuple):
    """A message of a partition, as long as the partition is this consumer's.

    Attributes:
        window: of the partition.
        offset: of the message.
    """

    window: PartitionWindow
    offset: int


def _headers_of(message: Any) -> Sequence[tuple[str, bytes | None]]:
    """The headers of a message; none if a name is no UTF-8, which the client cannot read."""
    try:
        return message.headers() or ()
    except (SystemError, UnicodeDecodeError):
        return ()


def _is_fatal(error: Any) -> bool:
    return bool(error.fatal()) or error.name() == "_FATAL"


def _is_ours(token: TakenMessage) -> bool:
    return not token.window.is_lost


class KafkaSource(Source):
    """See the module.

    Args:
        settings: brokers, topics and bounds.
        context: the pipeline and the rest.

    Raises:
        ConfigError: its package is not installed.
    """

    def __init__(self, settings: KafkaSettings, context: SourceContext) -> None:
        self._settings = settings
        self._name = context.name
        self._pipeline = context.pipelines[context.pipeline]
        self._config = client_config(settings)
        self._windows: dict[tuple[str, int], PartitionWindow] = {}
        self._is_leaving = self._is_down = False
        self._closing = threading.Event()
        self._moved = threading.Event()
        self._taken = self._settled = self._backlog = 0
        self._counts = AppendCounts()
        self._told = ""
        self._next_look = 0.0

    @classmethod
    def findings(cls, settings: KafkaSettings) -> Iterator[SinkFinding]:
        """See `Source`; asks the brokers for the topics."""
        from confluent_kafka import KafkaException  # noqa: PLC0415
        from confluent_kafka.admin import AdminClient  # noqa: PLC0415

        try:
            admin = AdminClient(client_config(settings), logger=LOGGER)
            found = admin.list_topics(timeout=CONNECT_SECONDS)
        except KafkaException as error:
            yield SinkFinding("error", f"brokers: {error.args[0].str()}")
            return
        yield SinkFinding("info", f"brokers: {len(found.brokers)}")
        for topic in settings.topics:
            if topic.startswith("^"):
                continue
            if topic in found.topics:
                partitions = len(found.topics[topic].partitions)
                yield SinkFinding("info", f"topic {topic} has {partitions} partitions")
            else:
                yield SinkFinding("warning", f"there is no topic {topic}")

    # -- the event loop --------------------------------------------------------------------------

    async def start(self) -> None:
        """See `Source`; brokers that are down are asked again and again."""
        self._loop = asyncio.get_running_loop()
        consumer = self._make()
        self._intake: BrokerIntake[TakenMessage] = BrokerIntake(
            self._pipeline,
            f"kafka {self._settings.group}",
            self._finish,
            is_wanted=_is_ours,
            is_held=_is_ours,
            counts=self._counts,
        )
        self._thread = threading.Thread(
            target=self._run, args=(consumer,), name=f"{self._name}-kafka", daemon=True
        )
        self._thread.start()

    def _make(self) -> Any:
        from confluent_kafka import Consumer, KafkaException  # noqa: PLC0415  an extra

        settings = self._settings
        bound = max(_QUEUE_KIB_MIN, settings.inflight_bytes_max // 4096)
        more = {
            "partition.assignment.strategy": "cooperative-sticky",
            "auto.commit.interval.ms": 1000, **self._config,
            "group.id": settings.group, "auto.offset.reset": settings.start,
            "isolation.level": settings.isolation, "enable.auto.commit": True,
            "enable.auto.offset.store": False, "queued.max.messages.kbytes": bound,
            "error_cb": self._note,
        }  # fmt: skip
        try:
            return Consumer(more, logger=LOGGER)
        except KafkaException as error:
            raise ConfigError(problem=f"kafka: {error.args[0].str()}") from None

    def facts(self) -> dict[str, object]:
        """See `Source`."""
        return {"topics": list(self._settings.topics), "group": self._settings.group}

    def numbers(self) -> Mapping[str, float]:
        """See `Source`."""
        windows = list(self._windows.values())
        return {
            "connected": int(not self._is_down),
            "messages": self._taken,
            "records": self._counts.records,
            "invalid": self._counts.invalid,
            "received_bytes": self._counts.bytes,
            "acknowledged": self._settled,
            "unsettled": sum(map(len, windows)),
            "backlog": self._backlog,
        }

    async def wait_finished(self) -> None:
        """See `Source`; it never ends."""
        await asyncio.shield(self._intake.failed)

    def _finish(self, tokens: Sequence[TakenMessage]) -> None:
        """Moves the floors of windows; the thread stores them."""
        by_window: dict[PartitionWindow, list[int]] = {}
        for window, offset in tokens:
            by_window.setdefault(window, []).append(offset)
        for window, offsets in by_window.items():
            window.settle(offsets)
        self._settled += len(tokens)
        self._moved.set()

    async def stop_taking(self, deadline: float) -> None:
        """See `Source`; offsets follow what is settled until `close`."""
        self._is_leaving = True
        await self._intake.flush(deadline)

    async def close(self) -> None:
        """Commits what is settled by now, and leaves the group."""
        self._closing.set()
        self._moved.set()
        await self._intake.close()
        await self._loop.run_in_executor(None, self._thread.join, CLOSE_SECONDS)
        if left := sum(map(len, self._windows.values())):
            log.warning("messages_unsettled", source=self._name, messages=left)

    # -- the thread ------------------------------------------------------------------------------

    def _run(self, consumer: Any) -> None:
        from confluent_kafka import KafkaException  # noqa: PLC0415

        while True:
            has_failed = False
            try:
                self._consume(consumer)
            except KafkaException as error:
                self._note(error.args[0])
                has_failed = _is_fatal(error.args[0])
            except Exception:  # a thread that ended would say nothing; a new consumer goes on
                log.exception("consumer_failed", source=self._name)
            if not has_failed:  # else its close may never return, and its partitions are gone
                self._give_up(consumer)
            consumer = None
            self._leave_windows()
            while not self._closing.wait(AGAIN_SECONDS):
                with contextlib.suppress(ConfigError):
                    consumer = self._make()
                    break
            if self._closing.is_set():
                return

    def _consume(self, consumer: Any) -> None:
        consumer.subscribe(
            list(self._settings.topics),
            on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost,
        )  # fmt: skip
        while not self._closing.is_set():
            message = consumer.poll(POLL_SECONDS)
            if message is not None:
                self._take([message, *consumer.consume(POLL_MESSAGES - 1, 0)])
            self._hold_back(consumer)
            self._store(consumer, self._windows.values())
            if time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + LOOK_SECONDS
                self._look(consumer)

    def _give_up(self, consumer: Any) -> None:
        with contextlib.suppress(Exception):  # it may have failed for good
            self._store(consumer, self._windows.values())
        with contextlib.suppress(Exception):
            consumer.close()

    def _leave_windows(self) -> None:
        """Stores nothing of a consumer's partitions any more, whatever it said of them."""
        for window in self._windows.values():
            window.is_lost = True
        self._windows.clear()

    def _take(self, messages: Sequence[Any]) -> None:
        """Hands messages to the loop.

        Raises:
            KafkaException: there will be no more of this consumer.
        """
        from confluent_kafka import KafkaException  # noqa: PLC0415

        fatal: Any = None
        taken: list[BrokerMessage[TakenMessage]] = []
        for one in messages:
            error = one.error()
            if error is not None and _is_fatal(error):
                fatal = error  # the end of the consumer, which notes it
                continue
            if error is not None:
                self._note(error)
                continue
            topic, partition, offset = one.topic(), one.partition(), one.offset()
            window = self._windows.get((topic, partition))
            if window is None or self._is_leaving:
                continue  # it is another consumer's, or the next life's
            value, key = one.value() or b"", one.key()
            attributes: list[tuple[str, str | int]] = [("topic", topic), ("partition", partition)]
            if key is not None:
                attributes.append(("key", key[:1024].decode("utf-8", "replace")))
            packed = pack_envelope(
                self._name, keep_headers(_headers_of(one)), tuple(attributes), "offset"
            )
            # A topic that was made anew has the same offsets and other times.
            name = b"%b %d %d %d" % (topic.encode(), partition, offset, one.timestamp()[1])
            window.take(offset, len(value) + len(packed))
            token = TakenMessage(window, offset)
            taken.append(BrokerMessage(value, sender_id(name), packed, offset, token))
        if taken:
            self._taken += len(taken)
            self._is_down = False
            self._loop.call_soon_threadsafe(self._intake.put, taken)
        if fatal is not None:
            raise KafkaException(fatal)

    def _hold_back(self, consumer: Any) -> None:
        """Pauses the partitions whose windows are at their share, and resumes others."""
        from confluent_kafka import TopicPartition  # noqa: PLC0415

        parts = max(1, len(self._windows))
        most = max(1, self._settings.inflight_messages_max // parts)
        bytes_most = max(1, self._settings.inflight_bytes_max // parts)
        pause, resume = [], []
        for window in self._windows.values():
            is_full = len(window) >= most or window.bytes >= bytes_most or self._is_leaving
            is_low = len(window) <= most // 2 and window.bytes <= bytes_most // 2
            if is_full and not window.is_paused:
                pause.append(TopicPartition(*window.at))
                window.is_paused = True
            elif is_low and not is_full and window.is_paused:
                resume.append(TopicPartition(*window.at))
                window.is_paused = False
        if pause:
            consumer.pause(pause)
        if resume:
            consumer.resume(resume)

    def _store(self, consumer: Any, windows: Iterable[PartitionWindow]) -> list[Any]:
        """Stores the floors that have moved, for the next commit."""
        from confluent_kafka import TopicPartition  # noqa: PLC0415

        moved = [
            TopicPartition(*window.at, floor)
            for window in windows
            if (floor := window.take_floor()) is not None
        ]
        if moved:
            consumer.store_offsets(offsets=moved)
        return moved

    def _assigned(self, _: Any, partitions: Sequence[Any]) -> None:
        for one in partitions:
            at = (one.topic, one.partition)
            self._windows[at] = PartitionWindow(at)
        self._is_down, self._told = False, ""
        log.info("partitions_assigned", source=self._name, partitions=len(partitions))

    def _revoked(self, consumer: Any, partitions: Sequence[Any]) -> None:
        from confluent_kafka import KafkaException  # noqa: PLC0415

        ats = [(one.topic, one.partition) for one in partitions]
        windows = [self._windows[at] for at in ats if at in self._windows]
        end = time.monotonic() + self._settings.revoke_timeout
        while any(map(len, windows)) and not self._closing.is_set():
            self._moved.clear()
            if (left := end - time.monotonic()) <= 0:
                break
            if any(map(len, windows)):
                self._moved.wait(min(left, 1.0))
        for window in windows:
            window.is_lost = True
            self._windows.pop(window.at, None)
        try:
            if self._store(consumer, windows) or windows:
                self._commit(consumer)
        except KafkaException as error:
            if error.args[0].name() != "_NO_OFFSET":
                self._note(error.args[0])
        facts = {"partitions": len(windows), "unsettled": sum(map(len, windows))}
        log.info("partitions_revoked", source=self._name, **facts)

    def _commit(self, consumer: Any) -> None:
        """Commits what is stored, again and again while other members join.

        Raises:
            KafkaException: it was refused.
        """
        from confluent_kafka import KafkaException  # noqa: PLC0415

        end = time.monotonic() + COMMIT_SECONDS
        while True:
            try:
                consumer.commit(asynchronous=False)
            except KafkaException as error:
                is_passing = error.args[0].name() == "REBALANCE_IN_PROGRESS"
                if not is_passing or time.monotonic() >= end:
                    raise
                time.sleep(POLL_SECONDS)
            else:
                return

    def _lost(self, _: Any, partitions: Sequence[Any]) -> None:
        for one in partitions:
            window = self._windows.pop((one.topic, one.partition), None)
            if window is not None:
                window.is_lost = True
        log.warning("partitions_lost", source=self._name, partitions=len(partitions))

    def _look(self, consumer: Any) -> None:
        """Counts the backlog; asks brokers that were down."""
        from confluent_kafka import KafkaException, TopicPartition  # noqa: PLC0415

        backlog = 0
        try:
            if self._is_down:
                consumer.list_topics(self._settings.topics[0], timeout=1.0)
                self._is_down, self._told = False, ""
                log.info("broker_connected", source=self._name)
            for at in list(self._windows):
                _, high = consumer.get_watermark_offsets(TopicPartition(*at), cached=True)
                position = consumer.position([TopicPartition(*at)])[0].offset
                backlog += max(0, high - position) if position >= 0 else 0
            self._backlog = backlog
        except KafkaException:
            pass  # it is asked again soon

    def _note(self, error: Any) -> None:
        """Logs an error of librdkafka's once, until another one comes or it is connected again."""
        self._is_down = self._is_down or error.name() == "_ALL_BROKERS_DOWN"
        told = f"{error.name()}: {error.str()}"
        if error.name() != self._told:
            self._told = error.name()
            log.warning("broker_error", source=self._name, error=told[:500])
