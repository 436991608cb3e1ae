"""Deduplication by a value in each record (`dedupe.key`).

The value of each record, as a digest, goes the way of the ids that senders give their records
(`RecentIds` in `base/append.py`): it is held while its append is under way, kept once that is
committed, stored in its commit, and restored at the start. A record whose value is kept is left out
of its append, whatever became of the one before. Two differences:

* values are kept for a time as well (`dedupe.window`), and are everyone's, whatever the principal;
* an append with a value that is held by another one waits for that one's end. If that fails, this
  one stores the record.

Appends keep their order: they go through one by one, from the reading of values to the hand-over.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from ingestd.base.append import Append, Deduplicated, HeldIds, RecentIds, sender_id
from ingestd.base.errors import IdsInFlight
from ingestd.codecs.pointer import ValueReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ingestd.base.clock import Clock
    from ingestd.journal.interface import Place
    from ingestd.journal.settings import DedupeSettings

_EVERYONE = ""


class Deduplicator:
    """The deduplicator of one pipeline.

    Args:
        settings: `[dedupe]`, with a key.
        clock: gives the time.

    Attributes:
        left_out: records that were, since the start.
    """

    def __init__(self, settings: DedupeSettings, clock: Clock) -> None:
        self.left_out = 0
        self._window, self._clock = settings.window, clock
        self._reader = ValueReader(settings.key, sender_id)
        self._recent = RecentIds(settings.keys_max)
        self._turn = asyncio.Lock()
        self._ended = asyncio.Event()

    def restore(self, stored: Iterable[tuple[float, bytes]]) -> None:
        """Takes what a journal has stored: time and keys of each commit, the oldest first."""
        now, monotonic = self._clock.now(), self._clock.monotonic()
        for at, packed in stored:
            age = max(0.0, now - at)
            if age < self._window:
                self._recent.restore([(_EVERYONE, packed)], monotonic - age)

    async def admit(
        self, append: Append, submit: Callable[[Append], asyncio.Future[Place]]
    ) -> tuple[Append, asyncio.Future[Place]]:
        """Submits an append without the records that came before.

        Args:
            append: as its source made it.
            submit: see `Journal.append`.

        Returns:
            The append as it was submitted, and its place, which may be awaited and cancelled.

        Raises:
            Overloaded: see `Journal.append`; nothing was submitted. Others as there.
        """
        async with self._turn:
            keys = await self._reader.read(append.records)
            held = await self._hold(frozenset(key for key in keys if key is not None))
            held.at = self._clock.monotonic()
            try:
                append = self._without(append, keys, held)
                placed = submit(append)
                self._recent.submit(held, placed)
            finally:
                self._recent.release(held)
        placed.add_done_callback(partial(self._resolved, len(keys) - append.records.count))
        return append, asyncio.shield(placed)

    def _resolved(self, left_out: int, placed: asyncio.Future[Place]) -> None:
        self._ended.set()
        if not placed.cancelled() and placed.exception() is None:
            self.left_out += left_out

    async def _hold(self, keys: frozenset[bytes]) -> HeldIds:
        """Holds the keys of an append, as soon as no other one has any of them."""
        while True:
            self._recent.forget(self._clock.monotonic() - self._window)
            try:
                return self._recent.hold(_EVERYONE, keys)
            except IdsInFlight:
                self._ended.clear()
                await self._ended.wait()

    def _without(self, append: Append, keys: Sequence[bytes | None], held: HeldIds) -> Append:
        records, now = append.records, self._clock.now()
        stored: Sequence[int] = range(records.count)
        if held.accepted or len(held.new) + keys.count(None) < len(keys):
            seen = set(held.accepted)
            stored = []
            for index, key in enumerate(keys):
                if key is None or key not in seen:
                    stored.append(index)
                if key is not None:
                    seen.add(key)
            records = records.pick(stored)
        left_out = len(keys) - len(stored)
        found = Deduplicated(held, now, now - self._window, stored, left_out)
        return append._replace(records=records, deduplicated=found)

    def close(self) -> None:
        """Ends the thread that reads large appends."""
        self._reader.close()
