"""Lines for commands: records and dead letters as JSON, as rows of a table and as pages."""

from __future__ import annotations

import base64
import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ingestd.base.clock import shown
from ingestd.base.envelope import facts_of
from ingestd.base.files import create_new, sync_folder
from ingestd.cli.output import put
from ingestd.journal.handling import letter_facts, text_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

    from ingestd.journal.dead_letters import StoredLetter


def write_lines(lines: Iterable[bytes], path: str | None = None) -> int:
    """Writes lines to a private file, synced and under its name once it is whole, or to stdout.

    No link is followed: neither at its name nor where it is written first.

    Returns:
        How many. A reader of stdout that has gone ends it early and is no error.

    Raises:
        OSError: the file.
        OutputError: stdout can't be written.
    """
    if path is None:
        count = 0
        for line in lines:
            if not put(line, flush=False):
                return 0
            count += 1
        return count if put(b"") else 0
    target = Path(path)
    _demand_file(target)
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


def _demand_file(target: Path) -> None:
    """Refuses what a file must not be put in place of: `/dev/null`, `/dev/stdout`, a folder.

    Raises:
        OSError: something else than a file is there.
    """
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise FileExistsError(errno.EEXIST, "it is a link, a pipe or a device, and no file")


def _write(lines: Iterable[bytes], file: BinaryIO) -> int:
    count = 0
    for line in lines:
        file.write(line)
        count += 1
    return count


# -- dead letters ----------------------------------------------------------------------------------

_ROW = "{:>8}  {:<12}  {:<24}  {:<11}  {:>5}  {:>9}  {}"


def head() -> str:
    """The table's first line."""
    return _ROW.format("ID", "PIPELINE", "GIVEN UP", "REASON", "TRIES", "BYTES", "ERROR")


def as_row(pipeline: str, kept: StoredLetter) -> str:
    """One line of the table."""
    letter = kept.letter
    error = one_line(letter.error, 80)
    if letter.records > 1:
        error = f"[{letter.records} records] {error}"
    if kept.marked:
        error = f"[{'moving' if kept.is_moving else 'requeued'}] {error}"
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
        f"error     {one_line(letter.error)}",
        f"attempts  {letter.attempts}",
        f"first at  {shown(letter.first_at)}",
        f"given up  {shown(letter.last_at)}",
        f"requeued  {'moving' if kept.is_moving else 'yes' if kept.marked else 'no'}",
    ]
    lines += [f"{name:<9} {one_line(text)}" for name, text in _origin(letter.envelope)]
    if letter.traceback:
        lines += ["", "traceback", _printable(letter.traceback.rstrip("\n"))]
    text = text_of(letter.payload)
    if text is None:
        encoded = base64.b64encode(letter.payload).decode()
        return "\n".join([*lines, "", f"payload   {kept.size} bytes, base64", encoded])
    return "\n".join([*lines, "", f"payload   {kept.size} bytes", _printable(text)])


def as_line(pipeline: str, kept: StoredLetter, *, whole: bool) -> bytes:
    """A JSON object and an LF; `whole` with traceback and payload.

    The payload is `payload` if it is UTF-8, else `payload_base64`.
    """
    return msgspec.json.encode(letter_facts(pipeline, kept, whole=whole)) + b"\n"


def _origin(packed: bytes) -> Iterator[tuple[str, str]]:
    """The facts of an envelope, by the names of their lines on a page."""
    for name, value in facts_of(packed).items():
        if isinstance(value, dict):
            label = "header" if name == "headers" else "attribute"
            yield from ((label, f"{key}: {one}") for key, one in value.items())
        else:
            yield name.removeprefix("content_"), str(value)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def one_line(text: str, width: int | None = None) -> str:
    """A text on one line of at most so many characters; control characters are blanks."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if width is None or len(line) <= width else f"{line[: width - 1]}…"
