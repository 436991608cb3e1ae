"""`Batch`, the argument of a handler: records, ids, rejections and retries."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Generic, TypeVar, cast, overload

import msgspec

from ingestd.base import envelope as envelopes
from ingestd.base.envelope import Envelope, EnvelopeRuns
from ingestd.base.record import Records, Span
from ingestd.handlers.outcome import AFTER_MAX, Failure, Job, Rejection
from ingestd.handlers.outcome import RetryRequest as RetryMark
from ingestd.handlers.text import plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ingestd.handlers.outcome import SinkRun

T_co = TypeVar("T_co", covariant=True)


class Reject(Exception):  # noqa: N818  it is an answer, not an error
    """Raised by a handler: give up every record of this call, without another try.

    Attributes:
        why: one line for the dead letters.
    """

    def __init__(self, why: str = "") -> None:
        super().__init__(why)
        self.why = why


class Retry(Exception):  # noqa: N818  it is an answer, not an error
    """Raised by a handler: not now. The batch comes again as it is, and no attempt is spent.

    It also tells that the sink may be down: when batches that were not known to fail end like this,
    one after the other, only one at a time is tried until something succeeds.

    Attributes:
        why: one line for people.
        after: seconds that this batch waits at least; `None` for the usual backoff.

    Raises:
        ValueError: `after` is negative, not a number, or longer than ten years.
    """

    def __init__(self, why: str = "", after: float | timedelta | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.after = seconds_of(after)


class RetryAfter(Retry):
    """`Retry` for as long as the other side said: a `Retry-After`, a rate limit.

    Args:
        seconds: that this batch waits at least.
        why: one line for people.
    """

    def __init__(self, seconds: float | timedelta, why: str = "") -> None:
        super().__init__(why, seconds)


class Unavailable(Exception):  # noqa: N818  it is an answer, not an error
    """Raised by a sink: it is down, overloaded or restarting, which passes.

    No record is at fault. The batch comes again as after any other exception, and the instance is
    made anew, but time alone never gives up a record that fails like this.

    Attributes:
        why: one line for people.
        after: seconds that this batch waits at least, where the other side says so: then no attempt
            is spent, as after `Retry`, and the instance stays. `None` for the usual backoff.

    Raises:
        ValueError: see `Retry`.
    """

    def __init__(self, why: str = "", after: float | timedelta | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.after = seconds_of(after)


class Blocked(Exception):  # noqa: N818  it is an answer, not an error
    """Raised by a sink: it cannot work until an operator acts, as with a missing table or right.

    The pipeline waits and says so once in its log, status and metrics. It tries again every few
    seconds, and no record is given up meanwhile.
    """


class PartFailed(Exception):  # noqa: N818  it carries an answer
    """Raised by a chain of handlers: one of them failed.

    Attributes:
        failure: that of the handler.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.error)
        self.failure = failure


def seconds_of(after: float | timedelta | None) -> float | None:
    """A time to wait in seconds.

    Raises:
        ValueError: it is negative, not a number, or longer than ten years.
    """
    if after is None:
        return None
    seconds = float(after.total_seconds() if isinstance(after, timedelta) else after)
    if not 0 <= seconds <= AFTER_MAX:
        raise ValueError(f"after: {after!r} is not a time to wait")
    return seconds


