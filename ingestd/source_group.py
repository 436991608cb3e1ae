"""The sources of a daemon, side by side: built, started, waited for and closed together."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Literal, TextIO

from ingestd.base.errors import (
    ConfigError,
    Exit,
    HandlerLoadError,
    InputIncomplete,
    InputUnreadable,
)
from ingestd.base.logging import get_logger
from ingestd.journal.idempotency import KeyRule
from ingestd.journal.interface import Ledger
from ingestd.settings import KINDS
from ingestd.sources.base import SourceContext

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from socket import socket

    from ingestd.base.append import AppendCounts
    from ingestd.base.clock import Clock
    from ingestd.execution.validator import Validator
    from ingestd.host.process import Surroundings
    from ingestd.pipeline import Pipeline
    from ingestd.settings import ConfiguredSource, Settings
    from ingestd.sources.base import InputCounts, Source
    from ingestd.sources.http.headers import RequestTracer
    from ingestd.sources.progress import Progress, ProgressSnapshot
    from ingestd.sources.screening import ScreenedIntake

log = get_logger()

CLOSE_SECONDS = 5.0
"""How long a process that validates may take to end by itself."""


class RunningSource:
    """One source of a daemon.

    Args:
        configured: its settings.
        source: as it was built.
        pipelines: those for its records that name none: one, and those that its route names.

    Attributes:
        ended: there is no more input, and all of it is accepted or given up.
        incomplete: some of its input was given up, and why.
    """

    def __init__(
        self, configured: ConfiguredSource, source: Source, pipelines: Sequence[Pipeline]
    ) -> None:
        self.configured = configured
        self.source = source
        self.ended = False
        self.incomplete: InputIncomplete | None = None
        self._pipelines = pipelines
        self._before = self._ledgers()

    @property
    def state(self) -> Literal["running", "ended", "incomplete"]:
        """The state, for status."""
        if not self.ended:
            return "running"
        return "incomplete" if self.incomplete else "ended"

    def snapshot(self) -> ProgressSnapshot | None:
        """The numbers of this run; `None` for a server."""
        counts = self.source.counts()
        if counts is None:
            return None
        now, before = self._ledgers(), self._before
        from ingestd.sources.progress import ProgressSnapshot  # noqa: PLC0415  not for servers

        return ProgressSnapshot(
            lines=counts.records + counts.invalid,
            bytes=counts.bytes,
            accepted=now.accepted - before.accepted,
            processed=now.processed - before.processed,
            invalid=counts.invalid,
            dead=now.dead - before.dead,
            pending=now.pending,
            urls_done=counts.urls_done,
            urls_total=counts.urls_total,
            bytes_left=counts.bytes_left,
        )

    def _ledgers(self) -> Ledger:
        """The sum of the pipelines' ledgers."""
        return Ledger(*map(sum, zip(*(one.ledger for one in self._pipelines), strict=True)))

    def code(self) -> Exit:
        """The exit code for an input that was read to its end."""
        last = self.snapshot()
        if last is None:
            return Exit.OK
        unread = isinstance(self.incomplete, InputUnreadable)
        if self.incomplete is not None and not (unread and last.lines == last.invalid):
            return self.incomplete.exit_code
        if not unread and not last.is_fruitless:
            return Exit.OK
        log.error(
            "nothing_processed",
            source=self.configured.name,
            lines=last.lines,
            invalid=last.invalid,
            dead=last.dead,
        )
        return Exit.DATA


