"""The sink `sqlite` writes records as rows of a table, each exactly once.

A batch's rows, and its id in the table `ingestd_batches`, are one transaction: a batch that comes
again under its id is known. Each row has its record's id besides, because a batch that failed may
come again in parts, under other ids, after its rows were committed: see docs/EXACTLY_ONCE.md.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from contextlib import contextmanager, suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from msgspec import Meta

from ingestd.base.files import make_folder, tighten
from ingestd.handlers.batch import Batch  # noqa: TC001  the loader reads the annotations
from ingestd.handlers.context import Context
from ingestd.handlers.decode import decoder_for
from ingestd.handlers.options import FilePath  # noqa: TC001  msgspec reads it
from ingestd.sinks.base import SinkOptions, check_folder
from ingestd.sinks.tables import (
    EXTRA,
    ID,
    RECORD,
    affinity,
    has_extra,
    keys_of,
    new_columns,
    rounded,
    rows_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ingestd.handlers.outcome import SinkFinding

LEDGER = "ingestd_batches"
"""The table of the batches that were written."""
_BUSY_SECONDS = 30.0
_HERE = Context()
_MAKE_LEDGER = f"""
    CREATE TABLE IF NOT EXISTS {LEDGER}(
        id TEXT PRIMARY KEY NOT NULL, records INTEGER NOT NULL, stored_at REAL NOT NULL
    ) WITHOUT ROWID
