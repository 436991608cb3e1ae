"""Envelopes go with their records through every cut and join, and equal ones are stored once."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.base import envelope
from ingestd.base.envelope import EMPTY, Envelope, EnvelopeRuns
from ingestd.base.record import Records, join

SHOP = envelope.pack(Envelope("http", "records", "shop", "application/json"))
TILL = envelope.pack(Envelope("http", "records", "till"))
FILE = envelope.pack(Envelope("fetch", attributes={"url": "https://a/b"}, numbered="line"))


def line(number: int) -> Envelope:
    return Envelope("fetch", attributes={"url": "https://a/b", "line": number})


def each(packed: bytes, count: int) -> list[Envelope]:
    known = EnvelopeRuns(packed, count)
    return [known.of(i) for i in range(count)]


def test_a_run_of_one_envelope_is_that_envelope() -> None:
    assert envelope.joined([(3, SHOP), (1, bytes(bytearray(SHOP)))]) == SHOP
    assert envelope.joined([(3, b""), (1, b"")]) == b""
    assert envelope.part(SHOP, 5, 7) == SHOP
    assert each(SHOP, 2) == [Envelope("http", "records", "shop", "application/json")] * 2
    assert each(b"", 1) == [EMPTY]


def test_equal_envelopes_are_stored_once_and_a_million_lines_are_one_run() -> None:
    turns = envelope.joined([(1, SHOP if n % 2 else TILL) for n in range(100)])
    assert turns.count(SHOP) == turns.count(TILL) == 1
    assert len(turns) < 100 * 4 + len(SHOP) + len(TILL) + 20
    pieces = [(1000, envelope.numbered(FILE, 1000, n * 1000)) for n in range(1000)]
    lines = envelope.joined(pieces)
    assert len(lines) < len(FILE) + 20
    assert EnvelopeRuns(lines, 1_000_000).of(999_999) == line(999_999)


@given(st.data())
def test_envelopes_go_with_their_records_through_cuts_and_joins(data: st.DataObject) -> None:
    runs, expected = [], []
    for number in range(data.draw(st.integers(1, 5))):
        count = data.draw(st.integers(1, 6))
        items = [b"%d" % (10 * number + i) for i in range(count)]
        run = Records.sized(items) if data.draw(st.booleans()) else Records.lines(items)
        packed = data.draw(st.sampled_from([b"", SHOP, TILL, FILE]))
        first = data.draw(st.integers(0, 12))
        if packed == FILE:
            packed = envelope.numbered(FILE, count, first)
            expected += [line(first + i) for i in range(count)]
        else:
            expected += each(packed, count)
        runs.append(run._replace(envelopes=packed))
    whole = join(runs)
    assert each(whole.envelopes, whole.count) == expected
    # However it was cut, it is the same again when it is joined.
    assert join(whole.pieces(data.draw(st.integers(1, 12)))) == whole
    first = data.draw(st.integers(0, whole.count - 1))
    part = whole.part(first, data.draw(st.integers(1, whole.count - first)))
    assert each(part.envelopes, part.count) == expected[first : first + part.count]
    alone = envelope.singles(part.envelopes, part.count)
    assert [EnvelopeRuns(one, 1).of(0) for one in alone] == each(part.envelopes, part.count)
    assert envelope.joined([(1, one) for one in alone]) == part.envelopes


def test_an_envelope_is_bounded() -> None:
    huge = {f"x-{n}": "v" * 10_000 for n in range(40)}
    packed = envelope.pack(
        Envelope("s" * 9000, "e" * 9000, "c" * 9000, "t" * 9000, huge, "p" * 9000, dict(huge))
    )
    assert len(packed) <= envelope.BYTES_MAX
    known = EnvelopeRuns(packed, 1).of(0)
    assert len(known.client) == envelope.NAME_CHARACTERS_MAX
    assert known.attributes["x-0"] == "v" * envelope.VALUE_CHARACTERS_MAX


def test_bytes_of_a_header_that_are_no_text_are_replaced() -> None:
    packed = envelope.pack(Envelope(headers={"x": "caf\udce9", "y": "é"}))
    assert EnvelopeRuns(packed, 1).of(0).headers == {"x": "caf?", "y": "é"}


@pytest.mark.parametrize(
    ("packed", "records"),
    [
        (b"R", 1),
        (b"R\x92\x90\x91\x93\x05\x01\x00", 1),  # names an envelope that is not there
        (envelope.joined([(1, SHOP), (1, TILL)]), 3),
        (b"\x91\x05", 1),
        (b"\xff\xfe", 1),
    ],
)
def test_damaged_envelopes_are_found(packed: bytes, records: int) -> None:
    with pytest.raises((ValueError, LookupError)):
        envelope.singles(packed, records)


def test_a_later_field_does_not_disturb() -> None:
    later = msgspec.msgpack.encode(["http", "records", "shop", "", {}, "", {}, "", "more"])
    assert EnvelopeRuns(later, 1).of(0) == Envelope("http", "records", "shop")
