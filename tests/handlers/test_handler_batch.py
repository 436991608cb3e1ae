from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from ingestd.base import envelope
from ingestd.base.envelope import Envelope
from ingestd.base.record import Records, Span
from ingestd.handlers.batch import Batch
from ingestd.handlers.outcome import Job, Rejection, RetryRequest

JOB = Job("j-9", 2, Records.lines([b"a", b"b", b"c", b"d"]), [Span(4, 8, 1), Span(7, 0, 3)], "j")


def test_it_is_a_sequence_of_the_decoded_records() -> None:
    batch = Batch(["a", "b", "c", "d"], JOB)
    assert isinstance(batch, Sequence)
    assert (len(batch), batch[0], batch[-1], batch[1:3]) == (4, "a", "d", ["b", "c"])
    assert list(batch) == ["a", "b", "c", "d"]
    assert "c" in batch
    assert batch.index("c") == 2
    assert (batch.id, batch.attempt, batch.payload) == ("j-9", 2, b"a\nb\nc\nd\n")
    assert repr(batch) == "<Batch j-9 attempt=2 records=4>"


def test_ids_follow_the_spans_and_leave_out_what_was_left_out() -> None:
    assert Batch(list("abcd"), JOB).ids == ["j.4.8", "j.7.0", "j.7.1", "j.7.2"]
    batch = Batch(
        list("bd"), JOB, [Rejection(0, "undecodable", ""), Rejection(2, "undecodable", "")]
    )
    assert batch.ids == ["j.7.0", "j.7.2"]


def test_envelopes_follow_the_records_and_leave_out_what_was_left_out() -> None:
    numbered = envelope.pack(Envelope("fetch", attributes={"url": "u"}, numbered="line"))
    records = JOB.records._replace(envelopes=envelope.numbered(numbered, 4, 7))
    job = msgspec.structs.replace(JOB, records=records)
    batch = Batch(
        list("bd"), job, [Rejection(0, "undecodable", ""), Rejection(2, "undecodable", "")]
    )
    assert [batch.envelope(i).attributes["line"] for i in (0, 1, -1)] == [8, 10, 10]
    with pytest.raises(IndexError):
        batch.envelope(2)
    assert Batch(list("abcd"), JOB).envelope(3) == Envelope()


def test_a_batch_by_hand_has_what_it_is_given() -> None:
    sent = Envelope("http", client="shop")
    at = datetime(2026, 5, 1, 12, tzinfo=UTC)
    batch = Batch.of([1, 2], accepted_at=at, lineage=["test-0"], envelope=sent)
    assert (batch.accepted_at, batch.lineage, batch.envelope(1)) == (at, ["test-0"], sent)
    assert Batch.of([1]).envelope(0) == Envelope()


def test_places_are_mapped_back_past_undecodable_records() -> None:
    lost = [Rejection(0, "undecodable", "x"), Rejection(2, "undecodable", "y")]
    batch = Batch(list("bd"), JOB, lost)
    batch.reject(1, "bad")
    batch.retry(-2, timedelta(minutes=1), "later")
    assert batch.rejections == [*lost, Rejection(3, "rejected", "bad")]
    assert batch.retries == [RetryRequest(1, 60.0, "later")]


def test_the_last_word_counts() -> None:
    batch = Batch(list("abcd"), JOB)
    batch.reject(0, "no")
    batch.retry(0)
    batch.retry(1, 2)
    batch.reject(1, "no")
    assert batch.rejections == [Rejection(1, "rejected", "no")]
    assert batch.retries == [RetryRequest(0, None, "")]


@pytest.mark.parametrize("i", [4, -5, 10**30])
def test_a_place_that_is_not_there(i: int) -> None:
    batch = Batch(list("abcd"), JOB)
    with pytest.raises(IndexError, match="of a batch of 4"):
        batch.reject(i, "x")
    with pytest.raises(IndexError):
        batch.retry(i)
    with pytest.raises(TypeError):
        batch.reject("0", "x")  # type: ignore[arg-type]
    assert (batch.rejections, batch.retries) == ([], [])


@pytest.mark.parametrize("after", [-1, float("nan"), float("inf"), 1.8e9, timedelta(seconds=-1)])
def test_a_wait_that_is_none(after: float | timedelta) -> None:
    with pytest.raises(ValueError, match="after"):
        Batch(list("abcd"), JOB).retry(0, after)


def test_why_becomes_one_short_line() -> None:
    batch = Batch(list("abcd"), JOB)
    batch.reject(0, "two\nlines \x1b[31m" + "x" * 5000)
    batch.reject(1, ValueError("not a str"))  # type: ignore[arg-type]
    (first, second) = batch.rejections
    assert first.error.startswith("two lines \\x1b[31mxxx")
    assert len(first.error) == 1000
    assert second.error == "not a str"


def test_records_as_they_came_are_taken_apart_when_looked_at() -> None:
    batch: Batch[bytes] = Batch(None, JOB)
    assert len(batch) == 4
    batch.reject(3, "x")
    assert (batch[-1], list(batch), batch[1:3]) == (b"d", [b"a", b"b", b"c", b"d"], [b"b", b"c"])
    assert list(batch) == [b"a", b"b", b"c", b"d"]
    assert batch.rejections == [Rejection(3, "rejected", "x")]


def test_a_batch_made_by_hand_for_the_users_own_tests() -> None:
    batch = Batch.of([{"a": 1}, b"raw", "text"], id="b1", attempt=3)
    assert (batch.id, batch.attempt, list(batch)) == ("b1", 3, [{"a": 1}, b"raw", "text"])
    assert batch.records.items() == [b'{"a":1}', b"raw", b"text"]
    assert batch.ids == ["test.1.0", "test.1.1", "test.1.2"]
    batch.reject(2, "why")
    assert batch.rejections == [Rejection(2, "rejected", "why")]


class Click(msgspec.Struct):
    page: int


def test_a_batch_made_by_hand_is_decoded_as_a_handler_says() -> None:
    def store(batch: Batch[Click]) -> None: ...

    batch = Batch.of([{"page": 1}, {"page": "x"}, b'{"page":3}'], handler=store)
    assert list(batch) == [Click(1), Click(3)]
    assert [(one.index, one.reason) for one in batch.rejections] == [(1, "undecodable")]
    batch.reject(1, "why")
    assert batch.rejections[-1] == Rejection(2, "rejected", "why")
    assert list(Batch.of(["text"], handler=lambda batch: None)) == ["text"]
    text = Batch.of(["text", b"\xff"], handler=lambda batch: None, record_format="text")
    assert (list(text), len(text.rejections)) == (["text"], 1)
    assert list(Batch.of([b"\xff"], handler=len, record_format="bytes")) == [b"\xff"]


@pytest.mark.parametrize("record", [{"page": 1}, "text", b"raw"])
def test_a_record_that_is_no_list_of_them_makes_no_batch(record) -> None:
    """Its members, or its characters, would be the records."""
    with pytest.raises(TypeError, match=r"of one write Batch.of\(\[record\]\)"):
        Batch.of(record)


def test_no_envelope_is_decoded_before_it_is_asked_for() -> None:
    job = msgspec.structs.replace(JOB, records=JOB.records._replace(envelopes=b"R\xff"))
    batch = Batch(list("abcd"), job)
    assert (list(batch), len(batch.ids), batch.lineage) == (list("abcd"), 4, [])
    with pytest.raises(msgspec.DecodeError):
        batch.envelope(0)
