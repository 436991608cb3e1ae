"""Parser of command lines; results on stdout and problems on stderr."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from ingestd.base.errors import OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, and accepts no abbreviated flags.

    Attributes:
        hidden: flags that `--help` does not show.
        fault_of: gives the reason why a flag is not known, if there is one.
        nearest_setting: gives the flag that was probably meant by an unknown one, from it and the
            nearest of the known ones.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _formatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self.hidden: list[str] = []
        self.fault_of: Callable[[str], str] = lambda _: ""
        self.nearest_setting: Callable[[str, str | None], str | None] = lambda _, close: close

    def error(self, message: str) -> NoReturn:
        """Reports wrong usage as the error that `main` prints.

        Raises:
            UsageError: always.
        """
        raise UsageError(problem=f"{message} (see {self.prog} --help)")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """See `ArgumentParser`; an unknown flag is a better reason than what its value seems to be.

        Raises:
            UsageError: the arguments are wrong.
        """
        try:
            return super().parse_known_args(args, namespace)
        except UsageError:
            words = [] if self._subparsers is not None or args is None else args
            flags = [word.split("=", 1)[0] for word in words if word.startswith("--") and word[2:]]
            unknown = [flag for flag in flags if flag not in self._option_string_actions]
            if unknown:
                self.error("\n".join(map(self.explain_unknown, unknown)))
            raise

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Explains an unknown command or action, and which one was probably meant."""
        known = list(action.choices or ())
        if isinstance(action.choices, dict) and value not in known:  # parsers by their names
            close = get_close_matches(value, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            self.error(f"unknown {str(action.metavar).lower()} {value!r}, {hint}")
        super()._check_value(action, value)

    def explain_unknown(self, flag: str) -> str:
        """Explains in a line that there is no such flag, and which one was probably meant."""
        known = {*re.findall(r"--[\w.-]*\w", self.format_help()), *self.hidden}
        known.discard("--help")  # near to every other short flag
        close = get_close_matches(flag, sorted(known), n=1)
        if fault := self.fault_of(flag):
            return f"unknown flag {flag}: {fault}"
        meant = self.nearest_setting(flag, close[0] if close else None)
        return f"unknown flag {flag}" + (f", did you mean {meant}?" if meant else "")


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(shutil.get_terminal_size().columns, 110)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=width)


def say(text: str) -> None:
    """Prints a result. A reader that has gone (`| head -1`) is no error.

    Raises:
        OutputError: stdout can't be written.
    """
    with _stdout() as out:
        encoding = out.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=out, flush=True)


def put(data: bytes, *, flush: bool = True) -> bool:
    """Writes bytes to stdout; False if its reader has gone.

    Raises:
        OutputError: stdout can't be written.
    """
    has_gone = True
    with _stdout() as out:
        out.buffer.write(data)
        if flush:
            out.buffer.flush()
        has_gone = False
    return not has_gone


def flush_stdout() -> None:
    """Writes what a handler in this process has printed.

    Raises:
        OutputError: stdout can't be written.
    """
    if sys.stdout is not None and not sys.stdout.closed:
        with _stdout() as out:
            out.flush()


@contextlib.contextmanager
def _stdout() -> Iterator[TextIO]:
    """Gives stdout. A reader that has gone is no error; anything else is one line on stderr."""
    try:
        if sys.stdout is None or sys.stdout.closed:
            raise OutputError(problem="it is closed")
        yield sys.stdout
    except BrokenPipeError:
        discard_stdout()
    except OSError as error:
        discard_stdout()
        raise OutputError(problem=error.strerror or error) from error


def number_of(count: int, one: str, many: str = "") -> str:
    """A count with its noun: `1 dead letter`, `2 dead letters`; `many` is `one` with an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def add_json(parser: argparse.ArgumentParser, text: str = "print one JSON object") -> None:
    """Adds `--json`, which every command has that prints facts."""
    parser.add_argument("--json", action="store_true", help=text)


def say_json(value: object) -> None:
    """Prints a result as one line of JSON in UTF-8; what JSON has no type for, as text.

    Raises:
        OutputError: stdout can't be written.
    """
    import msgspec  # noqa: PLC0415  help needs none of it

    flush_stdout()
    put(msgspec.json.encode(value, enc_hook=str) + b"\n")


def fail(problems: str) -> None:
    """Prints problems, one a line, if there is anything to print them to.

    Some quote what a server or a file says: control characters are shown as `?`.
    """
    for line in problems.splitlines():
        with contextlib.suppress(OSError):
            print(f"ingestd: {_CONTROL.sub('?', line)}", file=sys.stderr)


def discard_stdout() -> None:
    """Discards buffered output, so that flushing it at exit does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError):  # it is no file
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def confirmed(what: str) -> bool:
    """Asks for confirmation on the terminal.

    Raises:
        UsageError: there is none.
    """
    if not sys.stdin or not sys.stdin.isatty():
        raise UsageError(problem=f"to {what} without a terminal, add --yes")
    print(f"{what}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
