"""`ingestd check [HANDLER]` checks the configuration and prints the effective settings.

Each setting is a line of TOML with its origin; secrets are masked. Nothing is opened.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Literal

import msgspec

from ingestd.base.clock import SystemClock
from ingestd.base.errors import ConfigError, ExecutorLoadError, Exit, HandlerLoadError
from ingestd.cli.arguments import add_settings
from ingestd.cli.configured import configured, effective_values
from ingestd.cli.connect import (
    ConnectFinding,
    certificate_findings,
    disk_findings,
    journal_findings,
    sink_findings,
    source_findings,
)
from ingestd.cli.output import Parser, add_json, fail, say, say_json
from ingestd.config.keys import toml_of
from ingestd.handlers.target import exits_raised
from ingestd.http.credentials import read_tokens

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from ingestd.cli.output import Parser
    from ingestd.config.loader import Loaded
    from ingestd.handlers.runner import HandlerConfig
    from ingestd.pipeline_settings import PipelineSettings
    from ingestd.settings import Settings

_WIDTH_MAX = 48


def effective(loaded: Loaded[Settings]) -> Iterator[str]:
    """One line a setting: `batch.records_max = 500   # flag --batch.records_max`."""
    lines = [
        (f"{key} = {toml_of(value)}", origin)
        for key, value, origin in effective_values(loaded.settings, loaded.origins)
    ]
    width = min(max(len(text) for text, _ in lines), _WIDTH_MAX)
    for text, origin in lines:
        yield f"{text:<{width}}  # {_one_line(origin)}"


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


# -- the command -----------------------------------------------------------------------------------

DESCRIPTION = """\
Reads the configuration and the files that it names, and imports the handlers, as `ingestd run` with
the same flags would, and opens nothing: no port, no journal, no folder. Prints every
effective setting with its origin, as TOML; secrets are masked. --connect asks the sinks as well
(reachable, rights, tables, settings that promises rest on), measures 20 syncs of the data
directory, and looks at its free space, its journals and the certificates.

exit codes: 0 all is well; 2 usage; 78 configuration or handler, or an error that a sink found"""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    """Adds the flags: those of `run`, and one that asks the sinks."""
    add_settings(parser, argv)
    parser.add_argument(
        "--connect",
        action="store_true",
        help="ask the sinks too, and look at disk, journals and certificates",
    )
    add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Prints the effective settings; the exit code tells if `run` would start.

    Raises:
        ConfigError: the configuration is wrong.
    """
    loaded = configured(arguments)
    report = _Report(as_json=arguments.json)
    report.settings(loaded)
    # Before the handlers: from then on modules of the user's folder come before installed ones.
    _check_access(loaded.settings, report)
    for kind, problem in loaded.settings.unread():
        report.problem(kind, problem)
    report.heading("handlers")
    for name, pipeline in loaded.settings.pipeline_settings().items():
        _check_pipeline(name, pipeline, loaded.settings, report, connect=arguments.connect)
    if arguments.connect:
        report.heading("sources, disk and certificates")
        for look in (source_findings, disk_findings, journal_findings, certificate_findings):
            for one in look(loaded.settings):
                report.found(one)
    return report.end()


