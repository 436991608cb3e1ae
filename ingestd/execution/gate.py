"""Gate of a dispatcher: every reason why no batch may go to a worker, the handler's state aside.

Reasons are read where they arise, never copied, so none can be forgotten here when it has gone.
The ready queue asks `open_at` before it gives a batch, the watchdog and the drain ask it and
`stopped` at any time. A reason that begins or ends without an event is noticed by `look`, which the
gate's own task calls once a second.

Invariants, each with a test:

1. While a reason holds, no batch is given; what a worker has already comes to its end.
2. A drain does not wait for what a stopped gate keeps back, and it stays in the journal.
3. A gate that is closed is no stage that hangs.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ingestd.base.logging import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = get_logger()

POLL_SECONDS = 1.0
"""Between two looks at reasons that no event tells of."""


class BoundedLetters(Protocol):
    """Dead letters of accepted records, as far as they stop the dispatcher."""

    bytes_max: int

    @property
    def is_full(self) -> bool:
        """Tells if they are at their bound: more would come."""
        ...


class StopReason(NamedTuple):
    """A reason why no batch is given out until something changes.

    Attributes:
        name: for the log: the setting whose bound it is, where it is one.
        text: for people, with what to do about it.
        facts: for the log.
    """

    name: str
    text: str
    facts: dict[str, object]


class DispatchGate:
    """The gate of one pipeline's dispatcher.

    Args:
        pipeline: its name, for the log.
        letters: its dead letters.
        on_change: called when a reason has come or gone.

    Attributes:
        poll_seconds: between two looks.
    """

    def __init__(
        self, pipeline: str, letters: BoundedLetters, *, on_change: Callable[[], object]
    ) -> None:
        self._pipeline = pipeline
        self._letters = letters
        self._on_change = on_change
        self._seen: dict[str, StopReason] = {}
        self.poll_seconds = POLL_SECONDS

    @property
    def stopped(self) -> str:
        """Reason for people why no batch is given out; empty while batches are."""
        return next((reason.text for reason in self._reasons()), "")

    def open_at(self) -> float:
        """Loop time from which on a batch may be given; infinite until something changes."""
        return math.inf if self._letters.is_full else 0.0

    def _reasons(self) -> Iterator[StopReason]:
        if self._letters.is_full:
            text = "the dead letters are at dead.bytes_max: purge some or requeue them"
            yield StopReason("dead.bytes_max", text, {"bytes_max": self._letters.bytes_max})

    def look(self) -> None:
        """Notices what has come or gone since the last look, and logs it."""
        seen, self._seen = self._seen, {reason.name: reason for reason in self._reasons()}
        if seen.keys() == self._seen.keys():
            return
        for name, reason in self._seen.items():
            if name not in seen:
                log.error("dispatch_stopped", pipeline=self._pipeline, reason=name, **reason.facts)
        for name, reason in seen.items():
            if name not in self._seen:
                log.info("dispatch_resumed", pipeline=self._pipeline, reason=name, **reason.facts)
        self._on_change()

    async def run(self) -> None:
        """Looks once a second until it is cancelled."""
        while True:
            self.look()
            await asyncio.sleep(self.poll_seconds)
