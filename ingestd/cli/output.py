"""Prints results to stdout and problems to stderr."""

from __future__ import annotations

import os
import sys


def say(text: str) -> None:
    """Prints a result. A reader that has gone (`| head -1`) is no error."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        discard_stdout()


def fail(problems: str) -> None:
    """Prints problems, one a line."""
    for line in problems.splitlines():
        print(f"ingestd: {line}", file=sys.stderr)


def discard_stdout() -> None:
    """Discards buffered output, so that flushing it at exit does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
