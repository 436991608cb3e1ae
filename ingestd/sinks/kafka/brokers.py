"""Questions to the brokers that `check` asks: topics, their replicas and settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ingestd.handlers.outcome import SinkFinding
from ingestd.host.kafka import CONNECT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ingestd.sinks.kafka.options import KafkaOptions


def topic_findings(admin: Any, name: str, options: KafkaOptions) -> Iterator[SinkFinding]:
    """Findings about a topic that messages go to.

    Raises:
        KafkaException: the brokers do not answer.
    """
    topic = admin.list_topics(name, timeout=CONNECT_SECONDS).topics[name]
    if topic.error is not None and topic.error.name() == "UNKNOWN_TOPIC_OR_PART":
        text = f"there is no topic {name}; it is made if the brokers make topics by themselves"
        yield SinkFinding("warning", text)
        return
    if topic.error is not None:
        yield SinkFinding("error", f"topic {name}: {topic.error.str()}")
        return
    replicas = min((len(one.replicas) for one in topic.partitions.values()), default=0)
    if replicas < 2:
        text = f"topic {name} has one replica: what is acknowledged goes with its broker"
        yield SinkFinding("warning", text)
    settings = _settings_of(admin, name)
    if replicas >= 2 and settings.get("min.insync.replicas") == "1":
        text = f"topic {name}: min.insync.replicas is 1, so one broker's word is enough"
        yield SinkFinding("warning", text)
    size = settings.get("max.message.bytes", "")
    if size.isdigit() and int(size) < options.message_bytes_max:
        text = f"topic {name}: max.message.bytes is {size}, below message_bytes_max"
        yield SinkFinding("error", text)
    if "compact" in settings.get("cleanup.policy", "") and not options.key:
        text = f"topic {name} is compacted and takes no message without a key: set key"
        yield SinkFinding("error", text)


def ledger_findings(admin: Any, topic: str) -> Iterator[SinkFinding]:
    """Findings about the topic of the ledger.

    Raises:
        KafkaException: the brokers do not answer, or there is no right to see it.
    """
    if not is_there(admin, topic):
        yield SinkFinding("info", f"there is no topic {topic} yet; the sink makes it")
        return
    partitions = admin.list_topics(topic, timeout=CONNECT_SECONDS).topics[topic].partitions
    if len(partitions) != 1:
        yield SinkFinding("error", f"topic {topic} has {len(partitions)} partitions, not 1")


def is_there(admin: Any, topic: str) -> bool:
    """Returns True if there is such a topic.

    Raises:
        KafkaException: the brokers do not answer, or there is no right to see it.
    """
    from confluent_kafka import KafkaException  # noqa: PLC0415

    error = admin.list_topics(topic, timeout=CONNECT_SECONDS).topics[topic].error
    if error is not None and error.name() != "UNKNOWN_TOPIC_OR_PART":
        raise KafkaException(error)
    return error is None


def _settings_of(admin: Any, topic: str) -> dict[str, str]:
    """The settings of a topic; none if they cannot be read."""
    from confluent_kafka import KafkaException  # noqa: PLC0415
    from confluent_kafka.admin import ConfigResource  # noqa: PLC0415

    resource = ConfigResource(ConfigResource.Type.TOPIC, topic)
    asked = admin.describe_configs([resource], request_timeout=2)
    try:
        return {name: str(one.value) for name, one in asked[resource].result(10).items()}
    except KafkaException:
        return {}
