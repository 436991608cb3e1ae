"""What is said about records that were taken: 202, or 200 to those who waited. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd.http.problem import ERRORS_MAX, list_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ingestd.base.append import DeliveryWaiter, FailedRecord
    from ingestd.base.record import InvalidRecord
    from ingestd.codecs.lines import Parsed

_TOLD = frozenset({"rejected", "undecodable"})
"""Reasons whose detail is about the record. Others come with what the handler raised, which may
tell more of the machine than its clients should know."""


class IngestResult(NamedTuple):
    """An answer that is no problem.

    Attributes:
        body: JSON.
        status: 202, or 200 if the records are processed.
        headers: more of them.
    """

    body: bytes
    status: int = 202
    headers: Mapping[str, str] = {}


def accepted_body(parsed: Parsed) -> bytes:
    """The body of a 202."""
    return count_body(parsed.records.count, parsed.invalid, parsed.refused)


def count_body(accepted: int, rejected: int, refused: Sequence[InvalidRecord]) -> bytes:
    """The same by its numbers; `refused` may be the first ones alone."""
    if not rejected:
        return b'{"accepted":%d,"rejected":0,"errors":[]}' % accepted
    return msgspec.json.encode(
        {"accepted": accepted, "rejected": rejected, "errors": list_errors(refused)}
    )


def processed_body(refused: Sequence[InvalidRecord], invalid: int, watch: DeliveryWaiter) -> bytes:
    """The body of a 200: what became of each record, where it was not done.

    Args:
        refused: the others in the body; at least the first `ERRORS_MAX`.
        invalid: how many there were.
        watch: of those that were accepted.
    """
    # Behind the last one that is listed the place of a failure is not known, and not told either.
    errors = [*list_errors(refused), *_failures(watch.failed, refused)]
    errors.sort(key=lambda error: error["index"])
    return msgspec.json.encode(
        {
            "accepted": watch.count,
            "rejected": invalid,
            "processed": watch.count - watch.dead,
            "dead": watch.dead,
            "errors": errors[:ERRORS_MAX],
        }
    )


def _failures(
    failed: Iterable[FailedRecord], refused: Sequence[InvalidRecord]
) -> Iterator[dict[str, Any]]:
    """Dead letters as an answer lists them, by their places in the body."""
    skipped = 0
    for one in sorted(failed):
        # Refused records are in the body, but not among those that were accepted.
        while skipped < len(refused) and refused[skipped].index <= one.index + skipped:
            skipped += 1
        detail = one.error if one.reason in _TOLD else "see its dead letter"
        yield {"index": one.index + skipped, "reason": one.reason, "detail": detail}
