"""The buffer and the thread of a client, its end, and its life in child processes."""

from __future__ import annotations

import atexit
import contextlib
import gzip
import logging
import os
import random
import sys
import threading
import time
import weakref
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Literal

from ingestd.base.rate import backoff
from ingestd.client.exchange import (
    BufferFull,
    ClientClosed,
    Counts,
    DaemonConnection,
    Verdict,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RECORD_OVERHEAD = 160
"""Bytes that a record in the buffer takes beside its own: the objects around it."""
BACKOFF, BACKOFF_MAX, BACKOFF_CLOSING = 0.2, 30.0, 0.5
COMPRESS_MIN = 1024
COMPRESS_RATIO = 100
"""What shrinks more is sent as it is: the daemon takes it for a bomb (`http.inflate_ratio_max`)."""
WARN_SECONDS = 10.0
LOGGER = "ingestd.client"

_log = logging.getLogger(LOGGER)
_senders: weakref.WeakSet[Sender] = weakref.WeakSet()


class Sender:
    """The buffer, the thread and the counts that both clients share; arguments as in `Client`."""

    def __init__(
        self,
        url: str,
        *,
        pipeline: str = "",
        token: str = "",
        ca: str | None = None,
        certificate: str | tuple[str, str] | None = None,
        batch_records: int = 1000,
        batch_bytes: int = 1024**2,
        batch_age: float = 1.0,
        compress: bool = True,
        buffer_bytes: int = 16 * 1024**2,
        full: Literal["block", "raise", "drop"] = "block",
        request_timeout: float = 30.0,
        retry_timeout: float = 43_200.0,
        close_timeout: float = 5.0,
        on_invalid: Callable[[bytes, str], object] | None = None,
        on_dropped: Callable[[Sequence[bytes], str], object] | None = None,
        at_exit: bool = True,
    ) -> None:
        if full not in {"block", "raise", "drop"}:
            raise ValueError("`full` is block, raise or drop")
        _check_texts(pipeline=pipeline, token=token)
        _check_numbers(
            batch_age=batch_age, retry_timeout=retry_timeout, close_timeout=close_timeout,
            batch_records=batch_records, batch_bytes=batch_bytes, buffer_bytes=buffer_bytes,
            request_timeout=request_timeout,
        )  # fmt: skip
        if min(batch_records, batch_bytes, buffer_bytes, request_timeout) <= 0:
            raise ValueError("bounds of batches, buffer and requests are above 0")
        if not all(callable(one) for one in (on_invalid, on_dropped) if one is not None):
            raise TypeError("`on_invalid` and `on_dropped` are functions")
        if not all("!" <= character <= "~" for character in token):
            raise ValueError("a token has visible ASCII characters only")  # and is not shown here
        self.close_timeout = close_timeout
        self.at_exit = at_exit
        self._connection = DaemonConnection(url, pipeline, ca, certificate)
        self._headers = {"Content-Type": "application/x-ndjson", "User-Agent": "ingestd-client"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._batch_records, self._batch_bytes = batch_records, batch_bytes
        self._batch_age, self._compress = batch_age, compress
        self._buffer_bytes, self._full = buffer_bytes, full
        self._request_timeout, self._retry_timeout = request_timeout, retry_timeout
        self._on_invalid, self._on_dropped = on_invalid, on_dropped
        self._reset()
        _senders.add(self)

    def _reset(self) -> None:
        """Begins with nothing: at first, and in a child process, whose parent has all of it."""
        self._changed = threading.Condition()
        self._wakers: set[Callable[[], object]] = set()
        self._thread: threading.Thread | None = None
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._waiting_bytes = self._held_bytes = 0
        self._parts: list[list[bytes]] = []  # of the batch that is being posted, the next one last
        self._taken = self._settled = self._flush_to = 0  # records since the beginning
        self._accepted = self._invalid = self._dropped = self._refused = 0
        self._closed = self._finished = self._ended = self._failing = False
        self._deadline = float("inf")
        self._warn_next = 0.0
        self._name, self._requests = os.urandom(16).hex(), 0

    def begin_in_child(self) -> None:
        """Leaves connection and records to the parent process; called after a fork."""
        self._connection.renew()
        self._reset()

    @property
    def counts(self) -> Counts:
        """The counts of this moment, which add up."""
        with self._changed:
            sent, dropped = self._taken + self._refused, self._dropped + self._refused
            return Counts(sent, self._accepted, self._invalid, dropped)

    def runs_here(self) -> bool:
        """Returns True in the client's own thread, which never waits for itself."""
        return threading.current_thread() is self._thread

    # --- the callers' side

    def _put(self, data: bytes, timeout: float | None) -> bool:
        """Takes an encoded record into the buffer."""
        size = len(data) + RECORD_OVERHEAD
        with self._changed:
            if self._full == "block" and size <= self._buffer_bytes and not self.runs_here():
                self._changed.wait_for(lambda: self._closed or self._fits(size), timeout)
            if self._closed:
                raise ClientClosed
            if fits := self._fits(size):
                self._taken += 1
                self._waiting.append((time.monotonic(), data))
                self._waiting_bytes += len(data)
                self._held_bytes += size
                if self._thread is None:
                    self._start()
                elif len(self._waiting) == 1 or self._is_full():
                    self._notify()
            elif self._full != "drop":
                raise BufferFull(size=size, limit=self._buffer_bytes)
            else:
                self._refused += 1
        if not fits:
            self._warn("the buffer is full: %d records were dropped so far", self._refused)
        return fits

    def _fits(self, size: int) -> bool:
        return self._held_bytes + size <= self._buffer_bytes

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="ingestd-client", daemon=True)
        # At the end of the interpreter no thread can start: `close` posts what is left itself.
        with contextlib.suppress(RuntimeError):
            thread.start()
            self._thread = thread
        _close_with_multiprocessing()

    def _begin_flush(self) -> Callable[[], bool]:
        """Makes what is in the buffer due; returns a predicate that tells its end."""
        with self._changed:
            target = self._flush_to = self._taken
            self._notify()
        return lambda: self._ended or self._settled >= target

    def begin_close(self, timeout: float | None = None) -> float:
        """Takes no more records, sets the deadline of those that are there; seconds until then."""
        with self._changed:
            if not self._closed:
                wait = self.close_timeout if timeout is None else timeout
                self._closed, self._deadline = True, time.monotonic() + wait
            self._notify()
        if self._thread is None:
            self._run()
        return max(0.0, self._deadline - time.monotonic())

    def close_here(self, timeout: float | None = None) -> Counts:
        """Closes the client, and blocks the calling thread meanwhile."""
        left = self.begin_close(timeout)
        if not self.runs_here():  # as in a callback: the thread ends by itself
            with self._changed:
                self._changed.wait_for(self._is_ended, left)
            self._end_close()
        return self.counts

    def close_at_once(self) -> None:
        """Closes the client, and drops what has no outcome yet."""
        self.begin_close(0.0)
        self._end_close()

    def _end_close(self) -> None:
        """Gives up what is left at the deadline, a request that waits for its answer too."""
        self._finish("the daemon did not take them in time")
        self._connection.interrupt()

    def _is_ended(self) -> bool:
        return self._ended

    def _notify(self) -> None:
        """Wakes all that wait for a change, coroutines too; the lock is held."""
        self._changed.notify_all()
        wakers, self._wakers = self._wakers, set()
        for wake in wakers:
            with contextlib.suppress(RuntimeError):  # its event loop is closed
                wake()

    def _warn(self, text: str, *values: object) -> None:
        """Logs one warning in `WARN_SECONDS`."""
        now = time.monotonic()
        if now >= self._warn_next:
            self._warn_next = now + WARN_SECONDS
            _log.warning(text, *values)

    def _call(self, function: Callable[..., object] | None, *values: object) -> None:
        try:
            if function is not None:
                function(*values)
        except Exception:  # noqa: BLE001 - the application's own code; the client goes on
            _log.exception("a callback of the client failed")

    # --- the thread's side

    def _run(self) -> None:
        """Posts batches until the client is closed and empty, or its deadline has come."""
        try:
            while self._take():
                self._deliver()
        finally:
            self._connection.close()
            self._finish("the client was closed before they could be sent")

    def _is_full(self) -> bool:
        waiting, size = len(self._waiting), self._waiting_bytes
        return waiting >= self._batch_records or size >= self._batch_bytes

    def _due_in(self) -> float | None:
        """Seconds until the next batch is due; `None` while there is nothing."""
        if self._closed:
            return 0.0
        if not self._waiting:
            return None
        if self._is_full() or self._flush_to > self._settled:
            return 0.0
        return max(0.0, self._waiting[0][0] + self._batch_age - time.monotonic())

    def _take(self) -> bool:
        """Waits for a batch and takes it; False at the end."""
        batch: list[bytes] = []
        with self._changed:
            while (left := self._due_in()) != 0.0:
                self._changed.wait(left)
            if self._finished or time.monotonic() >= self._deadline:
                return False
            size = 0
            while self._waiting and len(batch) < self._batch_records:
                size += len(self._waiting[0][1]) + 1
                if batch and size > self._batch_bytes:
                    break
                batch.append(self._waiting.popleft()[1])
                self._waiting_bytes -= len(batch[-1])
            self._parts = [batch]
        return bool(batch)

    def _deliver(self) -> None:
        """Posts a batch, in halves if it is too large, until each record has an outcome."""
        while True:
            with self._changed:
                if not self._parts:  # done, or given up by `close`
                    return
                part = self._parts[-1]
            verdict = self._post(part)
            if verdict.kind != "split":
                self._settle(part, verdict)
                continue
            half = len(part) // 2
            with self._changed:
                if not self._finished:
                    self._parts[-1:] = [part[half:], part[:half]]
                if verdict.shrinks == "bytes":
                    self._batch_bytes = max(1, min(self._batch_bytes, sum(map(len, part)) // 2))
                elif verdict.shrinks == "records":
                    self._batch_records = min(self._batch_records, half)

    def _post(self, part: list[bytes]) -> Verdict:
        """Posts a request until its outcome is known."""
        self._requests += 1
        body = b"\n".join(part)
        headers = {**self._headers, "Idempotency-Key": f'"{self._name}-{self._requests}"'}
        if self._compress and len(body) >= COMPRESS_MIN:
            packed = gzip.compress(body, 1, mtime=0)
            if len(body) < COMPRESS_RATIO * len(packed):
                body, headers["Content-Encoding"] = packed, "gzip"
        given_up, tries = time.monotonic() + self._retry_timeout, 0
        while not self._finished:
            left = max(0.1, self._deadline - time.monotonic())
            timeout = min(self._request_timeout, left)
            verdict = self._connection.post(body, headers, timeout, len(part))
            if verdict.kind != "retry":
                self._recover()
                return verdict
            if verdict.at_once:
                continue  # on a new connection, which cannot be `at_once` again
            tries += 1
            self._fail(verdict.reason)
            longest = BACKOFF_CLOSING if self._closed else BACKOFF_MAX
            wait = max(verdict.after, backoff(tries, BACKOFF, longest, random.random))
            if time.monotonic() + wait > min(given_up, self._deadline):
                return Verdict("dropped", f"given up: {verdict.reason}")
            self._rest(wait, is_asked=verdict.after > 0.0)
        return Verdict("dropped")

    def _rest(self, seconds: float, *, is_asked: bool) -> None:
        """Waits; a close that comes meanwhile ends what the daemon did not ask for."""
        with self._changed:
            was_closed = self._closed or is_asked
            self._changed.wait_for(
                lambda: self._finished or (self._closed and not was_closed), seconds
            )

    def _fail(self, reason: str) -> None:
        if not self._failing:
            self._failing = True
            address = self._connection.address
            _log.warning("records cannot be sent to %s and wait: %s", address, reason)

    def _recover(self) -> None:
        if self._failing:
            self._failing = False
            _log.info("records are sent to %s again", self._connection.address)

    def _settle(self, part: list[bytes], verdict: Verdict) -> None:
        """Counts the outcome of a request, and gives its place in the buffer back."""
        count = len(part)
        invalid = dict(verdict.invalid)
        if verdict.kind == "invalid":
            invalid = dict.fromkeys(range(count), verdict.reason) | invalid
        dropped = count if verdict.kind == "dropped" else 0
        bad = len(invalid) + verdict.unnamed
        with self._changed:
            if self._finished:  # `close` gave them up meanwhile
                return
            self._parts.pop()
            self._held_bytes -= sum(map(len, part)) + RECORD_OVERHEAD * count
            self._accepted += count - bad - dropped
            self._invalid += bad
            self._dropped += dropped
        for index, reason in sorted(invalid.items()):
            self._call(self._on_invalid, part[index], reason)
        if bad:
            self._warn("%d records were invalid: %s", bad, verdict.reason)
        if dropped:
            self._report_dropped(part, verdict.reason)
        with self._changed:  # after the callbacks: a flush that ends has seen them
            self._settled += count
            self._notify()

    def _finish(self, reason: str) -> None:
        """Ends everything once: what has no outcome yet is dropped."""
        with self._changed:
            if self._finished:
                # Another thread is at it, and calls `on_dropped`.
                self._changed.wait_for(self._is_ended, self.close_timeout)
                return
            self._finished = self._closed = True
            left = [*chain(*reversed(self._parts)), *(data for _, data in self._waiting)]
            self._waiting.clear()
            self._parts.clear()
            self._held_bytes = self._waiting_bytes = 0
            self._dropped += len(left)
        if left:
            self._report_dropped(left, reason)
        with self._changed:
            self._ended = True
            self._notify()

    def _report_dropped(self, records: Sequence[bytes], reason: str) -> None:
        _log.warning("%d records were dropped: %s", len(records), reason)
        self._call(self._on_dropped, records, reason)


# What is wrong is told here: in the client's thread it would cost the records.


def _check_numbers(**options: object) -> None:
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"`{name}` is a number, not {value!r:.80}")
        if not 0 <= value <= threading.TIMEOUT_MAX:
            raise ValueError(f"`{name}` is out of range: {value!r:.80}")


def _check_texts(**options: object) -> None:
    for name, value in options.items():
        if not isinstance(value, str):
            raise TypeError(f"`{name}` is a text, not {type(value).__name__}")  # it may be secret


_ends_here = {0}
"""Processes whose end closes their clients through `multiprocessing`."""


def _close_all(*, at_exit: bool = False) -> None:
    """Closes all clients of the process, side by side."""
    clients = [one for one in list(_senders) if one.at_exit or not at_exit]
    try:
        for one in clients:
            one.begin_close()
        for one in clients:
            one.close_here()
    except KeyboardInterrupt:  # the wait is over: what is left is dropped, and reported
        for one in clients:
            one.close_at_once()


def _close_with_multiprocessing() -> None:
    """Closes the clients at the end of a child of `multiprocessing`, which skips `atexit`."""
    tools = sys.modules.get("multiprocessing.util")
    if tools is None or os.getpid() in _ends_here:
        return
    _ends_here.add(os.getpid())
    if sys.modules["multiprocessing.process"].parent_process() is not None:
        tools.Finalize(None, _close_all, exitpriority=10)


def _begin_in_child() -> None:
    for one in list(_senders):
        one.begin_in_child()


atexit.register(_close_all, at_exit=True)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)