class Batch(Sequence[T_co], Generic[T_co]):
    """The decoded records of one call, in order, with the batch's name and a say for each record.

    A record that nothing is said about is done when the handler returns. What is said counts only
    if the handler returns, or raises `Reject`; after any other exception, `Retry` too, the whole
    batch comes again. When both `reject` and `retry` are said of a record, the last one counts.

    Places (`i`) are those of this sequence, and may be negative, as everywhere in Python.
    """

    __slots__ = (
        "_envelopes", "_ids", "_job", "_places", "_records", "_runs", "_said", "_undecodable",
    )  # fmt: skip

    def __init__(
        self, records: Sequence[T_co] | None, job: Job, undecodable: Sequence[Rejection] = ()
    ) -> None:
        """A batch of the job's records without the undecodable ones. For ingestd; see `of`.

        `None` for records as they came: then they are taken apart only if someone looks at them.
        """
        self._records = records
        self._job = job
        self._undecodable = undecodable
        self._said: dict[int, Rejection | RetryMark] = {}
        self._runs: list[SinkRun] = []
        self._ids: list[str] | None = None
        self._envelopes: EnvelopeRuns | None = None
        self._places: Sequence[int] = range(job.records.count)
        if undecodable:
            gone = {rejection.index for rejection in undecodable}
            self._places = [place for place in self._places if place not in gone]

    @classmethod
    def of(
        cls,
        records: Iterable[T_co],
        *,
        id: str = "test-1",  # noqa: A002  it is the attribute's name
        attempt: int = 1,
        accepted_at: datetime = datetime(2026, 1, 1, tzinfo=UTC),
        lineage: Sequence[str] = (),
        envelope: Envelope = envelopes.EMPTY,
        handler: object = None,
        record_format: str = "json",
    ) -> Batch[T_co]:
        """A batch made by hand, to try a handler out: in a test, at the prompt.

        Args:
            records: decoded, as the handler gets them; with `handler` as they are sent.
            id: see the attribute.
            attempt: see the attribute.
            accepted_at: see the attribute; with a time zone.
            lineage: see the attribute.
            envelope: of each record.
            handler: function or class by whose annotation the records are decoded; what does not
                fit is left out, and among the `rejections`.
            record_format: of these records.

        Raises:
            NotAHandler: it can't be one.
            CannotDecode: its annotation does not go with the format.
            TypeError: the records are none; or one that is given alone.
        """
        if isinstance(records, str | bytes | Mapping):
            raise TypeError("a batch is of a list of records; of one write Batch.of([record])")
        values = list(records)
        form = "text" if handler is None else record_format
        raw = Records.sized([_encoded(value, form) for value in values])
        raw = raw._replace(envelopes=envelopes.pack(envelope))
        spans, at = [Span(1, 0, len(values))], accepted_at.timestamp()
        job = Job(id, attempt, raw, spans, "test", at, list(lineage))
        if handler is None:
            return cls(values, job)
        from ingestd.handlers.decode import decoder_for  # noqa: PLC0415  these import this module
        from ingestd.handlers.load import shape_of  # noqa: PLC0415

        values, undecodable = decoder_for(shape_of(handler).record, record_format).decode(raw)
        return cls(values, job, undecodable)

    @overload
    def __getitem__(self, i: int) -> T_co: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[T_co]: ...
    def __getitem__(self, i: int | slice) -> T_co | Sequence[T_co]:
        return self._taken_apart()[i]

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[T_co]:
        return iter(self._taken_apart())

    def __repr__(self) -> str:
        return f"<Batch {self.id} attempt={self.attempt} records={len(self)}>"

    @property
    def id(self) -> str:
        """The batch's name: the same records under the same name through retries and restarts."""
        return self._job.batch

    @property
    def attempt(self) -> int:
        """1 for the first try."""
        return self._job.attempt

    @property
    def ids(self) -> list[str]:
        """`journal.chunk.index` for each record here: where it was accepted, its name for ever."""
        if self._ids is None:
            origin = self._job.origin
            every = [
                f"{origin}.{chunk}.{index}"
                for chunk, first, count in self._job.spans
                for index in range(first, first + count)
            ]
            if names := self._job.records.names:
                every = [name or place for name, place in zip(names, every, strict=True)]
            self._ids = [every[place] for place in self._places] if self._undecodable else every
        return self._ids

    @property
    def accepted_at(self) -> datetime:
        """The time in UTC at which the batch's first record was accepted, as the journal has it.

        It is the same through retries, splits and restarts: all parts of a split batch have the
        time of the batch that was sealed. A record that is requeued is accepted anew.
        """
        return datetime.fromtimestamp(self._job.accepted_at, UTC)

    @property
    def lineage(self) -> list[str]:
        """The ids of the batches that this one was split from, oldest first; mostly none.

        Each of them held all records of this batch, and ended without an outcome for any of them:
        where a sink finds one of these ids, it has stored these records. A record that comes again
        by `retry` is not split from the batch whose call asked for that.
        """
        return list(self._job.lineage)

    @property
    def traceparent(self) -> str:
        """The span of this call, as W3C Trace Context has it; empty if the daemon traces it not."""
        return self._job.traceparent

    def envelope(self, i: int) -> Envelope:
        """The origin of record `i`: source, client, chosen headers; kept in the journal.

        Nothing is decoded before the first call. A record that an earlier version of ingestd
        accepted has an empty envelope.

        Raises:
            IndexError: there is no record `i`.
        """
        if self._envelopes is None:
            records = self._job.records
            self._envelopes = EnvelopeRuns(records.envelopes, records.count)
        return self._envelopes.of(self._place(i))

    @property
    def records(self) -> Records:
        """The whole batch as it came, undecodable records included."""
        return self._job.records

    @property
    def payload(self) -> bytes:
        """The bytes of `records`; with JSON and text mostly one record a line."""
        return self._job.records.payload

    @property
    def rejections(self) -> list[Rejection]:
        """Rejections so far, by place in the whole batch; undecodable records included."""
        if not self._said:
            return list(self._undecodable)
        said = [what for what in self._said.values() if isinstance(what, Rejection)]
        return sorted([*self._undecodable, *said], key=lambda what: what.index)

    @property
    def retries(self) -> list[RetryMark]:
        """Retries asked for so far, by place in the whole batch."""
        if not self._said:
            return []
        said = [what for what in self._said.values() if isinstance(what, RetryMark)]
        return sorted(said, key=lambda what: what.index)

    def reject(self, i: int, why: str = "") -> None:
        """Give record `i` up: it becomes a dead letter with `why`, its neighbours go on.

        Raises:
            IndexError: there is no record `i`.
        """
        place = self._place(i)
        self._said[place] = Rejection(place, "rejected", plain(why))

    def retry(self, i: int, after: float | timedelta | None = None, why: str = "") -> None:
        """Let record `i` come again, in a later batch; this spends one of its attempts.

        Args:
            i: the record's place.
            after: seconds (or a timedelta) to wait at least, and at most an eighth more, so that
                records which wait about as long share a batch; `None` for the usual backoff.
            why: one line for people.

        Raises:
            IndexError: there is no record `i`.
            ValueError: `after` is negative, not a number, or longer than ten years.
        """
        place = self._place(i)
        self._said[place] = RetryMark(place, seconds_of(after), plain(why))

    @property
    def job(self) -> Job:
        """The job that the batch was made of; for ingestd."""
        return self._job

    def adopt(self, said: Rejection | RetryMark) -> None:
        """Says of a record, by its place in the whole batch, what a part of a chain said of it."""
        self._said[said.index] = said

    @property
    def runs(self) -> list[SinkRun]:
        """The calls of the handlers of a chain; for ingestd."""
        return self._runs

    def reject_all(self, why: str = "") -> None:
        """Give every record up; those rejected before keep their own `why`."""
        line = plain(why)
        for place in self._places:
            if not isinstance(self._said.get(place), Rejection):
                self._said[place] = Rejection(place, "rejected", line)

    def _taken_apart(self) -> Sequence[T_co]:
        if self._records is None:
            self._records = cast("list[T_co]", self._job.records.items())
        return self._records

    def _place(self, i: int) -> int:
        i = operator.index(i)
        count = len(self._places)
        if not -count <= i < count:
            raise IndexError(f"record {i} of a batch of {count}")
        return self._places[i]


def _encoded(value: object, record_format: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and record_format != "json":
        return value.encode()
    return msgspec.json.encode(value, enc_hook=str)
