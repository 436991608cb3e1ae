"""The clients for threads and for coroutines: two faces of one `Sender`."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from ingestd.client.exchange import BufferFull, Counts, encoded
from ingestd.client.sender import RECORD_OVERHEAD, Sender

if TYPE_CHECKING:
    from collections.abc import Callable


class Client(Sender):
    """Sends records to a daemon: from any thread, and in child processes that are forked.

    Args:
        url: `http://HOST:PORT` or `https://HOST:PORT`, with the path that a proxy puts in front.
        pipeline: name of the pipeline; empty for the default one. Its format is `json`.
        token: bearer token.
        ca: PEM file of the authorities that sign the daemon's certificate; else the system's.
        certificate: PEM file of the client's certificate and key, or a file of each.
        batch_records: a request has this many records at most.
        batch_bytes: and this many bytes before compression, unless one record has more.
        batch_age: a record waits this long for others, seconds.
        compress: bodies of 1 KiB and more are sent as gzip.
        buffer_bytes: bound of the buffer; a record counts 160 bytes beside its own.
        full: at the bound `send` blocks, raises `BufferFull`, or drops the record.
        request_timeout: of connecting, and of each wait for the daemon in a request, seconds.
        retry_timeout: a request is given up after this, seconds; below `http.idempotency_ttl`.
        close_timeout: of `close` and of the end of the interpreter, seconds.
        on_invalid: gets an invalid record as JSON, and the reason; of those that are invalid beside
            good ones, the first 100 of a request. Called in the client's thread.
        on_dropped: gets the records that a final answer or a deadline dropped, and the reason;
            called in the client's thread, or in the one that closes it.
        at_exit: closes the client at the end of the interpreter.

    Raises:
        TypeError, ValueError: an option is wrong.
        OSError: a certificate cannot be read.
    """

    def send(self, record: Any, timeout: float | None = None) -> bool:
        """Takes a record, which is accepted later; False if it was dropped at the bound.

        Args:
            record: a JSON value; or bytes, which are one JSON text already.
            timeout: of the wait for room, with `full="block"`; `None` for any.

        Raises:
            TypeError, ValueError: it is no JSON.
            BufferFull: there is no room, or was none within `timeout`.
            ClientClosed: the client is closed.
        """
        return self._put(encoded(record), timeout)

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until all that was sent before has an outcome; False at the timeout."""
        done = self._begin_flush()
        with self._changed:
            if self.runs_here() or self._thread is None:  # nothing would change meanwhile
                return done()
            return self._changed.wait_for(done, timeout)

    def close(self, timeout: float | None = None) -> Counts:
        """Sends what is there, for `timeout` or `close_timeout` seconds, and drops the rest."""
        return self.close_here(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(Sender):
    """Sends records to a daemon from coroutines; arguments, outcomes and errors as in `Client`."""

    async def send(self, record: Any, timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """Takes a record; with `full="block"` the coroutine waits for room, not the loop."""
        data = encoded(record)
        size = len(data) + RECORD_OVERHEAD
        if self._full != "block" or size > self._buffer_bytes:
            return self._put(data, None)
        while True:
            with contextlib.suppress(BufferFull):
                return self._put(data, 0.0)
            if not await self._until(lambda: self._closed or self._fits(size), timeout):
                raise BufferFull(size=size, limit=self._buffer_bytes)

    async def flush(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """Waits until all that was sent before has an outcome; False at the timeout."""
        return await self._until(self._begin_flush(), timeout)

    async def close(self, timeout: float | None = None) -> Counts:  # noqa: ASYNC109
        """Sends what is there, for `timeout` or `close_timeout` seconds, and drops the rest."""
        await self._until(self._is_ended, self.begin_close(timeout))
        self._end_close()
        return self.counts

    async def _until(self, predicate: Callable[[], bool], seconds: float | None) -> bool:
        """Waits for a change after which the predicate holds; False after so many seconds."""
        import asyncio  # noqa: PLC0415 - 40 modules that `Client` does not need

        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    woken = asyncio.Event()
                    wake = partial(loop.call_soon_threadsafe, woken.set)
                    with self._changed:
                        if predicate():
                            return True
                        self._wakers.add(wake)
                    try:
                        await woken.wait()
                    finally:
                        with self._changed:
                            self._wakers.discard(wake)
        except TimeoutError:
            return predicate()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
