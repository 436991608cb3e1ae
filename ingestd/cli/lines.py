"""Lines of JSON for commands: records and dead letters, to stdout or into a file."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ingestd.base.files import create_new, sync_folder
from ingestd.cli.output import discard_stdout

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import BinaryIO


def write_lines(lines: Iterable[bytes], path: str | None = None) -> int:
    """Writes lines to a private file, synced and under its name once it is whole, or to stdout.

    No link is followed: neither at its name nor where it is written first.

    Returns:
        How many. A reader of stdout that has gone ends it early and is no error.

    Raises:
        OSError: the file, or a full disk behind stdout.
    """
    if path is None:
        try:
            count = _write(lines, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            discard_stdout()
            return 0
        return count
    target = Path(path)
    part = target.with_name(f"{target.name}.part")
    try:
        with os.fdopen(create_new(part), "wb") as file:
            count = _write(lines, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)  # it may be what fills the disk
        raise
    sync_folder(target.parent)
    return count


def _write(lines: Iterable[bytes], file: BinaryIO) -> int:
    count = 0
    for line in lines:
        file.write(line)
        count += 1
    return count


def text_of(payload: bytes) -> str | None:
    """The text of a payload; `None` if it is no UTF-8."""
    try:
        return payload.decode()
    except UnicodeDecodeError:
        return None


def payload_fields(payload: bytes) -> dict[str, object]:
    """The payload as a field of a JSON object: `payload` if it is UTF-8, else `payload_base64`."""
    text = text_of(payload)
    if text is None:
        return {"payload_base64": base64.b64encode(payload).decode()}
    return {"payload": text}
