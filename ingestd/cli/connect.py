"""`ingestd check --connect`: what sinks, disk, journals and certificates say; one line a finding.

Nothing is created but one file without a name in the data directory, for the probe of its disk.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Literal

import msgspec

from ingestd.base.errors import IngestdError
from ingestd.cli.output import fail

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ingestd.handlers.outcome import SinkFinding
    from ingestd.handlers.runner import HandlerConfig, Runner
    from ingestd.http.settings import TlsSettings
    from ingestd.settings import Settings

SYNCS = 20
SYNC_BYTES = 4096
FREE_SYNC_SECONDS = 5e-6
"""A sync that is quicker reached no disk, nor the cache of one that survives power failures."""
SLOW_SYNC_SECONDS = 0.05


class ConnectFinding(msgspec.Struct, frozen=True):
    """One finding.

    Attributes:
        about: `pipeline NAME`, `data_dir` or the table of a source.
        level: `error`: it cannot work like this; `warning`: a promise does not hold, or soon will
            not; `info`.
        text: one line without a secret.
    """

    about: str
    level: Literal["error", "warning", "info"]
    text: str


def sink_findings(name: str, config: HandlerConfig) -> Iterator[ConnectFinding]:
    """Asks the handler of a pipeline, if it has a `check()`.

    Args:
        name: of the pipeline.
        config: of its workers.
    """
    from ingestd.handlers.runner import Runner  # noqa: PLC0415  loads handlers

    runner = Runner(config, fail)
    runner.prepare()
    findings = asyncio.run(_checked(runner)) if runner.is_async else runner.check()
    if not runner.is_async:
        runner.close()
    for one in findings:
        yield ConnectFinding(f"pipeline {name}", one.level, one.text)


async def _checked(runner: Runner) -> list[SinkFinding]:
    findings = await runner.check_async()
    await runner.close_async()
    return findings


def source_findings(settings: Settings) -> Iterator[ConnectFinding]:
    """Asks what the sources read from, as far as they read from something that can be asked."""
    for source in settings.running_sources():
        try:
            for one in source.component.findings(source.settings):
                yield ConnectFinding(source.key, one.level, one.text)
        except IngestdError as error:
            yield ConnectFinding(source.key, "error", str(error))


def disk_findings(settings: Settings) -> Iterator[ConnectFinding]:
    """Looks at the data directory: its rights, free space, syncs, and the journals in it."""
    pipelines = settings.pipeline_settings()
    stored = {name: one.journal for name, one in pipelines.items() if one.journal.kind == "sqlite"}
    folder = settings.data_dir
    if not folder.exists():
        yield ConnectFinding("data_dir", "info", f"{folder} does not exist; run makes it")
        folder = next(one for one in folder.parents if one.exists())
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        problem = "is no folder" if not folder.is_dir() else "cannot be written by this user"
        yield ConnectFinding("data_dir", "error", f"{folder} {problem}")
        return
    for name, journal in stored.items():
        yield _free_space(name, folder, journal.free_min)
    if stored:
        yield _syncs(folder)
        yield from _journals(settings.data_dir)


def journal_findings(settings: Settings) -> Iterator[ConnectFinding]:
    """Asks the stores of journals that lie beyond this machine."""
    from ingestd.journal.settings import JournalKind  # noqa: PLC0415  its models
    from ingestd.registry import JOURNALS  # noqa: PLC0415

    asked = dict[str, str]()
    for name, pipeline in settings.pipeline_settings().items():
        journal = pipeline.journal
        kind = JOURNALS.load(journal.kind)
        if not (isinstance(kind, type) and issubclass(kind, JournalKind)):
            continue
        if (same := asked.setdefault(repr(journal.own), name)) != name:
            text = f"its journal lies where that of pipeline {same} does"
            yield ConnectFinding(f"pipeline {name}", "info", text)
            continue
        for level, text in asyncio.run(kind().check(journal.own)):
            yield ConnectFinding(f"pipeline {name}", level, text)


def _free_space(name: str, folder: Path, free_min: int) -> ConnectFinding:
    from ingestd.journal.disk_space import free_bytes, scaled  # noqa: PLC0415

    free, least = free_bytes(folder), scaled(free_min, folder)
    text = f"{free >> 20:,} MiB of its disk are free, journal.free_min is {least >> 20:,} MiB"
    if free < least:
        return ConnectFinding(f"pipeline {name}", "error", f"{text}: no record is accepted")
    level: Literal["warning", "info"] = "warning" if free < 2 * least else "info"
    return ConnectFinding(f"pipeline {name}", level, text)


def _syncs(folder: Path) -> ConnectFinding:
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            seconds = [_sync(file.fileno()) for _ in range(SYNCS)]
    except OSError as error:
        return ConnectFinding("data_dir", "error", f"cannot be written: {error.strerror}")
    median, worst = statistics.median(seconds), max(seconds)
    text = f"{SYNCS} syncs of 4 KiB: {_ms(median)} at the median, {_ms(worst)} at most"
    if median < FREE_SYNC_SECONDS:
        text += "; that is too quick for a disk: accepted records may not survive a power failure"
        return ConnectFinding("data_dir", "warning", text)
    if median > SLOW_SYNC_SECONDS:
        return ConnectFinding("data_dir", "warning", f"{text}; every answer waits for one")
    return ConnectFinding("data_dir", "info", text)


def _sync(descriptor: int) -> float:
    os.write(descriptor, bytes(SYNC_BYTES))
    started = time.perf_counter()
    os.fdatasync(descriptor)
    return time.perf_counter() - started


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"


def _journals(data_dir: Path) -> Iterator[ConnectFinding]:
    from ingestd.journal.sqlite.offline import journals, version_of  # noqa: PLC0415
    from ingestd.journal.sqlite.schema import VERSION  # noqa: PLC0415

    try:
        found = journals(data_dir)
    except IngestdError:
        return  # none yet
    for name, path in found.items():
        about = f"pipeline {name}"
        try:
            version = version_of(path)
        except IngestdError as error:
            yield ConnectFinding(about, "error", str(error))
            continue
        if version > VERSION:
            text = f"its journal has version {version}, this ingestd reads up to {VERSION}"
            yield ConnectFinding(about, "error", text)
        elif version < VERSION:
            text = f"the next start makes version {VERSION} of its journal of version {version};"
            yield ConnectFinding(about, "warning", f"{text} an earlier ingestd cannot read it then")
        else:
            yield ConnectFinding(about, "info", f"its journal has version {version}")


def certificate_findings(settings: Settings) -> Iterator[ConnectFinding]:
    """Looks at the certificates of the sources. What is wrong with one, `check` itself says."""
    from ingestd.http.tls import read_tls  # noqa: PLC0415  the server's

    for source in settings.running_sources():
        tls: TlsSettings | None = getattr(source.settings, "tls", None)
        if tls is None or not tls.certificate:
            continue
        try:
            context = read_tls(tls, f"{source.key}.tls").context
        except IngestdError:
            continue
        if context is not None and context.valid_until:
            until = time.strftime("%Y-%m-%d", time.gmtime(context.valid_until))
            text = f"the certificate {tls.certificate} is valid until {until}"
            yield ConnectFinding(source.key, "info", text)
