"""The sink `postgres` writes records as rows of a table, each exactly once.

One transaction a batch: its id goes into the table `ingestd_batches`, and its rows in with COPY. A
batch that comes again finds its id, or an ancestor's after a split, and is done. A connection that
breaks at COMMIT leaves the question open; the next try answers it.

Rows carry the record's id besides. It tells apart what a requeued dead letter, or a batch that was
split in an earlier version, brings again: when COPY meets such a row, the batch goes through a
temporary table and `INSERT … ON CONFLICT DO NOTHING`.

The server names the row that it refuses, so a bad record costs one more COPY; where it names none,
or there are many, halves are tried behind savepoints. What was refused stands beside the id of the
batch, for one whose answer was lost has to refuse it again.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from msgspec import Meta

from ingestd.handlers.batch import Batch, Blocked
from ingestd.handlers.context import Context  # noqa: TC001  the loader reads the annotations
from ingestd.handlers.options import Extra, Seconds, Secret
from ingestd.sinks.base import BatchHints, SinkOptions, ids_of
from ingestd.sinks.postgres import rows as making
from ingestd.sinks.postgres.rows import Column, Rows
from ingestd.sinks.postgres.server import (
    LEDGER,
    Name,
    RecordRefused,
    Table,
    classified,
    connect,
    findings,
    make_ledger,
    make_table,
    quoted,
    read_table,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import psycopg

    from ingestd.handlers.outcome import SinkFinding

ID = "_id"
EXTRA_COLUMN = "_extra"
RECORD = "record"
_NAMED_MAX = 8
"""Refused rows of a batch that are taken from the server's word; then halves are tried."""
_GROUPS_MAX = 16
"""COPY statements of a batch, one for records that lack the same columns with a default; a batch
with more such groups goes through the temporary table."""
_PRUNE_BATCHES = 1000
_PART = "ingestd_part"
"""The temporary table of rows that may be there already."""
_TYPES = {"json": "jsonb", "text": "text", "bytes": "bytea"}


class _BatchRows(NamedTuple):
    """Rows of a batch.

    Attributes:
        columns: of the lines.
        lines: by the record's place.
        lacking: columns with a default that a record does not name, by its place.
    """

    columns: Sequence[str]
    lines: dict[int, bytes]
    lacking: Mapping[int, tuple[str, ...]]


class PostgresOptions(SinkOptions, frozen=True, kw_only=True):
    """Options of the sink `postgres`."""

    dsn: Annotated[
        Secret, Meta(description="connection: `postgresql://user:password@host/db` or `host=… …`")
    ]
    table: Annotated[str, Meta(description="table of the rows", min_length=1, max_length=63)] = (
        "records"
    )
    schema: Annotated[
        str, Meta(description="schema of the tables; default: the first of the search path")
    ] = ""
    columns: Annotated[
        Literal["auto", "json", "existing"],
        Meta(
            description="auto: a column a key, made as needed; json: one column `record`;"
            " existing: the columns that the table has"
        ),
    ] = "auto"
    mapping: Annotated[
        dict[str, str],
        Meta(description="column to key, for a table that is there; other keys are left out"),
    ] = {}  # noqa: RUF012  a struct copies it
    mode: Annotated[
        Literal["append", "upsert"],
        Meta(description="upsert: a row replaces the one that has the same `key`"),
    ] = "append"
    key: Annotated[
        list[str], Meta(description="columns that name a row, for `upsert`; unique together")
    ] = []  # noqa: RUF012
    on_new_column: Annotated[
        Literal["add", "extra", "reject"] | None,
        Meta(
            description="a key without a column: add it; keep it in `_extra`; or reject the record."
            " Default: add with auto, else reject"
        ),
    ] = None
    statement_timeout: Annotated[
        Seconds, Meta(description="time limit of a statement; below `executor.timeout`")
    ] = Seconds(30)
    lock_timeout: Annotated[
        Seconds, Meta(description="longest wait for a lock, as for a new column")
    ] = Seconds(5)
    ledger_age: Annotated[
        Seconds, Meta(description="time for which the ids of stored batches are kept")
    ] = Seconds(90 * 86400)

    def __post_init__(self) -> None:
        if self.mode == "upsert" and not self.key:
            raise ValueError("key: upsert needs the columns that name a row")
        if self.mode == "upsert" and self.columns == "json":
            raise ValueError("mode: upsert needs columns, and there is only `record`")
        if self.table in {LEDGER, _PART}:
            raise ValueError(f"table: the name {self.table!r} is taken")
        if len(set(self.mapping.values())) < len(self.mapping):
            raise ValueError("mapping: two columns have the same key")
        if "\0" in self.table + self.schema:
            raise ValueError("table: is not a name")
        try:
            from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415
        except ImportError:  # which is told in a better place
            return
        try:
            conninfo_to_dict(self.dsn)
        except Exception:  # noqa: BLE001
            # Its message quotes what it does not understand, which may be the password.
            raise ValueError("dsn: *** is not a connection string of PostgreSQL") from None


