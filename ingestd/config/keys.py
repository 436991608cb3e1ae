"""Keys of settings: dotted names, found in the models, and values as people write them."""

from __future__ import annotations

import enum
import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeGuard, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, SecretStr

from ingestd.config.sections import MASK, LateModels, LateTables, OtherName, Shown
from ingestd.config.units import Unit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic.fields import FieldInfo

_BARE = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
PIPELINES = "pipelines"
SOURCES = "sources"


class KeyKind(enum.Enum):
    """Kind of a key."""

    TABLE = "a section, or a table with a name of the user's own"
    VALUE = "a setting"
    NAMED = "`pipelines`, `sources`, `http.tokens`: a table a name"
    FREE = "`handler.options`, `fetch.headers`: a table with any keys"
    INSIDE = "something in such a table"


class _LocatedKey(NamedTuple):
    """The setting, section or table at a path.

    Attributes:
        kind: of it.
        models: whose fields can follow; of a `NAMED` one, in each table with a name. There are
            several where a key in the table, its `kind`, says which.
        late: the tables that can follow, in place of models.
        field: the setting, if it is one.
    """

    kind: KeyKind
    models: tuple[type[BaseModel], ...]
    late: LateTables | None = None
    field: FieldInfo | None = None


class Schema:
    """The settings that exist, read from a model: by path, and the nearest to a wrong name.

    Attributes:
        root: the model of all settings.
    """

    def __init__(self, root: type[BaseModel]) -> None:
        self.root = root

    def locate(self, path: Sequence[str]) -> KeyKind | None:
        """Finds the key at a path from the top; `None` if there can be none."""
        found = self._find(path)
        return found.kind if found else None

    def field_at(self, path: Sequence[str]) -> FieldInfo | None:
        """The field of a setting; `None` for anything else."""
        found = self._find(path)
        return found.field if found else None

    def fault_at(self, path: Sequence[str]) -> str:
        """Explains why the component whose table a path is in cannot be used; empty if it can."""
        for found in self._ways(path[:-1]):
            for model in found.models:
                if fault := getattr(model, "FAULT", ""):
                    return str(fault)
        return ""

    def wrong_name(self, path: Sequence[str]) -> str | None:
        """Explains a wrong name of the user's own in a path; `None` if it is right."""
        for table in self._named_in(path):
            found = self._find(table)
            assert found is not None and found.field is not None  # noqa: S101, PT018  it was found
            key = get_args(found.field.annotation)[0]
            for mark in getattr(key, "__metadata__", ()):
                if isinstance(mark, AfterValidator):
                    try:
                        mark.func(path[len(table)])  # type: ignore[call-arg]  # takes a value alone
                    except ValueError as error:
                        return str(error)
        return None

    def _named_in(self, path: Sequence[str]) -> list[tuple[str, ...]]:
        """The beginnings of a path that are tables of names, each with a name behind it."""
        ways = enumerate(self._ways(path[:-1]), start=1)
        return [tuple(path[:end]) for end, found in ways if found.kind is KeyKind.NAMED]

    def _find(self, path: Sequence[str]) -> _LocatedKey | None:
        found = [_LocatedKey(KeyKind.TABLE, (self.root,)), *self._ways(path)]
        return found[-1] if len(found) > len(path) else None

    def _ways(self, path: Sequence[str]) -> Iterator[_LocatedKey]:
        """The keys on the way to a path, one a name; it ends where there is no such key."""
        found = _LocatedKey(KeyKind.TABLE, (self.root,))
        for name in path:
            if found.kind in {KeyKind.FREE, KeyKind.INSIDE} and name:
                found = found._replace(kind=KeyKind.INSIDE)
            elif found.kind is KeyKind.NAMED and name:
                found = _LocatedKey(KeyKind.TABLE, found.models)
            elif found.late is not None and name in found.late.names():
                found = _LocatedKey(KeyKind.TABLE, (found.late.model(name),))
            elif found.kind is KeyKind.TABLE and (model := _with_field(found.models, name)):
                field = model.model_fields[name]
                found = _LocatedKey(*_kind(field), _late(field), field)
            else:
                return
            yield found

    def values_of(
        self, table: BaseModel | Mapping[str, object], prefix: tuple[str, ...] = ()
    ) -> Iterator[tuple[tuple[str, ...], object]]:
        """Path and value of everything that is in effect; an empty table is a value."""
        items = table.items() if not isinstance(table, BaseModel) else iter(table)
        for name, value in items:
            path = (*prefix, name)
            if isinstance(value, dict) and (found := self._find(path)) and found.late:
                value = dict(found.late.filled(value))  # noqa: PLW2901
            if isinstance(value, BaseModel) or (isinstance(value, dict) and value):
                yield from self.values_of(value, path)
            elif self.locate(path) is not KeyKind.NAMED:
                yield path, value

    def nearest(self, path: Sequence[str]) -> tuple[str, ...] | None:
        """The key that was probably meant by one that does not exist; `None` if none is near."""
        known = self._candidates(path)
        for found in known.values():
            field = self.field_at(found)
            marks = field.metadata if field and found[:-1] == tuple(path[:-1]) else ()
            if OtherName(path[-1]) in marks:
                return found
        words = set(path[-1].split("_"))
        for found in known.values():  # a word was left out: the first one that is longer
            if found[:-1] == tuple(path[:-1]) and words < set(found[-1].split("_")):
                return found
        same_end = {key: found for key, found in known.items() if found[-1] == path[-1]}
        pipelines = self._find((PIPELINES,))
        pipeline_keys = pipelines.models[0].model_fields if pipelines else {}
        in_pipelines = {key: found for key, found in same_end.items() if found[0] in pipeline_keys}
        # A slip of the finger first, then a setting whose table was left out, then anything near.
        tries = ((known, 0.85), (in_pipelines, 0.6), (same_end, 0.6), (known, 0.6))
        for among, cutoff in tries:
            close = get_close_matches(".".join(path), among, n=1, cutoff=cutoff)
            if close:
                return among[close[0]]
        return None

    def _candidates(self, path: Sequence[str]) -> dict[str, tuple[str, ...]]:
        tables = [table for table in self._named_in(path) if len(path) > len(table) + 1]
        within = self._find(tables[-1]) if tables else None
        models, prefix = ((self.root,), ()) if within is None else (within.models, tables[-1])
        prefix = tuple(path[: len(prefix) + 1]) if prefix else ()
        found = (key for model in models for key in _with_sections(model, prefix))
        return {".".join(key): key for key in found}

    def example_in(self, path: Sequence[str]) -> tuple[str, ...]:
        """A setting that is in a table: `batch.records_max` for `batch`."""
        found = self._find(path)
        assert found is not None  # noqa: S101  the caller has located it
        if found.late is not None:
            name = (*found.late.names(), "NAME")[0]
            return (*path, name, next(iter(found.late.model(name).model_fields)))
        model = found.models[0]
        name, key = getattr(model, "EXAMPLE", ("", ()))
        if found.kind is KeyKind.NAMED:
            return (*path, name, *key)
        return (*path, *(key or next(key for key, _ in settings_of(model))))


