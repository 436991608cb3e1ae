"""Totals of all downloads, for the progress line and the summary."""

from __future__ import annotations


class DownloadTotals:
    """Counters of all downloads.

    Args:
        total: number of URLs.

    Attributes:
        total: number of URLs.
        done: of these, those that are finished.
        bytes: read, before decompression.
        records: made durable.
        refused: kept as dead letters.
        retries: tries that failed and are made again.
        given_up: URLs that were given up; with `fetch.every` once in each round.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.bytes = 0
        self.records = 0
        self.refused = 0
        self.retries = self.given_up = 0
        self._begun: list[_One] = []

    def begin(self) -> _One:
        """Adds a URL; returns its counters."""
        one = _One(self)
        self._begun.append(one)
        return one

    def accepted(self, records: int, refused: int) -> None:
        """Counts the records of a durable append."""
        self.records += records
        self.refused += refused

    @property
    def left(self) -> float | None:
        """Estimate of the bytes still to be read; `None` if unknown."""
        running = [one for one in self._begun if not one.ended]
        known = [one for one in self._begun if one.size is not None]
        if not known or any(one.running and one.size is None for one in running):
            return None
        mean = sum(one.size or 0 for one in known) / len(known)
        return sum(max(0.0, (mean if one.size is None else one.size) - one.got) for one in running)


class _One:
    """Counters of one URL."""

    def __init__(self, totals: DownloadTotals) -> None:
        self._totals = totals
        self.size: int | None = None
        self.got = 0
        self.running = False
        self.ended = False

    def expect(self, size: int | None) -> None:
        """Begins a body of that size."""
        self.size, self.got, self.running = size, 0, True

    def read(self, size: int) -> None:
        """Counts bytes read."""
        self.got += size
        self._totals.bytes += size

    def unexpect(self) -> None:
        """Ends the body."""
        self.running = False

    def postpone(self) -> None:
        """Counts a try that failed and is made again."""
        self._totals.retries += 1

    def give_up(self) -> None:
        """Counts the URL as given up."""
        self._totals.given_up += 1

    def end(self) -> None:
        """Marks the URL as done, or given up."""
        if not self.ended:
            self.ended = True
            self._totals.done += 1