class _Report:
    """Prints as it goes, or one JSON object at the end.

    Args:
        as_json: the object.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._settings: list[dict[str, object]] = []
        self._handlers: list[dict[str, str]] = []
        self._findings: list[ConnectFinding] = []
        self._code = Exit.OK

    def settings(self, loaded: Loaded[Settings]) -> None:
        """Tells the effective settings."""
        if self._as_json:
            self._settings = [
                {"key": key, "value": value, "origin": origin}
                for key, value, origin in effective_values(loaded.settings, loaded.origins)
            ]
        else:
            say("\n".join(effective(loaded)))

    def heading(self, text: str) -> None:
        """Begins a part."""
        if not self._as_json:
            say(f"\n# {text}")

    def handler(self, pipeline: str, targets: str, resolved: str) -> None:
        """Tells what the handler of a pipeline is."""
        if self._as_json:
            self._handlers.append({"pipeline": pipeline, "targets": targets, "is": resolved})
        else:
            say(f"# {pipeline}: {targets} is {resolved}")

    def found(self, finding: ConnectFinding) -> None:
        """Tells one finding; an error decides the exit code."""
        if finding.level == "error":
            self.fail(Exit.CONFIG)
        if self._as_json:
            self._findings.append(finding)
        else:
            say(f"# {finding.about.removeprefix('pipeline ')}: {finding.level}: {finding.text}")

    def problem(self, about: str, text: str, code: Exit = Exit.OK) -> None:
        """Tells what is wrong, or a doubt if `code` is OK."""
        self.fail(code)
        if self._as_json:
            level: Literal["error", "warning"] = "warning" if code == Exit.OK else "error"
            self._findings.append(ConnectFinding(about, level, text))
        else:
            fail(text if code != Exit.OK else f"warning: {text}")

    def fail(self, code: Exit) -> None:
        """Raises the exit code."""
        self._code = max(self._code, code)

    def end(self) -> int:
        """Prints what is left; returns the exit code."""
        if self._as_json:
            say_json(
                {
                    "settings": self._settings, "handlers": self._handlers,
                    "findings": self._findings, "exit_code": int(self._code),
                }
            )  # fmt: skip
        return int(self._code)


def _check_pipeline(
    name: str, pipeline: PipelineSettings, settings: Settings, report: _Report, *, connect: bool
) -> None:
    from ingestd.execution.build import handler_config  # noqa: PLC0415
    from ingestd.journal.build import build_journal  # noqa: PLC0415  help needs no SQLite

    config = handler_config(
        name, pipeline.executor, pipeline.handler, pipeline.format, settings.data_dir
    )
    try:
        targets = ", ".join(pipeline.handler.all_targets)
        # A module may print when it is imported, or end the process.
        with contextlib.redirect_stdout(sys.stderr), exits_raised():
            resolved = _resolve(pipeline, config)
        report.handler(name, targets, resolved)
        if connect:
            for one in sink_findings(name, config):
                report.found(one)
        build_journal(
            pipeline.journal, pipeline.dead, folder=settings.data_dir, clock=SystemClock()
        )
    except (HandlerLoadError, ExecutorLoadError, ConfigError) as error:
        report.problem(f"pipeline {name}", f"pipeline {name}: {error}", error.exit_code)


def _check_access(settings: Settings, report: _Report) -> None:
    """Reads the files with tokens, secrets and certificates."""
    if settings.traces.enabled:
        from ingestd.admin.traces import demand_opentelemetry  # noqa: PLC0415  most have none

        try:
            demand_opentelemetry()
        except ConfigError as error:
            report.problem("traces", str(error), error.exit_code)
    problems: list[str] = []
    read_tokens(settings.admin.tokens, problems, "admin.tokens")
    for text in problems:
        report.problem("admin", text, Exit.CONFIG)
    formats = {name: one.format for name, one in settings.pipeline_settings().items()}
    for source in settings.running_sources():
        try:
            for doubt in source.component.check(source.settings, formats, source.pipeline):
                report.problem(source.key, source.told(doubt))
        except ConfigError as error:
            report.problem(source.key, source.told(str(error)), error.exit_code)


def _resolve(pipeline: PipelineSettings, config: HandlerConfig) -> str:
    """The handler's full name, and the executor that will run it.

    Raises:
        HandlerLoadError: it can't be imported, or does not fit its pipeline or its options.
        ExecutorLoadError: the factory of its executor can't be imported.
    """
    from ingestd.execution.build import fitting_kind, validating_config  # noqa: PLC0415
    from ingestd.execution.external import load_factory  # noqa: PLC0415
    from ingestd.handlers.chain import load_configured  # noqa: PLC0415  only now it is needed

    executor = pipeline.executor
    kind: str = "external" if executor.factory else executor.kind
    spec = load_configured(msgspec.structs.replace(config, executor=kind))
    spec.check_options(config.options)
    if pipeline.handler.validate == "accept":
        load_configured(validating_config(config))
    if executor.factory:
        load_factory(executor.factory)
        kind = executor.factory
    elif kind == "auto":
        fitting = fitting_kind(config)
        kind = "async" if spec.is_async and fitting == "process" else fitting
    return f"{spec.full_name} (executor: {kind})"
