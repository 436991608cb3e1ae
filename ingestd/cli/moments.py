"""Parses and shows points in time: ISO 8601, or a time ago."""

from __future__ import annotations

from argparse import ArgumentTypeError
from datetime import UTC, datetime

from ingestd.base.clock import SystemClock
from ingestd.config.units import NotUnderstoodError, parse_seconds


def moment(written: str) -> float:
    """Seconds since the epoch from `2026-05-01`, `2026-05-01T12:00:00Z` or `2h` (ago).

    A moment without an offset is UTC, as all moments are that we print.

    Raises:
        ArgumentTypeError: neither of the two.
    """
    if "-" not in written:
        try:
            return SystemClock.now() - parse_seconds(written)
        except NotUnderstoodError:
            pass
    try:
        parsed = datetime.fromisoformat(written)
    except ValueError:
        text = f"{written!r} is neither a moment (2026-05-01T12:00:00Z) nor a time ago (2h)"
        raise ArgumentTypeError(text) from None
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
