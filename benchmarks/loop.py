"""The baseline: the asyncio loop that people write by hand, and that ingestd grew out of.

A producer puts single records into an `asyncio.Queue`. A consumer gets them under an
`async_timeout`, until a batch is full or old, and hands it to `run_in_executor`; a callback marks
its records done. Nothing is durable: what is in the queue goes with the process.

It is written to be fast, as far as it can be without being something else: one timeout a batch
instead of one a record, lines read many at a time, uvloop where that is installed.

`python -m benchmarks.loop AGE < FILE` is the loop over standard input; it prints what it counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import async_timeout

from benchmarks.handler import store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

RECORDS_MAX = 1000
"""Records a batch."""
STDIN_QUEUE_MAX = 10_000
"""Lines in the queue; then reading waits."""
STDIN_READ_BYTES = 256 * 1024
"""Lines read at once, together."""


class PlainLoop:
    """A queue and its consumer.

    Args:
        age_max: seconds after which a batch goes as it is.
        queue_max: records in the queue; 0 for no bound.

    Attributes:
        queue: records go in here, one by one.
        accepted: how many a source said yes to; the source counts.
        processed: how many `store` is done with.
    """

    def __init__(self, age_max: float, queue_max: int = 0) -> None:
        self.queue: asyncio.Queue[bytes] = asyncio.Queue(queue_max)
        self.accepted = 0
        self.processed = 0
        self._age_max = age_max

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The consumer, for as long as this lasts."""
        consumer = asyncio.create_task(self._consume(), name="consumer")
        try:
            yield
        finally:
            consumer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await consumer

    def counts(self) -> dict[str, int]:
        """What the benchmark asks for."""
        return {"accepted": self.accepted, "processed": self.processed}

    async def _consume(self) -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(max_workers=1) as executor:
            while True:
                batch = await self._next_batch()
                future = loop.run_in_executor(executor, decode_and_store, batch)
                future.add_done_callback(partial(self._done, len(batch)))

    async def _next_batch(self) -> list[bytes]:
        batch = [await self.queue.get()]
        with contextlib.suppress(TimeoutError):
            async with async_timeout.timeout(self._age_max):
                while len(batch) < RECORDS_MAX:
                    batch.append(await self.queue.get())
        return batch

    def _done(self, count: int, future: asyncio.Future[None]) -> None:
        future.result()
        self.processed += count
        for _ in range(count):
            self.queue.task_done()


def decode_and_store(batch: list[bytes]) -> None:
    """What runs in the thread."""
    store([json.loads(line) for line in batch])


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """The one of uvloop where that is installed, as in ingestd."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def _read_stdin(age_max: float) -> PlainLoop:
    plain = PlainLoop(age_max, STDIN_QUEUE_MAX)
    loop = asyncio.get_running_loop()
    async with plain.running():
        while lines := await loop.run_in_executor(
            None, sys.stdin.buffer.readlines, STDIN_READ_BYTES
        ):
            for line in lines:
                await plain.queue.put(line)
            plain.accepted += len(lines)
        await plain.queue.join()
    return plain


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        print(json.dumps(runner.run(_read_stdin(float(sys.argv[1]))).counts()))
