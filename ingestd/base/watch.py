"""What becomes of the records of one append, for whoever waits for it."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

FAILED_MAX = 100
"""So many failed records are named one by one; the others are counted."""

ERROR_CHARACTERS_MAX = 500
"""What is told of an error: a hundred of any size are an answer of any size."""


class Failed(NamedTuple):
    """A record that became a dead letter.

    Attributes:
        index: its place among the records of the append, from 0.
        reason: the dead letter's word.
        error: its line.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    reason: str
    error: str


class Watch:
    """Filled in by the pipeline each time a result is written down; on the event loop.

    Args:
        count: the records of the append, at least one.

    Attributes:
        left: of these, not settled yet.
        dead: dead letters now.
        failed: the dead ones one by one, as far as there are not too many.
        done: set when nothing is left.
    """

    __slots__ = ("count", "dead", "done", "failed", "left")

    def __init__(self, count: int) -> None:
        self.count = self.left = count
        self.dead = 0
        self.failed: list[Failed] = []
        self.done = asyncio.Event()

    def settled(self, records: int) -> None:
        """So many more have their outcome, the dead ones among them."""
        self.left -= records
        if not self.left:
            self.done.set()

    def died(self, index: int, records: int, reason: str, error: str) -> None:
        """Records from `index` on became one dead letter. Comes before they count as settled."""
        self.dead += records
        if len(self.failed) < FAILED_MAX:
            self.failed.append(Failed(index, reason, error[:ERROR_CHARACTERS_MAX]))
