"""Keys of settings: dotted names, found in the models, and values as people write them."""

from __future__ import annotations

import enum
import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple, TypeGuard, get_args, get_origin

from pydantic import AfterValidator, BaseModel, SecretStr

from ingestd.config.sections import MASK
from ingestd.config.units import Unit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic.fields import FieldInfo

_BARE = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
PIPELINES = "pipelines"
_NAMED_DEPTH = 2  # the longest path of a table of names, `http.tokens`


class KeyKind(enum.Enum):
    """Kind of a key."""

    TABLE = "a section, or a table with a name of the user's own"
    VALUE = "a setting"
    NAMED = "`pipelines`, `http.tokens`: a table a name"
    FREE = "`handler.options`, `fetch.headers`: a table with any keys"
    INSIDE = "something in such a table"


class _LocatedKey(NamedTuple):
    """The setting, section or table at a path.

    Attributes:
        kind: of it.
        model: whose fields can follow; of a `NAMED` one, in each table with a name.
        field: the setting, if it is one.
    """

    kind: KeyKind
    model: type[BaseModel]
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

    def wrong_name(self, path: Sequence[str]) -> str | None:
        """Explains a wrong name of the user's own in a path; `None` if it is right."""
        table = self._named_in(path)
        found = self._find(table) if table else None
        if table is None or found is None or found.field is None:
            return None
        key = get_args(found.field.annotation)[0]
        for mark in getattr(key, "__metadata__", ()):
            if isinstance(mark, AfterValidator):
                try:
                    mark.func(path[len(table)])  # type: ignore[call-arg]  # takes a value alone
                except ValueError as error:
                    return str(error)
        return None

    def _named_in(self, path: Sequence[str]) -> tuple[str, ...] | None:
        """The beginning of a path that is a table of names, if a name follows."""
        for end in range(1, min(len(path), _NAMED_DEPTH + 1)):
            if self.locate(path[:end]) is KeyKind.NAMED:
                return tuple(path[:end])
        return None

    def _find(self, path: Sequence[str]) -> _LocatedKey | None:
        found = _LocatedKey(KeyKind.TABLE, self.root)
        for name in path:
            if found.kind in {KeyKind.FREE, KeyKind.INSIDE} and name:
                found = found._replace(kind=KeyKind.INSIDE)
            elif found.kind is KeyKind.NAMED and name:
                found = _LocatedKey(KeyKind.TABLE, found.model)
            elif found.kind is KeyKind.TABLE and name in found.model.model_fields:
                field = found.model.model_fields[name]
                found = _LocatedKey(*_kind(field, found.model), field)
            else:
                return None
        return found

    def values_of(
        self, table: BaseModel | Mapping[str, object], prefix: tuple[str, ...] = ()
    ) -> Iterator[tuple[tuple[str, ...], object]]:
        """Path and value of everything that is in effect; an empty table is a value."""
        items = table.items() if not isinstance(table, BaseModel) else iter(table)
        for name, value in items:
            path = (*prefix, name)
            if isinstance(value, BaseModel) or (isinstance(value, dict) and value):
                yield from self.values_of(value, path)
            elif self.locate(path) is not KeyKind.NAMED:
                yield path, value

    def nearest(self, path: Sequence[str]) -> tuple[str, ...] | None:
        """The key that was probably meant by one that does not exist; `None` if none is near."""
        known = self._candidates(path)
        words = set(path[-1].split("_"))
        for found in known.values():  # a word was left out: the first one that is longer
            if found[:-1] == tuple(path[:-1]) and words < set(found[-1].split("_")):
                return found
        same_end = {key: found for key, found in known.items() if found[-1] == path[-1]}
        pipelines = self._find((PIPELINES,))
        pipeline_keys = pipelines.model.model_fields if pipelines else {}
        in_pipelines = {key: found for key, found in same_end.items() if found[0] in pipeline_keys}
        # A slip of the finger first, then a setting whose table was left out, then anything near.
        tries = ((known, 0.85), (in_pipelines, 0.6), (same_end, 0.6), (known, 0.6))
        for among, cutoff in tries:
            close = get_close_matches(".".join(path), among, n=1, cutoff=cutoff)
            if close:
                return among[close[0]]
        return None

    def _candidates(self, path: Sequence[str]) -> dict[str, tuple[str, ...]]:
        table = self._named_in(path)
        within = self._find(table) if table and len(path) > len(table) + 1 else None
        if table and within:
            found = _with_sections(within.model, (*table, path[len(table)]))
        else:
            found = _with_sections(self.root, ())
        return {".".join(key): key for key in found}

    def example_in(self, path: Sequence[str]) -> tuple[str, ...]:
        """A setting that is in a table: `batch.records_max` for `batch`."""
        found = self._find(path)
        assert found is not None  # noqa: S101  who asks has located it
        name, key = getattr(found.model, "EXAMPLE", ("", ()))
        if found.kind is KeyKind.NAMED:
            return (*path, name, *key)
        return (*path, *(key or next(key for key, _ in settings_of(found.model))))


def _kind(field: FieldInfo, model: type[BaseModel]) -> tuple[KeyKind, type[BaseModel]]:
    annotation = field.annotation
    if _is_section(annotation):
        return KeyKind.TABLE, annotation
    if get_origin(annotation) is dict:
        inner = get_args(annotation)[1]
        return (KeyKind.NAMED, inner) if _is_section(inner) else (KeyKind.FREE, model)
    return KeyKind.VALUE, model


def _is_section(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def settings_of(
    model: type[BaseModel], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Path and field of every setting in a model, sections in their order, without own names."""
    for name, field in model.model_fields.items():
        kind, section = _kind(field, model)
        if kind is KeyKind.TABLE:
            yield from settings_of(section, (*prefix, name))
        elif kind is not KeyKind.NAMED:
            yield (*prefix, name), field


def _with_sections(model: type[BaseModel], prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        path = (*prefix, name)
        yield path
        kind, section = _kind(field, model)
        if kind is KeyKind.TABLE:
            yield from _with_sections(section, path)


def dotted(path: Sequence[str]) -> str:
    """A path as TOML writes it: `batch.records_max`, `handler.options."a b"`."""
    return ".".join(name if _BARE.fullmatch(name) else quoted(name) for name in path)


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
    unit = unit_of(field)
    if isinstance(value, tuple):
        return list(value)
    if unit is None or not isinstance(value, int | float):
        return value
    return unit.show(value)
