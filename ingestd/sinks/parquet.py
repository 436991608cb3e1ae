"""Parquet of records: a column a key, of types that are pinned.

Arrow's own reader takes JSON lines as they came, where each record has the columns' keys and types
only. Otherwise the records are looked at value by value: keys without a column go into `_extra`, as
JSON text, and a record with a value that does not fit is rejected.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ingestd.base.record import Layout, Records
from ingestd.handlers.batch import Blocked
from ingestd.sinks.tables import COLUMNS_MAX, DOUBLE_EXACT, is_rounded, lines

if TYPE_CHECKING:
    from collections.abc import Callable

Column = Literal["int64", "double", "bool", "text", "json"]
"""The type of a column: `json` is text, for whatever there is."""
SCHEMA = "_schema.json"
"""The object that pins the columns, at the top of the prefix."""
EXTRA_COLUMN = "_extra"
"""The column of keys that have none."""
_INT64 = range(-(2**63), 2**63)
_BLOCK_BYTES = 2 * 1024 * 1024


def write(
    records: Records,
    record_format: str,
    columns: dict[str, Column],
    compression: str,
    reject: Callable[[int, str], None],
) -> bytes | None:
    """Renders records as a Parquet file; `None` if none of them can be in it.

    Args:
        records: of the file.
        record_format: of them; text and bytes are one column, `record`.
        columns: of JSON records.
        compression: `none`, `gzip` or `zstd`.
        reject: gets place and reason of each record that cannot be a row.
    """
    import pyarrow as pa  # noqa: PLC0415  it takes a second
    from pyarrow import parquet  # noqa: PLC0415

    if record_format == "json":
        table = _fast(records, columns)
        if table is None:
            table = _slow(records, columns, reject)
    elif record_format == "bytes":
        table = pa.table({"record": pa.array(records.items(), pa.binary())})
    else:
        items = [item.decode(errors="replace") for item in records.items()]
        table = pa.table({"record": pa.array(items, pa.string())})
    if table is None:
        return None
    out = io.BytesIO()
    parquet.write_table(table, out, compression=compression)
    return out.getvalue()


def _fast(records: Records, columns: dict[str, Column]) -> Any:
    """A table by Arrow's reader; `None` where only a look at each value helps."""
    import pyarrow as pa  # noqa: PLC0415

    if "json" in columns.values() or not columns:
        return None  # Arrow's reader keeps no value as it is written
    table = _read(records, pa.schema([(name, _arrow(kind)) for name, kind in columns.items()]))
    if table is None or _may_be_rounded(table):
        return None
    return table.append_column(EXTRA_COLUMN, pa.nulls(records.count, pa.string()))


def _may_be_rounded(table: Any) -> bool:
    """Returns True if a column of doubles has numbers that integers beside them are rounded to."""
    from pyarrow import compute, types  # noqa: PLC0415

    for column in table.columns:
        if types.is_floating(column.type):
            found = compute.min_max(column).as_py()
            if any(one is not None and abs(one) >= DOUBLE_EXACT for one in found.values()):
                return True
    return False


def _read(records: Records, schema: Any) -> Any:
    """A table of a schema; `None` if that is not possible."""
    import pyarrow as pa  # noqa: PLC0415
    from pyarrow import json  # noqa: PLC0415

    payload = records.payload if records.layout is Layout.LINES else lines(records, "json")
    try:
        table = json.read_json(
            pa.BufferReader(payload),
            read_options=json.ReadOptions(block_size=_BLOCK_BYTES),
            parse_options=json.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior="error"
            ),
        )
        if table.num_rows != records.count:
            return None
        return table.select(schema.names).cast(schema)
    except (pa.ArrowException, KeyError):
        return None


def _slow(records: Records, columns: dict[str, Column], reject: Callable[[int, str], None]) -> Any:
    """A table value by value."""
    import pyarrow as pa  # noqa: PLC0415

    rows: list[dict[str, Any]] = []
    for i, item in enumerate(records.items()):
        try:
            rows.append(_row(item, columns))
        except (ValueError, RecursionError) as error:
            reject(i, str(error))
    if not rows:
        return None
    own = [(name, _arrow(kind)) for name, kind in columns.items()]
    return pa.Table.from_pylist(rows, schema=pa.schema([*own, (EXTRA_COLUMN, pa.string())]))


def _arrow(kind: str) -> Any:
    import pyarrow as pa  # noqa: PLC0415

    types = {"int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_()}
    return types.get(kind, pa.string())


def read_columns(content: bytes) -> dict[str, Column]:
    """The columns of a `_schema.json`.

    Raises:
        Blocked: it cannot be read.
    """
    try:
        return msgspec.json.decode(content, type=dict[str, Column])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise Blocked(f"{SCHEMA} cannot be read: {error}") from None


def found_in(records: Records) -> dict[str, Column]:
    """Columns for the first `COLUMNS_MAX` keys of some records; of several types it is JSON."""
    kinds: dict[str, set[Column]] = {}
    for item in records.items():
        try:
            value = msgspec.json.decode(item)
        except (ValueError, RecursionError):  # `_slow` rejects it
            continue
        for name, one in value.items() if isinstance(value, dict) else ():
            if one is None or name == EXTRA_COLUMN:
                continue
            if name in kinds or len(kinds) < COLUMNS_MAX:
                kinds.setdefault(name, set()).add(_kind_of(one))
    return {name: _joined(found) for name, found in kinds.items()}


def _kind_of(value: Any) -> Column:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if value in _INT64 else "json"
    if isinstance(value, float):
        return "double"
    return "text" if isinstance(value, str) else "json"


def _joined(kinds: set[Column]) -> Column:
    if len(kinds) == 1:
        return next(iter(kinds))
    return "double" if kinds == {"int64", "double"} else "json"


def _row(item: bytes, columns: dict[str, Column]) -> dict[str, Any]:
    """A record as a row.

    Raises:
        ValueError: a value does not fit its column.
    """
    value = msgspec.json.decode(item)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  a reason, not a bug
    row: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, one in value.items():
        kind = columns.get(name)
        if kind is None:
            extra[name] = one
        elif one is None:
            row[name] = None
        elif kind == "json":
            row[name] = msgspec.json.encode(one).decode()
        elif (found := _kind_of(one)) == kind:
            row[name] = one
        elif kind == "double" and type(one) is int:
            if is_rounded(one):
                extra[name] = one
            else:
                row[name] = float(one)
        else:
            raise ValueError(f"{name}: {found} does not fit its column, which is {kind}")
    if extra:
        row[EXTRA_COLUMN] = msgspec.json.encode(extra).decode()
    return row
