"""What is done to a whole body: small ones at once, on the event loop, large ones in a thread."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from ingestd.base.bursts import compute_beside
from ingestd.sources.http.body import parse_body, parse_quickly
from ingestd.sources.http.encoding import inflate, inflate_short
from ingestd.sources.http.idempotency import take_fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import web

    from ingestd.base.record import Format
    from ingestd.http.settings import HttpSettings
    from ingestd.sources.http.body import Bounds, Reading
    from ingestd.sources.http.room import Hold
    from ingestd.sources.http.webhooks import Delivery, Webhook
    from ingestd.sources.lines import Parsed

THREAD_BYTES = 256 * 1024
"""From this size on it is a thread's work. Checking 256 KiB of good JSON lines takes 0.3 ms, or 10
ms if they have two bytes each, and going to a thread and back about 0.1 ms, with the interpreter's
lock shared either way."""

LARGE_BYTES = 4 * 1024 * 1024
"""Such bodies, and compressed ones that are not short, are parsed one at a time: what they need
beside themselves is as large as they are, and others have a thread where they do not wait for them.
"""

T = TypeVar("T")


class Bench:
    """Owns the threads.

    Args:
        settings: the bounds.

    Attributes:
        stream_thread: the one for pieces of streams, which come at any rate.
    """

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._thread = self._make_thread("http-body")
        self.stream_thread = self._make_thread("http-stream")
        self._large = self._make_thread("http-large")

    def _make_thread(self, name: str) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(
            1, thread_name_prefix=name, initializer=compute_beside, initargs=(self._loop,)
        )

    def close(self) -> None:
        """Ends the threads; what they are at is finished and thrown away."""
        for thread in (self._thread, self.stream_thread, self._large):
            thread.shutdown(wait=False, cancel_futures=True)

    async def parse(
        self,
        wire: bytes,
        hold: Hold,
        *,
        encoding: str,
        reading: Reading,
        form: Format,
        bounds: Bounds,
    ) -> Parsed:
        """The records of a body.

        Raises:
            Problem: see `parse_body` and `inflate`.
        """
        if encoding == "identity" or not wire:
            return await self._parse(wire, reading, form, bounds)
        settings = self._settings
        if len(wire) < THREAD_BYTES:
            short = inflate_short(encoding, wire, settings.body_bytes_max)
            if short is not None:
                hold.grow(len(short))
                return await self._parse(short, reading, form, bounds)

        def finish() -> Parsed:
            body = inflate(
                encoding, wire, settings.body_bytes_max, settings.inflate_ratio_max, hold.grow
            )
            return parse_body(body, reading, form, bounds)

        return await self._loop.run_in_executor(self._large, finish)

    async def _parse(self, body: bytes, reading: Reading, form: Format, bounds: Bounds) -> Parsed:
        if len(body) < THREAD_BYTES:
            parsed = parse_quickly(body, reading, form, bounds)
            if parsed is not None:
                return parsed
        thread = self._thread if len(body) < LARGE_BYTES else self._large
        return await self._loop.run_in_executor(thread, parse_body, body, reading, form, bounds)

    async def verify(self, webhook: Webhook, request: web.BaseRequest, wire: bytes) -> Delivery:
        """See `Webhook.check`."""
        now = time.time()
        return await self._do(len(wire), lambda: webhook.check(request.headers, wire, now))

    async def fingerprint(self, wire: bytes, content_type: str, encoding: str) -> bytes:
        """See `take_fingerprint`."""
        return await self._do(len(wire), lambda: take_fingerprint(wire, content_type, encoding))

    async def _do(self, size: int, work: Callable[[], T]) -> T:
        if size < THREAD_BYTES:
            return work()
        return await self._loop.run_in_executor(self._thread, work)
