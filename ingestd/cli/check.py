"""`ingestd check [HANDLER]` checks the configuration and prints the effective settings.

Each setting is a line of TOML with its origin; secrets are masked. Nothing is opened.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import msgspec

from ingestd.base.clock import SystemClock
from ingestd.base.errors import ConfigError, ExecutorLoadError, Exit, HandlerLoadError
from ingestd.cli.arguments import add_settings
from ingestd.cli.configured import configured
from ingestd.cli.output import Parser, fail, say
from ingestd.config.keys import dotted, quoted, shown
from ingestd.config.loader import DEFAULT
from ingestd.config.sections import MASK
from ingestd.handlers.options import Secret, options_of
from ingestd.handlers.target import own_sink
from ingestd.settings import SCHEMA

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from ingestd.cli.output import Parser
    from ingestd.config.loader import Loaded
    from ingestd.handlers.outcome import SinkFinding
    from ingestd.handlers.runner import HandlerConfig, Runner
    from ingestd.pipeline_settings import PipelineSettings
    from ingestd.settings import Settings

_SECRET_NAME = re.compile(
    r"pass|pwd|token|secret|key|dsn|credential|auth|private|cookie|signature", re.IGNORECASE
)
_PLAIN = re.compile(r"|true|false|-?[0-9]{1,9}(\.[0-9]{1,9})?", re.IGNORECASE)
_WIDTH_MAX = 48


def effective(loaded: Loaded[Settings]) -> Iterator[str]:
    """One line a setting: `batch.records_max = 500   # flag --batch.records_max`."""
    lines = []
    for path, value in SCHEMA.values_of(loaded.settings):
        origin = loaded.origins[dotted(path)]
        if origin == DEFAULT and _is_hint(path, value):
            origin = "suits the sink"
        text = f"{dotted(path)} = {_toml(_visible(path, value, origin, loaded))}"
        lines.append((text, origin))
    width = min(max(len(text) for text, _ in lines), _WIDTH_MAX)
    for text, origin in lines:
        yield f"{text:<{width}}  # {_one_line(origin)}"


def _is_hint(path: Sequence[str], value: object) -> bool:
    """Returns True for a bound that is neither written nor the default."""
    field = SCHEMA.field_at(path)
    return path[-2:-1] in [("batch",), ("queue",)] and field is not None and value != field.default


def _visible(path: Sequence[str], value: object, origin: str, loaded: Loaded[Settings]) -> object:
    source = loaded.origins.get(origin.removeprefix("as "), "") if "as " in origin[:3] else origin
    if source.startswith("secret "):
        return MASK
    if "options" in path:
        return _option(path, value, _harmless(path, loaded))
    return shown(SCHEMA.field_at(path), value)


def _harmless(path: Sequence[str], loaded: Loaded[Settings]) -> bool:
    """Returns True for an option of our own sinks that is no secret."""
    settings: Any = loaded.settings
    handler = settings.handler if path[0] == "handler" else settings.pipelines[path[1]].handler
    names = path[path.index("options") + 1 :]
    target = handler.target if not handler.targets else names[0] if names else ""
    struct = options_of(own_sink(target))
    return struct is not None and not set(names) & set(struct.named(Secret))


def _option(path: Sequence[str], value: object, harmless: bool) -> object:
    """An option as it may be shown: text may be a secret, whatever it is called."""
    names = path[path.index("options") + 1 :]
    if any(_SECRET_NAME.search(name) for name in names):
        return MASK
    if isinstance(value, dict):
        return {key: _option((*path, key), inner, harmless) for key, inner in value.items()}
    if isinstance(value, list):
        return [_option(path, inner, harmless) for inner in value]
    if isinstance(value, str) and not (harmless or _PLAIN.fullmatch(value)):
        return MASK
    return value


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{dotted([key])} = {_toml(v)}" for key, v in value.items()) + "}"
    return quoted(str(value))


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


# -- the command -----------------------------------------------------------------------------------

DESCRIPTION = """\
Reads the configuration and the files that it names, and imports the handlers, as `ingestd run` with
the same flags would, and opens nothing: no port, no journal, no folder. Prints every
effective setting with its origin, as TOML; secrets are masked. --connect asks the sinks as well.

