"""Harnesses of a handler: one for tests that are functions, one for tests that are coroutines.

`core.py` says what is real in them and what is not, and has all but the methods that take time.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ingestd.base import envelope as envelopes
from ingestd.testing.core import HarnessCore

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from ingestd.base.envelope import Envelope


class Harness(HarnessCore):
    """A harness for tests that are ordinary functions; see `HarnessCore` for what it is made with.

    Every method returns when it is done. It is closed at the end of a `with`, by `close()`, or by
    the fixture `ingestd_harness` that made it.
    """

    def send(self, records: Iterable[object], *, envelope: Envelope = envelopes.EMPTY) -> None:
        """Accepts records, as one request does; returns when they are durable.

        Args:
            records: JSON values (`bytes` are JSON as it stands), text or bytes, as the format says.
            envelope: of each record.

        Raises:
            HarnessError: they are no records; none is accepted.
            Overloaded: the journal is at its bound.
        """
        self._do(lambda: self._send(records, envelope))

    def run(self, seconds: float | None = None) -> None:
        """Calls the handler until each record is processed or dead, or for a time.

        Args:
            seconds: of the fake clock, exactly; `None` until nothing is pending.

        Raises:
            HarnessError: the handler does not come back, or there is no end.
        """
        self._do(lambda: self._run(seconds))

    def restart(self) -> None:
        """Closes the handler and the pipeline, and starts both again on the same journal.

        Raises:
            HarnessError: the journal keeps nothing.
        """
        self._do(self._restart)

    def close(self) -> None:
        """Closes the handler, and ends everything that belongs to the harness."""
        self.close_now()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncHarness(HarnessCore):
    """A harness for tests that are coroutines; see `HarnessCore` for what it is made with.

    The test's event loop turns while a method runs, so that the handler can talk to a server on it.
    The handler is loaded by the first method that is awaited.
    """

    _loads_at_once = False

    async def send(
        self, records: Iterable[object], *, envelope: Envelope = envelopes.EMPTY
    ) -> None:
        """See `Harness.send`.

        Raises:
            HandlerLoadError: see `Harness`.
        """
        await asyncio.wrap_future(self._begin(lambda: self._send(records, envelope)))

    async def run(self, seconds: float | None = None) -> None:
        """See `Harness.run`."""
        await asyncio.wrap_future(self._begin(lambda: self._run(seconds)))

    async def restart(self) -> None:
        """See `Harness.restart`."""
        await asyncio.wrap_future(self._begin(self._restart))

    async def close(self) -> None:
        """See `Harness.close`."""
        if self._closed:
            return
        try:
            await asyncio.wrap_future(self._begin(self._close))
        finally:
            self._end_all()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