"""


class _Open(NamedTuple):
    """A connection, and the file it was opened on."""

    db: sqlite3.Connection
    file: os.stat_result


class _Columns(NamedTuple):
    """The columns of the table.

    Attributes:
        taken: names of all.
        writable: names of those that can be written.
        affinities: of those that have one.
        defaults: names of those with a default that is not NULL.
    """

    taken: frozenset[str]
    writable: frozenset[str]
    affinities: Mapping[str, str]
    defaults: frozenset[str]


class SqliteOptions(SinkOptions, frozen=True, kw_only=True):
    """Options of the sink `sqlite`."""

    path: Annotated[
        FilePath | None,
        Meta(description="the file; default `out.db` in the data directory, or `out-NAME.db`"),
    ] = None
    table: Annotated[
        str, Meta(description="table of the rows; one that is there needs a unique column `_id`")
    ] = "records"
    columns: Annotated[
        Literal["auto", "json"],
        Meta(description="auto: a column a key; json: one column `record`, as with text and bytes"),
    ] = "auto"

    def __post_init__(self) -> None:
        table = self.table
        if not table or "\0" in table:
            raise ValueError(f"table: {table!r} is not a name")
        if table.lower() == LEDGER or table.lower().startswith("sqlite_"):
            raise ValueError(f"table: the name {table!r} is taken")


_DEFAULTS = SqliteOptions()


class SqliteSink:
    """Writes each batch in one synced transaction.

    Any number of these, in threads and processes, may write to the same file. A batch or a record
    that comes again changes nothing. The table is made if it is not there, the file with mode 0600.
    """

    def __init__(
        self,
        options: SqliteOptions = _DEFAULTS,
        context: Context = _HERE,
    ) -> None:
        self._path = _file(options.path, context)
        self._has_own = options.path is not None
        self._table = quoted(options.table)
        self._format = context.record_format
        self._is_auto = options.columns == "auto" and self._format == "json"
        self._decode = decoder_for(Any, "json").decode
        self._open: _Open | None = None
        self._columns: _Columns | None = None

    def __call__(self, batch: Batch[bytes]) -> None:
        """Writes the batch, if it is not there yet.

        Raises:
            sqlite3.Error: nothing of it was written. After a failure of the disk at the very end
                it may be there all the same; then it is known when it comes again.
            OSError: the file can't be made.
        """
        # First of all, and whether the batch is known or not: what can't be a row has to be
        # rejected in every call.
        ids, values = self._values(batch)
        if not values:
            return
        db = self._connection()
        try:
            db.execute("BEGIN IMMEDIATE")
            if self._is_new(db, batch):
                self._insert(db, ids, values)
            db.execute("COMMIT")
        except BaseException:
            self.close()  # which rolls back; and what was known of the table may be wrong
            raise

    def check(self) -> Iterator[SinkFinding]:
        """Looks if the folder of `path` can be written to, or made."""
        return check_folder(self._path.parent) if self._has_own else iter(())

    def close(self) -> None:
        """Closes the file; the next batch opens it again."""
        opened, self._open, self._columns = self._open, None, None
        if opened:
            opened.db.close()

    # -- records -------------------------------------------------------------------------------

    def _values(self, batch: Batch[bytes]) -> tuple[Sequence[str], Sequence[Any]]:
        """Ids and values of the rows; rejects records that can't become one."""
        problems: dict[int, str] = {}
        values: Sequence[Any]
        if self._is_auto:
            values, undecodable = self._decode(batch.records)
            problems = {one.index: one.error for one in undecodable}
        elif self._format == "bytes":
            values = batch.records.items()
        else:
            values = [_text(item) for item in batch.records.items()]
            if self._format == "json":
                problems = {i: "not UTF-8" for i, v in enumerate(values) if isinstance(v, bytes)}
                values = [v for v in values if isinstance(v, str)]
        for place, problem in problems.items():
            batch.reject(place, problem)
        if not problems:
            return batch.ids, values
        return [name for i, name in enumerate(batch.ids) if i not in problems], values

    # -- one transaction -----------------------------------------------------------------------

    def _is_new(self, db: sqlite3.Connection, batch: Batch[bytes]) -> bool:
        entered = db.execute(
            f"INSERT INTO {LEDGER} VALUES(?, ?, ?) ON CONFLICT(id) DO NOTHING",
            (batch.id, len(batch), time.time()),
        )
        return entered.rowcount == 1

    def _insert(self, db: sqlite3.Connection, ids: Sequence[str], values: Sequence[Any]) -> None:
        if not self._is_auto:
            self._prepare_table(db, [RECORD])
            self._insert_rows(db, [ID, RECORD], zip(ids, values, strict=True))
            return
        keys = keys_of(values)
        table = self._prepare_table(db, keys)
        columns = [key for key in keys if key in table.writable and key not in {ID, EXTRA}]
        kinds = {key: table.affinities[key] for key in columns if key in table.affinities}
        objects = [v for v in values if type(v) is dict]
        extra = has_extra(values, keys, columns) or any(
            rounded([o.get(key) for o in objects], kind) for key, kind in kinds.items()
        )
        rows = rows_of(ids, values, columns, has_extra=extra, affinities=kinds)
        names = [ID, *columns, *([EXTRA] if extra else [])]
        defaults = [name for name in columns if name in table.defaults]
        if not defaults:
            self._insert_rows(db, names, rows)
            return
        # A row that does not name a column gets its default, so rows that name others need another
        # statement; what follows one another keeps its order.
        lacking = (_lacking(value, defaults) for value in values)
        for absent, run in groupby(zip(lacking, rows, strict=True), key=itemgetter(0)):
            kept = [i for i, name in enumerate(names) if name not in absent]
            cells = (tuple([row[i] for i in kept]) for _, row in run)
            self._insert_rows(db, [names[i] for i in kept], cells)

    def _insert_rows(
        self, db: sqlite3.Connection, columns: Sequence[str], rows: Iterable[tuple[Any, ...]]
    ) -> None:
        names, marks = ", ".join(map(quoted, columns)), ", ".join("?" * len(columns))
        db.executemany(
            f"INSERT INTO {self._table}({names}) VALUES({marks})"
            f" ON CONFLICT({quoted(ID)}) DO NOTHING",
            rows,
        )

    def _prepare_table(self, db: sqlite3.Connection, keys: Sequence[str]) -> _Columns:
        """Makes the table, and columns for new keys; gives its columns."""
        if self._columns is None or not self._columns.writable.issuperset(keys):
            more = () if not self._is_auto else (EXTRA,)
            db.execute(
                f"CREATE TABLE IF NOT EXISTS {self._table}"
                f"({quoted(ID)} TEXT PRIMARY KEY NOT NULL"
                + "".join(f", {quoted(name)}" for name in (*_first(keys), *more))
                + ")"
            )
            self._columns = self._read_columns(db)
            new = new_columns(keys, self._columns.taken)
            new += [name for name in more if name not in self._columns.taken]
            # A STRICT table has no column without a type; ANY keeps values as they are there alone.
            kind = " ANY" if new and self._is_strict(db) else ""
            for name in new:
                db.execute(f"ALTER TABLE {self._table} ADD COLUMN {quoted(name)}{kind}")
            if new:
                self._columns = self._read_columns(db)
        return self._columns

    def _is_strict(self, db: sqlite3.Connection) -> bool:
        # Before version 3.37 SQLite has neither this pragma nor such tables.
        found = db.execute(f"PRAGMA table_list({self._table})").fetchall()
        return any(strict for _, _, _, _, _, strict in found)

    def _read_columns(self, db: sqlite3.Connection) -> _Columns:
        # Also the generated ones: they can't be written, but their names are in use.
        found = db.execute(f"PRAGMA table_xinfo({self._table})").fetchall()
        is_strict = self._is_strict(db)
        kinds = {name: affinity(kind, is_strict=is_strict) for _, name, kind, *_ in found}
        return _Columns(
            frozenset(kinds),
            frozenset(name for _, name, *_, hidden in found if not hidden),
            {name: kind for name, kind in kinds.items() if kind is not None},
            frozenset(name for _, name, _, _, default, *_ in found if default is not None),
        )

    # -- the file ------------------------------------------------------------------------------

    def _connection(self) -> sqlite3.Connection:
        """The open file, if it is still the one of that name."""
        if self._open and not _is_there(self._path, self._open.file):
            self.close()  # what goes into a file that was removed is lost
        if not self._open:
            self._open = self._connect()
        return self._open.db

    def _connect(self) -> _Open:
        make_folder(self._path.parent)
        with _alone(self._path.parent):
            with suppress(FileExistsError):
                # Not opened and closed: that would end all locks this process has on the file.
                os.mknod(self._path, 0o600)
            for suffix in ("", "-wal", "-shm"):
                tighten(self._path.with_name(self._path.name + suffix))
            file = self._path.stat()
            db = sqlite3.connect(
                self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                _prepare(db)
            except BaseException:
                db.close()
                raise
        return _Open(db, file)


def _prepare(db: sqlite3.Connection) -> None:
    (mode,) = db.execute("PRAGMA journal_mode=WAL").fetchone()
    if mode != "wal":
        raise sqlite3.OperationalError("this file system can't have a database with a WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute(_MAKE_LEDGER)


def quoted(name: str) -> str:
    """A name as SQL has it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


def _lacking(value: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Those of some columns that a record does not name."""
    there = value if type(value) is dict else ()
    return tuple(name for name in names if name not in there)


def _first(keys: Sequence[str]) -> list[str]:
    return new_columns(keys, ())


def _text(item: bytes) -> str | bytes:
    """A line as text; as it came, if it is no UTF-8."""
    try:
        return item.decode()
    except UnicodeDecodeError:
        return item


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Locks a folder: SQLite does not wait while another process switches a new file to WAL."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _is_there(path: Path, file: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), file)
    except FileNotFoundError:
        return False


def _file(path: str | None, context: Context) -> Path:
    if path is not None:
        return Path(path)
    name = "out.db" if context.pipeline == "default" else f"out-{context.pipeline}.db"
    return Path(context.data_dir, name)
