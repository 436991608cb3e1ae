"""Tells failures that are new from repetitions, so that a log shows each kind once. Pure.

A kind is how a try failed, the exception's type, and the line that raised it. The first failure of
a kind is worth its traceback; the repetitions are counted until somebody asks for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ingestd.handlers.outcome import Failure

KINDS_MAX = 64
"""Kinds that are remembered; the one that was seen longest ago goes."""
KIND_SECONDS = 3600.0
"""A kind that was not seen for so long is new when it comes again."""
_PART_CHARS_MAX = 200


class Kind(NamedTuple):
    """What makes two failures the same."""

    reason: str
    type: str
    where: str


class Repeated(NamedTuple):
    """A kind that came again since somebody asked last."""

    kind: Kind
    error: str
    times: int


class _Seen:
    __slots__ = ("at", "error", "times")

    def __init__(self) -> None:
        self.at = 0.0
        self.error = ""
        self.times = 0


class FailureKinds:
    """The kinds of one pipeline."""

    def __init__(self) -> None:
        self._seen: dict[Kind, _Seen] = {}  # the one seen last at the end

    def note(self, failure: Failure, now: float) -> bool:
        """Counts a failure at `now` (seconds of any clock).

        Returns:
            Whether its kind is new.
        """
        kind = kind_of(failure)
        seen = self._seen.pop(kind, None)
        new = seen is None or now - seen.at > KIND_SECONDS
        seen = _Seen() if seen is None else seen
        seen.at, seen.error = now, failure.error
        seen.times += not new
        self._seen[kind] = seen
        if len(self._seen) > KINDS_MAX:
            del self._seen[next(iter(self._seen))]
        return new

    def repeated(self) -> list[Repeated]:
        """What came again since the last call, most often first."""
        again = [Repeated(kind, one.error, one.times) for kind, one in self._seen.items()]
        for one in self._seen.values():
            one.times = 0
        return sorted((one for one in again if one.times), key=lambda one: -one.times)


def kind_of(failure: Failure) -> Kind:
    """The kind of a failure; its message does not count, for that may name the record."""
    at = failure.traceback.rfind('\n  File "')
    where = failure.traceback[at + 1 :].partition("\n")[0].strip() if at >= 0 else ""
    name = failure.error.partition(":")[0] if failure.reason == "raised" else ""
    return Kind(failure.reason, name[:_PART_CHARS_MAX], where[:_PART_CHARS_MAX])