exit codes: 0 all is well; 2 usage; 78 configuration or handler, or an error that a sink found"""


def add_arguments(parser: Parser, argv: Sequence[str]) -> None:
    """Adds the flags: those of `run`, and one that asks the sinks."""
    add_settings(parser, argv)
    parser.add_argument(
        "--connect",
        action="store_true",
        help="ask the sinks too: reachable, rights, tables, settings that promises rest on",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Prints the effective settings; the exit code tells if `run` would start.

    Raises:
        ConfigError: the configuration is wrong.
    """
    from ingestd.execution.build import handler_config  # noqa: PLC0415
    from ingestd.journal.build import build_journal  # noqa: PLC0415  help needs no SQLite

    loaded = configured(arguments)
    say("\n".join(effective(loaded)))
    # Before the handlers: from then on modules of the user's folder come before installed ones.
    code = _check_access(loaded.settings)
    say("\n# handlers")
    for name, pipeline in loaded.settings.pipeline_settings().items():
        config = handler_config(
            name,
            pipeline.executor,
            pipeline.handler,
            pipeline.format,
            loaded.settings.data_dir,
        )
        try:
            targets = ", ".join(pipeline.handler.all_targets)
            say(f"# {name}: {targets} is {_resolve(pipeline, config)}")
            if arguments.connect:
                code = max(code, _connect(name, config))
            build_journal(
                pipeline.journal,
                pipeline.dead,
                folder=loaded.settings.data_dir,
                clock=SystemClock(),
            )
        except (HandlerLoadError, ExecutorLoadError, ConfigError) as error:
            fail(f"pipeline {name}: {error}")
            code = int(error.exit_code)
    return code


def _check_access(settings: Settings) -> int:
    """Reads the files with tokens, secrets and certificates; returns an exit code."""
    code = Exit.OK
    formats = {name: one.format for name, one in settings.pipeline_settings().items()}
    for source in settings.running_sources():
        try:
            for doubt in source.component.check(source.settings, formats, source.pipeline):
                fail(f"warning: {source.told(doubt)}")
        except ConfigError as error:
            fail(source.told(str(error)))
            code = error.exit_code
    return int(code)


def _resolve(pipeline: PipelineSettings, config: HandlerConfig) -> str:
    """The handler's full name, and the executor that will run it.

    Raises:
        HandlerLoadError: it can't be imported, or does not fit its pipeline or its options.
        ExecutorLoadError: the factory of its executor can't be imported.
    """
    from ingestd.execution.build import fitting_kind  # noqa: PLC0415
    from ingestd.execution.external import load_factory  # noqa: PLC0415
    from ingestd.handlers.chain import load_configured  # noqa: PLC0415  only now it is needed

    executor = pipeline.executor
    kind: str = "external" if executor.factory else executor.kind
    spec = load_configured(msgspec.structs.replace(config, executor=kind))
    spec.check_options(config.options)
    if executor.factory:
        load_factory(executor.factory)
        kind = executor.factory
    elif kind == "auto":
        fitting = fitting_kind(config)
        kind = "async" if spec.is_async and fitting == "process" else fitting
    return f"{spec.full_name} (executor: {kind})"


def _connect(name: str, config: HandlerConfig) -> Exit:
    """Prints the findings of a handler's `check()`."""
    from ingestd.handlers.runner import Runner  # noqa: PLC0415

    runner = Runner(config, fail)
    runner.prepare()
    findings = asyncio.run(_checked(runner)) if runner.is_async else runner.check()
    for one in findings:
        say(f"# {name}: {one.level}: {one.text}")
    if not runner.is_async:
        runner.close()
    return Exit.CONFIG if any(one.level == "error" for one in findings) else Exit.OK


async def _checked(runner: Runner) -> list[SinkFinding]:
    findings = await runner.check_async()
    await runner.close_async()
    return findings
