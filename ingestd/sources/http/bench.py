"""What is done to a whole body: small ones at once, on the event loop, large ones in a thread."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import TYPE_CHECKING, TypeVar

from ingestd.sources.http.body import parse_body
from ingestd.sources.http.encoding import inflate
from ingestd.sources.http.idempotency import take_fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiohttp import web

    from ingestd.base.settings import HttpSettings
    from ingestd.sources.http.body import Bounds, Reading
    from ingestd.sources.http.room import Hold
    from ingestd.sources.http.webhooks import Delivery, Webhook
    from ingestd.sources.intake import Format
    from ingestd.sources.lines import Parsed

THREAD_BYTES = 1024 * 1024
"""From this size on it is a thread's work. Checking 1 MiB of JSON lines takes 1 to 2 ms, and going
to a thread and back about 0.1 ms, with the interpreter's lock shared either way."""

_THREADS = 2
T = TypeVar("T")


class Bench:
    """Owns the threads.

    Args:
        settings: the bounds.
    """

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="http-body")

    def close(self) -> None:
        """Ends the threads; what they are at is finished and thrown away."""
        self._threads.shutdown(wait=False, cancel_futures=True)

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
            return await self._do(len(wire), lambda: parse_body(wire, reading, form, bounds))
        sink = BytesIO()

        def take(piece: bytes) -> None:
            hold.grow(len(piece))
            sink.write(piece)

        steps = inflate(encoding, self._settings.body_bytes_max, wire, take)

        def finish() -> Parsed:
            for _ in steps:
                pass
            return parse_body(sink.getvalue(), reading, form, bounds)

        if len(wire) < THREAD_BYTES and _is_short(steps):
            return finish()
        return await self._loop.run_in_executor(self._threads, finish)

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
        return await self._loop.run_in_executor(self._threads, work)


def _is_short(steps: Iterator[None]) -> bool:
    """Whether one step is all of it: most bodies are, and need no thread."""
    next(steps, None)
    return next(steps, steps) is steps
