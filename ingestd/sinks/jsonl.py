"""The sink `jsonl` writes records as lines of JSON into hourly files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from ingestd.handlers.batch import Batch  # noqa: TC001  the loader reads the annotations
from ingestd.handlers.context import Context
from ingestd.handlers.options import FilePath, Size
from ingestd.sinks.base import SinkOptions, ids_of
from ingestd.sinks.files import Compressor, Folder
from ingestd.sinks.ledger import BatchLedger
from ingestd.sinks.tables import lines

if TYPE_CHECKING:
    from collections.abc import Callable

_HERE = Context()


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
        self._format = context.record_format
        self._compressor = Compressor(folder, compress, self.now) if compress != "none" else None
        wake = self._compressor.wake if self._compressor else (lambda: None)
        size = options.rotate_bytes
        self._folder = Folder(
            folder,
            rotate_bytes=size,
            now=self.now,
            set_aside=wake,
            ledger=BatchLedger(folder),
        )

    def __call__(self, batch: Batch[bytes]) -> None:
        """Writes the batch.

        Raises:
            OSError: it is not in the file, not even in part.
        """
        self._folder.append(lines(batch.records, self._format), ids_of(batch))

    def close(self) -> None:
        """Closes the file and ends the compression."""
        self._folder.close()
        if self._compressor:
            self._compressor.close()


def _folder(path: str | None, context: Context) -> Path:
    if path is not None:
        return Path(path)
    out = Path(context.data_dir, "out")
    return out if context.pipeline == "default" else out / context.pipeline
