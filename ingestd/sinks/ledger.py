"""The ledger of a folder of files: which batches are in them, and up to where each file is whole.

    .batches        one line a batch: its name, the file, and the file's length with the batch in it

A batch is written in this order, under the ledger's lock: its lines, a sync, its line here, a sync.
So after a crash anywhere

* what stands in a file behind the length that is known here was not finished: the next writer cuts
  it off, and the batch comes again;
* a batch whose name is here is on disk: it comes again, and nothing is written.

A file that is not known yet, or is shorter than known (it was set aside, and this is a new one), is
entered with its length before anything is written to it, under the name `-`.

The last `NAMES_MAX` names are kept. Answers that a crash took are those of the newest batches.
Lines that another program appends to a file that is being written are cut off like unfinished ones.
"""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.files import make_folder, open_private, sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

NAME = ".batches"
NAMES_MAX = 20_000
_FILES_MAX = 100
_NONE = "-"
_LINE = re.compile(rb"([^\s]+) ([^\s/]+) (\d+)", re.ASCII)


class _Known(NamedTuple):
    """Lines of the ledger.

    Attributes:
        names: of batches, oldest first.
        ends: length of each file, the one that was written last at the end.
    """

    names: dict[str, None]
    ends: dict[str, int]

    def take(self, name: str, file: str, end: int) -> None:
        """Takes one line, and drops what is beyond the bounds."""
        if name != _NONE:
            self.names[name] = None
        self.ends.pop(file, None)
        self.ends[file] = end
        if len(self.names) > NAMES_MAX:
            del self.names[next(iter(self.names))]
        if len(self.ends) > _FILES_MAX:
            del self.ends[next(iter(self.ends))]


class BatchLedger:
    """The ledger of one folder. Not thread-safe: each writer has its own.

    Args:
        folder: of the files; made when it is needed, mode 0700.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / NAME
        self._fd = -1
        self._read = 0
        self._known = _Known({}, {})

    def close(self) -> None:
        """Closes the ledger; the next use opens it again."""
        fd, self._fd = self._fd, -1
        self._read, self._known = 0, _Known({}, {})
        if fd >= 0:
            os.close(fd)

    @contextmanager
    def locked(self) -> Iterator[BatchLedger]:
        """Holds the ledger's lock, and has read what others wrote; an error closes it.

        Raises:
            OSError: it cannot be read or made.
        """
        try:
            while True:
                if self._fd < 0:
                    make_folder(self._folder)
                    self._fd = open_private(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
                    sync_folder(self._folder)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                if self._is_current():
                    break
                self.close()  # it was written anew by another writer
            self._catch_up()
            yield self
            if self._read > 3 * NAMES_MAX * 64:
                self._rewrite()
        except BaseException:
            self.close()
            raise
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def has(self, names: Sequence[str]) -> bool:
        """Tells if one of some names is that of a batch in the files."""
        return any(name in self._known.names for name in names)

    def settle(self, file: Path, fd: int) -> int:
        """Cuts what was not finished off a file that is locked, and gives its length then.

        Raises:
            OSError: it cannot be written.
        """
        size, end = os.fstat(fd).st_size, self._known.ends.get(file.name)
        if end is None or size < end:
            self._add(_NONE, file.name, size)
            return size
        if size > end:
            os.ftruncate(fd, end)
        return end

    def unfinished(self) -> list[Path]:
        """The files that are longer than they are known to be."""
        found = []
        for name, end in self._known.ends.items():
            file = self._folder / name
            try:
                if file.stat().st_size > end:
                    found.append(file)
            except FileNotFoundError:  # it was set aside, packed or taken
                continue
        return found

    def enter(self, name: str, file: Path, end: int) -> None:
        """Enters a batch that is in a file, on disk.

        Raises:
            OSError: it is not entered.
        """
        self._add(name, file.name, end)

    def _add(self, name: str, file: str, end: int) -> None:
        line = f"{name} {file} {end}\n".encode()
        before = os.fstat(self._fd).st_size
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(self._fd, left) :]
            os.fdatasync(self._fd)
        except BaseException:
            os.ftruncate(self._fd, before)
            raise
        self._read = before + len(line)
        self._known.take(name, file, end)

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def _catch_up(self) -> None:
        """Reads the lines of other writers; cuts off one that a crash tore."""
        new = os.pread(self._fd, max(0, os.fstat(self._fd).st_size - self._read), self._read)
        whole = new.rfind(b"\n") + 1
        if whole < len(new):
            os.ftruncate(self._fd, self._read + whole)
        self._read += whole
        for line in new[:whole].splitlines():
            if found := _LINE.fullmatch(line):
                self._known.take(found[1].decode(), found[2].decode(), int(found[3]))

    def _rewrite(self) -> None:
        """Writes the ledger anew with what is kept."""
        names, ends = self._known
        last = next(reversed(ends))
        lines = [f"{name} {last} {ends[last]}\n" for name in islice(names, len(names))]
        lines[:0] = [f"{_NONE} {file} {end}\n" for file, end in ends.items()]
        tmp = self._path.with_name(f"{NAME}.tmp")
        fd = open_private(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        with os.fdopen(fd, "wb") as out:
            out.write("".join(lines).encode())
            out.flush()
            os.fsync(fd)
        tmp.rename(self._path)
        sync_folder(self._folder)
        self.close()
