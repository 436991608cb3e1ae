"""Exceptions as plain data: one line for a list, a bounded traceback for the person who looks.

Values of local variables are never in it.
"""

from __future__ import annotations

from ingestd.handlers.outcome import Failure
from ingestd.handlers.text import describe
from ingestd.handlers.trace import trace_of


def failure_of(exc: BaseException) -> Failure:
    """The failure that a raising handler leaves: reason `raised`, one line, and the traceback.

    Never raises: without the memory for a traceback, or even for a line, it does without.
    """
    try:
        return Failure("raised", describe(exc), trace_of(exc))
    except BaseException:  # noqa: BLE001
        return Failure("raised", "an exception that can't be described")
