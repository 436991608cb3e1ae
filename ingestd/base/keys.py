"""The keys that exist: every setting's dotted name, read from the models."""

from __future__ import annotations

import enum
import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

from pydantic import BaseModel

from ingestd.base.settings import PipelineSettings, Settings
from ingestd.base.units import Unit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic.fields import FieldInfo

_BARE = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
PIPELINES = "pipelines"


class Kind(enum.Enum):
    """What a key is."""

    TABLE = "a section, or a pipeline"
    VALUE = "a setting"
    NAMED = "`pipelines`: a table a name"
    FREE = "`handler.options`, `fetch.headers`: a table with any keys"
    INSIDE = "something in such a table"


def locate(path: Sequence[str]) -> Kind | None:
    """What is at a path of keys from the top; `None` if nothing can be there."""
    found = _find(path)
    return found[0] if found else None


def field_at(path: Sequence[str]) -> FieldInfo | None:
    """The field of a setting; `None` for anything else."""
    found = _find(path)
    return found[2] if found else None


def _find(path: Sequence[str]) -> tuple[Kind, type[BaseModel], FieldInfo | None] | None:
    kind = Kind.TABLE
    model: type[BaseModel] = Settings
    field: FieldInfo | None = None
    for name in path:
        if kind in {Kind.FREE, Kind.INSIDE} and name:
            kind = Kind.INSIDE
        elif kind is Kind.NAMED and name:
            kind, model = Kind.TABLE, PipelineSettings
        elif kind is Kind.TABLE and name in model.model_fields:
            field = model.model_fields[name]
            kind, model = _kind(name, field, model)
        else:
            return None
    return kind, model, field


def _kind(name: str, field: FieldInfo, model: type[BaseModel]) -> tuple[Kind, type[BaseModel]]:
    annotation = field.annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return Kind.TABLE, annotation
    special = {PIPELINES: Kind.NAMED, "options": Kind.FREE, "headers": Kind.FREE}
    return special.get(name, Kind.VALUE), model


def settings_of(
    model: type[BaseModel], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Path and field of every setting in a model, sections in their order, without pipelines."""
    for name, field in model.model_fields.items():
        kind, section = _kind(name, field, model)
        if kind is Kind.TABLE:
            yield from settings_of(section, (*prefix, name))
        elif kind is not Kind.NAMED:
            yield (*prefix, name), field


def values_of(
    table: BaseModel | Mapping[str, object], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], object]]:
    """Path and value of everything that is in effect; an empty table is a value."""
    items = table.items() if not isinstance(table, BaseModel) else iter(table)
    for name, value in items:
        path = (*prefix, name)
        if isinstance(value, BaseModel) or (isinstance(value, dict) and value):
            yield from values_of(value, path)
        elif path != (PIPELINES,):
            yield path, value


def dotted(path: Sequence[str]) -> str:
    """A path as TOML writes it: `batch.records_max`, `handler.options."a b"`."""
    return ".".join(name if _BARE.fullmatch(name) else quoted(name) for name in path)


def quoted(name: str) -> str:
    """Text as a TOML basic string on one line."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'


def nearest(path: Sequence[str]) -> tuple[str, ...] | None:
    """The key that was probably meant by one that does not exist; `None` if none is near."""
    known = _candidates(path)
    same_end = {key: found for key, found in known.items() if found[-1] == path[-1]}
    in_pipelines = {
        key: found for key, found in same_end.items() if found[0] in PipelineSettings.model_fields
    }
    # A slip of the finger first, then a setting whose table was left out, then anything near.
    tries = ((known, 0.85), (in_pipelines, 0.6), (same_end, 0.6), (known, 0.6))
    for among, cutoff in tries:
        close = get_close_matches(".".join(path), among, n=1, cutoff=cutoff)
        if close:
            return among[close[0]]
    return None


def _candidates(path: Sequence[str]) -> dict[str, tuple[str, ...]]:
    found = [(PIPELINES,), *_with_sections(Settings, ())]
    if len(path) > 2 and path[0] == PIPELINES:
        found = list(_with_sections(PipelineSettings, (PIPELINES, path[1])))
    return {".".join(key): key for key in found}


def _with_sections(model: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for path, _ in settings_of(model, prefix):
        if len(path) > len(prefix) + 1:
            yield path[:-1]
        yield path


def example_in(path: Sequence[str]) -> tuple[str, ...]:
    """A setting that is in a table: `batch.records_max` for `batch`."""
    if path[0] == PIPELINES:
        name = (path[1:] or ("clicks",))[0]
        return (PIPELINES, name, *example_in(path[2:] or ("handler",)))
    return next(key for key, _ in settings_of(Settings) if key[: len(path)] == tuple(path))


def unit_of(field: FieldInfo | None) -> Unit | None:
    """How a setting's values are written; `None` for text and tables."""
    marks = field.metadata if field else []
    return next((mark for mark in marks if isinstance(mark, Unit)), None)


def shown(field: FieldInfo | None, value: object) -> object:
    """A setting's value as people write it: `4194304` becomes `"4MiB"`."""
    unit = unit_of(field)
    if isinstance(value, tuple):
        return list(value)
    if unit is None or not isinstance(value, int | float):
        return value
    return unit.show(value)
