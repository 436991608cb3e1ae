"""The logs of a group of daemons, and the adoption of those whose daemon is gone.

A group is all daemons on one stream. A log whose lease has lapsed or was given up, and which is not
drained, is adopted by one daemon of the group: it opens the log as its owner would, in one more
pipeline beside its own, without sources, processes what is pending, and leaves it.

Invariants (`docs/ENGINE.md` has the reasons, `tests/journal/test_group.py` the tests):

1. To adopt is to start on the log: lease, message of its own, compare-and-set. So all that protects
   a log from two owners protects it here, and batches keep their ids.
2. A daemon has one adopted log a pipeline at most, bounded as its own one is.
3. A log is left when nothing is pending, or its own daemon wants it. Dead letters, keys, offsets
   and ids of senders stay in it for that daemon.
4. A log ends once it has been drained for `retire_after`: a message says so, behind which no daemon
   can append, its numbers go into the sum of retired logs once, and it is deleted. A log with dead
   letters does not end: a daemon of the group holds it then, until they are gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import shutil
from functools import partial
from typing import TYPE_CHECKING, Any

import async_timeout

from ingestd.base.errors import IngestdError, Overloaded
from ingestd.base.files import make_folder
from ingestd.base.logging import get_logger
from ingestd.journal.interface import Ledger
from ingestd.journal.log.interface import LogAmbiguous, LogFenced, LogLease
from ingestd.journal.log.messages import (
    DRAINED,
    HEAD_BYTES,
    OPENED,
    RETIRED,
    LastMessage,
    end_entry,
    ending,
    packed,
    pieces,
    taken_apart,
)
from ingestd.journal.sqlite.offline import ADOPTED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
    from pathlib import Path

    from ingestd.base.clock import Clock
    from ingestd.journal.log.interface import GroupedLog

log = get_logger()

LOOK_SECONDS = 1.0
"""Between two looks at the group, at most; a quarter of the lease if that is shorter."""
FAILED_SECONDS = 60.0
"""A log that could not be adopted is left to the others for so long."""
CLOSE_SECONDS = 5.0
WANTED, FAILED, STOPPED = "wanted", "failed", "its own pipeline stands still"
STARTS_MAX = 8
"""A start has no numbers: those before it are looked at for them, up to so many in a row."""
READS_AT_ONCE = 16
"""So many last messages, of a MiB each at most, are read at a time."""
RUNNING_SECONDS = 30.0
"""How long a log that its daemon wants is kept for the calls that run."""


class LogGroup:
    """See `ingestd.journal.interface.JournalGroup`.

    Args:
        own: the daemon's log; it is opened and closed by its journal.
        clock: gives the time.
        ttl: seconds, of a lease.
        retire_after: seconds for which a log is drained before it ends.
        named: gives the settings of the journal kind with the name of another log.
    """

    def __init__(
        self,
        own: GroupedLog,
        *,
        clock: Clock,
        ttl: float,
        retire_after: float,
        named: Callable[[str], object],
    ) -> None:
        self.states: list[dict[str, Any]] = []
        self._own = own
        self._clock = clock
        self._ttl = ttl
        self._retire_after = retire_after
        self._named = named
        name, _, self._pipeline = own.place.partition(".")
        self._owner = f"{name}/{secrets.token_hex(8)}"
        self._failed: dict[str, float] = {}
        self._steady_from = 0.0

    async def run(
        self,
        pipelines: MutableMapping[str, Any],
        build: Callable[[Path, str, object], Any],
        stop: asyncio.Event,
    ) -> None:
        """See `JournalGroup.run`."""
        own = pipelines[self._pipeline]
        folder = own.journal.path.parent / ADOPTED
        await self._removed(folder)  # an earlier life may have left something
        while not stop.is_set():
            place = ""
            try:
                found = await self._looked()
                place = self._chosen(found) if _works(own) else ""
                if place and not await self._ended(place, found[place][1]):
                    pipeline = await self._adopted(place, found[place][1], build, folder)
                    if pipeline is not None:
                        pipelines[pipeline.name] = pipeline
                        await self._until_left(place, found[place][1], pipelines, pipeline, stop)
            except (Overloaded, LogAmbiguous, LogFenced) as error:
                log.debug("group_unanswered", log=place, error=str(error))
            except Exception as error:  # noqa: BLE001  none here ends the daemon's own work
                self._failed_at(place, error)  # another daemon may do better
                self._leave_to_others(place)
                await self._rest(stop, 0.0 if place else FAILED_SECONDS)
            await self._rest(stop)

    def _failed_at(self, place: str, error: Exception) -> None:
        if isinstance(error, IngestdError):  # which says all: no room on the disk, another version
            log.warning("adoption_failed", pipeline=self._pipeline, log=place, error=str(error))
        else:
            log.error("adoption_failed", pipeline=self._pipeline, log=place, exc_info=error)

    def _leave_to_others(self, place: str) -> None:
        self._failed[place] = asyncio.get_running_loop().time() + FAILED_SECONDS

    async def _rest(self, stop: asyncio.Event, seconds: float | None = None) -> None:
        """Waits until the next look, which daemons of a group do not take at the same moment."""
        if seconds is None:
            seconds = min(LOOK_SECONDS, self._ttl / 4) * random.uniform(0.7, 1.0)  # noqa: S311
        with contextlib.suppress(TimeoutError):
            async with async_timeout.timeout(seconds):
                await stop.wait()

    # -- looking -------------------------------------------------------------------------------

    async def _looked(self) -> dict[str, tuple[LogLease, LastMessage | None]]:
        """The leases of the pipeline's logs, and the last messages of those without an owner.

        An engine that did not answer let leases lapse whose daemons work: these come first.
        """
        leases = {
            place: lease
            for place, lease in (await self._leases()).items()
            if place.partition(".")[2] == self._pipeline
        }
        ends = await _endings(self._own, [one for one, lease in leases.items() if not lease.owner])
        found = {place: (lease, ends.get(place)) for place, lease in leases.items()}
        self.states = [_state(place, *one) for place, one in found.items()]
        self._failed = {place: at for place, at in self._failed.items() if place in found}
        return found

    async def _leases(self) -> Mapping[str, LogLease]:
        loop = asyncio.get_running_loop()
        late = loop.time() + self._ttl / 2
        try:
            found = await self._own.logs()
        except BaseException:
            late = 0.0
            raise
        finally:
            if loop.time() > late:
                # So long a daemon that works needs at most, with its reconnection, to renew.
                self._steady_from = loop.time() + self._ttl
        return found

    def _chosen(self, found: dict[str, tuple[LogLease, LastMessage | None]]) -> str:
        """The log to be adopted or to end: one that is not drained goes first."""
        over = [place for place, end in self._free(found) if self._is_over(end)]
        return next(iter((*self._lapsed(found), *over)), "")

    def _lapsed(self, found: dict[str, tuple[LogLease, LastMessage | None]]) -> list[str]:
        ended = {DRAINED, RETIRED}
        return [place for place, end in self._free(found) if end.kind not in ended]

    def _free(
        self, found: dict[str, tuple[LogLease, LastMessage | None]]
    ) -> Iterator[tuple[str, LastMessage]]:
        """The logs that no daemon has or waits for."""
        now = asyncio.get_running_loop().time()
        for place, (lease, end) in found.items() if now >= self._steady_from else ():
            if end is None or lease.wanted or place == self._own.place:
                continue
            if self._failed.get(place, 0.0) <= now:
                yield place, end

    def _is_over(self, end: LastMessage) -> bool:
        """Tells if the daemon of a log has been gone for so long that it counts as gone for good.

        What a daemon with another clock wrote may be a little in the future.
        """
        if end.kind == RETIRED:
            return True
        return end.end is not None and self._clock.now() - end.end.at >= self._retire_after

    # -- the end of a log ----------------------------------------------------------------------

    async def _ended(self, place: str, found: LastMessage | None) -> bool:
        """Ends a log that is drained and has no dead letters; False if there is more to do.

        Raises:
            LogFenced: its daemon has come back.
            Overloaded, LogAmbiguous: it may not have ended; the next look tells.
        """
        if found is None or found.end is None or (found.kind == DRAINED and found.end.letters):
            return False
        sibling, number = self._own.sibling(place), found.number
        if found.kind == DRAINED:
            room = sibling.message_bytes_max - HEAD_BYTES
            ((entry, part, parts, piece),) = pieces(end_entry(RETIRED, found.end), room)
            message = packed(entry, part, parts, number, piece)
            number = await sibling.append(message, after=number)
        await sibling.retire(number, found.end)
        log.info("log_retired", log=place, accepted=found.end.accepted)
        return True

    # -- adoption ------------------------------------------------------------------------------

    async def _adopted(
        self,
        place: str,
        found: LastMessage | None,
        build: Callable[[Path, str, object], Any],
        folder: Path,
    ) -> Any:
        """Opens a pipeline on a log; `None` if another daemon is faster."""
        sibling, name = self._own.sibling(place), place.partition(".")[0]
        if await sibling.acquire(self._owner, self._ttl) != self._owner:
            return None
        try:
            last = await sibling.last()
            if last is None or found is None or last.number != found.number:
                await sibling.release(self._owner)
                return None
            await asyncio.get_running_loop().run_in_executor(None, make_folder, folder / name)
            pipeline = build(folder / name, name, self._named(name))
            pipeline.journal.claimed(self._owner, found.end)
            await pipeline.open()
        except BaseException:
            await self._removed(folder / name)  # what was read of it may fill the disk
            with contextlib.suppress(Overloaded):
                await sibling.release(self._owner)
            raise
        log.info("log_adopted", pipeline=pipeline.name, pending=pipeline.ledger.pending)
        pipeline.end_input()
        return pipeline

    async def _until_left(
        self,
        place: str,
        found: LastMessage | None,
        pipelines: MutableMapping[str, Any],
        pipeline: Any,
        stop: asyncio.Event,
    ) -> None:
        """Has what is pending processed, and leaves the log; at a stop the daemon does."""
        gone_for_good = found is not None and found.end is not None
        try:
            while not (why := await self._reason_to_leave(place, pipeline, gone_for_good)):
                if not _works(pipelines[self._pipeline]):
                    why = STOPPED
                    break
                await self._rest(stop)
                if stop.is_set():
                    return
            if why == WANTED:
                log.info("log_wanted", pipeline=pipeline.name)
            if why in {WANTED, STOPPED}:
                await self._calls_ended(pipeline, stop)
                await _do_marked(pipeline)
        except Exception as error:  # noqa: BLE001  as above
            self._failed_at(place, error)
            why = FAILED
        if stop.is_set():
            return  # the daemon may have begun to close it
        if why == FAILED:
            self._leave_to_others(place)
        del pipelines[pipeline.name]
        now = asyncio.get_running_loop().time()
        report = await pipeline.close(now + CLOSE_SECONDS, now + 2 * CLOSE_SECONDS)
        log.info(
            "log_left", pipeline=pipeline.name, reason=why, **report.ledger._asdict(),
            pending=report.ledger.pending, balanced=report.balanced,
        )  # fmt: skip
        await self._removed(pipeline.journal.path.parent)

    async def _reason_to_leave(self, place: str, pipeline: Any, gone_for_good: bool) -> str:
        if pipeline.broken.done():
            log.warning("adoption_ended", log=place, error=str(pipeline.broken.exception()))
            return FAILED
        found = dict[str, tuple[LogLease, LastMessage | None]]()
        with contextlib.suppress(Overloaded):
            found = await self._looked()
        if place in found and found[place][0].wanted:
            return WANTED
        if not pipeline.ledger.pending:
            await _do_marked(pipeline)
        if pipeline.ledger.pending:
            return ""
        # The letters of a daemon that may come back are left to it.
        if not (gone_for_good and pipeline.journal.status().dead_letters.letters):
            return "drained"
        return "another log waits" if self._lapsed(found) else ""

    async def _calls_ended(self, pipeline: Any, stop: asyncio.Event) -> None:
        """Gives out no batch any more, and waits for the calls that run."""
        loop = asyncio.get_running_loop()
        until = loop.time() + RUNNING_SECONDS
        await pipeline.pause()
        while pipeline.dispatcher.running and loop.time() < until:
            await self._rest(stop)
            if stop.is_set():
                return

    async def _removed(self, folder: Path) -> None:
        remove = partial(shutil.rmtree, folder, ignore_errors=True)
        await asyncio.get_running_loop().run_in_executor(None, remove)


async def _do_marked(pipeline: Any) -> None:
    """Requeues and purges marked letters: the log does not have the marks, and the cache goes."""
    with contextlib.suppress(Overloaded):
        await pipeline.letters.poll()


def _works(pipeline: Any) -> bool:
    """Tells if the daemon's own batches get processed: else another daemon should adopt."""
    space = pipeline.auditor.free_space()
    if space is not None and space.low:  # it has no room for what is pending there
        return False
    return not pipeline.dispatcher.stopped and not pipeline.dispatcher.failures.down_since


