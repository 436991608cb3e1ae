"""The meaning of an answer for the records of its request."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, formatdate
from typing import Any

import pytest

from ingestd.client import Client, Counts
from ingestd.client.exchange import RETRY_AFTER_MAX, judge
from tests.client.tools import Answers


def body(**members: Any) -> bytes:
    return json.dumps(members).encode()


@pytest.mark.parametrize(
    ("status", "content", "count", "kind"),
    [
        (202, body(accepted=2, invalid=0, errors=[]), 2, "accepted"),
        (200, body(accepted=1, invalid=1), 2, "accepted"),
        (202, body(accepted=1, invalid=0), 2, "retry"),
        (503, b"[" * 100_000, 2, "retry"),
        (200, b"<html>Please log in</html>", 2, "retry"),
        (204, b"", 1, "retry"),
        *((status, b"", 2, "retry") for status in (401, 403, 404, 408, 409, 421, 425, 429)),
        *((status, b"[]", 2, "retry") for status in (500, 502, 503, 504)),
        (413, b"", 2, "split"),
        (413, b"", 1, "invalid"),
        (400, body(type="urn:ingestd:problem:mostly-invalid"), 2, "split"),
        (400, body(type="urn:ingestd:problem:malformed"), 2, "invalid"),
        (400, b"no", 2, "dropped"),
        (400, b"no", 1, "invalid"),
        *((status, b"", 2, "dropped") for status in (301, 308, 405, 411, 415, 422, 431)),
    ],
)
def test_an_answer(status: int, content: bytes, count: int, kind: str) -> None:
    assert judge(status, "", content, count).kind == kind


@pytest.mark.parametrize(
    ("status", "problem", "shrinks"),
    [
        (413, "payload-too-large", "bytes"),
        (413, "", "bytes"),
        (413, "inflate-ratio", "bytes"),
        (413, "too-many-records", "records"),
        (413, "record-too-large", ""),
        (400, "mostly-invalid", ""),
    ],
)
def test_what_there_was_too_much_of(status: int, problem: str, shrinks: str) -> None:
    verdict = judge(status, "", body(type=f"urn:ingestd:problem:{problem}"), 2)
    assert (verdict.kind, verdict.shrinks) == ("split", shrinks)


@pytest.mark.parametrize("index", [1.0, True, "1", [1], None, -1, 3])
def test_a_place_that_is_none(index: Any) -> None:
    told = body(accepted=2, invalid=1, errors=[{"index": index}])
    assert judge(202, "", told, 3).invalid == {}


TAKEN = b'HTTP/1.1 202 Accepted\r\nContent-Length: 26\r\n\r\n{"accepted":2,"invalid":0}'


@pytest.mark.parametrize(
    "first",
    [
        b'HTTP/1.1 400 Bad Request\r\nContent-Length: 500\r\n\r\n{"type":"urn:ingestd:pro',
        b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 500\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + TAKEN,
    ],
    ids=["cut off", "without its body", "something before it"],
)
def test_what_is_no_whole_answer_is_asked_for_again(first: bytes) -> None:
    with Answers(first, TAKEN) as server:
        with Client(server.url, batch_age=60, close_timeout=60) as client:
            client.send(1)
            client.send(2)
            assert client.flush(60)
        assert client.counts == Counts(2, 2)
    assert len(set(server.keys)) == 1


def test_invalid_records_by_place_and_number() -> None:
    errors: list[Any] = [{"index": 1, "reason": "malformed", "detail": "…"}, {"index": 9}, 7]
    verdict = judge(202, "", body(accepted=1, invalid=2, errors=errors), 3)
    assert verdict.invalid == {1: "malformed: …"}
    assert verdict.unnamed == 1


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("7", 7), ("0", 0), ("", 0), ("soon", 0), ("-1", 0), ("9" * 400, RETRY_AFTER_MAX), ("²", 0)],
)
def test_retry_after(said: str, seconds: float) -> None:
    assert judge(503, said, b"", 1).after == seconds


def test_retry_after_as_a_date() -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=600), usegmt=True)
    assert 500 < judge(503, later, b"", 1).after <= 600
    assert judge(429, formatdate(time.time() - 60, usegmt=True), b"", 1).after == 0
