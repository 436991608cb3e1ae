"""Handling of dead letters by an operator, for the command and for the console.

Everything is over the stores of some pipelines by name. A call may take long, because it reads the
letters that are meant; none of them runs on an event loop.
"""

from __future__ import annotations

import base64
import math
import re
from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.clock import shown
from ingestd.base.envelope import facts_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ingestd.journal.dead_letters import DeadLetters, LetterCounts, LetterFilter, StoredLetter

ERRORS_MAX = 1000
"""Different errors of a summary; all further ones of a reason are one."""
_DIGITS = re.compile(r"[0-9]+")


def letters_of(
    found: Mapping[str, DeadLetters],
    chosen: LetterFilter,
    *,
    whole: bool,
    before: int | None = None,
) -> Iterator[tuple[str, StoredLetter]]:
    """Yields the dead letters of all pipelines; `limit` counts over all of them.

    Args:
        found: the stores by pipeline.
        chosen: which.
        whole: with payload and traceback.
        before: see `DeadLetters.select`.
    """
    left = chosen.limit
    for name, letters in found.items():
        if left == 0:
            return
        for kept in letters.select(chosen._replace(limit=left), whole=whole, before=before):
            yield name, kept
            left = None if left is None else left - 1


def text_of(payload: bytes) -> str | None:
    """The text of a payload; `None` if it is no UTF-8."""
    try:
        return payload.decode()
    except UnicodeDecodeError:
        return None


def payload_fields(payload: bytes) -> dict[str, object]:
    """The payload as a field of a JSON object: `payload` if it is UTF-8, else `payload_base64`."""
    text = text_of(payload)
    if text is None:
        return {"payload_base64": base64.b64encode(payload).decode()}
    return {"payload": text}


def letter_facts(pipeline: str, kept: StoredLetter, *, whole: bool) -> dict[str, object]:
    """A dead letter as a JSON object; `whole` with traceback and payload.

    The payload is `payload` if it is UTF-8, else `payload_base64`.
    """
    letter = kept.letter
    facts: dict[str, object] = {
        "pipeline": pipeline,
        "id": kept.id,
        "record": letter.record,
        "records": letter.records,
        "reason": letter.reason,
        "error": letter.error,
        "attempts": letter.attempts,
        "first_at": shown(letter.first_at),
        "last_at": shown(letter.last_at),
        "bytes": kept.size,
        "retry": kept.marked,
        "envelope": facts_of(letter.envelope),
    }
    if whole:
        facts["traceback"] = letter.traceback
        facts |= payload_fields(letter.payload)
    return facts


# -- summing up ------------------------------------------------------------------------------------


class ErrorCount(NamedTuple):
    """The dead letters of a pipeline whose errors differ in nothing but their numbers.

    Attributes:
        letters: how many.
        bytes: of their payloads.
        marked: of these, to be requeued.
        first_at: when the first one was given up, seconds since the epoch.
        last_at: the last one.
        example: the number of the newest one.
        error: its error.
    """

    letters: int = 0
    bytes: int = 0
    marked: int = 0
    first_at: float = math.inf
    last_at: float = 0.0
    example: int = 0
    error: str = ""


def summed_up(
    letters: Iterable[tuple[str, StoredLetter]],
) -> list[tuple[str, str, ErrorCount]]:
    """Pipeline, reason and count of each error, the most frequent one first."""
    counts: dict[tuple[str, str, str], ErrorCount] = {}
    for pipeline, kept in letters:
        letter = kept.letter
        key = pipeline, letter.reason, _DIGITS.sub("0", letter.error)
        error = letter.error
        if key not in counts and len(counts) >= ERRORS_MAX:
            error = "(further errors)"
            key = pipeline, letter.reason, error
        before = counts.get(key, ErrorCount())
        counts[key] = ErrorCount(
            before.letters + 1,
            before.bytes + kept.size,
            before.marked + kept.marked,
            min(before.first_at, letter.last_at),
            max(before.last_at, letter.last_at),
            kept.id,
            error,
        )
    ordered = sorted(counts.items(), key=lambda one: -one[1].letters)
    return [(pipeline, reason, count) for (pipeline, reason, _), count in ordered]


# -- changing --------------------------------------------------------------------------------------


def counted(found: Mapping[str, DeadLetters], chosen: LetterFilter) -> dict[str, LetterCounts]:
    """Counts the chosen dead letters of each journal; `limit` counts over all of them."""
    counts, left = {}, chosen.limit
    for name, letters in found.items():
        if left == 0:
            break
        counts[name] = letters.count(chosen._replace(limit=left))
        left = None if left is None else left - counts[name].letters
    return counts


class RetryTotals(NamedTuple):
    """Counts of dead letters that were chosen to be requeued.

    Attributes:
        marked: will be requeued, and were not marked before.
        before: were marked before.
        incomplete: hold no record, or only its beginning, and stay.
        invalid: were never accepted and are still no records of their pipeline: they stay.
    """

    marked: int = 0
    before: int = 0
    incomplete: int = 0
    invalid: int = 0


def retry(
    found: Mapping[str, DeadLetters],
    chosen: LetterFilter,
    check: Callable[[str], Callable[[bytes], str]],
) -> RetryTotals:
    """Marks the chosen dead letters to be requeued.

    Args:
        found: the stores by pipeline.
        chosen: which.
        check: gives, for a pipeline, what tells the fault of a payload as a record of it.
    """
    totals = RetryTotals()
    for name, one in counted(found, chosen).items():
        new = invalid = 0
        if one.letters > one.marked + one.incomplete:
            new, invalid = found[name].mark(chosen, one.last, check(name))
        totals = RetryTotals(
            totals.marked + new,
            totals.before + one.marked,
            totals.incomplete + one.incomplete,
            totals.invalid + invalid,
        )
    return totals


def purge(
    found: Mapping[str, DeadLetters],
    chosen: LetterFilter,
    counts: Mapping[str, LetterCounts],
) -> int:
    """Deletes chosen dead letters that are not marked, those that were counted; returns how many.

    Args:
        found: the stores by pipeline.
        chosen: which.
        counts: of these, from `counted`.
    """
    return sum(
        found[name].purge(chosen, one.last)
        for name, one in counts.items()
        if one.letters > one.marked
    )
