"""Outage detection: decides if the handler works at all, and paces tries while it does not. Pure.

What is known of a handler is what became of the tries since its last success. A failure is *fresh*
if its batch had not failed before that success: a batch that failed while others succeeded says
something about itself, a fresh failure may say something about the sink.

* **up**: fewer than two families have failed freshly (a family is a batch and, once it is split,
  its parts). Everything may start, so a bad batch does not hold others up.
* **paused**: two families or more have. One try at a time starts, the *probe*, and the next one
  after a wait that grows with the outage. All else waits without a try.
* **down**: at least `DOWN_TRIES` fresh tries have failed over at least `DOWN_SECONDS`. This is what
  is reported. Down and paused together are an *outage*: its tries are not counted against batches.

A fresh failure that the handler calls `blocked` (a table or a right that is missing) is enough
alone: the handler is paused and down at once, and *blocked*.

The answers that lead to up:

* a record was processed. This alone is evidence against batches that fail (`successes`);
* the handler rejected all records of a batch, and either that same batch had failed since the last
  success, so the call came further than before, or no batch that has failed is left. Any other
  rejection may be one that the handler makes before it asks its sink, and a part of a batch may
  hold just the records that are rejected like that.

Records that do not fit the annotation tell nothing, for the handler is not called with them; nor
do records that shall come again (`batch.retry`), for a handler may say so of a sink that is down.

Invariants, each with a test:

1. Such an answer leads to up at once, from every state.
2. While paused a try starts only when the wait is over, and none starts while the probe runs,
   unless that has not come back for `retry.backoff_max` (a call that hangs must not keep a handler
   down that has come back).
3. A wait is never longer than `retry.backoff_max`, nor than an eighth of the outage so far (and
   10 ms): a sink that is back is noticed within an eighth of the time for which it was down. Where
   the handler says `unavailable` or `blocked` it is never longer than `KNOWN_SECONDS` either.
4. Without a fresh failure nothing is paused, and nothing is down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.handlers.outcome import BLOCKED, UNAVAILABLE

if TYPE_CHECKING:
    from collections.abc import Callable

DOWN_TRIES = 3
DOWN_SECONDS = 1.0
WAIT_MIN = 0.01
"""Seconds; the bound of the first waits, when an outage has lasted for no time yet."""
PROBE_SECONDS = 10.0
"""A probe that has run for so long, and for `retry.backoff_max`, does not keep others waiting."""
KNOWN_SECONDS = 5.0
"""Longest wait between probes of a sink that says itself that it cannot: asking costs it little."""
_PART = 8  # of the outage so far


def wait(elapsed: float, longest: float, random: Callable[[], float]) -> float:
    """Seconds until the next probe: half of the bound, and up to all of it.

    Args:
        elapsed: seconds for which nothing has succeeded.
        longest: `retry.backoff_max`, seconds.
        random: gives numbers in [0, 1).
    """
    return min(longest, max(WAIT_MIN, elapsed / _PART)) * (0.5 + 0.5 * random())


class Outage:
    """One pipeline's handler. Times are those of one clock that only goes forward, in seconds.

    Args:
        longest: `retry.backoff_max`.
        random: gives numbers in [0, 1).

    Attributes:
        successes: how many there have been; says what came before what.
        on_change: called when a try may start earlier than `next_at` said before.
        blocked: the sink says that an operator has to act.
    """

    def __init__(self, longest: float, random: Callable[[], float]) -> None:
        self.successes = 0
        self.on_change: Callable[[], object] = lambda: None
        self._longest = longest
        self._random = random
        self._up()

    def _up(self) -> None:
        self._families: set[int] = set()
        self._tries = 0
        self._since = 0.0
        self._is_down = False
        self.blocked = False
        self._probe: int | None = None
        self._next_at = 0.0

    @property
    def paused(self) -> bool:
        """Returns True if only probes may start."""
        return self.blocked or len(self._families) > 1

    @property
    def down_since(self) -> float | None:
        """Time of the first fresh failure, while the handler is down; else `None`."""
        return self._since if self._is_down else None

    @property
    def is_outage(self) -> bool:
        """Returns True if a failure now says nothing about its batch."""
        return self._is_down and self.paused

    @property
    def next_at(self) -> float | None:
        """Time of the next try while paused; `None` while all may start."""
        return self._next_at if self.paused else None

    def started(self, batch: int, now: float) -> None:
        """A try of a batch starts; while paused it is the probe."""
        if self.paused:
            self._probe = batch
            self._next_at = now + max(self._longest, PROBE_SECONDS)

    def succeeded(self) -> None:
        """A record was processed."""
        self.successes += 1
        self.recovered()

    def recovered(self) -> None:
        """The handler works again, although nothing is known to be processed."""
        paused = self.paused
        self._up()
        if paused:
            self.on_change()

    def failed(
        self,
        batch: int,
        family: int,
        now: float,
        *,
        fresh: bool,
        after: float | None = None,
        reason: str = "",
    ) -> None:
        """A try failed.

        Args:
            batch: its number.
            family: the number of the batch that it is a part of, or its own.
            now: the time.
            fresh: the batch had not failed before the last success.
            after: seconds that the handler asked to be left alone.
            reason: of the failure.
        """
        if fresh:
            self._since = self._since if self._tries else now
            self._tries += 1
            if len(self._families) < 2:
                self._families.add(family)
            self.blocked = reason == BLOCKED
            is_long = self._tries >= DOWN_TRIES and now - self._since >= DOWN_SECONDS
            self._is_down = self._is_down or self.blocked or is_long
        if self.paused and self._probe in (None, batch):
            self._probe = None
            known = reason in {UNAVAILABLE, BLOCKED}
            longest = min(self._longest, KNOWN_SECONDS) if known else self._longest
            seconds = wait(now - self._since, longest, self._random)
            self._next_at = now + max(seconds, min(after or 0.0, self._longest))
            self.on_change()

    def answered(self, batch: int) -> None:
        """A try ended without telling anything about the handler."""
        if self._probe == batch:
            self._probe = None
            self._next_at = 0.0
            self.on_change()

    def nothing_fails(self) -> None:
        """No batch that has failed is left; whether the handler works is not known."""
        paused = self.paused
        self._families.clear()
        self.blocked = False
        self._probe = None
        if paused:
            self.on_change()
