"""The meaning of an answer for the records of its request."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime, formatdate
from typing import Any

import pytest

from ingestd.client.exchange import RETRY_AFTER_MAX, judge


def body(**members: Any) -> bytes:
    return json.dumps(members).encode()


@pytest.mark.parametrize(
    ("status", "content", "count", "kind"),
    [
        (202, body(accepted=2, invalid=0, errors=[]), 2, "accepted"),
        (200, body(accepted=1, invalid=1), 2, "accepted"),
        (202, body(accepted=1, invalid=0), 2, "retry"),
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
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < judge(503, later, b"", 1).after <= 30
    assert judge(429, formatdate(time.time() - 60, usegmt=True), b"", 1).after == 0
