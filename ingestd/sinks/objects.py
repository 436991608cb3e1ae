"""The sink `objects` writes each batch as an object, NDJSON or Parquet, to a bucket or a folder.

    {prefix}/{path}/{batch id}.parquet                    one object a batch
    {prefix}/{path}/{field}={value}/{batch id}.parquet    with `partition_by`, one a value
    {prefix}/_schema.json                                 the columns of Parquet, pinned

* A key is made of the batch's id and of the time at which it was accepted, never of the clock of a
  try, and an object is created (`If-None-Match: *`), never written over. So there is one object for
  the same records whatever happens; "already there" is done.
* A part of a batch that was split looks for the objects of its ancestors first, value by value.
* A batch with more values than `partitions_max` is one object under `_many`. Whether it has more is
  the batch's alone, so a part finds the objects of its ancestor in one of the two places.
* Columns are those of the option, or are found in the first batch, and are kept in `_schema.json`,
  which is created as well: all writers have the same. A key without a column goes into `_extra`.
"""

from __future__ import annotations

import gzip
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import quote, unquote, urlsplit

import msgspec
from msgspec import Meta

from ingestd.base.files import sync_folder
from ingestd.base.record import Records
from ingestd.handlers.batch import Batch, Blocked, Unavailable
from ingestd.handlers.context import Context
from ingestd.handlers.options import Extra, FilePath, Seconds, Secret
from ingestd.handlers.outcome import SinkFinding
from ingestd.sinks import parquet
from ingestd.sinks.base import BatchHints, SinkOptions, ids_of
from ingestd.sinks.tables import lines

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ingestd.sinks.parquet import Column

CHECK = "_check"
MISSING = "_missing"
"""An object that nobody writes: `check` looks if the store says that it is not there."""
MANY = "_many"
NULL = "__HIVE_DEFAULT_PARTITION__"
_MIB = 1024**2
_SUFFIXES = {"none": "", "gzip": ".gz", "zstd": ".zst"}
_SCHEMES = ("s3", "gs", "az", "abfs", "abfss", "file")
_VALUE_CHARS_MAX = 200
_NAME_BYTES_MAX = 255
"""Longest name of a folder that file systems have; one in a key of a bucket is no longer."""
_TOLD_CHARS = 500
_READ_BYTES_MAX = 4 * _MIB
_MAY_LIST = (
    "the right to read is missing, or with S3 that to list (s3:ListBucket), without which it does"
    " not say what is not there: "
)
_PANIC = "PanicException"
"""What obstore raises where its own code failed, as on an address in the environment that is none;
it has no importable class. Whatever it is, no record is to be given up for it."""
_HERE = Context()


