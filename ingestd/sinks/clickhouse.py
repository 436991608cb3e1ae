"""The sink `clickhouse` inserts each batch as one block over HTTP, in the format JSONEachRow.

The batch's id is the `insert_deduplication_token`: a block that comes again under its token within
the table's deduplication window is dropped by the server. A part of a batch that was split has a
token of its own; where the table has a column `_id`, the part first asks which of its records are
there, for the whole may have been stored before its answer was lost.

A row that cannot be read is named by the server with its number. It becomes a dead letter, and the
rest is sent again under the same token, which was not used up by what failed. In each further call
the same rows are refused in the same way, so the block is the same.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple
from urllib.parse import urlencode

import msgspec
from msgspec import Meta

from ingestd.handlers.batch import Batch, Blocked, Unavailable
from ingestd.handlers.context import Context
from ingestd.handlers.outcome import SinkFinding
from ingestd.handlers.text import one_line
from ingestd.sinks.base import BatchHints
from ingestd.sinks.client import HttpOptions, HttpPeer, refuse
from ingestd.sinks.tables import ID, objects_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ingestd.sinks.client import HttpReply

_HERE = Context()
_REFUSED_MAX = 100
"""Rows that one call finds; a batch with more of them is split."""
_ASKED_AT_ONCE = 10_000
_ERROR_CHARS = 400
_SAID_BYTES = 64_000
_encode = msgspec.json.Encoder().encode
_ROW = re.compile(r"\(at row (\d+)\)|is violated at row (\d+)")
_CODE = re.compile(r"Code: (\d+)\. DB::")
# Text of the record, which is the dead letter's payload and no part of its reason.
_VALUE = re.compile(r" before: '.*?'(?=: |\.? ?\(|$)", re.DOTALL)
_AROUND = re.compile(
    r":? ?While executing .*|\(version .*?\)|^Code: \d+\. DB::Exception: ", re.DOTALL
)
_WINDOW = "{}_deduplication_window"
_BLOCKING = frozenset({
    16, 36, 48, 60, 62, 81, 115, 164, 192, 193, 194, 195, 218, 452, 497, 516,
})  # fmt: skip
"""No such table, database, user or setting; a wrong password; a missing right; read only."""
_PASSING = frozenset({
    159, 201, 202, 203, 209, 210, 225, 236, 241, 242, 243, 252, 279, 285, 286, 319, 394, 425, 439,
    733, 745, 999,
})  # fmt: skip
"""Timeouts, overload, too many parts, no memory or space, no Keeper, too few replicas."""
_OWN = frozenset({
    "database", "query", "insert_deduplication_token", "insert_deduplicate", "async_insert",
    "wait_end_of_query", "input_format_parallel_parsing", "max_insert_block_size", "user",
    "password", "input_format_skip_unknown_fields",
    "input_format_allow_errors_num", "input_format_allow_errors_ratio",
})  # fmt: skip
"""Settings that promises rest on."""


class ClickHouseOptions(HttpOptions, frozen=True, kw_only=True):
    """Options of the sink `clickhouse`."""

    table: Annotated[str, Meta(description="table of the rows, which has to be there")] = "records"
    database: Annotated[str | None, Meta(description="its database; default: that of the user")] = (
        None
    )
    exactly_once: Annotated[
        bool,
        Meta(
            description="refuse a table that does not drop blocks that come again, or has no"
            " column `_id`"
        ),
    ] = False
    unknown_fields: Annotated[
        Literal["reject", "skip"],
        Meta(description="keys without a column: a dead letter, or they are left out"),
    ] = "reject"
    settings: Annotated[
        dict[str, str], Meta(description="more settings of the server's for each insert")
    ] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, name in (("table", self.table), ("database", self.database)):
            if name is not None and (not name or "\0" in name):
                raise ValueError(f"{option}: {name!r} is no name")
        for name in self.settings:
            if name in _OWN:
                raise ValueError(f"settings: {name} is the sink's own")


class _Table(NamedTuple):
    """Facts about the table.

    Attributes:
        columns: their names.
        engine: its name.
        window: blocks that the server remembers for deduplication; 0 for none, and `None` where
            the engine has no such thing.
        views: materialized views that read from it.
    """

    columns: frozenset[str]
    engine: str
    window: int | None
    views: int


class ClickHouseSink:
    """Inserts a row a record, a block a batch.

    A JSON object is a row as it came. Text becomes `{"message": "…"}`; bytes too, or
    `{"base64": "…"}` where they are no UTF-8. Any other JSON value becomes a dead letter.
    """

    BATCH = BatchHints(records_max=100_000, bytes_max=16 * 1024 * 1024, age_max=5.0)

    def __init__(self, options: ClickHouseOptions, context: Context = _HERE) -> None:
        self._options = options
        self._peer = HttpPeer(options, {})
        self._format = context.record_format
        self._name = ".".join(_quoted(part) for part in (options.database, options.table) if part)
        self._table: _Table | None = None

    def __call__(self, batch: Batch[bytes]) -> None:
        """Inserts the batch unless it is there.

        Raises:
            Unavailable: the server is down or overloaded.
            Blocked: the table or a right is missing, or the table cannot keep `exactly_once`.
            RuntimeError: an error of the server's that a record may have caused.
        """
        if self._table is None:
            self._table = self._facts(window=self._options.exactly_once)
            if self._options.exactly_once and (problems := _problems(self._table)):
                raise Blocked(f"exactly_once: table {self._name} {' and '.join(problems)}")
        has_ids = ID in self._table.columns
        rows = list(objects_of(batch, self._format))
        names = batch.ids if has_ids else ()
        if has_ids and batch.lineage:
            there = self._stored([names[place] for place, _ in rows])
            rows = [one for one in rows if names[one[0]] not in there]
        if has_ids:
            rows = [(place, _named(row, names[place])) for place, row in rows]
        self._insert(batch, rows)

    def close(self) -> None:
        """Closes the connection."""
        self._peer.close()

    # -- rows ----------------------------------------------------------------------------------

    def _insert(self, batch: Batch[bytes], rows: list[tuple[int, bytes]]) -> None:
        """Sends a block, without the rows that the server could not read in the tries before."""
        options = self._options
        query = {
            "date_time_input_format": "best_effort", **options.settings,
            "query": f"INSERT INTO {self._name} FORMAT JSONEachRow",
            "insert_deduplication_token": batch.id, "insert_deduplicate": "1",
            # An insert that is gathered with others has no token of its own, and the answer has to
            # come after the block is stored.
            "async_insert": "0", "wait_end_of_query": "1",
            # One thread, so that the number of a row is its number in the block.
            "input_format_parallel_parsing": "0", "input_format_allow_errors_num": "0",
            "input_format_allow_errors_ratio": "0",
            "input_format_skip_unknown_fields": str(int(options.unknown_fields == "skip")),
        }  # fmt: skip
        refused, last = 0, 0
        while rows:
            # One block, for the server counts a token a block.
            query["max_insert_block_size"] = str(max(len(rows) + 1, 1_048_576))
            reply = self._post(query, b"".join([b"%b\n" % row for _, row in rows]))
            said = _error_of(reply)
            if said is None:
                if not reply.body.strip():
                    return
                # The status was sent before the insert failed, as with progress in the headers.
                said = reply.body[:_SAID_BYTES].decode("utf-8", "replace")
            number = _row_of(said)
            if not max(last, 1) <= number <= len(rows):
                self._raise(reply, said)
            last, refused = number, refused + 1
            if refused > _REFUSED_MAX:
                raise RuntimeError(f"more than {_REFUSED_MAX} rows: {_told(said)}")
            place, _ = rows.pop(number - 1)
            batch.reject(place, _told(said))

    def _stored(self, names: Sequence[str]) -> set[str]:
        """Those of some records that are in the table."""
        found: set[str] = set()
        for start in range(0, len(names), _ASKED_AT_ONCE):
            asked = ", ".join(_text(name) for name in names[start : start + _ASKED_AT_ONCE])
            rows = self._select(
                f"SELECT {ID} FROM {self._name} WHERE {ID} IN ({asked})",
                max_query_size=str(64 * 1024 * 1024),
            )
            found.update(row[ID] for row in rows)
        return found

    # -- requests ------------------------------------------------------------------------------

    def _post(self, query: dict[str, str], body: bytes) -> HttpReply:
        if self._options.database:
            query = {**query, "database": self._options.database}
        return self._peer.request("POST", f"/?{urlencode(query)}", body)

    def _select(self, statement: str, **settings: str) -> list[dict[str, Any]]:
        query = {"wait_end_of_query": "1", **settings}
        reply = self._post(query, f"{statement} FORMAT JSONEachRow".encode())
        if (said := _error_of(reply)) is not None:
            self._raise(reply, said)
        try:
            return [dict(row) for row in msgspec.json.Decoder(dict).decode_lines(reply.body)]
        except msgspec.DecodeError:
            raise Blocked(f"{reply.origin} does not answer as ClickHouse does") from None

    def _raise(self, reply: HttpReply, said: str) -> None:
        """Raises the class of an error that is no record's."""
        code = _code_of(reply, said)
        told = f"{reply.origin}: {_told(said)}"
        if code == 0:
            refuse(reply)
        if code in _BLOCKING:
            raise Blocked(f"{told} ({code})")
        # Too many parts pass when they are merged, too many partitions of one block do not.
        if code in _PASSING and "single INSERT block" not in said:
            raise Unavailable(f"{told} ({code})")
        raise RuntimeError(f"{told} ({code})")

    # -- the table -----------------------------------------------------------------------------

    def _facts(self, *, window: bool) -> _Table:
        """Asks for the table, and for the window of its deduplication if that is wanted.

        Raises:
            Blocked: there is none, or no right to see it.
        """
        database = self._options.database
        where = _text(database) if database else "currentDatabase()"
        table = f"database = {where} AND {{}} = {_text(self._options.table)}"
        found = self._select(
            "SELECT engine, engine_full, length(dependencies_table) AS views FROM system.tables"
            f" WHERE {table.format('name')}"
        )
        if not found:
            raise Blocked(f"there is no table {self._name}, or no right to see it")
        columns = self._select(f"SELECT name FROM system.columns WHERE {table.format('table')}")
        (one,) = found
        engine = str(one["engine"])
        return _Table(
            frozenset(str(row["name"]) for row in columns), engine,
            self._window(engine, str(one["engine_full"])) if window else 0, int(one["views"]),
        )  # fmt: skip

    def _window(self, engine: str, definition: str) -> int | None:
        """Blocks that the server remembers for deduplication; the table's own setting counts."""
        if not engine.endswith("MergeTree"):
            return None
        is_replicated = engine.startswith(("Replicated", "Shared"))
        name = _WINDOW.format("replicated" if is_replicated else "non_replicated")
        own = re.search(rf"\b(?<!_){name} = (\d+)", definition)
        if own:
            return int(own[1])
        rows = self._select(f"SELECT value FROM system.merge_tree_settings WHERE name = '{name}'")
        return int(rows[0]["value"]) if rows else 0

    def check(self) -> Iterator[SinkFinding]:
        """Asks for version, table, engine, its deduplication window, and views that read from it.

        Raises:
            Unavailable: the server cannot be reached.
            Blocked: there is no table, or no right.
        """
        (row,) = self._select("SELECT version() AS version")
        yield SinkFinding("info", f"ClickHouse {row['version']}")
        table = self._facts(window=True)
        window = "" if table.window is None else f", deduplication window {table.window} blocks"
        yield SinkFinding("info", f"table {self._name}: engine {table.engine}{window}")
        for problem in _problems(table):
            text = f"table {self._name} {problem}"
            if self._options.exactly_once:
                yield SinkFinding("error", f"exactly_once: {text}")
            else:
                text = f"{text}: a batch that comes again may be there twice"
                yield SinkFinding("warning", text)
        if table.views and not table.engine.startswith(("Replicated", "Shared")):
            text = f"table {self._name} feeds {table.views} materialized views, which can drop rows"
            yield SinkFinding("warning", f"{text} that another block had with the same result")


