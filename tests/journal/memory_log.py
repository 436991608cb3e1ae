"""An engine in memory with faults on demand, and logs on it as daemons have them."""

from __future__ import annotations

import asyncio
import itertools
import random
from typing import TYPE_CHECKING

import msgspec

from ingestd.journal.log.interface import (
    LogAmbiguous,
    LogFenced,
    LogFull,
    LogKey,
    LogMessage,
    LogUnreachable,
    Snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from ingestd.journal.log.messages import LogEnd

LOST, LATE, DOWN, FULL = "answer lost", "late", "down", "full"
_KEY_NUMBERS = itertools.count(1)


class Engine:
    """The messages of one log, its snapshot and its lease; outlives every daemon.

    Attributes:
        faults: what happens to the next appends, one each; empty for none.
        down: nothing answers.
        retired: the numbers of logs that have ended.
        stride: numbers grow by this much, as other logs of a stream take some.
        keys_max_seen: most keys that came with one message.
        lags: so many reads of keys ask a replica that has none yet.
        late_chance: that what is on its way arrives before an append.
        keys: idempotency keys by their names; those of another engine if both are of one stream.
    """

    def __init__(
        self,
        message_bytes_max: int = 1 << 20,
        stride: int = 3,
        keys: dict[str, LogMessage] | None = None,
    ) -> None:
        self.keys = {} if keys is None else keys
        self.keys_max_seen = 0
        self.late_chance = 0.5
        self.lags = 0
        self.message_bytes_max = message_bytes_max
        self.messages: list[LogMessage] = []
        self.snapshot: Snapshot | None = None
        self.parts: dict[tuple[int, int], bytes] = {}
        self.lease: tuple[str, float] = ("", 0.0)
        self.faults: list[str] = []
        self.down = False
        self.late: list[Callable[[], None]] = []
        self.appends = 0
        self.retired: list[LogEnd] = []
        self._stride = stride
        self._number = 0

    @property
    def last(self) -> int:
        return self.messages[-1].number if self.messages else 0

    def put(self, data: bytes, after: int, keys: Sequence[LogKey] = ()) -> int:
        there = [self.keys[key.name].number if key.name in self.keys else 0 for key in keys]
        if self.last != after or there != [key.replaces for key in keys]:
            raise LogFenced
        self.keys_max_seen = max(self.keys_max_seen, len(keys))
        for key in keys:
            self.keys[key.name] = LogMessage(next(_KEY_NUMBERS), key.data)
        self._number += self._stride
        self.messages.append(LogMessage(self._number, data))
        return self._number

    def number(self) -> int:
        self._number += self._stride
        return self._number

    def as_it_is(self) -> Engine:
        """A copy, which no daemon of this one reaches; what was on its way has arrived or never
        does."""
        copy = Engine(self.message_bytes_max, self._stride)
        copy.messages, copy.parts = [*self.messages], {**self.parts}
        copy.snapshot, copy._number = self.snapshot, self._number
        copy.keys = {**self.keys}
        return copy

    def deliver(self) -> None:
        """What was on its way arrives."""
        late, self.late = self.late, []
        for one in late:
            one()

    @property
    def bytes(self) -> int:
        return sum(len(one.data) for one in self.messages)


class MemoryLog:
    """A daemon's side of an engine."""

    name = "log memory"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.message_bytes_max = engine.message_bytes_max
        self.silence = self.full = ""
        self.keys_max = 900
        self.looks = 0
        self.gone = False

    @property
    def refusal(self) -> str:
        return self.silence or self.full

    async def open(self) -> None:
        self._check()

    def _check(self) -> None:
        if self.engine.down or self.gone:
            raise LogUnreachable(problem="it is down")

    async def acquire(self, owner: str, ttl: float) -> str:
        self._check()
        now = asyncio.get_running_loop().time()
        if self.engine.lease[0] in {"", owner} or self.engine.lease[1] <= now:
            self.engine.lease = owner, now + ttl
        return self.engine.lease[0]

    async def release(self, owner: str) -> None:
        self._check()
        if self.engine.lease[0] == owner:
            self.engine.lease = "", 0.0

    async def want(self) -> None:
        self._check()

    async def retire(self, number: int, end: LogEnd) -> None:
        self._check()
        engine = self.engine
        if end.journal not in [one.journal for one in engine.retired]:
            engine.retired.append(end)
        if engine.snapshot is not None and engine.snapshot.number <= number:
            engine.snapshot = None
        engine.messages = [one for one in engine.messages if one.number > number]

    async def append(self, data: bytes, *, after: int, keys: Sequence[LogKey] = ()) -> int:
        engine = self.engine
        engine.appends += 1
        fault = engine.faults.pop(0) if engine.faults else ""
        await asyncio.sleep(0)
        if engine.late and random.Random(engine.appends).random() < engine.late_chance:
            engine.deliver()
        if fault == DOWN or engine.down or self.gone:
            raise LogUnreachable(problem="it is down")
        if fault == FULL:
            raise LogFull(problem="it is full")
        if fault == LATE:
            engine.late.append(lambda: self._put_late(data, after, keys))
            raise LogAmbiguous(problem="time-out")
        number = engine.put(data, after, keys)
        if fault == LOST:
            raise LogAmbiguous(problem="time-out")
        return number

    def _put_late(self, data: bytes, after: int, keys: Sequence[LogKey]) -> None:
        try:
            self.engine.put(data, after, keys)
        except LogFenced:
            pass

    async def find_keys(
        self, names: Collection[str], *, from_leader: bool = False
    ) -> dict[str, LogMessage]:
        self._check()
        self.looks += 1
        await asyncio.sleep(0)
        if self.engine.lags and not from_leader:
            self.engine.lags -= 1
            return {}
        keys = self.engine.keys
        return {name: keys[name] for name in names if name in keys}

    async def last(self) -> LogMessage | None:
        self._check()
        return self.engine.messages[-1] if self.engine.messages else None

    async def read(self, first: int, bytes_max: int) -> list[LogMessage]:
        self._check()
        found, size = [], 0
        for message in self.engine.messages:
            if message.number >= first:
                found.append(message)
                size += len(message.data)
                if size >= bytes_max:
                    break
        return found

    async def trim(self, before: int) -> None:
        self._check()
        kept = [one for one in self.engine.messages if one.number >= before]
        assert kept, "the last message must stay"
        self.engine.messages = kept

    async def save_part(self, at: int, part: int, data: bytes) -> None:
        self._check()
        assert len(data) <= self.message_bytes_max
        self.engine.parts[at, part] = data

    async def drop_parts(self, at: int) -> None:
        self._check()
        self.engine.parts = {k: v for k, v in self.engine.parts.items() if k[0] != at}

    async def save(self, snapshot: Snapshot, *, after: int) -> int:
        self._check()
        old = self.engine.snapshot
        if (0 if old is None else old.number) != after:
            raise LogFenced
        number = self.engine.number()
        self.engine.snapshot = msgspec.structs.replace(snapshot, number=number)
        self.engine.parts = {k: v for k, v in self.engine.parts.items() if k[0] >= snapshot.at}
        return number

    async def snapshot(self) -> Snapshot | None:
        self._check()
        return self.engine.snapshot

    async def load_part(self, at: int, part: int) -> bytes | None:
        self._check()
        return self.engine.parts.get((at, part))

    async def close(self) -> None:
        pass
