"""Entry point of `ingestd`: parses argv, runs one command and returns its exit code.

Only the command that is named is imported: `--help` and `--version` need no settings.
"""

# ruff: noqa: E402  the order of the imports is part of a start

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os

from ingestd.base.path import put_last


def _leave(*_: object) -> None:
    """Ends a start that Ctrl-C interrupts while it imports, without a traceback."""
    os.write(2, b"ingestd: interrupted\n")
    os._exit(1)


# From here to the end of the imports: they take most of what a short command takes.
_interrupt = _signal.default_int_handler
if _signal.getsignal(_signal.SIGINT) is _interrupt:
    try:
        _signal.signal(_signal.SIGINT, _leave)
    except ValueError:  # only the main thread may
        pass
try:
    # First of all: with `python -m` the current folder comes before the standard library.
    put_last(os.getcwd())  # noqa: PTH109  pathlib imports a lot
except OSError:  # the current folder is gone; its users report that
    pass

import gc
import io
import sys
import traceback
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ingestd.base.errors import Exit, IngestdError
from ingestd.base.process import end_process
from ingestd.cli.output import Parser, fail, flush_stdout, say

if TYPE_CHECKING:
    from collections.abc import Sequence

if _signal.getsignal(_signal.SIGINT) is _leave:
    _signal.signal(_signal.SIGINT, _interrupt)

COMMANDS = {
    "run": "run the daemon: accept records, hand them to HANDLER in batches",
    "check": "check the configuration and the handler, print the effective settings",
    "dev": "run a daemon for trying out: reloads the handler, prints every batch",
    "try": "call the handler with the records of files, without a daemon",
    "prove": "kill a daemon at random moments on this machine, and count the records that it kept",
}
"""Modules in `cli` with the flags of all settings, and their help. Each has a `DESCRIPTION`,
`add_arguments(parser, argv)` and `execute(arguments)`, which returns the exit code."""
WITH_FILES = {"try"}
"""Commands whose words behind HANDLER are files."""
MODULES = {"try": "trial", "resume": "pause"}
"""Modules of commands that have another name: `try` can't be one."""
TOOLS = {
    "init": "write a small project: a handler with its settings, tests and deployment files",
    "dead": "list, sum up, show, edit, retry, purge or export dead letters",
    "replay": "feed processed records once more that journal.keep has kept",
    "tap": "print records as they pass through a running daemon",
    "top": "show the numbers of a running daemon, again each second",
    "peek": "print pending records, without taking them",
    "healthcheck": "check that the daemon on this machine is ready, or alive",
    "pause": "have pipelines accept records and give none to their handlers, until resume",
    "resume": "have paused pipelines go on",
    "journal": "show statistics of journals, verify or repair them",
    "token": "make a token for the http source, or hash one",
}
"""The same with arguments of their own; each of their parsers sets itself as the default `leaf`."""


IMPORTED_MAX = 100_000
"""Objects after which Python looks for cycles until a daemon has settled."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Problems are lines on stderr.

    Without `argv`, that is as a program, it ends the process.
    """
    if argv is None:
        # What is imported stays: looking through it again and again is a twentieth of a start.
        gc.set_threshold(IMPORTED_MAX)
        _open_closed_streams()
    code = _main(argv)
    if argv is None:
        end_process(code)
    return code


def _open_closed_streams() -> None:
    """Opens those that are closed (`<&- 2>&-`): `print` would take stdout for stderr."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115


def _main(argv: Sequence[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What the locale has no character for is still said.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _execute(sys.argv[1:] if argv is None else argv)
        flush_stdout()
    except IngestdError as error:
        fail(str(error))
        return int(error.exit_code)
    except KeyboardInterrupt:
        fail("interrupted")
        return int(Exit.UNEXPECTED)
    except Exception:  # noqa: BLE001  the last place that can say anything
        traceback.print_exc()
        return int(Exit.UNEXPECTED)
    return code


def _execute(argv: Sequence[str]) -> int:
    parser, commands = _parser(argv)
    try:
        arguments, words = parser.parse_known_args(argv)
    except SystemExit as left:  # --help has been printed
        return int(left.code or 0)
    except BrokenPipeError:  # the reader of --help has gone, which is no error
        return int(Exit.OK)
    if arguments.version:
        from ingestd import __version__  # noqa: PLC0415  reading it takes as long as the rest

        say(f"ingestd {__version__}")
        return int(Exit.OK)
    if arguments.command is None:
        _word_in(words, parser)
        parser.error(f"a command is required: {' or '.join((*COMMANDS, *TOOLS))}")
    module = _module(arguments.command)
    if arguments.command in TOOLS:
        unexpected = _word_in(words, arguments.leaf)
        if unexpected is not None:
            arguments.leaf.error(f"unexpected argument {unexpected!r}")
        return int(module.execute(arguments))
    handler, *files = _words_in(words, commands[arguments.command]) or [""]
    if arguments.command in WITH_FILES:
        arguments.files = files
    elif files:
        problem = f"unexpected argument {files[0]!r}: there is one HANDLER, {handler!r}"
        commands[arguments.command].error(problem)
    if handler:
        from ingestd.config.layers import Flag  # noqa: PLC0415  the command has imported it

        flag = Flag("handler.target", handler, "argument HANDLER")
        arguments.flags = [*arguments.flags, flag]
    return int(module.execute(arguments))


def _module(command: str) -> Any:
    return import_module(f"ingestd.cli.{MODULES.get(command, command)}")


def _parser(argv: Sequence[str]) -> tuple[Parser, dict[str, Parser]]:
    """The parser, and those of the commands; only of the one in `argv` the arguments are known."""
    parser = Parser(
        prog="ingestd",
        description="Turns a Python function into a durable, batched ingestion service.",
        epilog="ingestd run --help shows every setting.",
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    named = next((word for word in argv if not word.startswith("-")), "")
    commands: dict[str, Parser] = {}
    for name, text in {**COMMANDS, **TOOLS}.items():
        usage = f"ingestd {name} [HANDLER] [flags]" if name in COMMANDS else None
        if name in WITH_FILES:
            usage = f"ingestd {name} HANDLER FILE [FILE …] [flags]"
        one = commands[name] = subparsers.add_parser(name, help=text, usage=usage)
        if name == named:
            module = _module(name)
            one.description = module.DESCRIPTION
            module.add_arguments(one, argv)
    return parser, commands


def _word_in(words: Sequence[str], known: Parser) -> str | None:
    """The one word among those that are no flags.

    Raises:
        UsageError: see `_words_in`; or there are more.
    """
    words = _words_in(words, known)
    if len(words) > 1:
        known.error(f"unexpected argument {words[1]!r}")
    return words[0] if words else None


def _words_in(words: Sequence[str], known: Parser) -> Sequence[str]:
    """The words among those that are no flags; argparse on 3.11 loses some behind flags.

    Raises:
        UsageError: an unknown flag, with the nearest known one.
    """
    words = [word for word in words if word != "--"]
    unknown = [word.split("=", 1)[0] for word in words if word.startswith("-") and word != "-"]
    if unknown:
        known.error("\n".join(map(known.explain_unknown, unknown)))
    return words


if __name__ == "__main__":
    sys.exit(main())
