"""How far an input is accepted without a gap, although its appends end in any order."""

from __future__ import annotations

from collections import deque


class Part:
    """The lines that one append takes.

    Attributes:
        lines: lines of the input up to its end.
        records: records in it.
        accepted: it is durable.
    """

    __slots__ = ("accepted", "lines", "records")

    def __init__(self, lines: int, records: int) -> None:
        self.lines = lines
        self.records = records
        self.accepted = False


class Prefix:
    """The parts of one input, in their order.

    Attributes:
        lines: so many lines from the beginning are accepted, every one of them.
    """

    def __init__(self) -> None:
        self.lines = 0
        self._parts: deque[Part] = deque()

    def begin(self, lines: int, records: int) -> Part:
        """The next part.

        Args:
            lines: lines of the input up to its end.
            records: records in it.
        """
        part = Part(lines, records)
        self._parts.append(part)
        return part

    def accept(self, part: Part) -> None:
        """A part is durable."""
        part.accepted = True
        while self._parts and self._parts[0].accepted:
            self.lines = self._parts.popleft().lines

    @property
    def is_whole(self) -> bool:
        """Every part that was begun is accepted."""
        return not self._parts

    @property
    def behind(self) -> int:
        """Records that are accepted although something before them is not."""
        return sum(part.records for part in self._parts if part.accepted)
