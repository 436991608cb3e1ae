"""PostgreSQL: connections, the classes of its errors, tables and rights.

psycopg is imported when it is used: the class of the sink is read without the extra.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ingestd.handlers.batch import Blocked, Unavailable
from ingestd.handlers.outcome import SinkFinding
from ingestd.sinks.postgres.rows import Column

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import psycopg

LEDGER = "ingestd_batches"
"""The table of the batches that were stored."""
CONNECT_SECONDS = 10
_LINE = re.compile(r"COPY \S.*?, line (\d+)(?:, column ([^:]+))?")
_VALUE = re.compile(r"(: |value )\".*\"")
# What a server says before a connection has a result with a code.
_REFUSED = re.compile(
    r"password authentication failed|does not exist|no pg_hba\.conf entry|permission denied"
    r"|is not permitted to log in|authentication failed|no password supplied",
)
_TRANSIENT = re.compile(r"08|53|58|40|57P0|57014|55P03|55006|25006|25P04")
_RECORD = re.compile(r"22|23|44|54|P0001")
_TOO_LARGE = "54000"
_SINK = re.compile(r"28|3D|3F|42|0A|0L|0P|2B|F0")


class RecordRefused(Exception):  # noqa: N818  it is an answer, not an error
    """The server refuses one of several rows.

    Attributes:
        line: of the COPY, from 1; `None` if the server does not say which.
        why: in one line.
        is_conflict: it violates a unique index.
    """

    def __init__(self, line: int | None, why: str, *, is_conflict: bool) -> None:
        super().__init__(why)
        self.line = line
        self.why = why
        self.is_conflict = is_conflict


@contextmanager
def classified() -> Iterator[None]:
    """Turns errors of the server into what they mean for the batch.

    Raises:
        Unavailable: the server is down, overloaded, or the transaction has to be tried again.
        Blocked: a table, a right or a setting is missing.
        RecordRefused: one of the rows.
    """
    import psycopg  # noqa: PLC0415

    try:
        yield
    except psycopg.Error as error:
        raise meaning_of(error) from error


def meaning_of(error: psycopg.Error) -> Exception:
    """The exception that says what an error means, see `classified`; others stay as they are."""
    import psycopg  # noqa: PLC0415

    code = error.sqlstate or ""
    text = " ".join(str(error).split()) or type(error).__name__
    if not code:
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            kind = Blocked if _REFUSED.search(text) else Unavailable
            return kind(text)
        return error
    text = f"{' '.join((error.diag.message_primary or text).split())} ({code})"
    if detail := error.diag.message_detail if code[:2] in {"40", "53", "58"} else None:
        text += f": {' '.join(detail.split())[:200]}"
    if _TRANSIENT.match(code):
        return Unavailable(text)
    if _RECORD.match(code):
        # COPY inserts many rows at once: for one that is too large it names the last that it read.
        found = None if code == _TOO_LARGE else _LINE.search(error.diag.context or "")
        # Without the value: payloads are not logged.
        text = _VALUE.sub("value " if 'value "' in text else "", text)
        if found is not None and found[2]:
            text += f" in column {found[2]}"
        return RecordRefused(int(found[1]) if found else None, text, is_conflict=code == "23505")
    if _SINK.match(code):
        return Blocked(text)
    return error


def quoted(name: str) -> str:
    """A name as SQL has it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


class Name(NamedTuple):
    """The name of a table.

    Attributes:
        schema: empty for the first one of the search path.
        table: the name.
    """

    schema: str
    table: str

    @property
    def sql(self) -> str:
        """The name as SQL has it."""
        return f"{quoted(self.schema)}.{quoted(self.table)}" if self.schema else quoted(self.table)


class Table(NamedTuple):
    """A table as it is.

    Attributes:
        columns: that can be written.
        taken: the names of all columns.
        unique: the columns of each unique index that covers all rows.
        is_unlogged: it is empty after a crash of the server.
    """

    columns: tuple[Column, ...]
    taken: frozenset[str]
    unique: frozenset[frozenset[str]]
    is_unlogged: bool


def connect(dsn: str) -> psycopg.Connection[Any]:
    """A connection in autocommit, which prepares nothing: PgBouncer may stand before the server.

    Raises:
        Unavailable: there is none to be had.
        Blocked: the server refuses the user, the database or the host.
    """
    import psycopg  # noqa: PLC0415

    with classified():
        return psycopg.connect(
            dsn,
            autocommit=True,
            prepare_threshold=None,
            connect_timeout=CONNECT_SECONDS,
            fallback_application_name="ingestd",
            client_encoding="UTF8",
        )