class ObjectsOptions(SinkOptions, frozen=True, kw_only=True):
    """Options of the sink `objects`."""

    url: Annotated[
        str,
        Meta(description="`s3://bucket/prefix`, `gs://…`, `az://container/…`, or `file:///folder`"),
    ]
    format: Annotated[
        Literal["ndjson", "parquet"],
        Meta(description="ndjson: records as they came; parquet: a column a key, extra `parquet`"),
    ] = "ndjson"
    compress: Annotated[
        Literal["none", "gzip", "zstd"],
        Meta(description="compression of the object, with Parquet of its columns"),
    ] = "zstd"
    path: Annotated[
        str,
        Meta(
            description="folder below the prefix; `%Y %m %d %H` are those of the time (UTC) at"
            " which the batch was accepted"
        ),
    ] = "dt=%Y-%m-%d/hh=%H"
    partition_by: Annotated[
        str | None, Meta(description="key of JSON records; an object for each of its values")
    ] = None
    partitions_max: Annotated[
        int,
        Meta(ge=1, le=1000, description="a batch with more values is one object under `_many`"),
    ] = 32
    columns: Annotated[
        dict[str, Literal["int64", "double", "bool", "text", "json"]],
        Meta(description="columns of Parquet; default those of the first batch"),
    ] = msgspec.field(default_factory=dict)
    endpoint: Annotated[
        str | None, Meta(description="URL of an S3-compatible service other than AWS")
    ] = None
    region: Annotated[str | None, Meta(description="region of S3")] = None
    access_key_id: Annotated[
        str | None, Meta(description="key id of S3; default the environment's, or the machine's")
    ] = None
    secret_access_key: Annotated[Secret | None, Meta(description="secret of the key id")] = None
    service_account: Annotated[
        FilePath | None, Meta(description="file of a service account of Google Cloud")
    ] = None
    account: Annotated[str | None, Meta(description="storage account of Azure")] = None
    account_key: Annotated[Secret | None, Meta(description="key of the storage account")] = None
    timeout: Annotated[
        Seconds, Meta(description="bound of one request; keep it below `executor.timeout`")
    ] = Seconds(30)

    def __post_init__(self) -> None:
        self._check_addresses()
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ValueError("access_key_id: it and secret_access_key belong together")
        if any(part in {".", ".."} for part in self.path.split("/")):
            raise ValueError("path: it cannot lead out of the prefix")
        if "//" in self.path or not self.path.isprintable():
            raise ValueError("path: a folder in it has no name, or a name that cannot be")
        if self.format == "parquet" and find_spec("pyarrow") is None:
            raise ValueError("format: parquet needs pyarrow: pip install 'ingestd[parquet]'")
        if self.columns and self.format != "parquet":
            raise ValueError('columns: they are of format = "parquet"')
        if parquet.EXTRA_COLUMN in self.columns:
            raise ValueError(f"columns: the name {parquet.EXTRA_COLUMN} is taken")
        if not self.timeout:
            raise ValueError("timeout: it has to be longer than 0s")

    def _check_addresses(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in _SCHEMES or not (parts.netloc or parts.scheme == "file"):
            raise ValueError(f"url: it begins with {', '.join(s + '://' for s in _SCHEMES)}")
        if parts.query or parts.fragment or "@" in parts.netloc:
            raise ValueError("url: nothing but a bucket and a prefix belongs in it")
        if parts.scheme == "file" and (parts.netloc or not parts.path.startswith("/")):
            raise ValueError("url: a folder is written file:///folder")
        if self.endpoint is not None:
            end = urlsplit(self.endpoint)
            if end.scheme not in {"http", "https"} or not end.hostname:
                raise ValueError("endpoint: it begins with http:// or https:// and has a host")
            if "@" in end.netloc or end.query or end.fragment:
                raise ValueError("endpoint: nothing but a host, a port and a path belongs in it")
        for option in ("region", "access_key_id"):  # they become a part of a header
            value = getattr(self, option) or ""
            if not (value.isascii() and value.isprintable()):
                raise ValueError(f"{option}: {value!r} is not possible in a header")


class ObjectsSink:
    """Writes each batch as one object, or one a value of a key.

    Any number of these, in threads and processes, may write below one prefix.
    """

    EXTRA = Extra("objects", ("obstore",))
    BATCH = BatchHints(records_max=100_000, bytes_max=64 * _MIB, age_max=60.0)

    def __init__(self, options: ObjectsOptions, context: Context = _HERE) -> None:
        self._options = options
        self._format = context.record_format
        if options.partition_by is not None and self._format != "json":
            raise ValueError("partition_by: only JSON records have keys")
        self._store = ObjectStoreClient(options)
        self._pins = self._format == "json" and options.format == "parquet"
        self._columns: dict[str, Column] = {}
        name = options.partition_by or ""
        self._room = _NAME_BYTES_MAX - len(quote(name)) - len("=")
        only = msgspec.defstruct("Partitioned", [("value", Any, None)], rename={"value": name})
        self._partition: Any = msgspec.json.Decoder(only)

    def __call__(self, batch: Batch[bytes]) -> None:
        """Writes the objects of the batch that are not there yet.

        Raises:
            Unavailable: the store is down or overloaded.
            Blocked: the bucket or a right is missing, or the columns do not fit those pinned.
        """
        folder = batch.accepted_at.strftime(self._options.path).strip("/")
        if self._pins and not self._columns:
            self._columns = self._pinned(batch.records)
        # Records are rejected before anything else, whether the batch is there already or not.
        parts = [
            (place, content)
            for place, places in self._partitions(batch.records)
            if (content := self._rendered(batch, places)) is not None
        ]
        for place, content in parts:
            key = "/".join(part for part in (folder, place) if part)
            if not any(self._is_there(folder, place, name) for name in ids_of(batch)[:-1]):
                self._store.create(self._key(key, batch.id), content)

    def check(self) -> Iterator[SinkFinding]:
        """Findings: the bucket may be written to and looked into, and creates objects once."""
        shown = self._options.url
        self._store.create(CHECK, b"")
        if self._store.create(CHECK, b""):
            yield SinkFinding(
                "warning",
                f"{shown} writes over what is there (it ignores If-None-Match): a batch that comes"
                " again writes the same records again under the same key",
            )
        else:
            yield SinkFinding("info", f"{shown} can be written to and creates an object once")
        self._store.has(MISSING)
        if self._pins:
            pinned = self._store.read(parquet.SCHEMA)
            if pinned is not None:
                names = ", ".join(self._fitting(parquet.read_columns(pinned)))
                yield SinkFinding("info", f"columns in {parquet.SCHEMA}: {names}")

    def close(self) -> None:
        """Drops the client; the next batch makes another."""
        self._store.close()

    # -- keys ----------------------------------------------------------------------------------

    def _key(self, folder: str, name: str) -> str:
        options = self._options
        kind = ".parquet" if options.format == "parquet" else ".ndjson"
        suffix = "" if options.format == "parquet" else _SUFFIXES[options.compress]
        return f"{folder}/{name}{kind}{suffix}" if folder else f"{name}{kind}{suffix}"

    def _is_there(self, folder: str, place: str, name: str) -> bool:
        """Tells if an ancestor's object of a partition is there, or the one of all its records."""
        places = [place] if not place or place == MANY else [place, MANY]
        keys = ("/".join(part for part in (folder, one) if part) for one in places)
        return any(self._store.has(self._key(key, name)) for key in keys)

    def _partitions(self, records: Records) -> list[tuple[str, Sequence[int] | None]]:
        """The places of a batch's records by folder; `None` for all."""
        field = self._options.partition_by
        if field is None:
            return [("", None)]
        found: dict[str, list[int]] = {}
        for place, item in enumerate(records.items()):
            found.setdefault(f"{quote(field)}={self._value(item)}", []).append(place)
            if len(found) > self._options.partitions_max:
                return [(MANY, None)]
        return list(found.items())

    def _value(self, item: bytes) -> str:
        try:
            value = self._partition.decode(item).value
        except (ValueError, RecursionError):  # no object, or it cannot be decoded
            return NULL
        if value is None:
            return NULL
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        return _cut(quote(text[:_VALUE_CHARS_MAX], safe=""), self._room) or NULL

    # -- contents ------------------------------------------------------------------------------

    def _rendered(self, batch: Batch[bytes], places: Sequence[int] | None) -> bytes | None:
        """The object of some records; `None` if none of them can be in it."""
        records = batch.records
        if places is not None and len(places) < records.count:
            items = records.items()
            records = Records.sized([items[place] for place in places])
        if self._options.format == "parquet":
            return parquet.write(
                records,
                self._format,
                self._columns,
                self._options.compress,
                lambda i, why: batch.reject(i if places is None else places[i], why),
            )
        content = lines(records, self._format)
        if self._options.compress == "gzip":
            return gzip.compress(content, 6, mtime=0)
        return zstd.compress(content) if self._options.compress == "zstd" else content

    # -- columns -------------------------------------------------------------------------------

    def _pinned(self, records: Records) -> dict[str, Column]:
        """The columns that all writers have, pinned now if they are not yet."""
        while True:
            pinned = self._store.read(parquet.SCHEMA)
            if pinned is not None:
                columns = self._fitting(parquet.read_columns(pinned))
                if columns != parquet.read_columns(pinned):  # more columns, by the option
                    self._store.write(parquet.SCHEMA, msgspec.json.encode(columns))
                return columns
            columns = dict(self._options.columns) or parquet.found_in(records)
            if not columns or self._store.create(parquet.SCHEMA, msgspec.json.encode(columns)):
                return columns

    def _fitting(self, pinned: dict[str, Column]) -> dict[str, Column]:
        """The pinned columns with those of the option.

        Raises:
            Blocked: a column of the option has another type, which no file there has.
        """
        for name, kind in self._options.columns.items():
            before = pinned.get(name, kind)
            if before != kind and (before, kind) != ("int64", "double"):
                raise Blocked(
                    f"{self._options.url}/{parquet.SCHEMA}: the column {name} is {before} there and"
                    f" {kind} in the option columns: take another prefix"
                )
        return {**pinned, **self._options.columns}


class ObjectStoreClient:
    """The store of a sink: created objects, errors in the classes of a sink.

    Args:
        options: of the sink.
    """

    def __init__(self, options: ObjectsOptions) -> None:
        self._options = options
        self._store: Any = None
        parts = urlsplit(options.url)
        self._folder = Path(unquote(parts.path)) if parts.scheme == "file" else None

    def close(self) -> None:
        """Drops the connections."""
        self._store = None

    def create(self, key: str, content: bytes) -> bool:
        """Creates an object, durably; returns False if it was there.

        Raises:
            Unavailable: see the class; also while another write of the object is in progress.
        """
        if self._put(key, content, "create"):
            return True
        # S3 refuses a create with 409 while another one is in progress, which may come to nothing.
        if not self.has(key):
            raise Unavailable(f"{self._options.url}: another write of {key} is in progress")
        return False

    def write(self, key: str, content: bytes) -> None:
        """Writes an object, over what is there."""
        self._put(key, content, "overwrite")

    def has(self, key: str) -> bool:
        """Tells if there is an object of this key."""
        import obstore  # noqa: PLC0415

        def look() -> bool:
            try:
                obstore.head(self._opened(), key)
            except FileNotFoundError:
                return False
            return True

        return bool(self._asked(look, _MAY_LIST))

    def read(self, key: str) -> bytes | None:
        """The content of a small object; `None` if there is none."""
        import obstore  # noqa: PLC0415

        def look() -> bytes | None:
            try:
                found = obstore.get(self._opened(), key)
            except FileNotFoundError:
                return None
            if found.meta["size"] > _READ_BYTES_MAX:
                raise Blocked(f"{self._options.url}/{key}: more than {_READ_BYTES_MAX} bytes")
            return bytes(found.bytes())

        found = self._asked(look, _MAY_LIST)
        return found if isinstance(found, bytes) else None

    def _put(self, key: str, content: bytes, mode: str) -> bool:
        import obstore  # noqa: PLC0415
        from obstore import exceptions  # noqa: PLC0415

        def put() -> bool:
            try:
                obstore.put(self._opened(), key, content, mode=mode, use_multipart=False)
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                created = False
            else:
                created = True
            self._sync(key)
            return created

        return bool(self._asked(put))

    def _sync(self, key: str) -> None:
        """Syncs a file of a local folder and the names that lead to it; no store does that here."""
        if self._folder is None:
            return
        file = self._folder / key
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        for folder in file.parents:
            sync_folder(folder)
            if folder == self._folder:
                break

    def _asked(self, what: Callable[[], object], hint: str = "") -> object:
        """Does something with the store, and raises what its error means.

        Args:
            what: the thing.
            hint: is told where a right is missing.
        """
        from obstore import exceptions as of  # noqa: PLC0415

        lasting = (
            of.PermissionDeniedError, of.UnauthenticatedError, of.NotSupportedError,
            of.InvalidPathError, of.UnknownConfigurationKeyError, FileNotFoundError,
            PermissionError, ValueError,
        )  # fmt: skip
        try:
            return what()
        except (Blocked, Unavailable):
            raise
        except lasting as error:
            more = hint if isinstance(error, of.PermissionDeniedError) else ""
            raise Blocked(f"{self._options.url}: {more}{_told(error)}") from None
        except (of.BaseError, OSError) as error:
            told = _told(error)
            kind = Blocked if "(os error 13)" in told or "(os error 30)" in told else Unavailable
            raise kind(f"{self._options.url}: {told}") from None
        except BaseException as error:
            if type(error).__name__ != _PANIC:
                raise
            raise Blocked(f"{self._options.url}: {_told(error)}") from None

    def _opened(self) -> Any:
        from obstore.exceptions import BaseError  # noqa: PLC0415

        if self._store is None:
            try:
                self._store = self._made()
            except BaseError as error:  # nothing was sent yet: an option, or the environment
                raise Blocked(f"{self._options.url}: {_told(error)}") from None
        return self._store

    def _made(self) -> Any:
        from datetime import timedelta  # noqa: PLC0415

        from obstore.store import LocalStore, from_url  # noqa: PLC0415

        options = self._options
        if self._folder is not None:
            return LocalStore(prefix=self._folder, mkdir=True)
        given = {
            "endpoint": options.endpoint,
            "region": options.region,
            "access_key_id": options.access_key_id,
            "secret_access_key": options.secret_access_key,
            "service_account": options.service_account,
            "account_name": options.account,
            "account_key": options.account_key,
        }
        config = {name: str(value) for name, value in given.items() if value is not None}
        seconds = timedelta(seconds=options.timeout)
        http = (options.endpoint or "").startswith("http://")
        return from_url(
            options.url,
            config=config,
            client_options={
                "timeout": seconds,
                "connect_timeout": min(seconds, timedelta(seconds=10)),
                "allow_http": http,
            },
            # The outage rule paces the tries.
            retry_config={"max_retries": 1, "retry_timeout": seconds},
        )


def _cut(name: str, room: int) -> str:
    """A quoted text that is no longer than there is room, with whole characters."""
    if len(name) <= room:
        return name
    whole = re.sub(r"%.?$", "", name[:room])
    return quote(unquote(whole, errors="ignore"), safe="")


def _told(error: BaseException) -> str:
    """The first line of what a store says; behind it stand details for developers."""
    text = str(error).partition("\n")[0]
    return " ".join(text.split())[:_TOLD_CHARS] or type(error).__name__
