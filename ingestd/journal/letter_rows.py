"""Rows of the table `dead`: the letters of one batch with one reason lie in one. Pure.

A letter by itself takes a row, an entry in an index and its texts: a hundred times a small record.
Together they take their payloads and, packed, what differs between them: sizes, ids, errors.
A row holds the letters with the numbers up to its `id`, without a gap; its place is kept when it is
taken apart because some of them go. A row of one letter has no `facts`.
"""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ingestd.base import envelope
from ingestd.base.record import pack_sizes, unpack_sizes
from ingestd.journal.dead_letters import DeadLetter

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

LETTER_BYTES = 128
"""What a row takes beside its texts, about: itself, and its place in the index."""
ROW_LETTERS = 1000
ROW_BYTES = 4 << 20
"""No further letter goes into a row beyond these."""
FACTS_BYTES = 48 << 10
"""What the texts of the letters of one insertion may take together, beside half their payloads."""
_SHORTER = (None, 400, 100, 24, 0)
"""To how many characters each text is cut, one after the other, until they fit; the last is one
text for all of them."""

COLUMNS = (
    "id", "record", "records", "reason", "error", "traceback", "attempts", "first_at", "last_at",
    "retry", "bytes", "payload", "letters", "principal", "facts", "envelopes",
)  # fmt: skip


class LetterRow(NamedTuple):
    """A row as its table has it, with the columns in the order of `COLUMNS`.

    Attributes:
        id: the number of its last letter.
        record: the id of its first record, empty for letters that were never accepted.
        records: how many records it stands for.
        error: the first letter's, cut if there are more.
        size: what it counts for; the column `bytes`.
        letters: how many it holds.
        facts: what differs between them, packed; empty for one.
        envelopes: theirs, as `Records.envelopes`.
    """

    id: int
    record: str
    records: int
    reason: str
    error: str
    traceback: str
    attempts: int
    first_at: float
    last_at: float
    retry: int
    size: int
    payload: bytes
    letters: int
    principal: str
    facts: bytes
    envelopes: bytes

    @property
    def numbers(self) -> range:
        """The numbers of its letters."""
        return range(self.id - self.letters + 1, self.id + 1)


class _Facts(msgspec.Struct, array_like=True):
    """Data that differs between the letters of a row.

    Attributes:
        sizes: of the payloads, as `pack_sizes` makes them.
        runs: the records' ids as runs of (journal and chunk, first, count).
        texts: each (error, traceback) that there is.
        which: the text of each letter as `pack_sizes` makes it; empty if all have the first.
    """

    sizes: bytes
    runs: list[tuple[str, int, int]]
    texts: list[tuple[str, str]]
    which: bytes


UNREADABLE = (ValueError, TypeError, LookupError, OverflowError, msgspec.MsgspecError)
"""What `taken_apart` raises about a row that is damaged."""
DAMAGED = "what was known of these records is damaged; their bytes are kept"

_decode = msgspec.msgpack.Decoder(_Facts).decode
_encode = msgspec.msgpack.Encoder().encode


def letter_bytes(payload: bytes, error: str, traceback: str = "") -> int:
    """Bytes of a letter that has a row to itself."""
    return LETTER_BYTES + len(payload) + len(error) + len(traceback)


def packed(
    letters: Iterable[DeadLetter], last: int, *, row_bytes: int = ROW_BYTES
) -> list[LetterRow]:
    """Rows for new letters, which get the numbers from `last + 1` on.

    Args:
        letters: of one settlement, or refused ones of one commit.
        last: the newest number there is.
        row_bytes: no row takes a further payload beyond this.
    """
    groups = list(_grouped(letters, row_bytes))
    room = FACTS_BYTES // max(1, len(groups))
    rows = []
    for group in groups:
        last += len(group)
        rows.append(_row(group, last, retry=0, room=room))
    return rows


def _grouped(letters: Iterable[DeadLetter], row_bytes: int) -> Iterator[list[DeadLetter]]:
    open_: dict[tuple[object, ...], list[DeadLetter]] = {}
    sizes: dict[tuple[object, ...], int] = {}
    for letter in letters:
        if letter.records != 1:
            yield [letter]
            continue
        key = (letter.reason, letter.attempts, letter.first_at, letter.last_at,
               not letter.record, letter.principal)  # fmt: skip
        group = open_.setdefault(key, [])
        size = sizes.get(key, 0) + len(letter.payload)
        if group and letter.envelope != group[-1].envelope:
            size += len(letter.envelope)
        if group and (len(group) >= ROW_LETTERS or size > row_bytes):
            yield group
            group = open_[key] = []
            size = len(letter.payload)
        group.append(letter)
        sizes[key] = size
    yield from open_.values()


