"""Results of requests whose records were accepted, and the answers of our own protocol. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ingestd.base.record import InvalidRecord
from ingestd.http.problem import ERRORS_MAX, list_errors
from ingestd.http.response import JSON, Response

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ingestd.base.append import DeliveryWaiter, FailedRecord
    from ingestd.handlers.outcome import Rejection
    from ingestd.http.problem import Problem

_TOLD = frozenset({"rejected", "undecodable"})
"""Reasons whose detail is about the record. Others come with what the handler raised, which may
tell more of the machine than its clients should know."""


class PartResult(NamedTuple):
    """The result of the records of a request that went to one pipeline.

    Attributes:
        pipeline: its name.
        accepted: records.
        invalid: records that were not accepted.
        errors: the first ones of these.
        problem: the reason why no record of the part was accepted; `None` if it was.
        notes: of `Decoded`.
        rejected: of `Decoded`.
    """

    pipeline: str
    accepted: int = 0
    invalid: int = 0
    errors: Sequence[InvalidRecord] = ()
    problem: Problem | None = None
    notes: object = None
    rejected: Sequence[Rejection] = ()


class IngestResult(NamedTuple):
    """The result of a request whose records were accepted.

    Attributes:
        accepted: records.
        invalid: records that were not accepted.
        errors: the first ones of these.
        waiter: knows the outcome of each accepted record, if the client waited for all.
        stored: the body of the first answer, if the request was accepted before; `None` else.
        notes: of `Decoded`, if it has one part.
        parts: of a body whose codec `routes`, or that names its idempotency keys.
    """

    accepted: int
    invalid: int = 0
    errors: Sequence[InvalidRecord] = ()
    waiter: DeliveryWaiter | None = None
    stored: bytes | None = None
    notes: object = None
    parts: Sequence[PartResult] = ()

    def response(self) -> Response:
        """Returns our own protocol's answer: 202, or 200 with the outcomes."""
        if self.waiter is not None:
            body = processed_body(self.errors, self.invalid, self.waiter)
            return Response(200, JSON, body)
        if self.stored is not None:
            return Response(202, JSON, self.stored)
        return Response(202, JSON, count_body(self.accepted, self.invalid, self.errors))


class _ListedError(msgspec.Struct):
    index: int
    reason: str
    detail: str


class _Counts(msgspec.Struct):
    accepted: int
    invalid: int
    errors: list[_ListedError]


_COUNTS = msgspec.json.Decoder(_Counts)


def counted(body: bytes) -> tuple[int, int, list[InvalidRecord]]:
    """The numbers and the listed errors in what `count_body` made, without payloads."""
    counts = _COUNTS.decode(body)
    errors = [InvalidRecord(one.index, one.reason, one.detail, b"") for one in counts.errors]
    return counts.accepted, counts.invalid, errors


def count_body(accepted: int, invalid: int, errors: Sequence[InvalidRecord]) -> bytes:
    """Returns the body of a 202; `errors` may be the first ones alone."""
    if not invalid:
        return b'{"accepted":%d,"invalid":0,"errors":[]}' % accepted
    return msgspec.json.encode(
        {"accepted": accepted, "invalid": invalid, "errors": list_errors(errors)}
    )


def processed_body(errors: Sequence[InvalidRecord], invalid: int, waiter: DeliveryWaiter) -> bytes:
    """Returns the body of a 200: the outcome of each record that was not processed.

    Args:
        errors: the invalid records in the body; at least the first `ERRORS_MAX`.
        invalid: how many there were.
        waiter: of those that were accepted.
    """
    # Behind the last one that is listed the place of a failure is not known, and not told either.
    listed = [*list_errors(errors), *_failures(waiter.failed, errors)]
    listed.sort(key=lambda error: error["index"])
    return msgspec.json.encode(
        {
            "accepted": waiter.count,
            "invalid": invalid,
            "processed": waiter.count - waiter.dead,
            "dead": waiter.dead,
            "errors": listed[:ERRORS_MAX],
        }
    )


def _failures(
    failed: Iterable[FailedRecord], invalid: Sequence[InvalidRecord]
) -> Iterator[dict[str, Any]]:
    """Dead letters as an answer lists them, by their places in the body."""
    skipped = 0
    for one in sorted(failed):
        # Invalid records are in the body, but not among those that were accepted.
        while skipped < len(invalid) and invalid[skipped].index <= one.index + skipped:
            skipped += 1
        detail = one.error if one.reason in _TOLD else "see its dead letter"
        yield {"index": one.index + skipped, "reason": one.reason, "detail": detail}
