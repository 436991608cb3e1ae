"""Deadlines of bodies: a minimum rate, and a timeout. Times are seconds that do not go back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from types import TracebackType

    from ingestd.http.request import BodyBuffer


GRACE_SECONDS = 5.0
"""A body is measured over windows this long, so a stall shorter than this ends nothing."""

LATE_SECONDS = 1.0
"""A deadline that is looked at later than this says something about this process (it was stopped,
or had no time), not about its client: what that sent meanwhile may not have been read yet. It gets
as long once more."""


def is_late(due: float, now: float) -> bool:
    """Returns True if a due window is checked late."""
    return now >= due + LATE_SECONDS


class MinimumRate:
    """Decides, a window at a time, whether bytes come too slowly.

    A window that is looked at late says something about this process, not about its client (it
    was stopped, or had no time): that one is let pass.

    Args:
        rate_min: bytes a second; 0 for any.
        now: when the first window begins.

    Attributes:
        due: when to ask next; never if any rate will do.
    """

    def __init__(self, rate_min: int, now: float) -> None:
        self._bytes_min = rate_min * GRACE_SECONDS
        self._bytes = 0
        self.due = now + GRACE_SECONDS if rate_min else float("inf")

    def is_slow(self, total: int, now: float) -> bool:
        """Returns True if the window that ends now was too slow; begins the next one.

        Args:
            total: bytes that have come so far.
            now: at or after `due`.
        """
        slow = total - self._bytes < self._bytes_min and not is_late(self.due, now)
        self._bytes = total
        self.due = now + GRACE_SECONDS
        return slow


# -- timeouts of reading ---------------------------------------------------------------------------


class BodyTimeout(TimeoutError):  # noqa: N818 - what it is
    """A body was not there in time; the text says which bound that was."""


class BodyDeadline:
    """As a context around the reading: raises `BodyTimeout` there.

    It does so through the stream and does not cancel the reader. A reader that is cancelled in the
    moment in which its client leaves never looks at that error, and asyncio would log it.

    Args:
        loop: the running one.
        content: the body.
        total: tells how many bytes have come.
        timeout: seconds that it may take.
        rate_min: `http.body_rate_min`.
        detail: what is said when the time is up; empty for that of `http.body_timeout`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        content: BodyBuffer,
        total: Callable[[], int],
        *,
        timeout: float,
        rate_min: int,
        detail: str = "",
    ) -> None:
        now = loop.time()
        self._loop = loop
        self._content = content
        self._total = total
        self._detail = detail or f"not complete after http.body_timeout = {timeout:g} s"
        self._error: Exception | None = None
        self._rate_min = rate_min
        self._end = now + timeout
        self._pace = MinimumRate(rate_min, now)

    def __enter__(self) -> Self:
        self._wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        if error is not None and error is self._error:
            # What still comes is read for a while, so that the client gets to see its answer.
            self._content.set_exception(None)

    def end(self, error: Exception) -> None:
        """Raises this where the body is read."""
        self._error = error
        self._content.set_exception(error)

    def _wait(self) -> None:
        self._timer = self._loop.call_at(min(self._end, self._pace.due), self._look)

    def _look(self) -> None:
        now = self._loop.time()
        if is_late(self._end, now):
            self._end = now + LATE_SECONDS
            self._wait()
            return
        if now >= self._end:
            limit = self._detail
        elif self._pace.is_slow(self._total(), now):
            limit = f"slower than http.body_rate_min = {self._rate_min} bytes a second"
        else:
            self._wait()
            return
        self.end(BodyTimeout(limit))
