"""Bytes in flight: one bound for all requests together."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

from ingestd.sources import problem
from ingestd.sources.problem import Problem

if TYPE_CHECKING:
    from types import TracebackType


class Room:
    """How many bytes there may be. Safe to use from any thread.

    Args:
        bytes_max: the bound.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes = 0
        self._lock = threading.Lock()

    def hold(self) -> Hold:
        """A part of it, empty to begin with; give it back with `with`."""
        return Hold(self)

    def take(self, size: int) -> bool:
        """Whether there is room for that many more; then they are taken."""
        with self._lock:
            if self.bytes + size > self.bytes_max:
                return False
            self.bytes += size
            return True

    def give_back(self, size: int) -> None:
        """The opposite of `take`."""
        with self._lock:
            self.bytes -= size


class Hold:
    """What one request has taken."""

    __slots__ = ("_room", "bytes")

    def __init__(self, room: Room) -> None:
        self._room = room
        self.bytes = 0

    def grow(self, size: int) -> None:
        """Takes more.

        Raises:
            Problem: 503 if others have it; 413 if one request alone is too much.
        """
        if self._room.take(size):
            self.bytes += size
            return
        if self.bytes + size > self._room.bytes_max:
            detail = f"more than http.inflight_bytes_max = {self._room.bytes_max} in one request"
            raise Problem(problem.BODY_TOO_LARGE, detail)
        raise Problem(
            problem.BUSY, "http.inflight_bytes_max is reached", headers=problem.retry_after(1.0)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._room.give_back(self.bytes)
        self.bytes = 0