class SourceGroup:
    """All sources of a daemon. The calls come in the order of the methods.

    Args:
        settings: all of them.
        pipelines: by name, open.
        clock: gives the time.
        input_fd: standard input, for the one source that may read it.
        stderr: of the process, for progress and hints.
        sockets: listening ones that a service manager passed, for the one source that listens.
        is_interrupted: tells if a signal has asked the process to leave.
        on_request: see `SourceContext`.
        data_dir: the daemon's, for handlers.
        surroundings: the processes that validate records are started with.

    Attributes:
        all: the sources, in the order of the settings.
        progress: of the inputs that are read; `None` if there are none.

    Raises:
        ConfigError: something that the settings name is not what it should be.
    """

    def __init__(
        self,
        settings: Settings,
        pipelines: Mapping[str, Pipeline],
        *,
        clock: Clock,
        input_fd: int,
        stderr: TextIO,
        sockets: Sequence[socket],
        is_interrupted: Callable[[], bool],
        on_request: Callable[[str, str, int, float, str], None],
        data_dir: Path,
        surroundings: Surroundings,
    ) -> None:
        self._pipelines = pipelines
        self._validators = _validators_of(settings, data_dir, surroundings)
        self._screened = screens = _screened(settings, pipelines, self._validators)
        configured = settings.running_sources()
        _check_sockets(sockets, configured)
        self.all = []
        for one in configured:
            context = SourceContext(
                name=one.name,
                pipelines={**pipelines, **screens} if screens else pipelines,
                pipeline=one.pipeline,
                clock=clock,
                input_fd=input_fd,
                stderr=stderr,
                sockets=sockets if one.component.listens else (),
                is_interrupted=is_interrupted,
                on_request=on_request,
                screens=screens,
            )
            try:
                source = one.component.build(one.settings, context)
            except ConfigError as error:
                raise _of(one, error) from error
            fed = dict.fromkeys((one.pipeline, *one.routed))
            self.all.append(RunningSource(one, source, [pipelines[name] for name in fed]))
        self.progress: Progress | None = None
        if any(one.source.counts() is not None for one in self.all):
            from ingestd.sources.progress import Progress  # noqa: PLC0415  servers have none

            self.progress = Progress(self._snapshot, stderr, clock=clock)

    def trace(self, tracer: RequestTracer) -> None:
        """Has requests traced; before `start`."""
        for one in self.all:
            one.source.tracer = tracer

    async def start(self) -> None:
        """Starts all; if one cannot be, those before it are closed again.

        Raises:
            ConfigError: one cannot begin to take records.
        """
        started: list[Source] = []
        try:
            await self._start_validators()
            for one in self.all:
                await one.source.start()
                started.append(one.source)
        except BaseException as error:
            for source in started:
                await source.close()
            await self._end_validators()
            if isinstance(error, ConfigError) and not isinstance(error, HandlerLoadError):
                raise _of(one.configured, error) from error
            raise
        if self.progress is not None:
            self.progress.start()

    @property
    def addresses(self) -> list[str]:
        """The addresses that any of them listens at."""
        return [address for one in self.all for address in one.source.addresses]

    def running(self) -> dict[tuple[str, str], bool]:
        """Tells for each, by name and kind, if it is running, for metrics."""
        return {(one.configured.name, one.configured.kind): not one.ended for one in self.all}

    def numbers(self) -> dict[tuple[str, str], Mapping[str, float]]:
        """The numbers of each source, by name and kind, for metrics."""
        return {
            (one.configured.name, one.configured.kind): {
                **_read(one.source.counts()), **one.source.numbers(),
            }
            for one in self.all
        }  # fmt: skip

    def endpoints(self) -> dict[tuple[str, str], AppendCounts]:
        """The counts of each endpoint, by the name of its source and its own, for metrics."""
        return {
            (one.configured.name, name): counts
            for one in self.all
            for name, counts in one.source.endpoints().items()
        }

    def facts(self) -> dict[str, object]:
        """The kind of each and where its records come from, for the log line of a start."""
        facts = [{"source": one.configured.kind, **one.source.facts()} for one in self.all]
        if len(facts) == 1:
            return facts[0]
        names = [one.configured.name for one in self.all]
        return {"sources": dict(zip(names, facts, strict=True))}

    async def wait_finished(self) -> None:
        """Returns when every source has ended, so never while there is a server.

        Raises:
            IngestdError: the input of one could not be stored, and why.
        """
        follow = [asyncio.ensure_future(self._follow(one)) for one in self.all]
        try:
            await asyncio.gather(*follow)
        finally:
            for task in follow:
                task.cancel()

    async def _follow(self, one: RunningSource) -> None:
        try:
            await one.source.wait_finished()
        except InputIncomplete as error:
            one.incomplete = error  # what there is of it is finished all the same
        one.ended = True
        running = [other.configured for other in self.all if not other.ended]
        if not running:
            return
        last = one.snapshot()
        log.info("source_ended", source=one.configured.name, **(last.facts() if last else {}))
        for name, pipeline in self._pipelines.items():
            if one.configured.feeds(name) and not any(other.feeds(name) for other in running):
                pipeline.end_input()

    async def prepare(self, settings: Settings) -> Callable[[], None]:
        """Prepares a reload of all; see `Source.prepare`."""
        changes = []
        for one in self.all:
            try:
                changes.append(await one.source.prepare(settings.section_of(one.configured)))
            except ConfigError as error:
                raise _of(one.configured, error) from error

        def change() -> None:
            for each in changes:
                each()

        return change

    async def stop_taking(self, deadline: float) -> None:
        """Takes nothing new, and waits for what was taken; see `Source.stop_taking`."""
        await asyncio.gather(*(one.source.stop_taking(deadline) for one in self.all))

    async def close(self) -> None:
        """Ends everything of all of them that is still there."""
        for one in self.all:
            await one.source.close()
        for screened in self._screened.values():
            screened.close()
        await self._end_validators()

    async def _start_validators(self) -> None:
        starting = (one.start() for one in self._validators.values())
        for error in await asyncio.gather(*starting, return_exceptions=True):
            if error is not None:
                raise error

    async def _end_validators(self) -> None:
        deadline = asyncio.get_running_loop().time() + CLOSE_SECONDS
        await asyncio.gather(*(one.close(deadline) for one in self._validators.values()))

    async def report(self) -> None:
        """Sums the inputs up, and says where to go on with those that were left."""
        if self.progress is not None:
            await self.progress.stop()
        for one in self.all:
            one.source.report()

    def code(self) -> Exit:
        """The exit code for inputs that were all read to their end: the first that is not 0."""
        codes = [one.code() for one in self.all]
        return next((code for code in codes if code), Exit.OK)

    def _snapshot(self) -> ProgressSnapshot:
        """The sum over all inputs; a pipeline that several of them feed counts once."""
        from ingestd.sources.progress import ProgressSnapshot  # noqa: PLC0415  not for servers

        snapshots = {one: snapshot for one in self.all if (snapshot := one.snapshot())}
        read: Counter[str] = Counter()
        fed = {one.configured.pipeline: snapshot for one, snapshot in snapshots.items()}
        for snapshot in snapshots.values():
            read.update({key: getattr(snapshot, key) for key in ("lines", "bytes", "invalid")})
        for snapshot in fed.values():
            keys = ("accepted", "processed", "dead", "pending")
            read.update({key: getattr(snapshot, key) for key in keys})
        urls = [one for one in snapshots.values() if one.urls_total is not None]
        lefts = [one.bytes_left for one in snapshots.values()]
        known = [left for left in lefts if left is not None]
        return ProgressSnapshot(
            **read,
            urls_done=sum(one.urls_done or 0 for one in urls) if urls else None,
            urls_total=sum(one.urls_total or 0 for one in urls) if urls else None,
            bytes_left=sum(known) if len(known) == len(lefts) else None,
        )


