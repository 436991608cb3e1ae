"""Entry point of `ingestd`: parses argv, runs one command and returns its exit code."""

from __future__ import annotations

# First of all: with `python -m` the current folder comes before the standard library.
from ingestd.base import first  # noqa: F401  isort: skip

import io
import sys
import traceback
from typing import TYPE_CHECKING, Protocol

from ingestd.base.errors import Exit, IngestdError
from ingestd.base.process import end_process
from ingestd.cli import check, dead, healthcheck, journal, prove, run, token
from ingestd.cli.arguments import Parser, add_settings, handler_from
from ingestd.cli.output import discard_stdout, fail, say

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


class Command(Protocol):
    """Interface of a module in `cli` that is a command."""

    HELP: str
    DESCRIPTION: str

    def execute(self, arguments: argparse.Namespace, /) -> int:
        """Runs the command; returns the exit code."""


class Tool(Command, Protocol):
    """A command with arguments of its own and no settings."""

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None:
        """Adds the arguments; each parser sets itself as the default `leaf`."""


COMMANDS: dict[str, Command] = {"run": run, "check": check, "prove": prove}
TOOLS: dict[str, Tool] = {
    "dead": dead,
    "healthcheck": healthcheck,
    "journal": journal,
    "token": token,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Problems are lines on stderr.

    Without `argv`, that is as a program, it ends the process.
    """
    code = _main(argv)
    if argv is None:
        end_process(code)
    return code


def _main(argv: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What the locale has no character for is still said.
            stream.reconfigure(errors="backslashreplace")
    try:
        return _execute(sys.argv[1:] if argv is None else argv)
    except IngestdError as error:
        fail(str(error))
        return int(error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted before it started")
        return int(Exit.UNEXPECTED)
    except Exception:  # noqa: BLE001  the last place that can say anything
        traceback.print_exc()
        return int(Exit.UNEXPECTED)
    finally:
        _leave_stdout()


def _execute(argv: Sequence[str]) -> int:
    parser, commands = _parser(argv)
    try:
        arguments, words = parser.parse_known_args(argv)
    except SystemExit as left:  # --help has been printed
        return int(left.code or 0)
    if arguments.version:
        from ingestd import __version__  # noqa: PLC0415  reading it takes as long as the rest

        say(f"ingestd {__version__}")
        return int(Exit.OK)
    if arguments.command is None:
        handler_from(words, parser)
        parser.error(f"a command is required: {' or '.join((*COMMANDS, *TOOLS))}")
    if arguments.command in TOOLS:
        return _execute_tool(arguments, words)
    handler = handler_from(words, commands[arguments.command])
    if handler:
        arguments.flags = [*arguments.flags, handler]
    return COMMANDS[arguments.command].execute(arguments)


def _execute_tool(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    unexpected = handler_from(words, arguments.leaf)
    if unexpected is not None:
        arguments.leaf.error(f"unexpected argument {unexpected.value!r}")
    return TOOLS[arguments.command].execute(arguments)


def _parser(argv: Sequence[str]) -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="ingestd",
        description="Turns a Python function into a durable, batched ingestion service.",
        epilog="ingestd run --help shows every setting.",
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    commands: dict[str, Parser] = {}
    for name, command in COMMANDS.items():
        commands[name] = subparsers.add_parser(
            name,
            help=command.HELP,
            description=command.DESCRIPTION,
            usage=f"ingestd {name} [HANDLER] [flags]",
        )
        add_settings(commands[name], argv)
        if add_arguments := getattr(command, "add_arguments", None):
            add_arguments(commands[name])
    for name, tool in TOOLS.items():
        commands[name] = subparsers.add_parser(name, help=tool.HELP, description=tool.DESCRIPTION)
        tool.add_arguments(commands[name])
    return parser, commands


def _leave_stdout() -> None:
    """Flushes stdout; a reader that has gone is no error."""
    if sys.stdout is None or sys.stdout.closed:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()


if __name__ == "__main__":
    sys.exit(main())
