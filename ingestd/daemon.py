"""The life of the process, in order: start, serve, drain, leave. READ FIRST, with `pipeline.py`.

The daemon owns everything that lives longer than a request: the lock on the data directory, the
pipelines, the sources, the admin server. Each step below is one method of `Daemon`, called from
`run` in life order.
"""

from __future__ import annotations

import asyncio
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import async_timeout

from ingestd import __version__
from ingestd.admin.server import AdminServer
from ingestd.admin.status import Status, stages_of, status_of, status_of_source
from ingestd.base.clock import SystemClock
from ingestd.base.errors import (
    Exit,
    IngestdError,
    JournalFailed,
)
from ingestd.base.logging import get_logger, start_logging
from ingestd.base.metrics import Metrics, RouteMetrics
from ingestd.base.watchdog import Liveness
from ingestd.handlers.runner import CLOSE_SECONDS
from ingestd.host.data_dir import DataDir
from ingestd.host.process import (
    Forks,
    Signals,
    Surroundings,
    keep_settled,
    own_stderr,
    settle_interpreter,
    settle_memory,
)
from ingestd.host.systemd import ListenFds, Notifier, ServiceNotifier, ServiceState
from ingestd.pipeline import DrainReport, Pipeline
from ingestd.settings import plan_reload
from ingestd.source_group import SourceGroup, key_rule

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping
    from pathlib import Path

    from ingestd.base.logging import LogWriter
    from ingestd.settings import Settings

    Effective = Callable[[Settings], Iterable[tuple[str, object, str]]]

log = get_logger()

LAG_SECONDS = 0.5
"""How often the loop's lag is measured."""
JOURNAL_SECONDS = 5.0
"""How long, beyond the drain's own deadline, a disk may take to write what is left and tidy up."""
LEAVING = CLOSE_SECONDS + 2 * JOURNAL_SECONDS
"""How long leaving may take after the drain; the service manager shall wait so long."""


def serve(
    settings: Settings,
    *,
    again: Callable[[Settings], Settings] | None = None,
    effective: Effective | None = None,
    config: str = "",
    notifier: Notifier | None = None,
    passed: ListenFds | None = None,
    input_fd: int = 0,
) -> int:
    """Runs a daemon until it has left.

    Args:
        settings: all of them.
        again: loads them again, for a reload; called with those in effect.
        effective: gives key, value and origin of each of them, secrets masked.
        config: the file that they were read from, for the log; empty for none.
        notifier: the service manager, if there is one.
        passed: sockets that it has opened.
        input_fd: standard input, for the sources that read it.

    Returns:
        The exit code. The caller ends the process, see `base/process.py`: threads may still run.
    """
    listens = any(one.component.listens for one in settings.running_sources())
    settle_interpreter(for_strangers=listens)
    writer = start_logging(settings.log.level, settings.log.format)
    passed = passed or ListenFds([], [])
    daemon = Daemon(
        settings,
        writer,
        again=again,
        effective=effective,
        config=config,
        notifier=notifier or Notifier(),
        passed=passed,
        input_fd=input_fd,
    )
    # Not closed: that waits for threads which may hang, on a disk for example.
    runner = asyncio.Runner(loop_factory=_loop_factory())
    try:
        return runner.run(daemon.run())
    finally:
        passed.close()
        writer.close(1.0)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop  # noqa: PLC0415  not on every platform
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


