"""The journal over a replicated log: the SQLite journal with a log in the place of its disk.

Invariants (`docs/ENGINE.md` has the reasons, `tests/journal/test_log.py` the tests):

1. An append's future resolves after its entry is in the log.
2. Each message names the one before it, and the engine refuses it if that is not the last one. So
   the messages of a log are a chain, and a daemon that lost the log can't add to it.
3. The owner's first act is a message of its own: what is read after that does not change any more.
4. A publish without an answer is repeated, as it is, until it is known what became of it. Nothing
   else is published meanwhile, and nothing is rolled back.
5. An idempotency key goes into the engine with the entry that has its records, all or nothing, and
   only where no daemon of the group has it there. A commit whose key is taken is rolled back once
   it is certain that its entry can't come any more.
6. A snapshot is the state after a message, whatever comes behind it; a message goes only when a
   snapshot holds what it says, but for chunks that are pending no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
import secrets
import sqlite3
import struct
import threading
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from ingestd.base.errors import ConfigError, JournalFailed, KeyTaken, NeverFits, Overloaded
from ingestd.base.logging import get_logger
from ingestd.base.tasks import end_tasks
from ingestd.journal.idempotency import RememberedKey, size_of
from ingestd.journal.log import cache
from ingestd.journal.log.interface import (
    LogAmbiguous,
    LogFenced,
    LogKey,
    LogMessage,
    LogRefused,
    LogUnreachable,
    Snapshot,
    retry_after,
)
from ingestd.journal.log.messages import (
    COMMIT,
    DRAINED,
    HEAD_BYTES,
    OPENED,
    RETIRED,
    LogEnd,
    barrier,
    end_entry,
    ending,
    packed,
    pieces,
    taken_apart,
)
from ingestd.journal.sqlite.journal import SqliteJournal, is_passing
from ingestd.journal.sqlite.store import key_owners
from ingestd.journal.sqlite.writer import COMMIT_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from ingestd.base.append import Append, IdempotencyClaim
    from ingestd.base.record import Records, Span
    from ingestd.journal.interface import Chunk, Closed, Place, Recovered
    from ingestd.journal.log.group import LogGroup
    from ingestd.journal.log.interface import ReplicatedLog
    from ingestd.journal.log.messages import MessageHead
    from ingestd.journal.sqlite.store import Store

log = get_logger()

T = TypeVar("T")
_NO_KEYS: Mapping[str, LogKey] = MappingProxyType({})
_encode = msgspec.msgpack.Encoder().encode
_decode_key = msgspec.msgpack.Decoder(tuple[float, bytes, bytes]).decode
SNAPSHOT_BYTES = 64 << 20
"""Bytes of a log that are needed no more, before a snapshot lets them go."""
CARRIED_BYTES = 8 << 20
"""Pending chunks of this many bytes go into a snapshot, so that they do not hold a log back."""
PART_BYTES = 256 << 10
MARK_BYTES = 4 << 20
"""The distance of two places that a log can be trimmed to."""
READ_BYTES = 4 << 20
RETRY_SECONDS, KEY_RETRY_SECONDS = 0.2, 0.02
CLOSE_SECONDS = 10.0
RENEW_SECONDS = 1.0
"""After so long, at most, a lease is renewed again that could not be."""
KEY_SECONDS = 1.0
"""After so long a request whose key was taken meanwhile should come again, and gets the answer."""
OVERDUE_SECONDS = 5.0
"""So long a commit waits for keys of another daemon that are on their way."""
LOOKS_MAX = 4
"""So many requests look idempotency keys up in the engine at a time, each for all that waited."""
OPEN_TRIES = 10
OPEN_SECONDS = 20.0
"""How long a start waits for an engine that elects a leader, say, at each of its steps."""
LAPSE_SECONDS = 5.0
"""So late a lease may lapse."""


class Mark(NamedTuple):
    """A place that a log can be trimmed to.

    Attributes:
        number: of the first message of an entry.
        first_chunk: the id of its first chunk, or of the one that comes next.
        before: bytes of the log before it, since this life began to count.
    """

    number: int
    first_chunk: int
    before: int


class LogJournal(SqliteJournal):
    """See `ingestd.journal.interface.Journal`.

    Args:
        replicated: the log; opened and closed with the journal.
        path: of the cache.
        ttl: seconds, of the lease.
        snapshot_bytes: see `SNAPSHOT_BYTES`.
        owner: names the daemon in the lease.
        group: adopts the logs of other daemons; `None` for none.
        options: see `SqliteJournal`.
    """

    keeps = synced = False
    store_letters = cache.CacheDeadLetterStore

    def __init__(
        self,
        replicated: ReplicatedLog,
        path: Path,
        *,
        ttl: float = 10.0,
        snapshot_bytes: int = SNAPSHOT_BYTES,
        owner: str = "",
        group: LogGroup | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, **options)
        self.refused["journal.kind"] = 0
        self._log = replicated
        self._ttl = ttl
        self._snapshot_bytes = snapshot_bytes
        self._drained_at, self._adopted = 0.0, False
        self._owner = f"{owner}/{secrets.token_hex(8)}" if owner else secrets.token_hex(8)
        self.group = group
        self.maintenance.refusal = lambda: replicated.refusal
        self._last = 0
        self._answer_until = math.inf
        self._size = 0
        self._marks: list[Mark] = []
        self._latest = Mark(0, 1, 0)
        self._snapshot: Snapshot | None = None
        self._tried = 0
        self._saver: threading.Thread | None = None
        self._looks = asyncio.Semaphore(LOOKS_MAX)
        self._wanted: set[str] = set()
        self._looking: asyncio.Task[Mapping[str, LogMessage]] | None = None
        self._look_tasks: set[asyncio.Task[Mapping[str, LogMessage]]] = set()
        self._leaving, self._gave_up = threading.Event(), threading.Event()

    # -- start ---------------------------------------------------------------------------------

    def claimed(self, owner: str, end: LogEnd | None) -> None:
        """Has it go on with a lease that the daemon has taken to adopt the log.

        Args:
            owner: of the lease.
            end: of a log that was drained already, and then counts as drained since that time.
        """
        self._owner, self._drained_at = owner, 0.0 if end is None else end.at
        self._adopted = True

    async def open(self, on_chunk: Callable[[Chunk], None]) -> Recovered:
        """See `Journal.open`.

        Raises:
            ConfigError: the engine does not keep what is appended, as it is set up.
            JournalFailed: it does not answer, or another daemon owns the log.
        """
        renewing: asyncio.Task[None] | None = None
        try:
            await self._log.open()
            await self._take_lease()
            # From here on: to read what is pending may take longer than a lease.
            renewing = asyncio.create_task(self._renew(), name="lease")
            recovered = await super().open(on_chunk)
        except BaseException as error:
            if renewing is not None:
                await end_tasks(renewing)
            await self._log.close()
            if isinstance(error, Overloaded):
                raise self._failure(str(error)) from error
            raise
        self._committer.claim_bytes = -(-COMMIT_BYTES // self._log.keys_max)
        self._renewing = renewing
        return recovered

    async def _take_lease(self) -> None:
        """Waits for a lease that an earlier owner has let lapse.

        Servers that have just started, or have a new leader, let it lapse some seconds late.

        Raises:
            JournalFailed: another daemon keeps it.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + 2 * self._ttl + LAPSE_SECONDS
        told = False
        while True:
            asked = loop.time()  # an answer may be late, and is of that time
            try:
                owner = await self._log.acquire(self._owner, self._ttl)
            except LogUnreachable:
                if asked > until + OPEN_SECONDS:
                    raise
            else:
                if owner == self._owner:
                    return
                if not told:
                    log.info("lease_awaited", log=self._log.name, owner=owner)
                    told = True
                if asked > until:
                    raise self._failure(f"another daemon ({owner}) owns it")
                with contextlib.suppress(Overloaded, LogAmbiguous):
                    await self._log.want()
            await asyncio.sleep(min(1.0, self._ttl / 4))

    async def _renew(self) -> None:
        wait = third = self._ttl / 3
        while True:
            await asyncio.sleep(wait)
            wait = min(RENEW_SECONDS, third / 4)
            try:
                async with asyncio.timeout(third):
                    owner = await self._log.acquire(self._owner, self._ttl)
            except (Overloaded, TimeoutError):
                continue
            except Exception:
                # An operator may have removed the bucket, and may make it again.
                log.exception("lease_not_renewed", log=self._log.name)
            else:
                if owner != self._owner:
                    log.warning("lease_lost", log=self._log.name, owner=owner)
            wait = third

    def _open_store(self) -> tuple[Store, Recovered]:
        """Makes the cache anew from the log."""
        self._own()
        store = self._folded()
        try:
            recovered = store.recovered(self.failed)
            self._key_owners = key_owners(store.connection)
            self._step(store.connection)
        except BaseException:
            store.close()
            raise
        return store, recovered

    def _folded(self) -> cache.CacheStore:
        """The cache in the state after the message of `_own`.

        Raises:
            ConfigError: the log can't be read by this version.
            JournalFailed: something of it is missing.
        """
        for _ in range(OPEN_TRIES):
            store = cache.CacheStore(self.path, self._invalid, self._publish, self._entry_committed)
            try:
                if self._fold(store):
                    return store
            except (sqlite3.Error, msgspec.MsgspecError, ValueError) as error:
                store.close()
                if is_passing(error):  # a fault of the disk here
                    raise
                raise ConfigError(problem=f"{self._log.name} can't be read: {error}") from error
            except BaseException:
                store.close()
                raise
            store.close()  # it was trimmed meanwhile, to a snapshot that is newer
        raise self._failure("a part of it is missing")

    def _own(self) -> None:
        """Appends a message of this life, after which no earlier owner can append."""
        for _ in range(OPEN_TRIES):
            last = self._patiently(self._log.last)
            if last is not None and self._finished(last):
                continue
            journal = b"" if last is not None else secrets.token_hex(6).encode()
            self._last = 0 if last is None else last.number
            opened = partial(self._publish, OPENED + journal, 0)
            self._answer_until = self._loop.time() + OPEN_SECONDS
            with contextlib.suppress(LogFenced):
                self._until(opened)
                self._answer_until = math.inf
                return
        raise self._failure("other daemons keep taking it over")

    def _finished(self, last: LogMessage) -> bool:
        """Tells if the log had ended with this message; then it is gone, and another one begins."""
        with contextlib.suppress(ValueError):  # reading tells what is wrong with it
            found = ending(last)
            if found.kind == RETIRED and found.end is not None:
                self._patiently(partial(self._log.retire, found.number, found.end))
                return True
        return False

    def _fold(self, store: cache.CacheStore) -> bool:
        """Brings the cache to the state after the message of `_own`.

        Returns:
            False if something of it has gone meanwhile.
        """
        self._marks, self._size, self._latest = [], 0, Mark(0, 1, 0)
        db = store.connection
        db.execute("BEGIN")
        self._snapshot = found = self._patiently(self._log.snapshot)
        if found is not None and self._begins_behind(found):
            found = None
        pending = list[range]()
        if found is not None:
            for part in _joined(self._parts(found)):
                pending += [range(first, last + 1) for first, last in store.restore(part)]
            store.restored(cache.read_state(found.state))
            if not self._parts_whole:
                return False
        at = 0 if found is None else found.at
        for number, data in self._entries(0 if found is None else found.first):
            first_chunk = self._latest.first_chunk
            if data[:1] == COMMIT:
                first_chunk = store.apply(data[1:], pending if number <= at else None)
            elif data[:1] == OPENED and len(data) > 1 and found is None:
                store.begin(data[1:].decode())
            if self._note(number, first_chunk, len(data)):
                db.execute("COMMIT")
                db.execute("BEGIN")
                self._demand_space()
        if not self._chain_whole:
            return False
        db.execute("COMMIT")
        store.ready()
        return True

    def _demand_space(self) -> None:
        """Checks that a log which is adopted leaves the daemon's own pipelines room on the disk.

        Raises:
            JournalFailed: it does not.
        """
        if self._adopted and self.space is not None and self.space.low(self._clock.monotonic()):
            raise self._failure(f"its cache does not fit here: {self.space.left.shortage}")

    def _begins_behind(self, snapshot: Snapshot) -> bool:
        """Tells if a snapshot is of an earlier log of this name, by an owner that was paused."""
        messages = self._patiently(partial(self._log.read, 0, 1))
        if not messages or messages[0].number <= snapshot.at:
            return False
        head, _ = taken_apart(messages[0])
        return not head.after

    def _parts(self, snapshot: Snapshot) -> Iterator[bytes]:
        self._parts_whole = True
        for number in range(snapshot.parts):
            part = self._patiently(partial(self._log.load_part, snapshot.at, number))
            if part is None:
                self._parts_whole = False
                return
            yield part

    def _entries(self, first: int) -> Iterator[tuple[int, bytes]]:
        """The entries from a message on, up to the last one that this daemon appended.

        Yields:
            The number of the first message of each, and its bytes.

        Raises:
            ValueError: a message is not as it was appended.
        """
        self._chain_whole = False
        before: int | None = None
        begun, parts, entry = 0, list[bytes](), b""
        number = first
        while True:
            messages = self._read_some(number)
            for message in messages:
                head, data = taken_apart(message)
                if head.after != before and not self._begins(message, head, first, before):
                    return
                before = message.number
                self._size += len(data)
                if head.part == 0:
                    begun, parts, entry = message.number, [], head.entry
                if head.entry == entry and head.part == len(parts):
                    parts.append(data)
                    if head.part == head.parts - 1:
                        yield begun, b"".join(parts)
                if message.number == self._last:
                    self._chain_whole = True
                    return
            number = before + 1 if before is not None else first

    def _read_some(self, number: int) -> Sequence[LogMessage]:
        """Reads messages that are there, from a replica that may lag.

        Raises:
            JournalFailed: it does for long.
        """
        until = self._loop.time() + OPEN_SECONDS
        while not (found := self._patiently(partial(self._log.read, number, READ_BYTES))):
            if self._loop.time() > until:
                raise self._failure(f"nothing is read from {number} on, and {self._last} was taken")
            self._pause()
        return found

    def _begins(
        self, message: LogMessage, head: MessageHead, first: int, before: int | None
    ) -> bool:
        """Tells if a message is the one that reading begins with."""
        return before is None and (message.number == first or (not first and not head.after))

    # -- the way into the log, on the writer's thread ------------------------------------------

    def append(self, append: Append) -> asyncio.Future[Place]:
        """See `Journal.append`."""
        if (problem := self._log.refusal) and not self.failed.done():
            self._refusing("journal.kind")
            raise LogUnreachable(problem=problem, retry_after=retry_after())
        size, bound = size_of(append.claim), self._log.message_bytes_max
        if size > bound:
            raise NeverFits(size=size, what="a message of the journal's log", bound=bound)
        return super().append(append)

    def _publish(
        self,
        data: bytes,
        first_chunk: int,
        claims: Sequence[IdempotencyClaim] = (),
        at: float = 0.0,
    ) -> None:
        """Appends an entry with its keys; returns once it is in the log.

        Raises:
            KeyTaken: other daemons have some of the keys; the entry is not in the log.
            Overloaded: the engine takes nothing now; the entry is not in the log.
            JournalFailed: another daemon has the log.
            LogFenced: the same, as this life begins.
        """
        if first_chunk:
            data = COMMIT + data
        begun = 0
        for entry, part, parts, piece in pieces(data, self._log.message_bytes_max - HEAD_BYTES):
            message = packed(entry, part, parts, self._last, piece)
            try:
                # The entry counts when its last part is there, and its keys are there with that.
                with_keys = claims if part == parts - 1 else ()
                self._last = self._append(message, self._log_keys(with_keys, at))
            except LogFenced as fenced:
                if not first_chunk:
                    raise
                raise self._failure(str(fenced)) from fenced
            self._size += len(piece)  # also of an entry that is given up
            begun = begun or self._last
        if first_chunk:
            self._note(begun, first_chunk, len(data))

    def _append(self, message: bytes, keys: Mapping[str, LogKey] = _NO_KEYS) -> int:
        """Appends a message with keys, and repeats it until it is known what became of it."""
        may_be_there, lasts, since = False, False, math.inf
        while True:
            try:
                again = self._log.append(message, after=self._last, keys=(*keys.values(),))
                return self._wait(again)
            except LogRefused as error:
                # The next start learns the new bound, and reads what became of earlier tries.
                raise self._failure(str(error)) from error
            except LogAmbiguous as error:
                if not may_be_there:
                    log.warning("publish_unanswered", log=self._log.name, error=str(error))
                may_be_there = True
            except LogUnreachable:
                if not may_be_there:
                    raise
            except LogFenced:
                # Without an answer to these a message that is certainly not there is refused.
                ask = self._insist if may_be_there else self._asked
                # In this order: if the log is as before, the keys did not come with this message.
                lasts = self._loop.time() > since + RETRY_SECONDS
                changed = partial(self._changed, keys, from_leader=lasts)
                taken = ask(changed) if keys else set()
                last = ask(self._log.last)
                if last is not None and last.data == message:
                    return last.number
                number = 0 if last is None else last.number
                if number > self._last:
                    raise
                if taken and number == self._last and (not may_be_there or self._barred()):
                    raise KeyTaken(keys=frozenset(taken), retry_after=KEY_SECONDS) from None
                # One of ours is on its way, or a leader is new and does not know all of its log.
                now = self._loop.time()
                since = min(since, now)
                if number == self._last and not may_be_there and now > since + OVERDUE_SECONDS:
                    problem = "what another daemon appended is without an answer"
                    raise LogUnreachable(problem=problem, retry_after=retry_after()) from None
                if number < self._last and now > since + OPEN_SECONDS:
                    text = f"it ends with {number}, and {self._last} was acknowledged"
                    raise self._failure(text) from None
            # Another daemon's keys that are on their way are there, or not, within moments.
            slowly = may_be_there or lasts or not keys
            self._pause(RETRY_SECONDS if slowly else KEY_RETRY_SECONDS)

    def _barred(self) -> bool:
        """Makes certain that what may be on its way to the log does not come any more.

        Returns:
            False if it has come, or still may.
        """
        with contextlib.suppress(LogFenced, LogUnreachable):
            self._last = self._append(barrier(self._last))
            return True
        return False

    def _asked(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return self._wait(ask())

    def _insist(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        while True:
            try:
                return self._asked(ask)
            except LogUnreachable:
                self._pause()

    def _pause(self, seconds: float | None = None) -> None:
        if self._loop.time() > self._answer_until:
            raise self._failure(self._log.silence or "this start's message is not taken")
        if self._gave_up.wait(RETRY_SECONDS if seconds is None else seconds):
            raise self._failure("it was closed before the log answered")

    def _note(self, number: int, first_chunk: int, size: int) -> bool:
        """Notes an entry, the last in the log; True if it is some way behind the last mark."""
        self._latest = Mark(number, first_chunk, self._size - size)
        if self._marks and self._latest.before - self._marks[-1].before < MARK_BYTES:
            return False
        self._marks.append(self._latest)
        return True

    # -- idempotency keys of the group ---------------------------------------------------------

    async def _find_key(self, key: str) -> RememberedKey | None:
        found = await super()._find_key(key)
        if found is not None and self.idempotency.lives(key, found):
            return found
        if problem := self._log.silence:  # one that is full still has the answers
            raise LogUnreachable(problem=problem, retry_after=retry_after())
        message = await self._look_up(_name_of(key))
        return None if message is None else _remembered(message)

    async def _look_up(self, name: str) -> LogMessage | None:
        """Looks a key up, in one request with all others that wait for theirs."""
        self._wanted.add(name)
        if self._looking is None:
            self._looking = self._loop.create_task(self._look(), name="look for keys")
            self._look_tasks.add(self._looking)
            self._looking.add_done_callback(self._looked)
        found = await asyncio.shield(self._looking)
        return found.get(name)

    async def _look(self) -> Mapping[str, LogMessage]:
        async with self._looks:
            wanted, self._wanted, self._looking = self._wanted, set(), None
            return await self._log.find_keys(wanted)

    def _looked(self, task: asyncio.Task[Mapping[str, LogMessage]]) -> None:
        self._look_tasks.discard(task)
        if not task.cancelled():
            task.exception()  # those that wanted to know may have left

    def _log_keys(self, claims: Sequence[IdempotencyClaim], at: float) -> dict[str, LogKey]:
        """The keys of an entry as the engine has them, by those of their claims."""
        return {
            one.key: LogKey(
                _name_of(one.key),
                _encode((at, one.fingerprint, one.answer)),
                max(1, math.ceil(self.idempotency.lifetime(one.key))),
                one.replaces,
            )
            for one in claims
        }

    async def _changed(self, keys: Mapping[str, LogKey], *, from_leader: bool) -> set[str]:
        """The keys that are not in the engine as was expected when they were claimed."""
        names = [one.name for one in keys.values()]
        found = await self._log.find_keys(names, from_leader=from_leader)
        changed = set()
        for key, one in keys.items():
            message = found.get(one.name)
            if (message.number if message is not None else 0) != one.replaces:
                changed.add(key)
                if message is not None:  # its request is about to ask for it
                    self.idempotency.remember(key, _remembered(message))
        return changed

    # -- snapshots -----------------------------------------------------------------------------

    def _entry_committed(self) -> None:
        """Begins a snapshot if enough of the log is needed no more; on the writer's thread."""
        if self._size - self._tried < self._snapshot_bytes or self._leaving.is_set():
            return
        if self._saver is not None and self._saver.is_alive():
            return
        if self._snapshot is not None:
            first = self._snapshot.first
            self._marks = [one for one in self._marks if one.number >= first] or [self._latest]
        kept = self._size - self._marks[0].before
        size = 0 if self._snapshot is None else self._snapshot.size
        if kept - self._store.chunk_bytes() < max(self._snapshot_bytes, 2 * size):
            return
        self._tried = self._size
        with contextlib.suppress(sqlite3.Error):
            marks = [one[:2] for one in (*self._marks, self._latest)]
            self._saver = threading.Thread(
                target=self._save,
                args=(cache.open_snapshot(self.path), self._last, marks),
                name="snapshot",
                daemon=True,
            )
            self._saver.start()

    def _save(self, db: sqlite3.Connection, at: int, marks: Sequence[tuple[int, int]]) -> None:
        """Saves a snapshot and trims the log; on a thread of its own."""
        useless = True
        try:
            first, first_chunk = cache.first_kept(db, marks, CARRIED_BYTES)
            size = count = 0
            sized = _with_sizes(cache.parts(db, first_chunk, PART_BYTES))
            for count, part in enumerate(_cut(sized, self._log.message_bytes_max), 1):
                if self._leaving.is_set():
                    return
                self._wait(self._log.save_part(at, count - 1, part))
                size += len(part)
            saved = Snapshot(at, first, count, size, cache.state_of(db, self.id))
            after = 0 if self._snapshot is None else self._snapshot.number
            useless = False  # from here on they may be the parts of the last snapshot
            number = self._wait(self._log.save(saved, after=after))
            self._snapshot = msgspec.structs.replace(saved, number=number)
            self._wait(self._log.trim(first))
            log.debug("snapshot_saved", log=self._log.name, at=at, first=first, bytes=size)
        except (Overloaded, LogAmbiguous, LogFenced, JournalFailed, sqlite3.Error) as error:
            log.warning("snapshot_failed", log=self._log.name, error=str(error))
            with contextlib.suppress(Overloaded, JournalFailed):
                if useless:  # in a log that is full they would take the room that commits need
                    self._wait(self._log.drop_parts(at))
                self._snapshot = self._wait(self._log.snapshot())
        finally:
            db.close()

    # -- reads and the end ---------------------------------------------------------------------

    async def _poll_marked(self) -> bool:
        return await super()._poll_marked() | await self._read(cache.has_to_purge)

    async def read(self, first: int, bytes_max: int) -> list[Chunk]:
        """See `Journal.read`."""
        chunks = await super().read(first, bytes_max)
        if any(chunk.damaged for chunk in chunks):
            raise self._cache_failed()
        return chunks

    async def load(self, spans: Sequence[Span]) -> Records | None:
        """See `Journal.load`."""
        records = await super().load(spans)
        if records is None:
            raise self._cache_failed()
        return records

    def _cache_failed(self) -> JournalFailed:
        """Ends the journal: the log has what the cache has not, and the next start reads it."""
        failed = self._failure("its cache is damaged")
        if not self.failed.done():
            self.failed.set_exception(failed)
        return failed

    def _failure(self, problem: str) -> JournalFailed:
        return JournalFailed(path=self._log.name, problem=problem)

    async def close(self, deadline: float | None = None) -> Closed:
        """See `Journal.close`."""
        until = self._loop.time() + CLOSE_SECONDS if deadline is None else deadline
        for task in self._look_tasks:
            task.cancel()
        await end_tasks(self._renewing)
        give_up = self._loop.call_at(until, self._gave_up.set)
        closed = await super().close(deadline)
        give_up.cancel()
        self._gave_up.set()
        with contextlib.suppress(Overloaded, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._log.release(self._owner)
        await self._log.close()
        return closed

    def _close(self, deadline: float | None) -> None:
        self._leaving.set()
        if self._saver is not None:
            self._saver.join()
        super()._close(deadline)
        self._say_drained()

    def _say_drained(self) -> None:
        """Ends this life in the log, if nothing is pending: then no other daemon has to open it."""
        ledger = self._store.meta.ledger
        # Also in a log that is nearly full: each adoption would put a message there.
        if ledger.pending or self.failed.done() or self._log.silence:
            return
        at = self._drained_at or self._clock.now()
        end = LogEnd(self.id, at, *ledger, self._store.dead.letters)
        with contextlib.suppress(Overloaded, LogFenced, JournalFailed):
            self._publish(end_entry(DRAINED, end), 0)

    def _patiently(self, ask: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Asks the log until it answers, as the journal is opened."""
        return self._until(partial(self._asked, ask))

    def _until(self, call: Callable[[], T]) -> T:
        until = self._loop.time() + OPEN_SECONDS
        while True:
            try:
                return call()
            except LogUnreachable:
                if self._loop.time() > until:
                    raise
            self._pause()

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        """Runs a call of the log on the event loop; blocks the thread that calls."""
        try:
            running = asyncio.run_coroutine_threadsafe(call, self._loop)
        except RuntimeError as error:
            call.close()
            raise self._failure("the event loop has ended") from error
        while True:
            try:
                return running.result(1.0)
            except TimeoutError:
                if running.done():
                    raise
                if self._gave_up.is_set():
                    running.cancel()
                    raise self._failure("it was closed before the log answered") from None


def _name_of(key: str) -> str:
    """The name of a key in the engine: it takes few characters, and shows no client's words."""
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _remembered(message: LogMessage) -> RememberedKey:
    at, fingerprint, answer = _decode_key(message.data)
    return RememberedKey(fingerprint, answer, at, message.number)


def _with_sizes(parts: Iterable[bytes]) -> Iterator[bytes]:
    for part in parts:
        yield struct.pack(">I", len(part)) + part


def _cut(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Pieces as one run of bytes, cut into messages of a size."""
    kept = b""
    for piece in pieces:
        kept += piece
        while len(kept) >= size:
            yield kept[:size]
            kept = kept[size:]
    if kept:
        yield kept


def _joined(messages: Iterable[bytes]) -> Iterator[bytes]:
    """The inverse of `_with_sizes` and `_cut`."""
    kept = b""
    for message in messages:
        kept += message
        while len(kept) >= 4 and len(kept) >= 4 + (size := struct.unpack_from(">I", kept)[0]):
            yield kept[4 : 4 + size]
            kept = kept[4 + size :]
