"""Converts records to columns and rows of a table, or to lines of JSON. Pure.

A key of a JSON object is a column of the same spelling. What can be no column (see `fits`), or came
when there were `COLUMNS_MAX` already, is kept as JSON in the column `_extra`; so is a record that
is no object. Nothing of a record is ever left out.
"""

from __future__ import annotations

import base64
from itertools import chain
from typing import TYPE_CHECKING, Any

import msgspec

from ingestd.base.record import Layout, Records

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from ingestd.handlers.batch import Batch

ID = "_id"
EXTRA = "_extra"
RECORD = "record"
COLUMNS_MAX = 500
"""Columns that are made of keys; SQLite itself has room for 2,000."""
DOUBLE_EXACT = 2**53
"""Up to this size a double holds each integer."""
_KEY_CHARS_MAX = 200
_INTEGER_MIN, _INTEGER_MAX = -(2**63), 2**63 - 1
_NO_KEYS: dict[str, Any] = {}
_NOTHING: Mapping[str, str] = {}
_AFFINITIES: tuple[tuple[tuple[str, ...], str | None], ...] = (
    (("INT",), "INTEGER"), (("CHAR", "CLOB", "TEXT"), "TEXT"), (("BLOB",), None),
    (("REAL", "FLOA", "DOUB"), "REAL"),
)  # fmt: skip
_PLAIN = {str, float, bool, type(None), bytes}
_ENCODER = msgspec.json.Encoder()
_encode = _ENCODER.encode
# In JSON a raw line break can only be white space, and may as well be a space.
_BREAKS_TO_SPACES = bytes.maketrans(b"\n\r", b"  ")


def folded(name: str) -> str:
    """Folds a name as SQLite does (ASCII only): equal results are one column."""
    return name.encode().lower().decode()


def keys_of(values: Iterable[Any]) -> list[str]:
    """Every key of the objects among some values, in the order they came."""
    return list(dict.fromkeys(chain.from_iterable(v for v in values if type(v) is dict)))


def new_columns(keys: Iterable[str], taken: Collection[str]) -> list[str]:
    """The keys that become columns of a table.

    Args:
        keys: in the order they came.
        taken: names of the columns that there are; one that differs in its case only takes the
            name, too.
    """
    names = {folded(name) for name in (*taken, ID, EXTRA)}
    new = []
    for key in keys:
        if len(names) >= COLUMNS_MAX:
            break
        if fits(key) and folded(key) not in names:
            names.add(folded(key))
            new.append(key)
    return new


def fits(key: str) -> bool:
    """Returns True if a key can be the name of a column."""
    return 0 < len(key) <= _KEY_CHARS_MAX and "\0" not in key


def rows_of(
    ids: Sequence[str],
    values: Sequence[Any],
    columns: Sequence[str],
    *,
    has_extra: bool,
    affinities: Mapping[str, str] = _NOTHING,
) -> Iterator[tuple[Any, ...]]:
    """One row a record: its id, a cell a column and, with `has_extra`, what has no column.

    Args:
        ids: names of the records.
        values: decoded JSON.
        columns: keys that are columns, each once.
        has_extra: a value has no column (see the function), or is rounded by its one.
        affinities: of columns that have one (see `affinity`).
    """
    objects = [v if type(v) is dict else _NO_KEYS for v in values]
    left: dict[int, dict[str, Any]] = {}
    cells = []
    for key in columns:
        found = [o.get(key) for o in objects]
        kind = affinities.get(key)
        for i in rounded(found, kind):
            left.setdefault(i, {})[key], found[i] = found[i], None
        if kind == "TEXT" and float in set(map(type, found)):
            # SQLite would write 15 digits of it.
            found = [_encode(v).decode() if type(v) is float else v for v in found]
        cells.append(_column(found))
    if has_extra:
        known = frozenset(columns)
        cells.append([_extra(v, known, left.get(i)) for i, v in enumerate(values)])
    return zip(ids, *cells, strict=True)


def affinity(kind: str, *, is_strict: bool) -> str | None:
    """Returns the affinity that the declared type of a column has; `None` for none.

    https://sqlite.org/datatype3.html#determination_of_column_affinity
    """
    kind = kind.upper()
    if not kind or (is_strict and kind == "ANY"):
        return None
    for signs, found in _AFFINITIES:
        if any(sign in kind for sign in signs):
            return found
    return "NUMERIC"


def rounded(values: Sequence[Any], kind: str | None) -> list[int]:
    """The places of integers that a column of an affinity would round."""
    if kind not in {"REAL", "INTEGER", "NUMERIC"} or int not in set(map(type, values)):
        return []
    if kind == "REAL":
        return [i for i, v in enumerate(values) if type(v) is int and is_rounded(v)]
    return [
        i for i, v in enumerate(values) if type(v) is int and not _INTEGER_MIN <= v <= _INTEGER_MAX
    ]


def has_extra(values: Iterable[Any], keys: Iterable[str], columns: Collection[str]) -> bool:
    """Returns True if something in the values has no column."""
    return not set(keys) <= set(columns) or any(type(v) is not dict for v in values)


def _extra(value: Any, known: frozenset[str], inexact: dict[str, Any] | None) -> str | None:
    if type(value) is not dict:
        return _encode(value).decode()
    left = {key: inner for key, inner in value.items() if key not in known} | (inexact or {})
    return _encode(left).decode() if left else None


def _column(values: list[Any]) -> list[Any]:
    if set(map(type, values)) <= _PLAIN:
        return values
    return [
        v
        if (kind := type(v)) in _PLAIN or (kind is int and _INTEGER_MIN <= v <= _INTEGER_MAX)
        else _cell(v)
        for v in values
    ]


def _cell(value: Any) -> str:
    """Objects and arrays as JSON; a number that no 64 bits hold as its digits."""
    return str(value) if type(value) is int else _encode(value).decode()


# -- lines -----------------------------------------------------------------------------------------


def lines(records: Records, record_format: str) -> bytes:
    """Renders records as lines of JSON.

    JSON lines go as they came, without a copy. Text and bytes become JSON strings; what is not
    UTF-8 becomes `{"base64": "..."}`.
    """
    if record_format == "json":
        if records.layout is Layout.LINES:
            return records.payload
        spaced = records._replace(payload=records.payload.translate(_BREAKS_TO_SPACES))
        return Records.lines(spaced.items()).payload
    return _ENCODER.encode_lines([_shown(item) for item in records.items()])


def _shown(item: bytes) -> str | dict[str, str]:
    try:
        return item.decode("utf-8")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(item).decode("ascii")}


def objects_of(batch: Batch[bytes], record_format: str) -> Iterator[tuple[int, bytes]]:
    """Each record as a JSON object in one line, with its place; others are rejected.

    A JSON object goes as it came. Text becomes `{"message": "..."}`, and bytes too, or
    `{"base64": "..."}` where they are not UTF-8.
    """
    is_json = record_format == "json"
    texts = lines(batch.records, record_format).split(b"\n")
    for place, text in enumerate(texts[:-1]):
        if text.lstrip(b" \t\r")[:1] == b"{":
            yield place, text
        elif is_json:
            batch.reject(place, "it is no JSON object")
        else:
            yield place, b'{"message":%b}' % text


def is_rounded(value: int) -> bool:
    """Returns True if a double cannot hold an integer as it is."""
    if -DOUBLE_EXACT <= value <= DOUBLE_EXACT:
        return False
    try:
        return int(float(value)) != value
    except OverflowError:
        return True