# -- for people ------------------------------------------------------------------------------------


async def states_of(log_: GroupedLog) -> list[dict[str, Any]]:
    """The states of all logs, with the numbers that their last messages have."""
    leases = await log_.logs()
    ends = await _endings(log_, [*leases])
    return [_state(place, lease, ends[place]) for place, lease in leases.items()]


async def retired_logs(log_: GroupedLog) -> list[dict[str, Any]]:
    """The sums of the logs that have ended, as states of them."""
    return [
        {
            "log": f"{one.logs} logs", "pipeline": pipeline, "owner": "", "state": "retired",
            **_numbers(Ledger(one.accepted, one.processed, one.dead, one.invalid)),
        }
        for pipeline, one in (await log_.retired()).items()
    ]  # fmt: skip


async def _endings(log_: GroupedLog, places: Sequence[str]) -> dict[str, LastMessage | None]:
    """The last messages of some logs, by their places; a few are read at a time."""
    found = dict[str, LastMessage | None]()
    for first in range(0, len(places), READS_AT_ONCE):
        some = places[first : first + READS_AT_ONCE]
        ends = await asyncio.gather(*(_ending_of(log_, place) for place in some))
        found.update(zip(some, ends, strict=True))
    return found


async def _ending_of(log_: GroupedLog, place: str) -> LastMessage | None:
    sibling = log_.sibling(place)
    message = await sibling.last()
    if message is None:
        return None
    try:
        end = found = ending(message)
        for _ in range(STARTS_MAX):
            if found.kind != OPENED or found.ledger is not None:
                break
            after = taken_apart(message)[0].after
            message = next(iter(await sibling.read(after, 1)), None)
            if message is None or message.number != after:
                break  # it was trimmed
            found = ending(message)
        return end._replace(ledger=found.ledger)
    except ValueError:
        return LastMessage(0 if message is None else message.number, b"")


def _state(place: str, lease: LogLease, end: LastMessage | None) -> dict[str, Any]:
    name, _, pipeline = place.partition(".")
    owner = lease.owner.partition("/")[0]
    state = "owned" if owner == name else "adopted"
    if not owner:
        state = {DRAINED: "drained", RETIRED: "retiring"}.get(end.kind if end else b"", "lapsed")
    numbers = _numbers(None if end is None else end.ledger)
    return {"log": name, "pipeline": pipeline, "owner": owner, "state": state, **numbers}


def _numbers(ledger: Ledger | None) -> dict[str, int | None]:
    """The four numbers of promise 2, where they are known without reading the log."""
    if ledger is None:
        return dict.fromkeys(("accepted", "processed", "dead", "pending"))
    return {
        "accepted": ledger.accepted, "processed": ledger.processed, "dead": ledger.dead,
        "pending": ledger.pending,
    }  # fmt: skip
