"""A worker's own handler: loaded once, created once, called with job after job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ingestd.base.errors import HandlerLoadError
from ingestd.handlers.call import call, call_async, close, close_async
from ingestd.handlers.failure import failure_of
from ingestd.handlers.load import load
from ingestd.handlers.outcome import Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from ingestd.handlers.load import HandlerSpec
    from ingestd.handlers.outcome import Failure, Job


class Wanted(msgspec.Struct, frozen=True):
    """Which handler a worker loads, and for whom.

    Attributes:
        target: `module:name` or a registered name.
        options: the handler's options.
        record_format: json, text or bytes.
        executor: thread, process or async.
        pipeline: its name.
        data_dir: the daemon's data directory.
    """

    target: str
    options: dict[str, Any]
    record_format: str
    executor: str
    pipeline: str
    data_dir: str


class Runner:
    """What one worker holds. Not for use by two threads at once.

    A handler class whose constructor fails (its database is down, say) does not stop the daemon:
    each job tries to create it again, and fails like any other job until that succeeds.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._spec: HandlerSpec | None = None
        self._handler: Callable[[Any], Any] | None = None

    def prepare(self) -> str:
        """Loads the handler and tries to create it.

        Returns:
            One line about a constructor that failed, or nothing.

        Raises:
            HandlerLoadError: it can't be loaded, or does not take its options.
        """
        wanted = self._wanted
        spec = load(wanted.target, record_format=wanted.record_format, executor=wanted.executor)
        spec.check_options(wanted.options)
        self._spec = spec
        _, failure = self._made()
        return failure.error if failure else ""

    def _made(self) -> tuple[tuple[HandlerSpec, Callable[[Any], Any]] | None, Failure | None]:
        """The handler, created now if it is not yet; or why it can't be."""
        assert self._spec is not None  # noqa: S101  prepare() came first
        if self._handler is None:
            wanted = self._wanted
            try:
                self._handler = self._spec.create(
                    wanted.options, pipeline=wanted.pipeline, data_dir=wanted.data_dir
                )
            except HandlerLoadError as error:
                return None, failure_of(error.__cause__ or error)
            except BaseException as error:  # noqa: BLE001  a worker catches everything
                return None, failure_of(error)
        return (self._spec, self._handler), None

    def run(self, job: Job) -> Result:
        """Calls the handler; never raises."""
        made, failure = self._made()
        return call(*made, job) if made else Result(failure=failure)

    async def run_async(self, job: Job) -> Result:
        """Calls an `async def` handler; raises only `asyncio.CancelledError`."""
        made, failure = self._made()
        return await call_async(*made, job) if made else Result(failure=failure)

    def close(self) -> str:
        """Calls the handler's `close()`, if it has one; one line if that failed."""
        if self._spec is None or self._handler is None:
            return ""
        failure = close(self._spec, self._handler)
        return failure.error if failure else ""

    async def close_async(self) -> str:
        """`close` for an `async def` handler."""
        if self._spec is None or self._handler is None:
            return ""
        failure = await close_async(self._spec, self._handler)
        return failure.error if failure else ""
