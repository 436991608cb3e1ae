"""Log of handler failures: each kind once with its traceback, then counts.

A kind is how a try failed, the exception's type, and the line that raised it. The first failure of
a kind is worth its traceback; the repetitions are counted.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingestd.base.clock import Clock
    from ingestd.execution.outage import Outage
    from ingestd.handlers.outcome import Failure, Result


KINDS_MAX = 64
"""Kinds that are remembered; the one that was seen longest ago goes."""
KIND_SECONDS = 3600.0
"""A kind that was not seen for so long is new when it comes again."""
_PART_CHARS_MAX = 200


class FailureKind(NamedTuple):
    """Kind of a failure: equal kinds are one repeated failure."""

    reason: str
    type: str
    where: str


class Repeated(NamedTuple):
    """A kind that came again since the last report."""

    kind: FailureKind
    error: str
    times: int


class _Seen:
    __slots__ = ("at", "error", "times")

    def __init__(self) -> None:
        self.at = 0.0
        self.error = ""
        self.times = 0


class FailureKinds:
    """The kinds of one pipeline."""

    def __init__(self) -> None:
        self._seen: dict[FailureKind, _Seen] = {}  # the one seen last at the end

    def note(self, failure: Failure, now: float) -> bool:
        """Counts a failure at `now` (seconds of any clock).

        Returns:
            Whether its kind is new.
        """
        kind = kind_of(failure)
        seen = self._seen.pop(kind, None)
        new = seen is None or now - seen.at > KIND_SECONDS
        seen = _Seen() if seen is None else seen
        seen.at, seen.error = now, failure.error
        seen.times += not new
        self._seen[kind] = seen
        if len(self._seen) > KINDS_MAX:
            del self._seen[next(iter(self._seen))]
        return new

    def repeated(self) -> list[Repeated]:
        """Kinds that came again since the last call, the most frequent first."""
        again = [Repeated(kind, one.error, one.times) for kind, one in self._seen.items()]
        for one in self._seen.values():
            one.times = 0
        return sorted((one for one in again if one.times), key=lambda one: -one.times)


def kind_of(failure: Failure) -> FailureKind:
    """The kind of a failure; its message does not count, for that may name the record."""
    at = failure.traceback.rfind('\n  File "')
    where = failure.traceback[at + 1 :].partition("\n")[0].strip() if at >= 0 else ""
    name = failure.error.partition(":")[0] if failure.reason == "raised" else ""
    return FailureKind(failure.reason, name[:_PART_CHARS_MAX], where[:_PART_CHARS_MAX])


# -- log lines -------------------------------------------------------------------------------------
#
# A sink that is down fails hundreds of batches for the same reason. The log has one line for each
# kind of failure, one when the handler goes down and one when it is back, and once a minute what
# came again meanwhile. Each try is there on the level `debug`. Records that are given up are told
# alike: the first ones of a reason at once, and once a minute the sum of those that came after
# them.

log = get_logger()

MINUTE = 60.0
KINDS_LOGGED_MAX = 5
"""Kinds of failures that a minute's lines name."""


class FailureLog:
    """One pipeline's.

    Args:
        pipeline: its name.
        outage: whether the handler works.
        clock: for the time of day.
        pending: how many records wait.
    """

    def __init__(
        self, pipeline: str, outage: Outage, clock: Clock, pending: Callable[[], int]
    ) -> None:
        self._pipeline = pipeline
        self._outage = outage
        self._clock = clock
        self._pending = pending
        self._kinds = FailureKinds()
        self._given_up: dict[str, tuple[int, str]] = {}  # since the last line about each reason
        self._down_since: float | None = None
        self.down_since = 0.0
        """Seconds since the epoch; 0 while the handler works."""
        self.blocked = False
        """The sink says that an operator has to act."""
        self.last_error = ""
        """The newest failure in one line, while it is down."""

    def ended(self, failure: Failure | None, now: float, **facts: object) -> bool:
        """A try has ended, at `now` (loop time), and the outage knows of it.

        Returns:
            Whether the handler was down until now.
        """
        if failure is not None:
            self._failed(failure, now, **facts)
        since, self._down_since = self._down_since, self._outage.down_since
        if since is None and self._down_since is not None and failure is not None:
            self.down_since = self._clock.now() - (now - self._down_since)
            if not self._outage.blocked:  # which has a line of its own
                log.error("handler_went_down", reason=failure.reason, **self._told(failure))
        blocked, self.blocked = self.blocked, self._outage.blocked
        if failure is not None and self.blocked and not blocked:
            log.error("handler_blocked", **self._told(failure))
        if since is None or self._down_since is not None:
            return False
        self.down_since, self.last_error = 0.0, ""
        log.warning(
            "handler_came_back",
            pipeline=self._pipeline,
            down_seconds=round(now - since, 1),
            pending=self._pending(),
        )
        return True

    def tried(self, result: Result, records: int, attempts: int) -> None:
        """Writes a line about one try, on the level `debug`."""
        log.debug(
            "batch_tried",
            records=records,
            attempts=attempts,
            seconds=round(result.seconds, 6),
            failed=result.failure is not None,
            rejected=len(result.rejections),
            retries=len(result.retries),
        )

    def _told(self, failure: Failure) -> dict[str, object]:
        return {
            "pipeline": self._pipeline,
            "error": failure.error,
            "exception": failure.traceback,
            "pending": self._pending(),
        }

    def _failed(self, failure: Failure, now: float, **facts: object) -> None:
        self.last_error = failure.error
        write = log.debug
        if self._kinds.note(failure, now):
            write = log.info if failure.is_asked else log.warning
            if failure.traceback:
                facts["exception"] = failure.traceback
        write("batch_failed", reason=failure.reason, error=failure.error, **facts)

    def given_up(self, reason: str, records: int, error: str) -> None:
        """Some records of a batch have become dead letters."""
        facts = {"reason": reason, "records": records, "error": error}
        if reason not in self._given_up:
            self._given_up[reason] = 0, ""
            log.warning("records_given_up", **facts)
            return
        self._given_up[reason] = self._given_up[reason][0] + records, error
        log.debug("records_given_up", **facts)

    def sum_up_given_up(self) -> None:
        """Writes how many more records were given up since the last time."""
        given_up, self._given_up = self._given_up, {}
        for reason, (records, error) in given_up.items():
            if records:
                self._given_up[reason] = 0, ""
                facts = {"reason": reason, "records": records, "error": error}
                log.warning("records_given_up", pipeline=self._pipeline, **facts)

    async def run(self) -> None:
        """Writes once a minute what came again, for as long as the pipeline lives."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(MINUTE)
            self.sum_up(loop.time())
            self.sum_up_given_up()

    def sum_up(self, now: float) -> None:
        """Writes what came again since the last time; `now` is loop time."""
        repeated = self._kinds.repeated()
        if self._down_since is not None:
            log.warning(
                "handler_still_down",
                pipeline=self._pipeline,
                down_seconds=round(now - self._down_since, 1),
                tries=sum(one.times for one in repeated),
                error=self.last_error,
                pending=self._pending(),
            )
            return
        for one in repeated[:KINDS_LOGGED_MAX]:
            log.warning(
                "failures_repeated",
                pipeline=self._pipeline,
                reason=one.kind.reason,
                where=one.kind.where,
                error=one.error,
                times=one.times,
            )
