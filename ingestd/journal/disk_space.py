"""Watches the space of the journal's disk: new records are refused before it is full."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ingestd.journal.interface import FreeSpace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CHECK_SECONDS = 0.25


PART = 10
SCALED_MAX = 256 << 20
"""The default of `journal.free_min`: of a smaller disk a tenth is kept free. More than the default
is kept as it was set."""


def free_bytes(folder: Path) -> int:
    """Asks for the bytes that an unprivileged process may still write there."""
    space = os.statvfs(folder)
    return space.f_bavail * space.f_frsize


def scaled(free_min: int, folder: Path) -> int:
    """`journal.free_min` on the disk of a folder."""
    if free_min > SCALED_MAX:
        return free_min
    try:
        space = os.statvfs(folder)
    except OSError:
        return free_min
    return min(free_min, space.f_blocks * space.f_frsize // PART)


class DiskSpaceGuard:
    """Watches one folder's disk; asks it at most every `CHECK_SECONDS`.

    The journal's file does not shrink: what is settled leaves free pages in it, which the next
    records go to. They count as free space, but for half of `free_min` at most: the rest has to be
    outside, where the write-ahead log grows.

    Args:
        folder: of the journal's file.
        free_min: bytes.
        ask: tells how many bytes are free there.

    Attributes:
        reusable: bytes of free pages inside the file, as the last commit left them.
    """

    def __init__(
        self, folder: Path, free_min: int, *, ask: Callable[[Path], int] = free_bytes
    ) -> None:
        self.free_min = free_min
        self.reusable = 0
        self._folder = folder
        self._ask = ask
        self._checked = -CHECK_SECONDS
        self._outside = 0

    @property
    def free(self) -> int:
        """The bytes that count as free, by the last check."""
        return self._outside + min(self.reusable, self.free_min // 2)

    @property
    def left(self) -> FreeSpace:
        """The free space and its bound, by the last check."""
        return FreeSpace(self.free, self.free_min)

    def check(self) -> None:
        """Asks the disk now."""
        try:
            self._outside = self._ask(self._folder)
        except OSError:
            self._outside = self.free_min  # the next commit will tell

    def low(self, now: float) -> bool:
        """Returns True if there is too little for new records.

        Args:
            now: seconds, from a clock that does not go back.
        """
        if now - self._checked >= CHECK_SECONDS:
            self._checked = now
            self.check()
        return self.free < self.free_min