class Daemon:
    """One daemon, for one life.

    Args:
        settings: all of them; each part gets only its own.
        writer: the log's, for the metric of dropped lines and the level.
        again: loads the settings again; called with those in effect.
        effective: gives key, value and origin of each of them, secrets masked.
        config: the file that they were read from, for the log; empty for none.
        notifier: the service manager.
        passed: sockets that it has opened; the servers close them.
        input_fd: standard input, for the sources that read it.
    """

    def __init__(
        self,
        settings: Settings,
        writer: LogWriter,
        *,
        again: Callable[[Settings], Settings] | None,
        effective: Effective | None = None,
        config: str = "",
        notifier: Notifier,
        passed: ListenFds,
        input_fd: int = 0,
    ) -> None:
        self.settings = settings
        self._input_fd = input_fd
        self._surroundings = Surroundings.now()
        self._stderr = own_stderr()
        self._writer = writer
        self._again = again
        self._effective = effective or (lambda _: ())
        self._config = config
        self._passed = passed
        self._service = ServiceNotifier(notifier)
        self._liveness = Liveness()
        self._hung = ""
        self._leave_by: float | None = None  # loop time
        self._clock = SystemClock()
        self._state: Literal["starting", "running", "draining"] = "starting"
        self._started_at = time.monotonic()
        self._metrics = Metrics(__version__)
        self._failure: BaseException | None = None
        self._input_ended = False
        self._deadline = 0.0  # of the drain, loop time
        self._routes: dict[str, RouteMetrics] = {}
        self._metrics.watch_log(lambda: writer.lines_lost)
        self._metrics.watch(lambda: {name: status_of(p) for name, p in self.pipelines.items()})
        self._metrics.watch_workers(
            lambda: {name: p.dispatcher.sinks for name, p in self.pipelines.items()},
            lambda: {name: p.dispatcher.memory() for name, p in self.pipelines.items()},
        )
        self.pipelines: dict[str, Pipeline] = {}
        self._adopting: list[asyncio.Future[None]] = []
        self._stop_adopting = asyncio.Event()

    async def run(self) -> int:
        """The whole life.

        Returns:
            The exit code.

        Raises:
            IngestdError: it could not start; everything that was started is closed again.
        """
        self._signals = Signals()
        self._signals.install()
        asyncio.get_running_loop().set_exception_handler(_callback_failed)
        data_dir = DataDir(self.settings.data_dir)
        forks = Forks(self.settings.data_dir, [self._input_fd] if self._input_fd else [])
        forks.listen(self._addresses)
        if data_dir.is_open:
            # It was there before, and may be shared on purpose; what is in it is private.
            log.warning("data_directory_readable", path=str(data_dir.path), should_be="mode 0700")
        watch = asyncio.ensure_future(self._watch())
        try:
            await self._start_unless_urged(data_dir)
            reason = await self._serve()
            await self._drain(reason)
            return await self._leave()
        finally:
            watch.cancel()
            data_dir.close()
            forks.forget()

    def _addresses(self) -> list[str]:
        """The listen addresses."""
        return [
            *((getattr(self, "admin", None) and self.admin.addresses) or ()),
            *getattr(getattr(self, "sources", None), "addresses", ()),
        ]

    # -- start ---------------------------------------------------------------------------------

    async def _start_unless_urged(self, data_dir: DataDir) -> None:
        """A signal leaves even while a handler is being imported, or a disk does not answer.

        The first one as soon as the start is through, or at the drain's deadline; the second one
        at once.
        """
        start = asyncio.ensure_future(self._start(data_dir))
        left = asyncio.ensure_future(self._asked_for_long())
        await asyncio.wait({start, left}, return_when=asyncio.FIRST_COMPLETED)
        left.cancel()
        if not start.done():
            log.warning("start_abandoned")
            self._writer.close(1.0)
            os._exit(Exit.OK)  # nothing was accepted in this life; workers end with us
        await start

    async def _asked_for_long(self) -> None:
        await self._signals.stop_requested.wait()
        timeout = self._drain_timeout()
        log.info("start_interrupted", timeout=timeout, second_signal="leaves at once")
        try:
            async with async_timeout.timeout(timeout):
                await self._signals.force_requested.wait()
        except TimeoutError:
            pass

    def _drain_timeout(self) -> float:
        """The longest of the pipelines'."""
        return max(s.drain.timeout for s in self.settings.pipeline_settings().values())

    async def _start(self, data_dir: DataDir) -> None:
        """Admin first, so that a long recovery can be watched; sources last: then it is ready."""
        self.admin = AdminServer(
            self.settings.admin,
            self,
            self._metrics,
            sockets=self._passed.admin,
            hooks=self.settings.hooks,
            traces=self.settings.traces,
        )
        opened: list[Callable[[], Awaitable[object]]] = []
        try:
            opened.append(self.admin.close)
            await self.admin.start()
            for name in self.settings.pipeline_settings():
                pipeline = self._build(name, data_dir.folder(name))
                await pipeline.open()
                opened.append(partial(self._close_pipeline, pipeline))
                self.pipelines[name] = pipeline
            self.sources = SourceGroup(
                self.settings,
                self._own,
                clock=self._clock,
                input_fd=self._input_fd,
                stderr=self._stderr,
                sockets=self._passed.records,
                is_interrupted=self._signals.stop_requested.is_set,
                on_request=self._answered,
                data_dir=data_dir.path,
                surroundings=self._surroundings,
            )
            if self.admin.traces is not None:
                self.sources.trace(self.admin.traces.requests)
            sources = self.sources
            self._metrics.watch_sources(sources.running, sources.numbers, sources.endpoints)
            await self.sources.start()
        except BaseException:
            for close in reversed(opened):
                await close()
            raise
        self._state = "running"
        self._adopting = [
            asyncio.ensure_future(
                group.run(self.pipelines, partial(self._build, name), self._stop_adopting)
            )
            for name, one in self._own.items()
            if (group := one.journal.group) is not None
        ]
        self._service.ready()
        if self.sources.progress is not None:
            self._writer.above_live = self.sources.progress.is_live
        log.info(
            "daemon_started",
            version=__version__,
            pid=os.getpid(),
            config=self._config,
            **self.sources.facts(),
            admin=self.admin.addresses,
            data_dir=str(self.settings.data_dir),
            pipelines=list(self.pipelines),
            executors={name: one.dispatcher.executor for name, one in self.pipelines.items()},
        )
        for _, problem in self.settings.unread():
            log.warning("settings_unread", problem=problem)

    def _build(self, name: str, folder: Path, log: str = "", table: object = None) -> Pipeline:
        """Builds a pipeline, not opened yet.

        Args:
            name: of its settings.
            folder: of its journal.
            log: of another daemon, which it adopts.
            table: the settings of the journal kind for that.
        """
        settings = self.settings.pipeline_settings()[name]
        if log:
            journal = settings.journal.model_copy(update={settings.journal.kind: table})
            settings = settings.model_copy(update={"journal": journal})
        pipeline = Pipeline(
            f"{name}@{log}" if log else name,
            settings,
            folder=folder,
            data_dir=self.settings.data_dir,
            metrics=self._metrics.pipeline(name),
            clock=self._clock,
            keys=key_rule(self.settings),
            surroundings=self._surroundings,
        )
        if self.admin.traces is not None and not log:
            self.admin.traces.follow(pipeline)  # to the end of the daemon
        return pipeline

    @property
    def _own(self) -> dict[str, Pipeline]:
        """The pipelines of the settings; others (`NAME@LOG`) work on adopted logs."""
        return {name: one for name, one in self.pipelines.items() if "@" not in name}

    async def _close_pipeline(self, pipeline: Pipeline) -> None:
        await pipeline.end_workers(self._in(CLOSE_SECONDS))
        await pipeline.close_journal(self._in(JOURNAL_SECONDS))

    # -- serve ---------------------------------------------------------------------------------

    async def _serve(self) -> str:
        """Turns until a signal, the end of input, or a pipeline that broke; says which."""
        settle_memory()
        asked = asyncio.ensure_future(self._signals.stop_requested.wait())
        ended = asyncio.ensure_future(self.sources.wait_finished())
        lag = asyncio.ensure_future(self._measure_lag())
        reloads = asyncio.ensure_future(self._reload_when_asked())
        broken = {pipeline.broken for pipeline in self._own.values()}
        ends: set[asyncio.Future[Any]] = {asked, ended, *broken}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if any(one.done() for one in broken):
                return "failure"
            error = ended.exception() if ended.done() else None
            if error is not None:
                log.error("source_failed", error=str(error), exc_info=error)
                self._failure = error
                return "failure"
            return self._signals.name if asked.done() else "end of input"
        finally:
            for task in (asked, ended, lag, reloads):
                task.cancel()

    async def _reload_when_asked(self) -> None:
        """SIGHUP, also one that came during the start; those that come at once are one."""
        while True:
            await self._signals.reload_requested.wait()
            self._signals.reload_requested.clear()
            self._service.reloading()
            try:
                await self._reload()
            except IngestdError as error:
                log.error("reload_refused", error=str(error))  # noqa: TRY400  it is one line
            except Exception:
                log.exception("reload_refused")
            finally:
                self._service.ready()

    async def _reload(self) -> None:
        """Reads the settings anew, and the files that they name; takes of them what can change.

        Raises:
            IngestdError: something is wrong with any of it, and everything stays as it is.
        """
        new = self.settings
        if self._again is not None:
            new = await asyncio.get_running_loop().run_in_executor(None, self._again, new)
        settings, changed, needs_restart = plan_reload(self.settings, new)
        changes = [self.admin.prepare(settings.admin), await self.sources.prepare(settings)]
        for change in changes:
            change()
        # From here on nothing can be wrong any more.
        self.settings = settings
        self._writer.set_level(settings.log.level)
        for name, pipeline in settings.pipeline_settings().items():
            self.pipelines[name].reload(pipeline.batch, key_rule(settings))
        log.info("reloaded", changed=changed, needs_restart=needs_restart)

    # -- drain ---------------------------------------------------------------------------------

    async def _drain(self, reason: str) -> None:
        """Not ready; serve on for the delay; stop taking; finish what was taken."""
        self._state = "draining"
        self._service.stopping()
        self._stop_adopting.set()
        self._input_ended = reason == "end of input"
        if self._input_ended:
            # Everything was accepted; a signal gives the work its usual deadline.
            pending = sum(p.ledger.pending for p in self._own.values())
            log.info("input_ended", pending=pending, waits="until all is settled, without deadline")
            work = asyncio.gather(*(p.drain(None) for p in self._own.values()))
            await self._race(work, self._signals.stop_requested)
            if not self._signals.stop_requested.is_set():
                return
            reason = self._signals.name
        again = {"second_signal": "leaves at once"} if reason.startswith("SIG") else {}
        log.info("drain_started", reason=reason, timeout=self._drain_timeout(), **again)
        if reason == "failure":
            return
        if self.settings.drain.delay and not self._input_ended:
            self._leave_by = self._in(self.settings.drain.delay + self._drain_timeout() + LEAVING)
            await self._race(
                asyncio.sleep(self.settings.drain.delay), self._signals.force_requested
            )
        timeouts = {n: s.drain.timeout for n, s in self.settings.pipeline_settings().items()}
        began = asyncio.get_running_loop().time()
        self._deadline = began + self._drain_timeout()
        self._leave_by = self._deadline + LEAVING
        await self._race(self.sources.stop_taking(self._deadline), self._signals.force_requested)
        work = asyncio.gather(
            *(p.drain(began + timeouts[n.partition("@")[0]]) for n, p in self.pipelines.items())
        )
        await self._race(work, self._signals.force_requested)

    async def _race(self, work: Awaitable[Any], stop: asyncio.Event) -> None:
        """Waits for the work, or stops waiting when the event comes or a pipeline breaks."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(stop.wait())
        ends: set[asyncio.Future[Any]] = {task, stopped}
        ends |= {pipeline.broken for pipeline in self._own.values()}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            if not task.done():
                task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    # -- leave ---------------------------------------------------------------------------------

    async def _leave(self) -> int:
        """Closes everything, reports, and says how it went."""
        self._signals.remove()
        self._leave_by = max(self._in(0.0), self._deadline) + LEAVING
        await self.sources.close()
        if self._adopting:  # one that is just being opened can't be hurried
            await asyncio.wait(self._adopting, timeout=JOURNAL_SECONDS)
        grace = 0.0 if self._signals.force_requested.is_set() else CLOSE_SECONDS
        # All at once, and one deadline for all.
        closing = self._in(grace)
        await asyncio.gather(*(one.end_workers(closing) for one in self.pipelines.values()))
        # One after the other, but one deadline for all: they may well lie on the same disk. It
        # counts from here: the time that a handler takes to close is not the disk's.
        give_up = max(self._in(JOURNAL_SECONDS), self._deadline)
        reports = {
            # One that is adopted may still come or go.
            name: await pipeline.close_journal(give_up)
            for name, pipeline in [*self.pipelines.items()]
        }
        await self.sources.report()
        await self.admin.close(urged=not grace)
        for name, report in reports.items():
            _log_report(name, report)
        code = self._exit_code(reports) or (self.sources.code() if self._input_ended else Exit.OK)
        log.info("daemon_left", code=int(code))
        return int(code)

    def _exit_code(self, reports: Mapping[str, DrainReport]) -> Exit:
        errors = [p.broken.exception() for p in self._own.values() if p.broken.done()]
        for error in (*errors, self._failure):
            if isinstance(error, JournalFailed):
                log.error("journal_failed", error=str(error))
            if error is not None:
                return error.exit_code if isinstance(error, IngestdError) else Exit.UNEXPECTED
        for name in self._own:
            report = reports[name]
            lost = report.ledger.pending and not report.durable
            if lost or not (report.balanced and report.written):
                return Exit.LOST
        return Exit.OK

    # -- what others may know ------------------------------------------------------------------

    def ready(self) -> tuple[bool, str]:
        """See `AdminView.ready`."""
        if self._state != "running":
            return False, self._state
        for name, pipeline in self._own.items():
            if pipeline.broken.done():
                return False, f"pipeline {name} is broken"
            space = pipeline.auditor.free_space()
            if space is not None and space.low:
                why = space.refusal or f"on its disk {space.shortage}"
                return False, f"pipeline {name} takes no records: {why}"
        return True, "ready"

    def alive(self) -> tuple[bool, str]:
        """See `AdminView.alive`."""
        return not self._hung, self._hung or "alive"

    def status(self) -> Status:
        """See `AdminView.status`."""
        return Status(
            state=self._state,
            version=__version__,
            uptime_seconds=round(time.monotonic() - self._started_at, 3),
            pipelines={name: status_of(pipeline) for name, pipeline in self.pipelines.items()},
            sources={
                one.configured.name: status_of_source(one)
                for one in (self.sources.all if self._state != "starting" else ())
            },
        )

    def effective_settings(self) -> Iterable[tuple[str, object, str]]:
        """See `AdminView.effective_settings`."""
        return self._effective(self.settings)

    def _answered(self, route: str, pipeline: str, status: int, seconds: float, slug: str) -> None:
        """Counts an answer of the http source."""
        counted = self._routes.get(route)
        if counted is None:
            counted = self._routes[route] = self._metrics.route(route)
        counted.answered(status, seconds)
        if pipeline and status in (429, 503):
            self._metrics.pipeline(pipeline).request_refused(slug)

    async def _watch(self) -> None:
        """Looks whether everything moves, and tells the service manager; to the very end."""
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            # A pipeline that is being opened is none yet.
            self._liveness.look((s for p in self.pipelines.values() for s in stages_of(p)), now)
            hung, self._hung = self._hung, self._liveness.hung()
            if self._hung and not hung:
                log.error("pipeline_hung", problem=self._hung)
            self._service.turn(self._standing(), now)
            self._signals.keep()
            keep_settled()
            await asyncio.sleep(self._service.period)

    def _standing(self) -> ServiceState:
        ledgers = [pipeline.ledger for pipeline in self.pipelines.values()]
        return ServiceState(
            self._state,
            self._hung,
            self._leave_by,
            accepted=sum(ledger.accepted for ledger in ledgers),
            processed=sum(ledger.processed for ledger in ledgers),
            pending=sum(ledger.pending for ledger in ledgers),
        )

    async def _measure_lag(self) -> None:
        """Measures how late the loop wakes up, for a handler's thread or a long callback."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_SECONDS
            await asyncio.sleep(LAG_SECONDS)
            self._metrics.loop_lag.set(max(0.0, loop.time() - due))

    def _in(self, seconds: float) -> float:
        return asyncio.get_running_loop().time() + seconds


def _callback_failed(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Logs errors of the loop, without `logging`."""
    error = context.get("exception")
    log.error("callback_failed", message=str(context.get("message")), exc_info=error or False)


def _log_report(name: str, report: DrainReport) -> None:
    """The four numbers of promise 2, and whether they add up."""
    write = log.info if report.balanced else log.error
    write(
        "drained" if not report.ledger.pending else "drained_partly",
        pipeline=name,
        accepted=report.ledger.accepted,
        processed=report.ledger.processed,
        dead=report.ledger.dead,
        pending=report.ledger.pending,
        invalid=report.ledger.invalid,  # kept without being accepted
        balanced=report.balanced,
        workers_gone=report.workers_gone,
    )
    if not report.written:
        log.error("journal_stuck", pipeline=name)
    if not report.balanced:
        log.error("ledger_mismatch", pipeline=name, counted=report.counted)
