"""Errors. One root; a class's docstring is its message, its facts are fields."""

from __future__ import annotations

import enum
import inspect


class Exit(enum.IntEnum):
    """What the process says when it leaves (see `docs/ARCHITECTURE.md`)."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    DATA = 65
    LOST = 75
    CONFIG = 78


class IngestdError(Exception):
    """Something went wrong."""

    exit_code = Exit.UNEXPECTED

    def __init__(self, **facts: object) -> None:
        self.facts = facts
        template = inspect.cleandoc(type(self).__doc__ or "")
        super().__init__(template.format(**facts))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by facts: the default would pass the message to a keyword-only constructor."""
        return (_rebuild, (type(self), self.facts))


def _rebuild(kind: type[IngestdError], facts: dict[str, object]) -> IngestdError:
    return kind(**facts)


class ConfigError(IngestdError):
    """{problem}"""

    exit_code = Exit.CONFIG


class UsageError(IngestdError):
    """{problem}"""

    exit_code = Exit.USAGE


class HandlerLoadError(ConfigError):
    """handler {target!r}: {problem}"""


class AddressError(ConfigError):
    """cannot listen on {address} ({setting}): {problem}"""


class DataDirError(ConfigError):
    """data directory {path}: {problem}"""


class Overloaded(IngestdError):
    """{what} is full"""

    @property
    def retry_after(self) -> float:
        """Seconds after which a try may succeed."""
        after = self.facts.get("retry_after", 1.0)
        return after if isinstance(after, float) else 1.0


class NeverFits(IngestdError):
    """{size} bytes, more than {what} = {bound}"""


class InputIncomplete(IngestdError):
    """{given_up} of {total} {what} were given up"""


class InputUnreadable(InputIncomplete):
    """standard input could not be read to its end: {problem}"""


class KeyInFlight(IngestdError):
    """a request with this Idempotency-Key is in progress"""


class KeyReused(IngestdError):
    """this Idempotency-Key came with another body, Content-Type or Content-Encoding"""


class Draining(IngestdError):
    """this daemon is draining"""


class JournalFailed(IngestdError):
    """journal {path} failed: {problem}"""

    exit_code = Exit.LOST


class JournalUnreadable(ConfigError):
    """journal {path}: {problem}"""
