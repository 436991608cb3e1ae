"""The sink `jsonl` writes records as lines of JSON into hourly files."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import quote

import msgspec
from msgspec import Meta

from ingestd.base.record import Records
from ingestd.handlers.batch import Batch  # noqa: TC001  the loader reads the annotations
from ingestd.handlers.context import Context
from ingestd.handlers.options import FilePath, Size
from ingestd.sinks.base import SinkOptions, check_folder, ids_of
from ingestd.sinks.files import Compressor, Folder
from ingestd.sinks.ledger import BatchLedger
from ingestd.sinks.tables import lines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ingestd.handlers.outcome import SinkFinding

_HERE = Context()
_FIELD = re.compile(r"\{([^{}]+)\}")


class JsonlOptions(SinkOptions, frozen=True, kw_only=True):
    """Options of the sink `jsonl`."""

    path: Annotated[
        FilePath | None,
        Meta(description="folder of the files; default `out` in the data directory, or `out/NAME`"),
    ] = None
    rotate_bytes: Annotated[
        Size, Meta(description="a file is set aside before it grows beyond this")
    ] = Size(256 * 1024 * 1024)
    compress: Annotated[
        Literal["none", "gzip", "zstd"],
        Meta(description="compression of files that are no longer written"),
    ] = "none"
    partition: Annotated[
        str,
        Meta(
            description="folders below `path` by fields of JSON records: `country={country}/{kind}`"
        ),
    ] = ""
    partitions_max: Annotated[
        int,
        Meta(description="bound of these folders; records of further ones go to `_other`", ge=1),
    ] = 100

    def __post_init__(self) -> None:
        if not self.partition:
            return
        parts = self.partition.split("/")
        if not all(parts) or any(part.startswith(".") or "\0" in part for part in parts):
            raise ValueError("partition: is not a path below a folder, without names like .x")
        if not _FIELD.search(self.partition):
            raise ValueError("partition: has no {field} in it")
        if self.compress != "none":
            raise ValueError("compress: does not go with partition")


_DEFAULTS = JsonlOptions()


class JsonlSink:
    """Appends each batch to the file of this hour (UTC) and syncs it.

    Any number of these, in threads and processes, may write to the same folder. A batch that comes
    again, also in parts, is in the files once. Folders are made with mode 0700, files with 0600.
    """

    # Seconds since the epoch; a subclass may have another clock.
    now: Callable[[], float] = staticmethod(time.time)

    def __init__(
        self,
        options: JsonlOptions = _DEFAULTS,
        context: Context = _HERE,
    ) -> None:
        folder, compress = _folder(options.path, context), options.compress
        self._own = folder if options.path is not None else None
        self._format = context.record_format
        self._compressor = Compressor(folder, compress, self.now) if compress != "none" else None
        wake = self._compressor.wake if self._compressor else (lambda: None)

        def make(path: Path) -> Folder:
            return Folder(
                path,
                rotate_bytes=options.rotate_bytes,
                now=self.now,
                set_aside=wake,
                ledger=BatchLedger(path),
            )

        self._folder = make(folder)
        self._partitions: Partitions | None = None
        if options.partition:
            if self._format != "json":
                raise ValueError("partition: needs JSON records")
            self._partitions = Partitions(folder, options, make)

    def __call__(self, batch: Batch[bytes]) -> None:
        """Writes the batch.

        Raises:
            OSError: it is not in the file, not even in part.
        """
        if self._partitions is None:
            self._folder.append(lines(batch.records, self._format), ids_of(batch))
        else:
            self._partitions.append(batch)

    def check(self) -> Iterator[SinkFinding]:
        """Looks if the folder of `path` can be written to, or made."""
        return check_folder(self._own) if self._own else iter(())

    def close(self) -> None:
        """Closes the file and ends the compression."""
        self._folder.close()
        if self._partitions is not None:
            self._partitions.close()
        if self._compressor:
            self._compressor.close()


_OPEN_MAX = 32
"""Folders of one writer whose files are open."""
_VALUE_CHARS_MAX = 64
_NAME_BYTES_MAX = 255
"""Longest name of a folder; a character of a value may be twelve."""
OTHER = "_other"
_decode = msgspec.json.Decoder().decode


class Partitions:
    """Writes each batch to folders by fields of its records; each has a ledger of its own.

    A batch comes again whole, and each folder knows if it has its part.

    Args:
        path: above the folders.
        options: the pattern and its bound.
        make: a writer for one folder.
    """

    def __init__(self, path: Path, options: JsonlOptions, make: Callable[[Path], Folder]) -> None:
        self._path = path
        self._pattern, self._most = options.partition, options.partitions_max
        self._make = make
        self._known: set[str] | None = None
        self._open: OrderedDict[str, Folder] = OrderedDict()

    def append(self, batch: Batch[bytes]) -> None:
        """Writes a batch.

        Raises:
            OSError: it is not in all of its folders; what is there is known when it comes again.
        """
        found: dict[str, list[bytes]] = {}
        for item in batch.records.items():
            found.setdefault(self._name_of(item), []).append(item)
        for name, items in found.items():
            self._folder(name).append(lines(Records.sized(items), "json"), ids_of(batch))

    def close(self) -> None:
        """Closes all files."""
        while self._open:
            self._open.popitem()[1].close()

    def _name_of(self, item: bytes) -> str:
        try:
            value = _decode(item)
        except (ValueError, RecursionError):  # as 1e999
            value = None
        record = value if type(value) is dict else {}
        name = _FIELD.sub(lambda found: folder_name(record.get(found[1])), self._pattern)
        if any(len(part.encode()) > _NAME_BYTES_MAX for part in name.split("/")):
            return OTHER
        if self._known is None:
            depth = "/".join("*" * (self._pattern.count("/") + 1))
            there = [one for one in self._path.glob(depth) if one.is_dir()]
            self._known = {str(one.relative_to(self._path)) for one in there}
        if name not in self._known:
            # Another writer may have made it, and a batch that comes again has to find it.
            if len(self._known) >= self._most and not (self._path / name).is_dir():
                return OTHER
            self._known.add(name)
        return name

    def _folder(self, name: str) -> Folder:
        folder = self._open.pop(name, None) or self._make(self._path / name)
        self._open[name] = folder
        if len(self._open) > _OPEN_MAX:
            self._open.popitem(last=False)[1].close()
        return folder


def folder_name(value: object) -> str:
    """A field's value as a part of a folder's name: `_none` without one, and `%2F` for a slash."""
    if value is None or isinstance(value, dict | list) or value == "":
        return "_none"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    name = quote(text, safe="") if len(text) <= _VALUE_CHARS_MAX else OTHER
    return "%2E" + name[1:] if name.startswith(".") else name


def _folder(path: str | None, context: Context) -> Path:
    if path is not None:
        return Path(path)
    out = Path(context.data_dir, "out")
    return out if context.pipeline == "default" else out / context.pipeline