def _problems(table: _Table) -> list[str]:
    """Reasons why a table cannot hold each record once."""
    found = []
    if table.window is None:
        found.append(f"has the engine {table.engine}, which drops no block that comes again")
    elif not table.window:
        found.append(
            "drops no block that comes again: ALTER TABLE … MODIFY SETTING"
            " non_replicated_deduplication_window = 10000"
        )
    if ID not in table.columns:
        found.append(f"has no column {ID}: ALTER TABLE … ADD COLUMN {ID} String")
    return found


def _named(row: bytes, name: str) -> bytes:
    """A JSON object with its record's id in it."""
    rest = row.lstrip(b" \t\r")[1:]
    comma = b"" if rest.lstrip(b" \t\r")[:1] == b"}" else b","
    return b'{"_id":%b%b%b' % (_encode(name), comma, rest)


def _error_of(reply: HttpReply) -> str | None:
    """The text of an error; `None` where there is none."""
    if reply.status == 200 and "x-clickhouse-exception-code" not in reply.headers:
        return None
    return reply.body[:_SAID_BYTES].decode("utf-8", "replace")


def _code_of(reply: HttpReply, said: str) -> int:
    """The number of ClickHouse's error; 0 if something else answered."""
    told = reply.headers.get("x-clickhouse-exception-code", "")
    found = _CODE.search(said)
    return int(told) if told.isascii() and told.isdigit() else int(found[1]) if found else 0


def _row_of(said: str) -> int:
    """The number of the row that an error is about, from 1; 0 if it is about none."""
    found = _ROW.search(said)
    return int(found[1] or found[2]) if found else 0


def _told(said: str) -> str:
    """An error in one line, without text of the record."""
    return one_line(_AROUND.sub("", _VALUE.sub("", said)), _ERROR_CHARS).strip()


def _quoted(name: str) -> str:
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


def _text(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
