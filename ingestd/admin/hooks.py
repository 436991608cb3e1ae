"""Hooks: a signed POST to a URL of the operator's when something needs a person.

A hook looks at the status once a second, apart from every record, and tells of what has changed.
`HookWatch` decides that and does no I/O; a task of each hook sends what it has to tell, one message
after the other, from a thread of its own.

Invariants:

1. Nothing waits for a hook. Messages wait in a queue of `QUEUED_MAX`; beyond it the oldest goes,
   and the log says so.
2. Of one kind and pipeline there is at most one message in `every`. What comes meanwhile is told
   with the next one: letters are counted on, and a sink that is up again by then was never down.
3. `sink_back` follows a `sink_down` that was told, and only that.
4. A message has one id for all of its tries (https://www.standardwebhooks.com). It is tried until
   the answer is a success, `TRIES_MAX` times; the log has the hook's name, and no URL or secret.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
import time
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd.base.logging import get_logger
from ingestd.base.rate import backoff
from ingestd.base.tasks import OwnThread
from ingestd.http.signatures import signature_headers, signing_key
from ingestd.sinks.connection import HttpConnection, target_of, told

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ingestd.admin.status import AdminView, PipelineStatus
    from ingestd.settings import HookSettings

LOOK_SECONDS = 1.0
"""Between two looks at the status."""
QUEUED_MAX = 100
TRIES_MAX = 12
"""Of one message: about half an hour with the waits between them."""
BACKOFF_SECONDS, BACKOFF_MAX_SECONDS = 2.0, 300.0
POST_SECONDS = 10.0
_ROOM = ("journal.bytes_max", "journal.free_min", "dead.bytes_max")
"""Bounds that stop a pipeline when they are reached."""

log = get_logger()


class HookEvent(NamedTuple):
    """Something to tell.

    Attributes:
        kind: one of `settings.HOOK_KINDS`.
        pipeline: its name.
        data: facts, for JSON.
    """

    kind: str
    pipeline: str
    data: dict[str, Any]


class _Told:
    """State of one pipeline as a hook has told of it.

    Attributes:
        letters: dead letters ever, of which it has told.
        down_at: since when the sink is down that it has told of; 0 if it is up.
        near: bounds of which it has told that they are near.
        paused: when the pause began that it has told of.
        told_at: when it told of each kind last.
    """

    def __init__(self, letters: int) -> None:
        self.letters = letters
        self.down_at = 0.0
        self.near: frozenset[str] = frozenset()
        self.paused: str | None = None
        self.told_at: dict[str, float] = {}


class HookWatch:
    """Decides what a hook tells.

    Args:
        kinds: of the events that it tells of.
        every: seconds between two messages of one kind about one pipeline.
        paused_after: seconds after which a pause is too long.
    """

    def __init__(self, kinds: frozenset[str], every: float, paused_after: float) -> None:
        self._kinds = kinds
        self._every = every
        self._paused_after = paused_after
        self._known: dict[str, _Told] = {}

    def look(self, pipelines: Mapping[str, PipelineStatus], now: float) -> list[HookEvent]:
        """Compares the status with what was told.

        Args:
            pipelines: their status now.
            now: seconds since the epoch.
        """
        found: list[HookEvent] = []
        self._known = {name: known for name, known in self._known.items() if name in pipelines}
        for name, status in pipelines.items():
            letters = status.dead_ever + status.invalid_ever
            known = self._known.setdefault(name, _Told(letters))
            for kind, data in self._events(known, status, letters, now):
                known.told_at[kind] = now
                if kind in self._kinds:
                    found.append(HookEvent(kind, name, data))
        return found

    def _events(
        self, known: _Told, status: PipelineStatus, letters: int, now: float
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        def may(kind: str) -> bool:
            # A clock may be put back, by years.
            return not 0 <= now - known.told_at.get(kind, -self._every) < self._every

        if letters > known.letters and may("dead_letters"):
            yield "dead_letters", {
                "new": letters - known.letters, "kept": status.dead_letters.kept,
            }  # fmt: skip
            known.letters = letters
        handler = status.handler
        if handler.state != "up" and not known.down_at and may("sink_down"):
            known.down_at = handler.down_since_seconds or now
            yield "sink_down", {
                "state": handler.state, "since": handler.down_since, "error": handler.error,
                "pending": status.pending,
            }  # fmt: skip
        elif handler.state == "up" and known.down_at:
            seconds, known.down_at = max(0.0, now - known.down_at), 0.0
            yield "sink_back", {"down_seconds": round(seconds, 3), "pending": status.pending}
        near = frozenset(bound for bound in _ROOM if bound in status.bounds_near)
        if near - known.near and may("journal_near"):
            yield "journal_near", {
                "bounds": {bound: status.bounds_used.get(bound, 1.0) for bound in sorted(near)},
                "pending": status.pending,
            }  # fmt: skip
            known.near = near
        known.near &= near
        if status.paused and status.paused_since != known.paused and status.paused_since:
            since = datetime.fromisoformat(status.paused_since).timestamp()
            if now - since >= self._paused_after:
                known.paused = status.paused_since
                yield "paused", {"since": status.paused_since, "pending": status.pending}


class Hook:
    """One hook: what it has to tell, and the task that sends it.

    Args:
        name: of its table.
        settings: of it.
    """

    def __init__(self, name: str, settings: HookSettings) -> None:
        self._name = name
        self._watch = HookWatch(frozenset(settings.on), settings.every, settings.paused_after)
        self._key = signing_key(settings.secret.get_secret_value())
        self._target = target_of(settings.url)
        self._queue: deque[bytes] = deque()
        self._filled = asyncio.Event()
        self._thread = OwnThread(f"hook-{name}")
        self._task = asyncio.ensure_future(self._run())

    def look(self, pipelines: Mapping[str, PipelineStatus], now: float) -> None:
        """Queues what there is to tell; never waits."""
        for event in self._watch.look(pipelines, now):
            if len(self._queue) >= QUEUED_MAX:
                self._queue.popleft()
                log.warning("hook_message_dropped", hook=self._name, queued=QUEUED_MAX)
            at = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
            message = {
                "type": event.kind,
                "timestamp": at.replace("+00:00", "Z"),
                "data": {"host": socket.gethostname(), "pipeline": event.pipeline, **event.data},
            }
            self._queue.append(msgspec.json.encode(message))
            self._filled.set()

    async def _run(self) -> None:
        while True:
            while not self._queue:
                self._filled.clear()
                await self._filled.wait()
            await self._send(self._queue.popleft())

    async def _send(self, body: bytes) -> None:
        name, problem = f"msg_{secrets.token_hex(12)}", ""
        loop = asyncio.get_running_loop()
        for tries in range(1, TRIES_MAX + 1):
            try:
                problem = await loop.run_in_executor(self._thread, self._post, name, body)
            except Exception as error:  # noqa: BLE001  no hook may end the others
                problem = told(error)
            if not problem:
                log.info("hook_told", hook=self._name, message=name, tries=tries)
                return
            log.info("hook_postponed", hook=self._name, message=name, tries=tries, problem=problem)
            wait = backoff(tries, BACKOFF_SECONDS, BACKOFF_MAX_SECONDS, random.random)
            await asyncio.sleep(BACKOFF_SECONDS + wait)
        log.error("hook_given_up", hook=self._name, message=name, problem=problem)

    def _post(self, name: str, body: bytes) -> str:
        """Sends a message once, in the hook's thread; returns what went wrong, or nothing."""
        connection = HttpConnection(
            self._target,
            connect_timeout=POST_SECONDS,
            timeout=POST_SECONDS,
            allow_private=True,
            truncates=True,
        )
        signed = signature_headers(self._key, name, time.time(), body)
        headers = {"Content-Type": "application/json", "User-Agent": "ingestd", **signed}
        try:
            answer = connection.send("POST", body, headers)
        finally:
            connection.close()
        return "" if 200 <= answer.status < 300 else f"the answer was {answer.status}"

    def close(self) -> None:
        """Ends the task; what was not sent is not sent any more."""
        self._task.cancel()
        self._thread.shutdown(wait=False)


class Hooks:
    """All hooks of a daemon.

    Args:
        settings: `[hooks]`, by name.
        view: the daemon.
    """

    def __init__(self, settings: Mapping[str, HookSettings], view: AdminView) -> None:
        self._view = view
        self._hooks = [Hook(name, one) for name, one in settings.items()]
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        while True:
            try:
                pipelines, now = self._view.status().pipelines, time.time()
                for hook in self._hooks:
                    hook.look(pipelines, now)
            except Exception:
                log.exception("hooks_failed")  # the next look may do better
            await asyncio.sleep(LOOK_SECONDS)

    def close(self) -> None:
        """Ends all of them."""
        self._task.cancel()
        for hook in self._hooks:
            hook.close()
