"""The sink `jsonl` writes records as lines of JSON into hourly files."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ingestd.base.record import Layout, Records
from ingestd.handlers.batch import Batch  # noqa: TC001  the loader reads the annotations
from ingestd.handlers.context import Context
from ingestd.sinks.files import SUFFIXES, Compressor, Folder

if TYPE_CHECKING:
    from collections.abc import Callable

_ROTATE_BYTES = 256 * 1024 * 1024
_HERE = Context()
# In JSON a raw line break can only be white space, and may as well be a space.
_BREAKS_TO_SPACES = bytes.maketrans(b"\n\r", b"  ")
_ENCODER = msgspec.json.Encoder()


class JsonlSink:
    """Appends each batch to the file of this hour (UTC) and syncs it.

    Any number of these, in threads and processes, may write to the same folder. A batch that comes
    again after a crash is written again: at least once.

    Options:
        path: the folder; by default `out` in the data directory, for a named pipeline
            `out/NAME`. Made with mode 0700, its files with 0600.
        rotate_bytes: a file is set aside before it grows beyond this; `"256MiB"`.
        compress: `none`, `gzip` or `zstd`, for files that are no longer written.

    Raises:
        ValueError: an option makes no sense; names it.
    """

    # Seconds since the epoch; a subclass may have another clock.
    now: Callable[[], float] = staticmethod(time.time)

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        rotate_bytes: int | str = _ROTATE_BYTES,
        compress: str = "none",
        context: Context = _HERE,
    ) -> None:
        if compress != "none" and compress not in SUFFIXES:
            raise ValueError(f"compress: {compress!r} is not none, gzip or zstd")
        folder, size = _folder(path, context), _size(rotate_bytes)
        self._format = context.record_format
        self._compressor = Compressor(folder, compress, self.now) if compress != "none" else None
        wake = self._compressor.wake if self._compressor else (lambda: None)
        self._folder = Folder(folder, rotate_bytes=size, now=self.now, set_aside=wake)

    def __call__(self, batch: Batch[bytes]) -> None:
        """Writes the batch.

        Raises:
            OSError: it is not in the file, not even in part.
        """
        self._folder.append(lines(batch.records, self._format))

    def close(self) -> None:
        """Closes the file and ends the compression."""
        self._folder.close()
        if self._compressor:
            self._compressor.close()


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


def _folder(path: object, context: Context) -> Path:
    if path is None:
        out = Path(context.data_dir, "out")
        return out if context.pipeline == "default" else out / context.pipeline
    if not isinstance(path, str | Path) or not str(path):
        raise ValueError(f"path: {path!r} is not a folder's path")
    return Path(path)


def _size(written: object) -> int:
    if isinstance(written, str):
        # Only here: it brings pydantic, which a worker with the default does without.
        from ingestd.config.units import parse_size  # noqa: PLC0415

        try:
            written = parse_size(written)
        except ValueError as exc:
            raise ValueError(f"rotate_bytes: {exc}") from exc
    if not isinstance(written, int) or isinstance(written, bool) or written < 1:
        raise ValueError(f"rotate_bytes: {written!r} is not a size of at least 1 byte")
    return written