def _row(group: Sequence[DeadLetter], last: int, *, retry: int, room: int) -> LetterRow:
    first = group[0]
    payload, error, traceback, facts = first.payload, first.error, first.traceback, b""
    if len(group) > 1:
        payload = b"".join([letter.payload for letter in group])
        facts = _pack(group, room + len(payload) // 2)
        error, traceback = error[:200], ""
    envelopes = envelope.joined([(1, letter.envelope) for letter in group])
    size = letter_bytes(payload, error, traceback) + len(facts) + len(envelopes)
    return LetterRow(
        last, first.record, sum(letter.records for letter in group), first.reason, error, traceback,
        first.attempts, first.first_at, first.last_at, retry, size, payload, len(group),
        first.principal, facts, envelopes,
    )  # fmt: skip


def _pack(group: Sequence[DeadLetter], room: int) -> bytes:
    sizes = pack_sizes([len(letter.payload) for letter in group])
    runs = _runs([letter.record for letter in group if letter.record])
    for longest in _SHORTER:
        texts: dict[tuple[str, str], int] = {}
        which = [
            texts.setdefault(
                (_cut(letter.error, longest), _cut(letter.traceback, longest)), len(texts)
            )
            for letter in group
        ]
        places = pack_sizes(which) if len(texts) > 1 else b""
        facts = zlib.compress(_encode(_Facts(sizes, runs, list(texts), places)), 1)
        if len(facts) <= room:
            break
    return facts


def _cut(text: str, longest: int | None) -> str:
    if longest is None or len(text) <= longest:
        return text
    return f"{text[: longest - 1]}…" if longest else "(there were too many different texts)"


def _runs(records: Sequence[str]) -> list[tuple[str, int, int]]:
    runs: list[tuple[str, int, int]] = []
    for record in records:
        place, _, index = record.rpartition(".")
        if not (place and index.isascii() and index.isdigit() and str(int(index)) == index):
            runs.append((record, -1, 1))  # no id of ours: kept as it is
            continue
        last = runs[-1] if runs else None
        if last is not None and last[0] == place and last[1] + last[2] == int(index):
            runs[-1] = (place, last[1], last[2] + 1)
        else:
            runs.append((place, int(index), 1))
    return runs


def _ids(runs: Iterable[tuple[str, int, int]]) -> list[str]:
    return [
        place if first < 0 else f"{place}.{index}"
        for place, first, count in runs
        for index in range(first, first + count)
    ]


def taken_apart(row: LetterRow, *, whole: bool = True) -> list[tuple[int, int, DeadLetter]]:
    """Each letter of a row: its number, the bytes of its payload, and what it says.

    Args:
        row: its payload may be missing where it is not asked for.
        whole: with payloads and tracebacks.

    Raises:
        ValueError, TypeError, LookupError, msgspec.MsgspecError: the row is damaged (`readable`).
    """
    if row.letters == 1:
        size = len(row.payload)
        payload, traceback = (row.payload, row.traceback) if whole else (b"", "")
        (origin,) = _envelopes(row)
        letter = _letter(row, row.record, row.error, traceback, payload, origin=origin)
        return [(row.id, size, letter)]
    try:
        facts = _decode(zlib.decompress(row.facts))
    except zlib.error as broken:
        raise ValueError("what a row of dead letters says can't be read") from broken
    sizes, ids = unpack_sizes(facts.sizes), _ids(facts.runs)
    if row.record == "":
        ids = [""] * row.letters
    texts = unpack_sizes(facts.which) if facts.which else [0] * row.letters
    found, start = [], 0
    for number, size, record, text, origin in zip(
        row.numbers, sizes, ids, texts, _envelopes(row), strict=True
    ):
        error, traceback = facts.texts[text]
        payload = row.payload[start : start + size] if whole else b""
        start += size
        letter = _letter(row, record, error, traceback if whole else "", payload, origin=origin)
        found.append((number, size, letter))
    return found


def _envelopes(row: LetterRow) -> list[bytes]:
    """The envelope of each letter; damaged ones are dropped, because the records are whole."""
    try:
        return envelope.singles(row.envelopes, row.letters)
    except UNREADABLE:
        return [b""] * row.letters


def readable(row: LetterRow) -> LetterRow:
    """The row itself, or one letter in its place if it does not tell any more what is in it."""
    try:
        taken_apart(row, whole=False)
    except UNREADABLE:
        return row._replace(
            letters=1,
            facts=b"",
            envelopes=b"",
            reason="damaged",
            error=DAMAGED,
            traceback="",
            retry=0,
        )
    return row


def _letter(
    row: LetterRow, record: str, error: str, traceback: str, payload: bytes, *, origin: bytes
) -> DeadLetter:
    records = row.records if row.letters == 1 else 1
    return DeadLetter(
        record, row.reason, error, traceback, payload, row.attempts, row.first_at, row.last_at,
        records, row.principal, envelope=origin,
    )  # fmt: skip


def split(row: LetterRow, chosen: Collection[int]) -> tuple[list[LetterRow], list[LetterRow]]:
    """A row as rows of the letters with these numbers, and of the others; the numbers stay.

    Returns:
        The rows of those that are chosen, and of the rest.
    """
    numbers = row.numbers
    inside = [number in chosen for number in numbers]
    if all(inside):
        return [row], []
    if not any(inside):
        return [], [row]
    letters = [letter for _, _, letter in taken_apart(row)]
    changes = [i for i, (one, other) in enumerate(pairwise(inside), 1) if one != other]
    parts: tuple[list[LetterRow], list[LetterRow]] = ([], [])
    for start, end in pairwise([0, *changes, len(letters)]):
        part = _row(letters[start:end], numbers[end - 1], retry=row.retry, room=FACTS_BYTES)
        parts[0 if inside[start] else 1].append(part)
    return parts
