"""Messages of the sink `kafka`: topic, key and headers from templates, the value as it came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd.sinks.kafka.options import PLACEHOLDER, TOPIC

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ingestd.handlers.batch import Batch
    from ingestd.handlers.context import Context
    from ingestd.sinks.kafka.options import KafkaOptions

_OVERHEAD = 1024  # of a message, beside its key, value and headers
_decode = msgspec.json.Decoder().decode


class KafkaMessage(NamedTuple):
    """A message of one record.

    Attributes:
        place: of the record in its batch.
        topic: its name.
        key: `None` for none.
        value: the record.
        headers: names and values.
    """

    place: int
    topic: str
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]


class KafkaMessages:
    """Makes the messages of batches.

    Args:
        options: of the sink.
        context: format and name of the pipeline.

    Attributes:
        topic: the one topic; `None` where records name it.

    Raises:
        ValueError: a placeholder names a value of records that have none.
    """

    def __init__(self, options: KafkaOptions, context: Context) -> None:
        self._options = options
        self._topic = _Template(options.topic, context.pipeline)
        self._key = _Template(options.key, context.pipeline)
        self._headers = [
            (name, _Template(text, context.pipeline)) for name, text in options.headers.items()
        ]
        self.topic = self._topic.fixed
        templates = [self._topic, self._key, *(one for _, one in self._headers)]
        self._decodes = any(one.has_fields for one in templates)
        if self._decodes and context.record_format != "json":
            raise ValueError(f"records of format {context.record_format} have no values by name")

    def of(self, batch: Batch[bytes]) -> Iterator[KafkaMessage]:
        """A message a record; rejects what can be none."""
        options, batch_id, fixed = self._options, batch.id, self._topic.fixed
        size_max = options.message_bytes_max - _OVERHEAD
        has_key, key, key_of = bool(options.key), None, self._key.render
        headers_of = [(name, template.render) for name, template in self._headers]
        values: Any = None
        for place, (name, item) in enumerate(zip(batch.ids, batch, strict=True)):
            if self._decodes:
                try:
                    values = _decode(item)
                except (ValueError, RecursionError):
                    batch.reject(place, "it is no JSON that can be decoded")
                    continue
            topic = fixed or self._topic.render(name, batch_id, values)
            if fixed is None and (topic is None or not TOPIC.fullmatch(topic)):
                why = "has no value for" if topic is None else "gives no name of a topic for"
                batch.reject(place, f"it {why} {options.topic}")
                continue
            size, headers = len(item), []
            if has_key and (text := key_of(name, batch_id, values)) is not None:
                key = text.encode()
                size += len(key)
            else:
                key = None
            for header, render in headers_of:
                if (text := render(name, batch_id, values)) is not None:
                    headers.append((header, text.encode()))
                    size += len(header) + 4 * len(text)
            if size > size_max:
                batch.reject(place, f"it has {size} bytes, more than message_bytes_max")
                continue
            yield KafkaMessage(place, topic or "", key, item, headers)


class _Template:
    """A text with placeholders.

    Attributes:
        has_fields: a placeholder names a value of the record.
        fixed: the text, where it has no placeholders.
        render: from a record's id, its batch's and its values to the text; `None` where there is no
            value for a placeholder.
    """

    def __init__(self, text: str, pipeline: str) -> None:
        # Literal text and placeholders by turns.
        parts = PLACEHOLDER.split(text.replace("{_pipeline}", pipeline))
        getters = [_getter(name) for name in parts[1::2]]
        self.has_fields = not {"_id", "_batch"}.issuperset(parts[1::2])
        self.fixed = None if getters else parts[0]
        self.render: Callable[[str, str, Any], str | None] = _joined(parts[::2], getters)
        if not getters:
            self.render = lambda *_: parts[0]
        elif parts[::2] == ["", ""]:
            self.render = getters[0]


def _joined(
    texts: list[str], getters: list[Callable[[str, str, Any], str | None]]
) -> Callable[[str, str, Any], str | None]:
    def render(name: str, batch: str, values: Any) -> str | None:
        found = [texts[0]]
        for getter, text in zip(getters, texts[1:], strict=True):
            value = getter(name, batch, values)
            if value is None:
                return None
            found += (value, text)
        return "".join(found)

    return render


def _getter(placeholder: str) -> Callable[[str, str, Any], str | None]:
    if placeholder == "_id":
        return lambda name, _, __: name
    if placeholder == "_batch":
        return lambda _, batch, __: batch
    path = placeholder.split(".")

    def value(_: str, __: str, values: Any) -> str | None:
        for name in path:
            values = values.get(name) if type(values) is dict else None
        if type(values) is str:
            return values
        if values is None or isinstance(values, dict | list):
            return None
        return msgspec.json.encode(values).decode()

    return value
