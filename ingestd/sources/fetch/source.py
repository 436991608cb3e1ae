"""The source `fetch` downloads lines and events from URLs and goes on at stored positions.

The list is read, every URL gets a task (`download.py`), and a bounded number of them run at once.
A URL's records and its position are one append (`appends.py`), so a restart goes on at the exact
line.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TextIO

from ingestd.base.errors import InputIncomplete
from ingestd.base.logging import get_logger
from ingestd.sources.base import InputCounts, Source
from ingestd.sources.fetch.client import DownloadClient
from ingestd.sources.fetch.concurrency import (
    DecompressionMemory,
    DownloadSlots,
    InflightBudget,
    memory_for,
)
from ingestd.sources.fetch.download import Download, DownloadAttempts
from ingestd.sources.fetch.totals import DownloadTotals
from ingestd.sources.fetch.urls import read_links

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp.abc import AbstractResolver

    from ingestd.base.clock import Clock
    from ingestd.sources.base import Intake, SourceContext
    from ingestd.sources.fetch import FetchSettings
    from ingestd.sources.fetch.urls import Link

log = get_logger()

LISTED_MAX = 100
"""Bound of the URLs given up that the last log line names."""


class FetchSource(Source):
    """Downloads a list of URLs and hands the records to one pipeline.

    Args:
        settings: what and how.
        intake: the pipeline.
        clock: gives the time.
        name: of the source.
        fd: standard input, if the list comes from there.
        stderr: where the hint for a terminal goes.
        allowed: tells if an address may be connected to; `fetch.allow_private` decides by default.
        resolver: resolves names; the system's resolver by default.

    Attributes:
        totals: what was read and accepted so far.
    """

    def __init__(
        self,
        settings: FetchSettings,
        intake: Intake,
        *,
        clock: Clock,
        name: str = "fetch",
        fd: int = 0,
        stderr: TextIO | None = None,
        allowed: Callable[[str], bool] | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self.totals = DownloadTotals(0)
        self._settings = settings
        self._intake = intake
        self._clock = clock
        self._name = name
        self._fd = fd
        self._stderr = stderr
        self._client = DownloadClient(settings, allowed=allowed, resolver=resolver)
        self._downloads: list[Download] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._error: BaseException | None = None

    @classmethod
    def of(cls, settings: FetchSettings, context: SourceContext) -> FetchSource:
        """See `Source`."""
        return cls(
            settings,
            context.pipelines[context.pipeline],
            clock=context.clock,
            name=context.name,
            fd=context.input_fd,
            stderr=context.stderr,
        )

    async def start(self) -> None:
        """Reads the list and begins to download.

        Raises:
            ConfigError: the list can't be read, or is not one of URLs.
        """
        settings = self._settings
        links = await read_links(settings, fd=self._fd, stderr=self._stderr)
        await self._client.start()
        self.totals = DownloadTotals(len(links))
        slots = DownloadSlots(settings.concurrency, settings.concurrency_per_host)
        budget, memory = InflightBudget(settings.inflight_bytes_max), memory_for(settings)
        self._downloads = [
            Download(link, settings, self._tries(link, budget, memory), slots) for link in links
        ]
        self._tasks = [
            asyncio.create_task(self._run(download), name="fetch-url")
            for download in self._downloads
        ]
        log.info("fetch_started", urls=len(links))

    def _tries(
        self, link: Link, budget: InflightBudget, memory: DecompressionMemory
    ) -> DownloadAttempts:
        return DownloadAttempts(
            link,
            self._settings,
            self._intake,
            client=self._client,
            budget=budget,
            memory=memory,
            totals=self.totals,
            clock=self._clock,
            source=self._name,
        )

    async def _run(self, download: Download) -> None:
        try:
            await download.run()
        except Exception as error:  # noqa: BLE001 - `wait_finished` raises it
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Stops everything: nothing more can be stored. `wait_finished` raises the error."""
        if self._error is None:
            self._error = error
        self._cancel()

    def _cancel(self) -> None:
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()

    def facts(self) -> dict[str, object]:
        """See `Source`."""
        return {"urls": self.totals.total}

    def counts(self) -> InputCounts:
        """See `Source`."""
        totals = self.totals
        return InputCounts(
            totals.records, totals.refused, totals.bytes, totals.done, totals.total, totals.left
        )

    def numbers(self) -> Mapping[str, float]:
        """See `Source`."""
        return {"retries": self.totals.retries, "urls_given_up": self.totals.given_up}

    async def wait_finished(self) -> None:
        """Returns when every URL is done and all of it is accepted.

        Raises:
            InputIncomplete: some were given up.
            IngestdError: the pipeline can't take records any more.
        """
        await asyncio.wait(self._tasks)
        if self._error is not None:
            raise self._error
        given_up = [download for download in self._downloads if download.reason]
        if given_up:
            log.error(
                "urls_given_up",
                given_up=len(given_up),
                total=len(self._downloads),
                urls=[f"{one.link.shown}: {one.reason}" for one in given_up[:LISTED_MAX]],
            )
            raise InputIncomplete(given_up=len(given_up), total=len(self._downloads), what="URLs")

    async def stop_taking(self, deadline: float) -> None:
        """Stops reading, and waits until records that were read are accepted."""
        self._cancel()
        left = max(0.0, deadline - asyncio.get_running_loop().time())
        flush = asyncio.create_task(self._flush(), name="fetch-flush")
        await asyncio.wait([flush], timeout=left)
        flush.cancel()
        await asyncio.wait([flush])

    async def _flush(self) -> None:
        await asyncio.wait(self._tasks)
        await asyncio.gather(
            *(one.tries.appends.flushed() for one in self._downloads), return_exceptions=True
        )

    async def close(self) -> None:
        """Ends everything. Records that are not accepted by now are downloaded again next time."""
        self._cancel()
        await asyncio.wait(self._tasks)
        left = sum([await download.tries.appends.close() for download in self._downloads])
        await self._client.close()
        if left:
            log.warning("fetch_records_left", bytes=left)
