"""Errors of the package: one root, with message templates in a field and facts by name."""

from __future__ import annotations

import enum
from typing import ClassVar


class Exit(enum.IntEnum):
    """Exit codes of the process."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    DATA = 65
    LOST = 75
    CONFIG = 78


class IngestdError(Exception):
    """Something went wrong."""

    message: ClassVar[str] = "something went wrong"

    exit_code = Exit.UNEXPECTED

    def __init__(self, **facts: object) -> None:
        self.facts = facts
        super().__init__(self.message.format(**facts))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by facts: the default would pass the message to a keyword-only constructor."""
        return (_rebuild, (type(self), self.facts))


def _rebuild(kind: type[IngestdError], facts: dict[str, object]) -> IngestdError:
    return kind(**facts)


class ConfigError(IngestdError):
    """The configuration is wrong."""

    message = "{problem}"

    exit_code = Exit.CONFIG


class UsageError(IngestdError):
    """The command line is wrong."""

    message = "{problem}"

    exit_code = Exit.USAGE


class OutputError(IngestdError):
    """Standard output can't be written."""

    message = "standard output: {problem}"


class DaemonError(IngestdError):
    """The daemon that a command asked gave no answer, or refused it."""

    message = "{problem}"


class HandlerLoadError(ConfigError):
    """A handler can't be loaded, or does not fit its pipeline or its options."""

    message = "handler {target!r}: {problem}"


class ExecutorLoadError(ConfigError):
    """The factory of an executor can't be loaded, or gives no executor."""

    message = "executor.factory {target!r}: {problem}"


class AddressError(ConfigError):
    """An address can't be listened on."""

    message = "cannot listen on {address} ({setting}): {problem}"


class DataDirError(ConfigError):
    """The data directory can't be used."""

    message = "data directory {path}: {problem}"


class Overloaded(IngestdError):
    """A bound is reached; a later try may succeed."""

    message = "{what} is full"

    @property
    def retry_after(self) -> float:
        """Seconds after which a try may succeed."""
        after = self.facts.get("retry_after", 1.0)
        return after if isinstance(after, float) else 1.0


class IdsInFlight(Overloaded):
    """A record with the same sender's id is being accepted for another request."""

    message = "another request with some of these records is in progress"


class KeysFull(Overloaded):
    """No more idempotency keys can be remembered."""


class KeyTaken(Overloaded):
    """An Idempotency-Key was taken by another daemon meanwhile; a later try gets its answer."""

    message = "another daemon has just taken this Idempotency-Key: send the request again"

    @property
    def keys(self) -> frozenset[str]:
        """The keys, `scoped`."""
        keys = self.facts.get("keys")
        return keys if isinstance(keys, frozenset) else frozenset()


class NeverFits(IngestdError):
    """Records are larger than a bound: no later try can succeed."""

    message = "{size} bytes, more than {what} = {bound}"


class InputIncomplete(IngestdError):
    """A part of the input was given up."""

    message = "{given_up} of {total} {what} were given up"


class InputUnreadable(InputIncomplete):
    """Standard input could not be read to its end."""

    message = "standard input could not be read to its end: {problem}"


class KeyInFlight(IngestdError):
    """A request with the same Idempotency-Key is in progress."""

    message = "a request with this Idempotency-Key is in progress"


class KeyReused(IngestdError):
    """An Idempotency-Key came with another request."""

    message = "this Idempotency-Key came with another body, Content-Type or Content-Encoding"

    @property
    def in_progress(self) -> bool:
        """The other request has no answer yet, and may still come to nothing."""
        return self.facts.get("in_progress") is True


class KeysUnsupported(IngestdError):
    """An Idempotency-Key came to a pipeline whose journal keeps none."""

    message = "the journal of this pipeline keeps no idempotency keys"


class Draining(IngestdError):
    """The daemon accepts no more records: it is shutting down."""

    message = "this daemon is shutting down"


class JournalFailed(IngestdError):
    """A journal can't be written; the next start recovers it."""

    message = "journal {path} failed: {problem}"

    exit_code = Exit.LOST


class JournalUnreadable(ConfigError):
    """A journal can't be opened."""

    message = "journal {path}: {problem}"