def _with_field(models: Sequence[type[BaseModel]], name: str) -> type[BaseModel] | None:
    return next((model for model in models if name in model.model_fields), None)


def _late(field: FieldInfo) -> LateTables | None:
    return next((mark for mark in field.metadata if isinstance(mark, LateTables)), None)


def _kind(field: FieldInfo) -> tuple[KeyKind, tuple[type[BaseModel], ...]]:
    annotation = field.annotation
    if _late(field) is not None:
        return KeyKind.TABLE, ()
    for mark in field.metadata:
        if isinstance(mark, LateModels):
            return KeyKind.NAMED, tuple(mark.models())
    if _is_section(annotation):
        return KeyKind.TABLE, (annotation,)
    if get_origin(annotation) is dict:
        inner = get_args(annotation)[1]
        if get_origin(inner) is Annotated:
            inner = get_args(inner)[0]
        members = get_args(inner) if get_origin(inner) is Union else (inner,)
        sections = tuple(member for member in members if _is_section(member))
        return (KeyKind.NAMED, sections) if sections else (KeyKind.FREE, ())
    return KeyKind.VALUE, ()


def _is_section(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def settings_of(
    model: type[BaseModel], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Path and field of every setting in a model, sections in their order, without own names."""
    for name, field in model.model_fields.items():
        kind, _ = _kind(field)
        if kind is KeyKind.TABLE:
            for path, section in _tables_at(field, (*prefix, name)):
                yield from settings_of(section, path)
        elif kind is not KeyKind.NAMED:
            yield (*prefix, name), field


def tables_of(
    model: type[BaseModel], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo, list[str]]]:
    """Path, field and inner keys of every table in a model whose own keys a user chooses.

    There are no inner keys where anything may be in the table.
    """
    for name, field in model.model_fields.items():
        kind, sections = _kind(field)
        if kind is KeyKind.TABLE:
            for path, section in _tables_at(field, (*prefix, name)):
                yield from tables_of(section, path)
        elif kind is not KeyKind.VALUE:
            keys = dict.fromkeys(key for section in sections for key in section.model_fields)
            everywhere = [key for key in keys if all(key in one.model_fields for one in sections)]
            yield (*prefix, name), field, list(dict.fromkeys((*everywhere, *keys)))


def _with_sections(model: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        if _kind(field)[0] is KeyKind.TABLE:
            for path, section in _tables_at(field, (*prefix, name)):
                if path != (*prefix, name):
                    yield path
                yield from _with_sections(section, path)


def _tables_at(
    field: FieldInfo, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """Path and model of the table that a field is, or of the tables that components have in it."""
    late = _late(field)
    if late is None:
        yield path, _kind(field)[1][0]
    else:
        yield from (((*path, name), late.model(name)) for name in late.names())


def dotted(path: Sequence[str]) -> str:
    """A path as TOML writes it: `batch.records_max`, `handler.options."a b"`."""
    return ".".join(name if _BARE.fullmatch(name) else quoted(name) for name in path)


def toml_of(value: object) -> str:
    """A setting's value in TOML, in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(toml_of(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{dotted([key])} = {toml_of(v)}" for key, v in value.items()) + "}"
    return quoted(str(value))


def quoted(name: str) -> str:
    """Text as a TOML basic string on one line."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'


def unit_of(field: FieldInfo | None) -> Unit | None:
    """The unit of a setting; `None` for text and tables."""
    marks = field.metadata if field else []
    return next((mark for mark in marks if isinstance(mark, Unit)), None)


def shown(field: FieldInfo | None, value: object) -> object:
    """A setting's value as people write it: `4194304` becomes `"4MiB"`; a secret is masked."""
    if isinstance(value, SecretStr):
        return MASK if value.get_secret_value() else ""
    own = (
        next((mark for mark in field.metadata if isinstance(mark, Shown)), None) if field else None
    )
    if own is not None:
        value = own.show(value)
    unit = unit_of(field)
    if isinstance(value, tuple):
        return list(value)
    if unit is None or not isinstance(value, int | float):
        return value
    return unit.show(value)
