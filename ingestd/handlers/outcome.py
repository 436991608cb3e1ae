"""Jobs and results: plain data that crosses to a worker and back.

A `Job` is one try of one sealed batch. A `Result` says what became of it; the worker catches
everything, so a result always comes back unless the worker itself died.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import msgspec

from ingestd.base.record import Records, Span  # noqa: TC001  msgspec reads the annotations


class Job(msgspec.Struct, frozen=True, array_like=True):
    """One call of the handler.

    Attributes:
        batch: the batch's id; names the same records through retries, crashes and restarts.
        attempt: 1 for the first try.
        records: the batch's records, as they came.
        spans: where each record lies in its journal, in order; gives the records their ids.
        origin: the journal's own id, the first part of each record's id.
        accepted_at: when the batch's first record was accepted, seconds since the epoch.
        lineage: the ids of the batches that this one was split from, oldest first.
        traceparent: the span of this call (W3C Trace Context); empty if it has none.
    """

    batch: str
    attempt: int
    records: Records
    spans: list[Span]
    origin: str
    accepted_at: float = 0.0
    lineage: list[str] = []
    traceparent: str = ""


class Rejection(msgspec.Struct, frozen=True, array_like=True):
    """One record given up without another try.

    Attributes:
        index: its place in the batch, from 0.
        reason: `undecodable` (does not fit the annotation) or `rejected` (the handler said so).
        error: one line for people.
    """

    index: int
    reason: str
    error: str


class RetryRequest(msgspec.Struct, frozen=True, array_like=True):
    """One record that the handler wants to see again.

    Attributes:
        index: its place in the batch, from 0.
        after: seconds to wait; `None` for the usual backoff.
        error: one line for people.
        is_unavailable: the sink says that the record is not at fault, as with `Unavailable`.
    """

    index: int
    after: float | None
    error: str
    is_unavailable: bool = False


REJECTED = frozenset({"undecodable", "rejected"})
"""Reasons of a `Rejection`."""
ERROR_KIND_CHARS = 100
ERROR_CHARS_MAX = 4096
"""Longest `error` of anything here."""
AFTER_MAX = 3650 * 86400.0
"""Seconds; the longest wait that a handler may ask for. A time of day in its place is longer."""
FINDINGS_MAX = 100
"""Most findings of one `check()`."""
POSTPONED = "postponed"
"""The reason of a failure that the handler asked for with `raise Retry`."""
UNAVAILABLE = "unavailable"
"""The reason of a failure of the sink's that passes, `raise Unavailable`: it is no record's."""
BLOCKED = "blocked"
"""The reason of a failure of the sink's that lasts until an operator acts, `raise Blocked`."""
SAID = frozenset({"raised", POSTPONED, UNAVAILABLE, BLOCKED})
"""Reasons of a failure that a worker may give; the others are found by the pool."""


class SinkFinding(NamedTuple):
    """One line of what the `check()` of a sink found.

    Attributes:
        level: `error`: it cannot work like this; `warning`: a promise does not hold; `info`.
        text: for people, without a secret.
    """

    level: Literal["error", "warning", "info"]
    text: str


class SinkRun(NamedTuple):
    """One call of one of the handlers of a chain.

    Attributes:
        target: its place among `handler.targets`.
        seconds: that it ran for.
        records: that it is done with.
        error: the kind of its failure, see `error_kind`; empty if there was none.
    """

    target: int
    seconds: float
    records: int
    error: str


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """The call as a whole did not succeed: nothing else in the result counts.

    Attributes:
        reason: `raised`, `unavailable`, `blocked`, `postponed`, `timeout` or `crashed`.
        error: one line: the exception's type and message, or how the worker died.
        traceback: as Python prints it, bounded; empty where there is none.
        after: with `postponed` and `unavailable`, seconds that the batch shall wait; `None` for the
            usual backoff.
    """

    reason: str
    error: str
    traceback: str = ""
    after: float | None = None

    @property
    def is_asked(self) -> bool:
        """Returns True if handler or sink asked for the batch again: that spends no try."""
        return self.reason == POSTPONED or (self.reason == UNAVAILABLE and self.after is not None)


class Result(msgspec.Struct, frozen=True, array_like=True):
    """Outcomes of a job's records. Records in neither list are done, unless `failure` is set.

    Attributes:
        rejections: records given up, at most one entry a record.
        retries: records to be tried again; no record is in both lists.
        failure: set when the batch has to be tried again as it is.
        seconds: how long the handler itself ran.
        runs: of each handler of a chain that was called; empty where there is one without a chain.
    """

    rejections: list[Rejection] = []
    retries: list[RetryRequest] = []
    failure: Failure | None = None
    seconds: float = 0.0
    runs: list[SinkRun] = []


def error_kind(failure: Failure) -> str:
    """The class of the exception behind a failure, or the reason where there is none."""
    name = class_named(failure.error) if failure.reason == "raised" else ""
    return name[:ERROR_KIND_CHARS] or failure.reason


def class_named(error: str) -> str:
    """The class that stands before the text of an exception in one line; empty where none does."""
    name = error.partition(":")[0]
    return name if name.replace(".", "").isidentifier() else ""


def flaw_of(result: Result, records: int) -> str:
    """The first thing that makes a result impossible for a job of so many records; or nothing.

    The pipeline takes indices, times and reasons as they are. A worker's answer, or a batch that
    its handler reached into, is looked at here once, where it is no turn of the event loop.
    """
    if not 0 <= result.seconds < math.inf:
        return f"it ran for {result.seconds!r} s"
    failure = result.failure
    if failure is not None and (flaw := _flaw_of_failure(failure)):
        return flaw
    if result.runs and (flaw := _flaw_of_runs(result.runs)):
        return flaw
    if not (result.rejections or result.retries):
        return ""
    seen: set[int] = set()
    every: list[Rejection | RetryRequest] = [*result.rejections, *result.retries]
    for said in every:
        if not 0 <= said.index < records:
            return f"it names record {said.index} of {records}"
        if said.index in seen:
            return f"it names record {said.index} twice"
        if len(said.error) > ERROR_CHARS_MAX:
            return f"its error for record {said.index} is {len(said.error)} characters long"
        seen.add(said.index)
    for rejection in result.rejections:
        if rejection.reason not in REJECTED:
            return f"its reason for record {rejection.index} is none of ours"
    for retry in result.retries:
        if not _is_wait(retry.after):
            return f"it wants record {retry.index} again after {retry.after!r} s"
    return ""


def _flaw_of_runs(runs: list[SinkRun]) -> str:
    for run in runs:
        if not (0 <= run.seconds < math.inf and run.records >= 0):
            return f"a sink of it had {run.records!r} records for {run.seconds!r} s"
        if len(run.error) > ERROR_KIND_CHARS:
            return f"its kind of error is {len(run.error)} characters long"
    return ""


def _flaw_of_failure(failure: Failure) -> str:
    # How a worker died is said by its monitor, never by the worker.
    if failure.reason not in SAID:
        return "its reason for the failure is none of ours"
    if len(failure.error) > ERROR_CHARS_MAX:
        return f"its error is {len(failure.error)} characters long"
    if not _is_wait(failure.after):
        return f"it wants the batch again after {failure.after!r} s"
    return ""


def _is_wait(after: float | None) -> bool:
    return after is None or 0 <= after <= AFTER_MAX
