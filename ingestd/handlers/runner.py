"""Runs a worker's handler: loads and creates it once, calls it with job after job."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import threading
from functools import partial
from inspect import isawaitable
from itertools import islice
from os import getpid
from typing import TYPE_CHECKING, Any

import msgspec

from ingestd.base.errors import HandlerLoadError
from ingestd.handlers.call import (
    call,
    call_async,
    check_of,
    close,
    close_async,
    failure_from,
)
from ingestd.handlers.chain import Validation, load_configured
from ingestd.handlers.failure import failure_of
from ingestd.handlers.forked import ParentOnly, end_child
from ingestd.handlers.load import HandlerSpec
from ingestd.handlers.options import redactor
from ingestd.handlers.outcome import (
    FINDINGS_MAX,
    Failure,
    Rejection,
    Result,
    SinkFinding,
    flaw_of,
)
from ingestd.handlers.text import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ingestd.handlers.chain import ChainSpec
    from ingestd.handlers.outcome import Job

CLOSE_SECONDS = 5.0
"""How long a handler may take to close itself."""


class HandlerConfig(msgspec.Struct, frozen=True):
    """Configuration of a worker: its handler, options, format and pipeline.

    Attributes:
        target: `module:name` or a registered name.
        options: the handler's options.
        record_format: json, text or bytes.
        executor: thread, process or async; auto while it is not known whether the handler is
            async.
        pipeline: its name.
        data_dir: the daemon's data directory; its name need not be UTF-8.
        transform: `module:callable` in front of the handler; empty for none.
        targets: handlers instead of `target`; `options` has a table for each.
        validates: no handler is made and called: records are decoded alone.
    """

    target: str
    options: dict[str, Any]
    record_format: str
    executor: str
    pipeline: str
    data_dir: bytes
    transform: str = ""
    targets: tuple[str, ...] = ()
    validates: bool = False


class Runner:
    """Loads and calls the handler of one worker. Not for use by two threads at once.

    A handler class whose constructor fails (its database is down, say) does not stop the daemon:
    each job tries to create it again, and fails like any other job until that succeeds. An instance
    whose call raised is closed, and the next job gets a new one: its connection may be broken.

    Args:
        wanted: the handler.
        report: gets one line when an instance that is replaced did not close as it should.

    Attributes:
        spoiled: an instance waits for `renew`.
    """

    def __init__(
        self, wanted: HandlerConfig, report: Callable[[str], None] = lambda _: None
    ) -> None:
        self._wanted = wanted
        self._report = report
        self._spec: HandlerSpec | ChainSpec | None = None
        self._handler: Callable[[Any], Any] | None = None
        self._redact: Callable[[str], str] = str
        self.spoiled = False

    @property
    def is_async(self) -> bool:
        """Returns True if calls have to be awaited; `prepare` comes first."""
        return self._spec is not None and self._spec.is_async

    @property
    def schema(self) -> bytes:
        """See `Validation.schema`; empty where a handler is called."""
        found = self._spec.found if isinstance(self._spec, HandlerSpec) else None
        return found.schema if isinstance(found, Validation) else b""

    def prepare(self) -> str:
        """Loads the handler and tries to create it.

        With the executor `auto` one that is async is not created: it will run elsewhere.

        Returns:
            One line about a constructor that failed, or nothing.

        Raises:
            HandlerLoadError: it can't be loaded, or does not take its options.
        """
        wanted = self._wanted
        with ParentOnly():
            spec = load_configured(wanted)
            spec.check_options(wanted.options)
            self._spec = spec
            self._redact = redactor(spec.secrets_of(wanted.options))
            if spec.is_async and wanted.executor == "auto":
                return ""
            _, failure = self._made()
        return self._redact(failure.error) if failure else ""

    def check(self) -> list[SinkFinding]:
        """Findings of the handler's `check()`, if it has one; raises nothing.

        A check that fails is a finding, and so is a handler that cannot be made.
        """
        found: list[SinkFinding] = []
        try:
            with ParentOnly():
                if look := self._look(found):
                    found += islice(look() or (), FINDINGS_MAX)
        except BaseException as error:  # noqa: BLE001  a sink that is down, say
            found.append(SinkFinding("error", failure_from(error).error))
        return self._told(found)

    async def check_async(self) -> list[SinkFinding]:
        """`check` for an `async def` handler, whose `check` may be async or not.

        Raises:
            asyncio.CancelledError: this task was cancelled.
        """
        from asyncio import CancelledError  # noqa: PLC0415  other workers do without

        found: list[SinkFinding] = []
        try:
            if look := self._look(found):
                given = look()
                found += islice((await given if isawaitable(given) else given) or (), FINDINGS_MAX)
        except CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001
            found.append(SinkFinding("error", failure_from(error).error))
        return self._told(found)

    def _look(self, found: list[SinkFinding]) -> Callable[[], Any] | None:
        made, failure = self._made()
        if failure is not None:
            found.append(SinkFinding("error", failure.error))
        return check_of(*made) if made is not None else None

    def _told(self, found: list[SinkFinding]) -> list[SinkFinding]:
        told = []
        for one in found:
            if isinstance(one, SinkFinding) and one.level in _LEVELS:
                told.append(SinkFinding(one.level, plain(self._redact(str(one.text)))))
            else:
                problem = "the handler's check() gives something that is no SinkFinding"
                told.append(SinkFinding("warning", problem))
        return told

    def _made(
        self,
    ) -> tuple[tuple[HandlerSpec | ChainSpec, Callable[[Any], Any]] | None, Failure | None]:
        """The handler, created now if it is not yet; or why it can't be."""
        assert self._spec is not None  # noqa: S101  prepare() came first
        if self._handler is None:
            wanted = self._wanted
            try:
                self._handler = self._spec.create(
                    # A copy: an instance may change its options, and the next one gets them too.
                    copy.deepcopy(wanted.options),
                    pipeline=wanted.pipeline,
                    data_dir=os.fsdecode(wanted.data_dir),
                )
            except HandlerLoadError as error:
                return None, failure_from(error.__cause__ or error)
            except BaseException as error:  # noqa: BLE001  a worker catches everything
                return None, failure_from(error)
        return (self._spec, self._handler), None

    def run(self, job: Job) -> Result:
        """Calls the handler; never raises."""
        if job.traceparent:
            with _current_span(job.traceparent):
                return self._run(job)
        return self._run(job)

    def _run(self, job: Job) -> Result:
        if self.spoiled:
            self.renew()
        process = getpid()
        try:
            made, failure = self._made()
            result = call(*made, job) if made else Result(failure=failure)
        except BaseException as error:  # noqa: BLE001
            if getpid() != process:
                end_child(error)
            result = Result(failure=failure_of(error))
        result = self._looked_at(result, job)
        if getpid() != process:  # as `ParentOnly`, which costs a batch of one record too much
            end_child(None)
        return result

    async def run_async(self, job: Job) -> Result:
        """Calls an `async def` handler; raises only `asyncio.CancelledError`."""
        from asyncio import CancelledError  # noqa: PLC0415  other workers do without

        await self.renew_async()
        try:
            with ParentOnly():
                made, failure = self._made()
                result = await call_async(*made, job) if made else Result(failure=failure)
        except CancelledError:
            self._spoil()
            raise
        except BaseException as error:  # noqa: BLE001
            result = Result(failure=failure_of(error))
        return self._looked_at(result, job)

    def _looked_at(self, result: Result, job: Job) -> Result:
        if result.failure is None and not (result.rejections or result.retries):
            return result  # all is done
        if self._redact is not str:
            result = self._redacted(result)
        if flaw := flaw_of(result, job.records.count):
            error = f"the handler reached into its batch: {flaw}"
            result = Result(failure=Failure("raised", error))
        if result.failure is not None and not result.failure.is_asked:
            self._spoil()
        return result

    def _redacted(self, result: Result) -> Result:
        """The result with no secret of the options in anything that is told."""
        redact, failure = self._redact, result.failure
        if failure is not None:
            told = redact(failure.error), redact(failure.traceback)
            failure = Failure(failure.reason, *told, failure.after)
        return Result(
            [Rejection(one.index, one.reason, redact(one.error)) for one in result.rejections],
            [msgspec.structs.replace(one, error=redact(one.error)) for one in result.retries],
            failure,
            result.seconds,
            result.runs,
        )

    def _spoil(self) -> None:
        # A function stays, and so does an object of the module's: neither was made by us.
        self.spoiled = self._handler is not None and self._spec is not None and self._spec.is_class

    def renew(self) -> None:
        """Closes an instance whose call raised; the next job creates another one.

        `run` does it if it was not done before: the sooner, the sooner its connection is closed.
        """
        if not self.spoiled:
            return
        overran = threading.Timer(CLOSE_SECONDS, self._report, (_OVERRAN,))
        overran.daemon = True
        overran.start()
        try:
            failed = self.close()
        finally:
            overran.cancel()
        self._forget(failed)

    async def renew_async(self) -> None:
        """`renew` for an `async def` handler; one that takes too long is given up."""
        import asyncio  # noqa: PLC0415

        if not self.spoiled:
            return
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                failed = await self.close_async()
        except TimeoutError:
            failed = _OVERRAN
        self._forget(failed)

    def _forget(self, failed: str) -> None:
        self._handler, self.spoiled = None, False
        if failed:
            self._report(failed)

    def close(self) -> str:
        """Calls the handler's `close()`, if it has one; one line if that failed."""
        if self._spec is None or self._handler is None:
            return ""
        failure = close(self._spec, self._handler)
        return self._redact(failure.error) if failure else ""

    async def close_async(self) -> str:
        """`close` for an `async def` handler."""
        if self._spec is None or self._handler is None:
            return ""
        failure = await close_async(self._spec, self._handler)
        return self._redact(failure.error) if failure else ""


_LEVELS = frozenset({"error", "warning", "info"})


@contextlib.contextmanager
def _current_span(traceparent: str) -> Iterator[None]:
    """Makes the span of a call the current one of OpenTelemetry, if the handler has imported that.

    In a thread of the daemon it is: such a thread runs in the context in which the span was begun.
    """
    leave: Callable[[], object] = bool
    if "opentelemetry.trace" in sys.modules:
        with contextlib.suppress(Exception):  # of a version that does it in another way
            leave = _entered(traceparent)
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            leave()


def _entered(traceparent: str) -> Callable[[], object]:
    from opentelemetry import context, trace  # noqa: PLC0415  the handler has
    from opentelemetry.trace.propagation import tracecontext  # noqa: PLC0415

    current = trace.get_current_span().get_span_context()
    if f"-{trace.format_span_id(current.span_id)}-" in traceparent[35:]:
        return bool
    extract = tracecontext.TraceContextTextMapPropagator().extract
    return partial(context.detach, context.attach(extract({"traceparent": traceparent})))


_OVERRAN = f"it was not done after {CLOSE_SECONDS:g} s"
