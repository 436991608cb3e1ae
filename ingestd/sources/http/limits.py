"""How much one token may send: a bucket for records, a bucket for bytes. Pure: time is passed in.

What a request holds is only known once it was read. So it is let in while the bucket is not in
debt, whole, and charged what it really held: a large one puts the bucket into debt, and until that
is paid nothing more is let in. On average nobody gets beyond the rate.
"""

from __future__ import annotations

BURST_SECONDS = 5.0
"""What was not used is saved for so long: after a pause so many seconds' worth come at once."""


class Bucket:
    """Fills at a rate, up to `BURST_SECONDS` of it.

    Args:
        rate: a second; more than 0.
        now: seconds that do not go back.
    """

    __slots__ = ("_at", "_level", "_rate")

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._level = rate * BURST_SECONDS
        self._at = now

    def wait(self, now: float) -> float:
        """Seconds until the debt is paid; 0 if there is none."""
        self._fill(now)
        return max(0.0, -self._level / self._rate)

    def charge(self, amount: float, now: float) -> None:
        """Takes out what was sent, also if it is not in there."""
        self._fill(now)
        self._level -= amount

    def _fill(self, now: float) -> None:
        self._level = min(self._level + (now - self._at) * self._rate, self._rate * BURST_SECONDS)
        self._at = now


class Limits:
    """Both bounds of one token.

    Args:
        records: a second; 0 is no limit.
        size: bytes of records a second; 0 is no limit.
        now: seconds that do not go back.
    """

    __slots__ = ("_records", "_size")

    def __init__(self, records: int, size: int, now: float) -> None:
        self._records = Bucket(records, now) if records else None
        self._size = Bucket(size, now) if size else None

    def wait(self, now: float) -> tuple[float, str]:
        """Seconds until something may be sent again, and the setting that says so."""
        waits = [(0.0, "")]
        if self._records is not None:
            waits.append((self._records.wait(now), "records_per_second"))
        if self._size is not None:
            waits.append((self._size.wait(now), "bytes_per_second"))
        return max(waits)

    def charge(self, records: int, size: int, now: float) -> None:
        """What came: records, and their bytes."""
        if self._records is not None:
            self._records.charge(records, now)
        if self._size is not None:
            self._size.charge(size, now)
