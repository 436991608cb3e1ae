"""`ingestd check [HANDLER]`: what `run` would do with the same flags, without opening anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.base.errors import ConfigError, Exit, HandlerLoadError
from ingestd.cli.configured import configured
from ingestd.cli.effective import effective
from ingestd.cli.output import fail, say

if TYPE_CHECKING:
    import argparse

    from ingestd.settings import PipelineSettings, Settings

HELP = "check the configuration and the handler, print the effective settings"
DESCRIPTION = """\
Reads the configuration and the files that it names, and imports the handlers, as `ingestd run` with
the same flags would, and opens nothing: no port, no journal, no folder. Prints every setting that
is in effect with where it came from, as TOML; secrets are masked.

exit codes: 0 all is well; 2 usage; 78 configuration or handler"""


def execute(arguments: argparse.Namespace) -> int:
    """Prints what is in effect; the exit code says whether `run` would start.

    Raises:
        ConfigError: the configuration is wrong.
    """
    loaded = configured(arguments)
    say("\n".join(effective(loaded)))
    say("\n# handlers")
    code = 0
    for name, pipeline in loaded.settings.pipeline_settings().items():
        try:
            say(f"# {name}: {pipeline.handler.target} is {_resolve(pipeline)}")
        except HandlerLoadError as error:
            fail(f"pipeline {name}: {error}")
            code = int(error.exit_code)
    return max(code, _check_access(loaded.settings))


def _check_access(settings: Settings) -> int:
    """Whether the files with tokens, secrets and certificates are what they should be."""
    if settings.source.kind != "http":
        return int(Exit.OK)
    from ingestd.sources.http.access import read_access  # noqa: PLC0415  only now it is needed

    try:
        for doubt in read_access(settings.http).doubts:
            fail(f"warning: {doubt}")
    except ConfigError as error:
        fail(str(error))
        return int(error.exit_code)
    return int(Exit.OK)


def _resolve(pipeline: PipelineSettings) -> str:
    """The handler's full name, and what it will run in.

    Raises:
        HandlerLoadError: it can't be imported, or does not fit its pipeline or its options.
    """
    from ingestd.handlers.load import load  # noqa: PLC0415  only now the user's code is needed
    from ingestd.handlers.target import is_ours  # noqa: PLC0415

    handler = pipeline.handler
    spec = load(handler.target, record_format=pipeline.format, executor=pipeline.executor.kind)
    spec.check_options(handler.options)
    found = spec.found
    module = getattr(found, "__module__", type(found).__module__)
    kind = pipeline.executor.kind
    if kind == "auto":
        kind = "thread" if is_ours(handler.target) else "async" if spec.is_async else "process"
    qualified = getattr(found, "__qualname__", type(found).__qualname__)
    return f"{module}:{qualified} (executor: {kind})"