def read_table(db: psycopg.Connection[Any], name: Name) -> Table | None:
    """The table of a name; `None` if there is none."""
    found = db.execute(
        "SELECT c.oid, c.relpersistence = 'u' FROM pg_class c WHERE c.oid = to_regclass(%s)",
        [name.sql],
    ).fetchone()
    if found is None:
        return None
    rows = db.execute(
        "SELECT attname, format_type(atttypid, NULL), attgenerated <> '' OR attidentity = 'a',"
        " CASE WHEN attidentity = 'd' THEN format('nextval(%%L)',"
        " pg_get_serial_sequence(attrelid::regclass::text, attname))"
        " ELSE coalesce(pg_get_expr(adbin, adrelid), pg_get_expr(typdefaultbin, 0), '') END"
        " FROM pg_attribute JOIN pg_type t ON t.oid = atttypid"
        " LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum"
        " WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
        [found[0]],
    ).fetchall()
    unique = db.execute(
        "SELECT array_agg(a.attname::text) FROM pg_index i JOIN pg_attribute a"
        " ON a.attrelid = i.indrelid AND a.attnum = ANY(i.indkey[0:i.indnkeyatts - 1])"
        " WHERE i.indrelid = %s AND i.indisunique AND i.indisvalid AND i.indpred IS NULL"
        " AND i.indexprs IS NULL GROUP BY i.indexrelid",
        [found[0]],
    ).fetchall()
    return Table(
        tuple(Column(name, kind, default) for name, kind, is_made, default in rows if not is_made),
        frozenset(attribute for attribute, *_ in rows),
        frozenset(frozenset(names) for (names,) in unique),
        found[1],
    )


def make_table(columns: Sequence[Column], name: Name, key: Sequence[str]) -> str:
    """The statement that makes a table with a primary key."""
    made = [f"{quoted(column.name)} {column.type}" for column in columns]
    primary = ", ".join(map(quoted, key))
    return f"CREATE TABLE IF NOT EXISTS {name.sql} ({', '.join(made)}, PRIMARY KEY ({primary}))"


def make_ledger(name: Name) -> str:
    """The statements that make the ledger."""
    return (
        f"CREATE TABLE IF NOT EXISTS {name.sql} (id text PRIMARY KEY, records bigint NOT NULL,"
        " refused jsonb, stored_at timestamptz NOT NULL DEFAULT now());"
        f" CREATE INDEX IF NOT EXISTS {LEDGER}_stored_at ON {name.sql} (stored_at)"
    )


# -- check -----------------------------------------------------------------------------------------


def findings(
    db: psycopg.Connection[Any], name: Name, ledger: Name, *, upserts: bool, makes_tables: bool
) -> Iterator[SinkFinding]:
    """Findings on a server, a table and the rights to it."""
    shown = {
        key: db.execute(f"SHOW {key}").fetchone()[0]  # type: ignore[index]
        for key in ("server_version", "fsync", "full_page_writes", "synchronous_commit",
                    "server_encoding", "transaction_read_only")
    }  # fmt: skip
    yield SinkFinding("info", f"PostgreSQL {shown['server_version']}, table {name.sql}")
    if shown["fsync"] != "on":
        yield SinkFinding("warning", "fsync is off: a crash of its machine loses committed batches")
    if shown["full_page_writes"] != "on":
        yield SinkFinding("warning", "full_page_writes is off: a crash can tear pages of the table")
    if shown["synchronous_commit"] == "off":
        yield SinkFinding("info", "synchronous_commit is off; the sink sets it on for its batches")
    if shown["server_encoding"] != "UTF8":
        text = f"the database's encoding is {shown['server_encoding']}: not every text fits it"
        yield SinkFinding("warning", text)
    if shown["transaction_read_only"] != "off":
        yield SinkFinding("error", "the server takes no writes: it is a standby, or read-only")
    rights = {"INSERT": "", "SELECT": ""} | ({"UPDATE": ""} if upserts else {})
    yield from _table_findings(db, name, [*rights], makes_tables=makes_tables)
    yield from _table_findings(db, ledger, ["INSERT", "SELECT"], makes_tables=True)
    if not _one(db, "SELECT has_database_privilege(current_database(), 'TEMP')"):
        text = "the user has no TEMP right: batches that come again in parts cannot be stored"
        yield SinkFinding("error", text)


def _table_findings(
    db: psycopg.Connection[Any], name: Name, rights: Sequence[str], *, makes_tables: bool
) -> Iterator[SinkFinding]:
    table = read_table(db, name)
    if table is None:
        if not makes_tables:
            yield SinkFinding("error", f"there is no table {name.sql}")
            return
        schema = name.schema or _one(db, "SELECT current_schema()")
        if schema is None or not _one(db, "SELECT to_regnamespace(%s)", quoted(schema)):
            yield SinkFinding("error", f"there is no schema {schema or 'in the search path'}")
        elif not _one(db, "SELECT has_schema_privilege(%s, 'CREATE')", schema):
            text = f"there is no table {name.sql}, and the user may not make one in {schema}"
            yield SinkFinding("error", text)
        return
    if table.is_unlogged:
        text = f"the table {name.sql} is unlogged: a crash of the server empties it"
        yield SinkFinding("warning", text)
    for right in rights:
        if not _one(db, "SELECT has_table_privilege(%s, %s)", name.sql, right):
            yield SinkFinding("error", f"the user has no {right} right on {name.sql}")


def _one(db: psycopg.Connection[Any], statement: str, *values: object) -> Any:
    row = db.execute(statement, values or None).fetchone()
    return None if row is None else row[0]
