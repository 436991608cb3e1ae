"""Makes rows of records, in the text format of COPY. Pure.

A key of a JSON object is the column of that name. What has no column, or does not fit the type of
its column, is kept as JSON in the column `_extra`, or makes its record a dead letter, as the
options say. PostgreSQL cannot store U+0000 in text, so a record with it is refused here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd.base.record import Layout, Records
from ingestd.sinks.tables import DOUBLE_EXACT, is_rounded

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

COLUMNS_MAX = 500
"""Columns that are made of keys; PostgreSQL has room for 1,600, dropped ones included."""
NAME_BYTES_MAX = 63
"""Bytes of a name; PostgreSQL cuts longer ones, so that two keys would be one column."""
_SYSTEM = frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})
_INTEGER_MIN, _INTEGER_MAX = -(2**63), 2**63 - 1
_NULL = r"\N"
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_SPECIAL = "\\\t\n\r"
_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
_decode_lines = msgspec.json.Decoder().decode_lines
NO_NUL = "contains U+0000, which PostgreSQL cannot store"


class Column(NamedTuple):
    """A column that can be written.

    Attributes:
        name: of it.
        type: as PostgreSQL shows it: `bigint`, `jsonb`, `timestamp with time zone`.
        default: the SQL of what a row gets that does not name the column; empty for NULL.
    """

    name: str
    type: str
    default: str = ""


def nul_places(records: Records, record_format: str) -> list[int]:
    """The places of records that have a U+0000 in a text."""
    sign = {"json": b"\\u0000", "text": b"\0"}.get(record_format)
    if sign is None or sign not in records.payload:
        return []
    items = records.items()
    if record_format == "json":
        return [i for i, item in enumerate(items) if b"\\u0000" in item and _NUL.search(item)]
    return [i for i, item in enumerate(items) if sign in item]


def can_be_column(key: str) -> bool:
    """Tells if a key can be the name of a column."""
    return 0 < len(key.encode()) <= NAME_BYTES_MAX and key not in _SYSTEM and "\0" not in key


def type_of(values: Sequence[Any]) -> str | None:
    """The type of a column that all values of a key fit in; `None` where all are null."""
    kinds = {type(value) for value in values} - {type(None)}
    if not kinds:
        return None
    if kinds == {bool}:
        return "boolean"
    if kinds == {int}:
        fits = all(_INTEGER_MIN <= value <= _INTEGER_MAX for value in values if value is not None)
        return "bigint" if fits else "numeric"
    if kinds <= {int, float}:
        exact = not any(type(value) is int and is_rounded(value) for value in values)
        return "double precision" if exact else "numeric"
    return "text" if kinds == {str} else "jsonb"


def new_columns(
    values: Iterable[Any], taken: Collection[str], reserved: Collection[str]
) -> list[Column]:
    """Columns for the keys of objects that have none yet, in the order in which they came.

    Args:
        values: decoded records.
        taken: names that there are.
        reserved: names that no key may have.
    """
    objects = [value for value in values if type(value) is dict]
    new = keys_of(objects) - {*taken, *reserved}
    if not new:
        return []
    # In the order in which they came: a set has none.
    order = dict.fromkeys(key for value in objects for key in value if key in new)
    made = [
        (key, type_of([value.get(key) for value in objects])) for key in order if can_be_column(key)
    ]
    room = max(0, COLUMNS_MAX - len(taken))
    return [Column(key, kind) for key, kind in made if kind is not None][:room]


def keys_of(objects: Iterable[Mapping[str, Any]]) -> set[str]:
    """Every key of some objects."""
    return set[str]().union(*objects)


# -- cells -----------------------------------------------------------------------------------------

_NUMBERS = frozenset({int, float})
_KINDS: dict[str, frozenset[type]] = {
    "bigint": frozenset({int}),
    "numeric": _NUMBERS,
    "double precision": _NUMBERS,
    "boolean": frozenset({bool}),
}


def _rounded(values: list[Any]) -> list[int]:
    """The places of integers that a double cannot hold as they are."""
    if int not in set(map(type, values)):
        return []
    low, high = _extremes(values)
    if low >= -DOUBLE_EXACT and high <= DOUBLE_EXACT:
        return []
    return [i for i, v in enumerate(values) if type(v) is int and is_rounded(v)]


def _misfits(values: list[Any], present: set[type], kind: str) -> list[int]:
    """The places of values that do not fit the type of a column that was made of a key."""
    fitting = _KINDS.get(kind)
    if fitting is None:
        return []
    is_wide = kind == "bigint" and any(
        type(v) is int and not _INTEGER_MIN <= v <= _INTEGER_MAX for v in _extremes(values)
    )
    if present <= fitting and not is_wide:
        return []
    return [
        i
        for i, v in enumerate(values)
        if v is not None
        and (type(v) not in fitting or (kind == "bigint" and not _INTEGER_MIN <= v <= _INTEGER_MAX))
    ]


def _extremes(values: list[Any]) -> tuple[Any, ...]:
    """The least and the greatest integer."""
    found = [v for v in values if type(v) is int]
    return (min(found), max(found)) if found else ()


def _text_of(value: Any) -> str:
    kind = type(value)
    if kind is str:
        text: str = value
        return text
    return _encode(value).decode() if kind is not int else str(value)


def _escaped(cells: list[str]) -> list[str]:
    """Cells with what COPY gives a meaning escaped; most columns have nothing of it."""
    text = "".join(cells)
    if not any(sign in text for sign in _SPECIAL):
        return cells
    return [cell.translate(_ESCAPES) for cell in cells]


def cells_of(values: list[Any], kind: str) -> tuple[list[str], list[int]]:
    """The cells of one column, and the places of values that do not fit its type.

    Args:
        values: one a row; `None` is NULL.
        kind: the type of the column. What it is to other types than those that are made of keys
            is PostgreSQL's to say.
    """
    kinds = set(map(type, values))
    has_null = type(None) in kinds
    kinds.discard(type(None))
    if kind in {"json", "jsonb"}:
        cells = [_NULL if v is None else _encode(v).decode().translate(_ESCAPES) for v in values]
        return cells, []
    misfits = _misfits(values, kinds, kind)
    if misfits:
        values, has_null = list(values), True
        for i in misfits:
            values[i] = None
    if kinds == {str} and not has_null:
        return _escaped(values), misfits
    # `repr` has another spelling of some fractions than JSON, which a text would keep.
    if kinds <= _NUMBERS and not has_null and (float not in kinds or kind in _KINDS):
        return list(map(repr, values)), misfits
    if kinds == {str}:
        texts = _escaped(["" if v is None else v for v in values])
    else:
        texts = _escaped(["" if v is None else _text_of(v) for v in values])
    if has_null:
        texts = [_NULL if v is None else t for v, t in zip(values, texts, strict=True)]
    return texts, misfits


class Rows(NamedTuple):
    """Rows for COPY.

    Attributes:
        columns: in the order of the cells.
        lines: one a row, without a line end.
        rejected: why a record gets no row, by its place.
        lacking: columns with a default that a record does not name, by its place; their cells are
            NULL.
    """

    columns: Sequence[str]
    lines: list[bytes]
    rejected: Mapping[int, str]
    lacking: Mapping[int, tuple[str, ...]] = {}


class CopyGroup(NamedTuple):
    """Rows that name the same columns.

    Attributes:
        columns: in the order of the cells.
        places: one a row.
        lines: one a row, without a line end.
    """

    columns: Sequence[str]
    places: Sequence[int]
    lines: Sequence[bytes]


def groups(
    columns: Sequence[str], lines: Mapping[int, bytes], lacking: Mapping[int, tuple[str, ...]]
) -> list[CopyGroup]:
    """Lines by place, in groups of those that lack the same columns, which get no cell there.

    Within a group they stay in order.
    """
    if not lacking:
        return [CopyGroup(columns, list(lines), list(lines.values()))] if lines else []
    found: dict[tuple[str, ...], list[int]] = {}
    for place in lines:
        found.setdefault(lacking.get(place, ()), []).append(place)
    made = []
    for names, places in found.items():
        of_group = [lines[place] for place in places]
        if names:
            kept = [i for i, name in enumerate(columns) if name not in names]
            # No cell has a tab of its own: see `_escaped`.
            cells = (line.split(b"\t") for line in of_group)
            of_group = [b"\t".join([one[i] for i in kept]) for one in cells]
            made.append(CopyGroup([columns[i] for i in kept], places, of_group))
        else:
            made.append(CopyGroup(columns, places, of_group))
    return made


def object_rows(
    ids: Sequence[str],
    values: Sequence[Any],
    columns: Mapping[str, tuple[str, str]],
    *,
    id_column: str | None,
    extra_column: str | None,
    leave_out: bool,
    defaults: Collection[str] = (),
) -> Rows:
    """Rows of records whose keys have columns.

    Args:
        ids: names of the records.
        values: decoded records.
        columns: by key the column's name and type.
        id_column: the column of the ids, if there is one.
        extra_column: the column of what has no other; without one a record with such is rejected.
        leave_out: what has no column is left out.
        defaults: names of the columns that have a default.
    """
    objects = [v if type(v) is dict else {} for v in values]
    left: dict[int, dict[str, Any]] = {}
    lacking = _lacking(objects, columns, defaults)
    cells: list[list[str]] = []
    names: list[str] = []
    if id_column is not None:
        names.append(id_column)
        cells.append(_escaped(list(ids)))
    for key, (name, kind) in columns.items():
        column = [o.get(key) for o in objects]
        if kind == "double precision" and extra_column is not None:
            # Without another place PostgreSQL rounds them, as the user's column says.
            for i in _rounded(column):
                left.setdefault(i, {})[key], column[i] = column[i], None
        made, misfits = cells_of(column, kind)
        for i in misfits:
            left.setdefault(i, {})[key] = column[i]
        names.append(name)
        cells.append(made)
    known = columns.keys()
    if not leave_out and not keys_of(objects) <= known:
        for i, one in enumerate(objects):
            if not one.keys() <= known:
                left.setdefault(i, {}).update((k, one[k]) for k in one if k not in known)
    others = {i: v for i, v in enumerate(values) if type(v) is not dict}
    rejected: dict[int, str] = {}
    if extra_column is None:
        rejected = {i: f"no column holds {_keys(found)}" for i, found in left.items()}
        rejected |= dict.fromkeys(others, "it is no JSON object, so it has no columns")
    elif left or others:
        extra = {**left, **others}
        names.append(extra_column)
        none = [_NULL] * len(values)
        for i, what in extra.items():
            none[i] = _encode(what).decode().translate(_ESCAPES)
        cells.append(none)
    if not cells:
        return Rows(
            names, [], dict.fromkeys(range(len(values)), "the table has none of its columns")
        )
    # No cell has a line end of its own: see `_escaped`.
    lines = "\n".join(map("\t".join, zip(*cells, strict=True))).encode().split(b"\n")
    return Rows(names, lines, rejected, lacking)


def _lacking(
    objects: Sequence[Mapping[str, Any]],
    columns: Mapping[str, tuple[str, str]],
    defaults: Collection[str],
) -> dict[int, tuple[str, ...]]:
    """The columns with a default that an object does not name, by its place."""
    found: dict[int, tuple[str, ...]] = {}
    for key, (name, _) in columns.items():
        if name in defaults:
            for i, one in enumerate(objects):
                if key not in one:
                    found[i] = (*found.get(i, ()), name)
    return found


def _keys(found: Mapping[str, Any]) -> str:
    shown = ", ".join(repr(key)[:80] for key in list(found)[:3])
    return shown + (f" and {len(found) - 3} more keys" if len(found) > 3 else "")


def whole_rows(
    ids: Sequence[str], items: Sequence[bytes], record_format: str, *, names: Sequence[str]
) -> Rows:
    """Rows of an id and the record as it came, which is not decoded."""
    if record_format == "bytes":
        bodies = [b"\\\\x" + item.hex().encode() for item in items]
    else:
        # In JSON a tab or a line break can only be white space outside of texts.
        bodies = list(items)
        if any(b"\\" in item or b"\t" in item or b"\n" in item or b"\r" in item for item in items):
            bodies = [
                item.replace(b"\\", b"\\\\").replace(b"\t", b"\\t").replace(b"\n", b"\\n")
                .replace(b"\r", b"\\r") for item in items
            ]  # fmt: skip
    named = _escaped(list(ids))
    lines = [b"%b\t%b" % (i.encode(), body) for i, body in zip(named, bodies, strict=True)]
    return Rows(names, lines, {})


def decoded(records: Records) -> tuple[list[Any], dict[int, str]]:
    """The values of records, in order, and why some have none, by place."""
    if records.layout is Layout.LINES:
        try:
            values = _decode_lines(records.payload)
            if len(values) == records.count:
                return values, {}
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
            pass  # which one it is, is found below
    values, rejected = [], {}
    for i, item in enumerate(records.items()):
        try:
            values.append(_decode(item))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            values.append(None)
            rejected[i] = f"cannot be decoded: {error}"
    return values, rejected
