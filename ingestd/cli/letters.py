"""Renders dead letters as a table row, a page or a JSON line, and writes exports."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ingestd.base.files import create_new, sync_folder
from ingestd.cli.moments import shown
from ingestd.cli.output import discard_stdout

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import BinaryIO

    from ingestd.journal.dead_letters import StoredLetter

_ROW = "{:>8}  {:<12}  {:<24}  {:<11}  {:>5}  {:>9}  {}"


def head() -> str:
    """The table's first line."""
    return _ROW.format("ID", "PIPELINE", "GIVEN UP", "REASON", "TRIES", "BYTES", "ERROR")


def as_row(pipeline: str, kept: StoredLetter) -> str:
    """One line of the table."""
    letter = kept.letter
    error = _one_line(letter.error, 80)
    if letter.records > 1:
        error = f"[{letter.records} records] {error}"
    if kept.marked:
        error = f"[requeued] {error}"
    return _ROW.format(
        kept.id, pipeline, shown(letter.last_at), letter.reason, letter.attempts, kept.size, error
    ).rstrip()


def as_page(pipeline: str, kept: StoredLetter) -> str:
    """All fields, for a terminal. Control characters are shown as `?`."""
    letter = kept.letter
    lines = [
        f"letter    {kept.id} of pipeline {pipeline}",
        f"record    {letter.record or '(never accepted)'}",
        f"records   {letter.records}",
        f"reason    {letter.reason}",
        f"error     {_one_line(letter.error)}",
        f"attempts  {letter.attempts}",
        f"first at  {shown(letter.first_at)}",
        f"given up  {shown(letter.last_at)}",
        f"requeued  {'yes' if kept.marked else 'no'}",
    ]
    if letter.traceback:
        lines += ["", "traceback", _printable(letter.traceback.rstrip("\n"))]
    text = _text(letter.payload)
    if text is None:
        encoded = base64.b64encode(letter.payload).decode()
        return "\n".join([*lines, "", f"payload   {kept.size} bytes, base64", encoded])
    return "\n".join([*lines, "", f"payload   {kept.size} bytes", _printable(text)])


def as_line(pipeline: str, kept: StoredLetter, *, whole: bool) -> bytes:
    """A JSON object and an LF; `whole` with traceback and payload.

    The payload is `payload` if it is UTF-8, else `payload_base64`.
    """
    letter = kept.letter
    facts: dict[str, object] = {
        "pipeline": pipeline,
        "id": kept.id,
        "record": letter.record,
        "records": letter.records,
        "reason": letter.reason,
        "error": letter.error,
        "attempts": letter.attempts,
        "first_at": shown(letter.first_at),
        "last_at": shown(letter.last_at),
        "bytes": kept.size,
        "retry": kept.marked,
    }
    if whole:
        facts["traceback"] = letter.traceback
        text = _text(letter.payload)
        if text is None:
            facts["payload_base64"] = base64.b64encode(letter.payload).decode()
        else:
            facts["payload"] = text
    return msgspec.json.encode(facts) + b"\n"


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


def _text(payload: bytes) -> str | None:
    try:
        return payload.decode()
    except UnicodeDecodeError:
        return None


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def _one_line(text: str, width: int | None = None) -> str:
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if width is None or len(line) <= width else f"{line[: width - 1]}…"
