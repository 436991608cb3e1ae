"""Texts with placeholders that name values of a record, for topics, subjects, keys and headers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

PLACEHOLDER = re.compile(r"\{([^{}]+)\}")
"""A placeholder: `{name}` or `{name.inner}` of a JSON object, `{_id}`, `{_batch}`."""


class Template:
    """A text with placeholders.

    Args:
        text: as the options have it.
        pipeline: the name of the pipeline.

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
