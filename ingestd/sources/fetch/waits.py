"""How long to wait before a URL is asked again. Pure: the caller says the time and the chance."""

from __future__ import annotations

from email.utils import parsedate_to_datetime

RECONNECT_MIN = 0.1
"""Seconds; a stream that ends is never asked again sooner."""


def retry_after(text: str | None, date: str | None, now: float, longest: float) -> float | None:
    """What a server's `Retry-After` asks for, in seconds; `None` if it says nothing.

    Args:
        text: the header: seconds, or a date.
        date: the answer's `Date`: the server's clock may be another one than ours.
        now: our clock, seconds since the epoch.
        longest: `fetch.retry_after_max`, seconds.
    """
    text = (text or "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:12]), longest)
    at = _moment(text)
    if at is None:
        return None
    there = _moment(date or "")
    return min(max(0.0, at - (now if there is None else there)), longest)


def reconnect(asked: float | None, first: float, longest: float) -> float:
    """Seconds before a stream that ended is asked again.

    Args:
        asked: what the stream's `retry` said, seconds.
        first: `fetch.backoff`, if it said nothing.
        longest: `fetch.backoff_max`.
    """
    return max(RECONNECT_MIN, min(first if asked is None else asked, longest))


def _moment(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