def _validators_of(
    settings: Settings, data_dir: Path, surroundings: Surroundings
) -> dict[str, Validator]:
    """Validators of the pipelines whose records are validated before they are accepted."""
    validating = {
        name: one
        for name, one in settings.pipeline_settings().items()
        if one.handler.validate == "accept"
    }
    if not validating:
        return {}
    from ingestd.execution.build import make_validator  # noqa: PLC0415  few daemons have one

    return {
        name: make_validator(
            name, one.executor, one.handler, one.format,
            data_dir=data_dir, surroundings=surroundings,
        )
        for name, one in validating.items()
    }  # fmt: skip


def _screened(
    settings: Settings,
    pipelines: Mapping[str, Pipeline],
    validators: Mapping[str, Validator],
) -> dict[str, ScreenedIntake]:
    """The pipelines with validators or routes, as sources get them."""
    routes = {
        name: one.route for name, one in settings.pipeline_settings().items() if one.route.field
    }
    if not (routes or validators):
        return {}
    from ingestd.sources.screening import Router, ScreenedIntake  # noqa: PLC0415  few daemons

    return {
        name: ScreenedIntake(
            pipelines[name],
            validators.get(name),
            Router(routes[name].field, routes[name].to, routes[name].default)
            if name in routes
            else None,
            pipelines,
            validators,
        )
        for name in {**routes, **validators}
    }


def _read(counts: InputCounts | None) -> dict[str, float]:
    """The numbers of an input, by the names in `ingestd.base.scraped`."""
    if counts is None:
        return {}
    numbers = {
        "records": counts.records, "invalid": counts.invalid, "received_bytes": counts.bytes,
        "urls": counts.urls_total, "urls_done": counts.urls_done, "left_bytes": counts.bytes_left,
    }  # fmt: skip
    return {name: number for name, number in numbers.items() if number is not None}


def _check_sockets(sockets: Sequence[socket], configured: Sequence[ConfiguredSource]) -> None:
    listening = [one for one in configured if one.component.listens]
    if not sockets or len(listening) == 1:
        return
    if listening:
        names = ", ".join(one.key for one in listening)
        raise ConfigError(problem=f"a socket for records was passed, and several listen: {names}")
    kinds = ", ".join(one.kind for one in configured)
    raise ConfigError(problem=f"a socket for records was passed; source.kind is {kinds}")


def _of(configured: ConfiguredSource, error: ConfigError) -> ConfigError:
    """An error of a source, with its name where it has one of its own."""
    text = configured.told(str(error))
    return error if text == str(error) else ConfigError(problem=text)


def key_rule(settings: Settings) -> KeyRule:
    """The rule for idempotency keys: enough for each source that takes some.

    Without such a source keys are kept as the tables of the kinds say, for its next life. Ids are
    kept for all sources together.
    """
    sources = settings.running_sources()
    running = [need for one in sources if (need := one.component.keys(one.settings)) is not None]
    tables = [kind.keys(getattr(settings, name)) for name, kind in KINDS.items()]
    needs = [one for one in running if one.keys_max] or [
        one for one in tables if one is not None and one.keys_max
    ]
    return KeyRule(
        max(one.ttl for one in needs),
        max(one.keys_max for one in needs),
        signed_ttl=max(one.signed_ttl for one in needs),
        shared=len(needs) > 1 or any(one.shared for one in needs),
        ids_max=sum(one.ids_max for one in running) or max(one.ids_max for one in needs),
    )