class PostgresSink:
    """Writes each batch in one transaction with COPY; a connection a worker."""

    EXTRA = Extra("postgres", ("psycopg",))
    BATCH = BatchHints(records_max=20_000, bytes_max=8 * 1024 * 1024)

    def __init__(self, options: PostgresOptions, context: Context) -> None:
        self._options = options
        self._format = context.record_format
        self._is_whole = options.columns == "json" or self._format != "json"
        self._table = Name(options.schema, options.table)
        self._ledger = Name(options.schema, LEDGER)
        is_own = options.columns == "auto" and not options.mapping
        self._makes_table = is_own or self._is_whole
        self._on_new = options.on_new_column or ("add" if is_own else "reject")
        self._db: psycopg.Connection[Any] | None = None
        self._known: Table | None = None
        self._defaults: Mapping[str, str] = {}
        self._begin = ""
        self._batches = 0

    def __call__(self, batch: Batch[bytes]) -> None:
        """Writes the batch, if it is not there yet.

        Raises:
            Unavailable: the server is down or overloaded, or the transaction has to come again.
            Blocked: a table, a column or a right is missing.
        """
        records = batch.records
        refused: dict[int, str] = dict.fromkeys(
            making.nul_places(records, self._format), making.NO_NUL
        )
        # A record as it came where it is stored whole, else its value.
        items: Sequence[Any]
        if self._is_whole:
            items = records.items()
            if self._format == "text":
                refused |= {i: "not UTF-8" for i, item in enumerate(items) if not _is_text(item)}
        else:
            items, undecodable = making.decoded(records)
            refused |= undecodable
        if len(refused) < len(items):
            was_known = self._known is not None
            try:
                found = self._store(batch, items, refused)
            except Blocked:
                if not was_known:
                    raise
                self._known = None  # somebody changed the table: look at it once more
                found = self._store(batch, items, refused)
            refused |= found
        for place, why in refused.items():
            batch.reject(place, why)

    def check(self) -> Iterator[SinkFinding]:
        """Findings on the server, its settings, the tables and the rights to them."""
        with classified():
            yield from findings(
                self._connection(),
                self._table,
                self._ledger,
                upserts=self._options.mode == "upsert",
                makes_tables=self._makes_table,
            )

    def close(self) -> None:
        """Closes the connection; the next batch opens another one."""
        db, self._db, self._known = self._db, None, None
        if db is not None:
            db.close()

    # -- one batch -----------------------------------------------------------------------------

    def _store(
        self,
        batch: Batch[bytes],
        items: Sequence[Any],
        refused: Mapping[int, str],
    ) -> dict[int, str]:
        """Writes all records but those refused; gives those that are refused besides, by place."""
        with classified():
            db = self._connection()
            self._prune(db)
            fine = [i for i in range(len(items)) if i not in refused]
            ids = batch.ids
            if refused:
                ids, items = [ids[i] for i in fine], [items[i] for i in fine]
            table = self._prepared(db, () if self._is_whole else items)
            made = self._rows(table, ids, items)
            without = {fine[i]: why for i, why in made.rejected.items()}
            lines = {fine[i]: line for i, line in enumerate(made.lines) if i not in made.rejected}
            lacking = {fine[i]: names for i, names in made.lacking.items() if fine[i] in lines}
            rows = _BatchRows(made.columns, lines, lacking)
            return self._write(db, batch, rows, without)

    def _write(
        self,
        db: psycopg.Connection[Any],
        batch: Batch[bytes],
        rows: _BatchRows,
        refused: dict[int, str],
    ) -> dict[int, str]:
        """Writes rows until the server takes them; gives all that is refused, by place.

        Args:
            db: the connection.
            batch: all records.
            rows: those that are refused are taken out.
            refused: records that the columns of the table have no room for. A batch that comes
                again refuses what it refused then, whatever columns there are now.
        """
        lacking = set(rows.lacking.values())
        # COPY needs a column.
        is_many = len(lacking) >= _GROUPS_MAX or (rows.columns and tuple(rows.columns) in lacking)
        careful = self._options.mode == "upsert" or is_many
        for _ in range(_NAMED_MAX):
            copied: Sequence[int] = ()
            try:
                with self._transaction(db):
                    before = self._enter(db, batch, refused)
                    if before is None and careful and rows.lines:
                        copied = list(rows.lines)
                        self._merge(db, rows, copied)
                    elif before is None:
                        for group in making.groups(*rows):
                            copied = group.places
                            self._copy(db, group.columns, group.lines)
            except RecordRefused as error:
                if error.is_conflict and ID in rows.columns and not careful:
                    careful = True  # a row that is there already, or a bad one: that will show
                elif error.line is None or error.line > len(copied):
                    break
                else:
                    place = copied[error.line - 1]
                    refused[place] = error.why
                    del rows.lines[place]
            else:
                return refused if before is None else before
        return self._write_halves(db, batch, rows, refused)

    def _write_halves(
        self,
        db: psycopg.Connection[Any],
        batch: Batch[bytes],
        rows: _BatchRows,
        refused: dict[int, str],
    ) -> dict[int, str]:
        """One transaction, in which halves are tried behind savepoints; gives what is refused."""
        with self._transaction(db):
            before = self._enter(db, batch, refused)
            if before is not None:
                return before
            waiting = [list(rows.lines)]
            while waiting:
                places = waiting.pop()
                db.execute("SAVEPOINT half")
                try:
                    with classified():
                        self._merge(db, rows, places)
                except RecordRefused as error:
                    db.execute("ROLLBACK TO SAVEPOINT half")
                    if len(places) == 1:
                        refused[places[0]] = error.why
                        continue
                    middle = len(places) // 2
                    waiting += [places[middle:], places[:middle]]
                else:
                    db.execute("RELEASE SAVEPOINT half")
            statement = f"UPDATE {self._ledger.sql} SET refused = %s WHERE id = %s"
            db.execute(statement, [_told(batch, refused), batch.id])
        return refused

    def _enter(
        self, db: psycopg.Connection[Any], batch: Batch[bytes], refused: Mapping[int, str]
    ) -> dict[int, str] | None:
        """Writes the batch's id down, with what is refused.

        Returns:
            `None`; or, if it or an ancestor of it is there already, what was refused then.
        """
        names = list(ids_of(batch))
        for ancestor in batch.lineage:
            # Its last try may still be at its COMMIT, where nobody sees it and it can succeed: this
            # waits for its end.
            db.execute("SAVEPOINT ancestor")
            db.execute(
                f"INSERT INTO {self._ledger.sql}(id, records) VALUES (%s, 0)"
                " ON CONFLICT DO NOTHING",
                [ancestor],
            )
            db.execute("ROLLBACK TO SAVEPOINT ancestor")
        entered = db.execute(
            f"INSERT INTO {self._ledger.sql}(id, records, refused)"
            f" SELECT %s, %s, %s WHERE NOT EXISTS (SELECT 1 FROM {self._ledger.sql}"
            " WHERE id = ANY(%s)) ON CONFLICT DO NOTHING",
            [batch.id, batch.records.count, _told(batch, refused), names],
        )
        if entered.rowcount == 1:
            return None
        statement = f"SELECT refused FROM {self._ledger.sql} WHERE id = ANY(%s)"
        before: dict[str, str] = {}
        for (told,) in db.execute(statement, [names]).fetchall():
            before |= told or {}
        return {i: before[name] for i, name in enumerate(batch.ids) if name in before}

    def _copy(
        self,
        db: psycopg.Connection[Any],
        columns: Sequence[str],
        lines: Sequence[bytes],
        into: str = "",
    ) -> None:
        names = ", ".join(map(quoted, columns))
        statement = f"COPY {into or self._table.sql}({names}) FROM STDIN"
        with db.cursor() as cursor, cursor.copy(statement) as copy:
            copy.write(b"\n".join([*lines, b""]))

    def _merge(self, db: psycopg.Connection[Any], rows: _BatchRows, places: Sequence[int]) -> None:
        """Puts rows in through a temporary table: what is there is left, or replaced."""
        names = ", ".join(map(quoted, rows.columns))
        place = "ingestd_place"
        while place in rows.columns:  # a key of a record may have that name
            place += "_"
        db.execute(
            f"CREATE TEMP TABLE {_PART} ON COMMIT DROP AS"
            f" SELECT {names}, 0::bigint AS {place} FROM {self._table.sql} WITH NO DATA"
        )
        lines = [b"%b\t%d" % (rows.lines[one], number) for number, one in enumerate(places)]
        self._copy(db, [*rows.columns, place], lines, _PART)
        lacking: dict[str, list[int]] = {}
        for number, one in enumerate(places):
            for name in rows.lacking.get(one, ()):
                lacking.setdefault(name, []).append(number)
        for name, numbers in lacking.items():
            default = self._defaults[name].replace("%", "%%")
            db.execute(
                f"UPDATE {_PART} SET {quoted(name)} = {default} WHERE {place} = ANY(%s)", [numbers]
            )
        selected = self._selected(rows.columns, names, place)
        db.execute(f"INSERT INTO {self._table.sql}({names}) {selected}")
        db.execute(f"DROP TABLE {_PART}")

    def _selected(self, columns: Sequence[str], names: str, place: str) -> str:
        if self._options.mode == "append":
            known = f" ON CONFLICT ({quoted(ID)}) DO NOTHING" if ID in columns else ""
            return f"SELECT {names} FROM {_PART} ORDER BY {place}{known}"
        key = ", ".join(map(quoted, self._options.key))
        new = [f"{quoted(name)} = EXCLUDED.{quoted(name)}" for name in columns
               if name not in self._options.key]  # fmt: skip
        action = f"UPDATE SET {', '.join(new)}" if new else "NOTHING"
        # The last of a batch counts; in one order everywhere, so that workers wait for one another
        # and do not lock each other out.
        return (
            f"SELECT DISTINCT ON ({key}) {names} FROM {_PART}"
            f" ORDER BY {key}, {place} DESC ON CONFLICT ({key}) DO {action}"
        )

    # -- rows ----------------------------------------------------------------------------------

    def _rows(self, table: Table, ids: Sequence[str], items: Sequence[Any]) -> Rows:
        if self._is_whole:
            return making.whole_rows(ids, items, self._format, names=(ID, RECORD))
        types = {column.name: column.type for column in table.columns}
        if mapping := self._options.mapping:
            if lost := [name for name in mapping if name not in types]:
                raise Blocked(f"the table {self._table.sql} has no column {lost[0]!r} (mapping)")
            columns = {key: (name, types[name]) for name, key in mapping.items()}
        else:
            own = {ID, EXTRA_COLUMN}
            columns = {name: (name, types[name]) for name in types if name not in own}
        has_extra = self._on_new != "reject" and EXTRA_COLUMN in types
        self._defaults = {one.name: one.default for one in table.columns if one.default}
        return making.object_rows(
            ids,
            items,
            self._used(columns, items),
            id_column=ID if ID in types else None,
            extra_column=EXTRA_COLUMN if has_extra else None,
            leave_out=bool(mapping),
            defaults=self._defaults,
        )

    def _used(
        self, columns: Mapping[str, tuple[str, str]], values: Sequence[Any]
    ) -> dict[str, tuple[str, str]]:
        """The columns that some record has: the others keep their defaults."""
        used = making.keys_of(value for value in values if type(value) is dict)
        key = set(self._options.key) if self._options.mode == "upsert" else set()
        return {k: column for k, column in columns.items() if k in used or column[0] in key}

    # -- tables --------------------------------------------------------------------------------

    def _prepared(self, db: psycopg.Connection[Any], values: Sequence[Any]) -> Table:
        """The table, made or widened where that is asked for."""
        if self._known is None:
            self._known = self._read(db)
        table = self._known
        if table is not None:
            self._look_at(table)
        missing = self._missing(values, table)
        if table is None or missing:
            with self._transaction(db):
                # One worker at a time, of this daemon or another one.
                db.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))",
                           [f"ingestd {self._table.sql}"])  # fmt: skip
                db.execute(make_ledger(self._ledger))
                table = read_table(db, self._table)
                if table is not None:
                    self._look_at(table)
                self._widen(db, table, self._missing(values, table))
                self._known = table = read_table(db, self._table)
        if table is None:
            raise Blocked(f"there is no table {self._table.sql}")
        return table

    def _read(self, db: psycopg.Connection[Any]) -> Table | None:
        """The table; `None` too if there is no ledger yet."""
        return read_table(db, self._table) if read_table(db, self._ledger) else None

    def _missing(self, values: Sequence[Any], table: Table | None) -> list[Column]:
        """Columns that are to be made."""
        if self._is_whole or self._on_new != "add" or (table is None and not self._makes_table):
            return []
        taken = table.taken if table is not None else ()
        found = making.new_columns(values, taken, (ID, EXTRA_COLUMN))
        # `_extra` is for what can be no column, or does not fit its type.
        if table is not None and EXTRA_COLUMN not in table.taken:
            found.append(Column(EXTRA_COLUMN, "jsonb"))
        return found

    def _widen(
        self, db: psycopg.Connection[Any], table: Table | None, missing: Sequence[Column]
    ) -> None:
        if table is not None:
            if missing:
                added = [f"ADD COLUMN IF NOT EXISTS {quoted(c.name)} {c.type}" for c in missing]
                db.execute(f"ALTER TABLE {self._table.sql} {', '.join(added)}")
            return
        if not self._makes_table:
            return
        if self._is_whole:
            columns, key = [Column(ID, "text"), Column(RECORD, _TYPES[self._format])], [ID]
        else:
            extra = [] if self._on_new == "reject" else [Column(EXTRA_COLUMN, "jsonb")]
            columns = [Column(ID, "text"), *missing, *extra]
            key = self._options.key if self._options.mode == "upsert" else [ID]
        if lost := set(key) - {column.name for column in columns}:
            raise Blocked(f"no record has the key {min(lost)!r}, so the table cannot be made")
        db.execute(make_table(columns, self._table, key))

    def _look_at(self, table: Table) -> None:
        """Refuses a table that lacks what the options need.

        Raises:
            Blocked: says what it lacks.
        """
        if self._on_new == "extra" and EXTRA_COLUMN not in table.taken and not self._is_whole:
            raise Blocked(f"the table {self._table.sql} has no column {EXTRA_COLUMN!r} of jsonb")
        key = self._options.key if self._options.mode == "upsert" else [ID]
        if ID not in table.taken and self._options.mode == "append":
            if self._makes_table:
                raise Blocked(f"the table {self._table.sql} has no unique column {ID!r}")
            return  # a table of the user's: the ledger alone knows what is there
        if frozenset(key) not in table.unique:
            text = f"the table {self._table.sql} has no unique index on {', '.join(key)}"
            raise Blocked(text)

    # -- connection ----------------------------------------------------------------------------

    def _connection(self) -> psycopg.Connection[Any]:
        if self._db is not None and self._db.closed:
            self.close()
        if self._db is None:
            self._db = connect(self._options.dsn)
            options = self._options
            self._begin = (
                f"BEGIN; SET LOCAL statement_timeout = {int(options.statement_timeout * 1000)};"
                f" SET LOCAL lock_timeout = {int(options.lock_timeout * 1000)}"
            )
            if self._db.execute("SHOW synchronous_commit").fetchone() == ("off",):
                self._begin += "; SET LOCAL synchronous_commit = on"
        return self._db

    def _transaction(self, db: psycopg.Connection[Any]) -> _Transaction:
        # Settings are those of the transaction: behind PgBouncer no session is ours.
        return _Transaction(db, self._begin)

    def _prune(self, db: psycopg.Connection[Any]) -> None:
        """Removes old rows of the ledger: faster than new ones come, some at a time."""
        self._batches += 1
        if self._known is None or self._batches % _PRUNE_BATCHES:
            return
        with self._transaction(db):
            # Without the right to it, or beside another worker, they stay for now.
            allowed = db.execute(
                "SELECT has_table_privilege(%s, 'DELETE')"
                " AND pg_try_advisory_xact_lock(hashtextextended(%s, 1))",
                [self._ledger.sql, self._ledger.sql],
            ).fetchone()
            if allowed == (True,):
                db.execute(
                    f"DELETE FROM {self._ledger.sql} WHERE id IN (SELECT id"
                    f" FROM {self._ledger.sql} WHERE stored_at < now() - make_interval(secs => %s)"
                    " LIMIT %s)",
                    [float(self._options.ledger_age), 4 * _PRUNE_BATCHES],
                )


class _Transaction:
    """A transaction with its settings; an error rolls it back, and keeps its meaning."""

    def __init__(self, db: psycopg.Connection[Any], begin: str) -> None:
        self._db = db
        self._begin = begin

    def __enter__(self) -> None:
        with classified():
            self._db.execute(self._begin.encode())

    def __exit__(self, kind: type[BaseException] | None, error: object, _trace: object) -> None:
        import psycopg  # noqa: PLC0415

        if kind is None:
            with classified():
                self._db.execute("COMMIT")
            return
        try:
            self._db.execute("ROLLBACK")
        except psycopg.Error:
            self._db.close()  # which rolls back as well
        if isinstance(error, psycopg.Error):
            with classified():
                raise error


def _told(batch: Batch[bytes], refused: Mapping[int, str]) -> str | None:
    """Refusals by record id, as the ledger keeps them."""
    if not refused:
        return None
    ids = batch.ids
    return json.dumps({ids[place]: why for place, why in refused.items()})


def _is_text(item: bytes) -> bool:
    try:
        item.decode()
    except UnicodeDecodeError:
        return False
    return True
