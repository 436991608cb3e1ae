"""The first page of a journal's file: its header, and where each table begins; kept a second time.

Without it SQLite can't read a row, however whole the rest is. So what it says of the tables lies in
the file once more, as a row that a scan of the raw file finds, and a repair reads the journal with
a first page that is made of it. What the page says beside the tables is the same in every journal.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sqlite3
import struct
import zlib
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCHEMA = """CREATE TABLE IF NOT EXISTS tables(
    one INTEGER PRIMARY KEY CHECK (one = 1), content BLOB NOT NULL) STRICT"""
_MAGIC = b"ingestd: where the tables of this journal begin\n"
_HEAD = struct.Struct(">II")  # length and CRC-32 of what follows
_FRACTIONS = b"\0\x40\x20\x20"
"""No bytes of a page are kept back; and how much of a row lies on it, which SQLite fixes."""
_FOUND_MAX = 100
_rows = msgspec.msgpack.Decoder(tuple[int, int, list[tuple[str, str, str, int, str | None]]])


def keep(db: sqlite3.Connection) -> None:
    """Writes down where the tables begin, if that is not what is written already.

    Raises:
        sqlite3.Error: it can't be written.
    """
    content = _content(db)
    kept = db.execute("SELECT content FROM tables").fetchone()
    if kept != (content,):
        db.execute("INSERT OR REPLACE INTO tables VALUES(1, ?)", (content,))


def _content(db: sqlite3.Connection) -> bytes:
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    tables = db.execute("SELECT type, name, tbl_name, rootpage, sql FROM sqlite_schema").fetchall()
    packed = zlib.compress(msgspec.msgpack.encode((application, version, tables)))
    return _MAGIC + _HEAD.pack(len(packed), zlib.crc32(packed)) + packed


def check(path: Path) -> None:
    """Looks at what SQLite takes for a file that it may only read.

    Raises:
        sqlite3.DatabaseError: that is damaged.
    """
    with path.open("rb", buffering=0) as file:
        head = file.read(20)
    if len(head) == 20 and head[18] > 2:
        raise sqlite3.DatabaseError("the header of the file is damaged")


@contextlib.contextmanager
def mended(path: Path, page_bytes: int) -> Iterator[None]:
    """Has the tables of a journal be found for as long as the block, if SQLite can't find them.

    The page is put back as it was; after a crash it stays as it is meant to be.

    Args:
        path: the file.
        page_bytes: the size of a page.
    """
    if _is_whole(path, page_bytes):
        yield
        return
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        before = os.pread(fd, page_bytes, 0)
        try:
            for page in _pages(path, page_bytes):
                os.pwrite(fd, page, 0)
                if _is_whole(path, page_bytes):
                    break
                os.pwrite(fd, before, 0)
            yield
        finally:
            os.pwrite(fd, before, 0)
    finally:
        os.close(fd)


def _is_whole(path: Path, page_bytes: int) -> bool:
    """Returns True if the page is right, and leads to the row with the journal's id."""
    try:
        with path.open("rb", buffering=0) as file:
            head = file.read(32)
            pages = file.seek(0, os.SEEK_END) // page_bytes
        if head[20:24] != _FRACTIONS or head[28:] != pages.to_bytes(4, "big"):
            return False
        with contextlib.closing(sqlite3.connect(path)) as db:
            (journal,) = db.execute("SELECT journal FROM meta").fetchone()
            return type(journal) is str
    except (sqlite3.Error, OSError, ValueError, TypeError):
        return False


def _pages(path: Path, page_bytes: int) -> Iterator[bytes]:
    """First pages by the copies that there are; none if there is none."""
    try:
        with path.open("rb") as file:
            raw = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except (OSError, ValueError):
        return
    with contextlib.closing(raw):
        for packed in _copies(raw):
            page = _made(packed, page_bytes, len(raw) // page_bytes)
            if page is not None:
                yield page


def _copies(raw: mmap.mmap) -> Iterator[bytes]:
    """Yields the stored copies; older ones may lie on free pages."""
    at = -1
    for _ in range(_FOUND_MAX):
        at = raw.find(_MAGIC, at + 1)
        if at < 0:
            return
        start = at + len(_MAGIC) + _HEAD.size
        length, crc = _HEAD.unpack(raw[start - _HEAD.size : start])
        packed = raw[start : start + min(length, len(raw))]
        if zlib.crc32(packed) == crc:
            yield packed


def _made(packed: bytes, page_bytes: int, pages: int) -> bytes | None:
    try:
        application, version, tables = _rows.decode(zlib.decompress(packed))
        if any(root > pages for _, _, _, root, _ in tables):
            return None  # of an earlier time: the file has been made smaller since
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
            db.execute(f"PRAGMA page_size={page_bytes}")
            db.execute(f"PRAGMA application_id={application}")
            db.execute(f"PRAGMA user_version={version}")
            db.execute("PRAGMA writable_schema=ON")
            db.executemany("INSERT INTO sqlite_schema VALUES(?,?,?,?,?)", tables)
            page = bytearray(db.serialize()[:page_bytes])
    except (sqlite3.Error, zlib.error, msgspec.MsgspecError):
        return None
    page[18:20] = b"\2\2"  # a file with a write-ahead log
    page[28:40] = struct.pack(">III", pages, 0, 0)  # and with no page that is free
    page[92:96] = page[24:28]  # the number of pages is true
    return bytes(page)
