"""Reload of settings: which changes take effect in a running daemon. Pure.

A field takes effect if it, or the section that it is in, is marked `Reloadable`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from pydantic import BaseModel

from ingestd.base.errors import ConfigError
from ingestd.config.keys import PIPELINES, SOURCES, Schema, dotted
from ingestd.config.sections import Reloadable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

S = TypeVar("S", bound=BaseModel)


class Change(NamedTuple, Generic[S]):
    """The effect of new settings.

    Attributes:
        settings: those of the running daemon with everything that can change put in.
        changed: keys whose value changed, dotted.
        needs_restart: keys that are set to another value and stay as they were, dotted.
    """

    settings: S
    changed: list[str]
    needs_restart: list[str]


def plan(running: S, new: S, check: Callable[[S], list[tuple[str, str]]]) -> Change[S]:
    """Compares the settings in effect with those that are configured now.

    Args:
        running: the settings that are in effect.
        new: what is configured now.
        check: finds what does not go together: (dotted key, what is wrong with it) for each.

    Raises:
        ConfigError: what can change does not go with what can't; one line for each problem.
    """
    changed: list[str] = []
    needs_restart: list[str] = []
    schema = Schema(type(running))
    for path in _different(schema, running, new):
        (changed if _is_reloadable(schema, path) else needs_restart).append(dotted(path))
    settings = _merge(running, new)
    problems = [
        f"{key}: {text}; what needs a restart is as it was" for key, text in check(settings)
    ]
    if problems:
        raise ConfigError(problem="\n".join(problems))
    return Change(settings, changed, needs_restart)


def _different(schema: Schema, running: BaseModel, new: BaseModel) -> Iterator[tuple[str, ...]]:
    before, after = dict(schema.values_of(running)), dict(schema.values_of(new))
    # A pipeline or source that came, went or is of another kind is one change, not one for each of
    # its settings.
    whole = [
        (table, name)
        for table in (PIPELINES, SOURCES)
        for name in _came_or_went(getattr(running, table), getattr(new, table))
    ]
    yield from whole
    for path in dict.fromkeys((*before, *after)):
        if path[:2] not in whole and before.get(path) != after.get(path):
            yield path


def _came_or_went(running: dict[str, BaseModel], new: dict[str, BaseModel]) -> list[str]:
    names = sorted(running.keys() | new.keys())
    return [name for name in names if type(running.get(name)) is not type(new.get(name))]


def _is_reloadable(schema: Schema, path: tuple[str, ...]) -> bool:
    fields = (schema.field_at(path[:end]) for end in range(1, len(path) + 1))
    return any(field is not None and _marked(field.metadata) for field in fields)


def _marked(metadata: list[object]) -> bool:
    return any(isinstance(mark, Reloadable) for mark in metadata)


def _merge(running: S, new: S) -> S:
    """The running settings with what is reloadable taken from the new ones."""
    update: dict[str, object] = {}
    for name, field in type(running).model_fields.items():
        old, value = getattr(running, name), getattr(new, name)
        if _marked(field.metadata):
            update[name] = value
        elif isinstance(old, BaseModel):
            update[name] = _merge(old, value)
        elif isinstance(old, dict) and any(isinstance(one, BaseModel) for one in old.values()):
            update[name] = {
                key: _merge(one, value[key]) if type(value.get(key)) is type(one) else one
                for key, one in old.items()
            }
    return running.model_copy(update=update)
