"""What is counted of all downloads together: for the progress line, and the summary."""

from __future__ import annotations


class DownloadTotals:
    """The counters.

    Args:
        total: how many URLs there are.

    Attributes:
        total: how many URLs there are.
        done: of these, how many will not be asked again.
        bytes: read, as they were sent.
        records: made durable.
        refused: kept as dead letters.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.bytes = 0
        self.records = 0
        self.refused = 0
        self._begun: list[_One] = []

    def begin(self) -> _One:
        """The counters of one more URL."""
        one = _One(self)
        self._begun.append(one)
        return one

    def accepted(self, records: int, refused: int) -> None:
        """An append is durable."""
        self.records += records
        self.refused += refused

    @property
    def left(self) -> float | None:
        """Bytes that are still to be read, about; `None` if nothing tells."""
        running = [one for one in self._begun if not one.ended]
        known = [one for one in self._begun if one.size is not None]
        if not known or any(one.running and one.size is None for one in running):
            return None
        mean = sum(one.size or 0 for one in known) / len(known)
        return sum(max(0.0, (mean if one.size is None else one.size) - one.got) for one in running)


class _One:
    """One URL's."""

    def __init__(self, tally: DownloadTotals) -> None:
        self._tally = tally
        self.size: int | None = None
        self.got = 0
        self.running = False
        self.ended = False

    def expect(self, size: int | None) -> None:
        """A body begins, of that size."""
        self.size, self.got, self.running = size, 0, True

    def read(self, size: int) -> None:
        """So many bytes came."""
        self.got += size
        self._tally.bytes += size

    def unexpect(self) -> None:
        """The body ended."""
        self.running = False

    def end(self) -> None:
        """The URL is done, or given up."""
        if not self.ended:
            self.ended = True
            self._tally.done += 1
