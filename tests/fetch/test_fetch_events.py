"""Server-sent events: the specification's examples and rules, in any division into reads."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ingestd.base.record import Layout
from ingestd.codecs.lines import KEPT_BYTES
from ingestd.sources.fetch.decoders import ID_CHARS_MAX, Event, EventParser, records_of

MAX = 1000


def parse(stream: bytes, bytes_max: int = MAX) -> tuple[list[bytes], EventParser]:
    parser = EventParser(bytes_max)
    return [event.data for event in parser.feed(stream)], parser


@pytest.mark.parametrize(
    ("stream", "data"),
    [
        # The examples of the specification.
        ((b"data: This is the first message.\n\ndata: This is the second message, it\n"
          b"data: has two lines.\n\ndata: This is the third message.\n\n"),
         [b"This is the first message.", b"This is the second message, it\nhas two lines.",
          b"This is the third message."]),
        (b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\n", [b"73857293", b"2153"]),
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", [b"YHOO\n+2\n10"]),
        ((b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\n"
          b"data:  third event\n\n"), [b"first event", b"second event", b" third event"]),
        (b"data\n\ndata\ndata\n\ndata:", [b"", b"\n"]),
        (b"data:test\n\ndata: test\n\n", [b"test", b"test"]),
        # Ends of lines.
        (b"data: a\r\rdata: b\r\n\r\ndata: c\n\n", [b"a", b"b", b"c"]),
        (b"data: a\r\n\rdata: b\n\r\n", [b"a", b"b"]),
        # A mark at the very beginning, and nowhere else.
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [b"a"]),
        # What is not complete, unknown fields, no field at all.
        (b"data: a\n\ndata: b\n", [b"a"]),
        (b"data: a\n\ndata: b\n\r", [b"a", b"b"]),
        (b"Data: a\ndat: b\nwhat ever\n: data: c\n\n", []),
        (b"\n\n\nid: 5\n\n", []),
        (b"data: a:b: c\n\n", [b"a:b: c"]),
    ],
)  # fmt: skip
def test_what_is_an_event(stream: bytes, data: list[bytes]) -> None:
    assert parse(stream)[0] == data


@pytest.mark.parametrize(
    ("stream", "last"),
    [
        (b"id: 1\ndata: a\n\n", "1"),
        (b"id: 1\ndata: a\n\nid: 2\ndata: b\n", "1"),  # not complete
        (b"id: 1\n\n", "1"),
        (b"id: 1\ndata: a\n\ndata: b\n\n", "1"),
        (b"id: 1\ndata: a\n\nid\ndata: b\n\n", ""),
        (b"id: 1\n\nid: 2\0\n\n", "1"),
        (b"id: 1\n\nid: a\x01b\n\n", "1"),  # no header can say it
        (b"id: 1\n\nid: " + b"x" * (ID_CHARS_MAX + 1) + b"\n\n", "1"),
        ("id: ä→\n\n".encode(), "ä→"),
    ],
)
def test_the_last_event_id(stream: bytes, last: str) -> None:
    assert parse(stream, 10_000)[1].last_id == last


@pytest.mark.parametrize(
    ("stream", "retry"),
    [
        (b"retry: 1500\n\n", 1.5),
        (b"retry: 1500\n", 1.5),
        (b"retry: 15x\n\n", None),
        (b"retry: -1\n\n", None),
        (b"retry:\n\n", None),
        (b"retry: " + b"9" * 400 + b"\n\n", None),
        ("retry: ١٢\n\n".encode(), None),
    ],
)
def test_retry(stream: bytes, retry: float | None) -> None:
    assert parse(stream)[1].retry == retry


field = st.sampled_from(
    [b"data", b"data: ", b"data:x", b"data: yy", b"id: 1", b"id", b"retry: 7", b": c", b"event: e",
     b"data: " + b"z" * 30, b"", b"junk"]
)  # fmt: skip
ends = st.sampled_from([b"\n", b"\r", b"\r\n", b"\n\n"])
streams = st.builds(
    lambda mark, parts: mark + b"".join(part + end for part, end in parts),
    st.sampled_from([b"", b"\xef\xbb\xbf", b"\xef\xbb"]),
    st.lists(st.tuples(field, ends), max_size=30),
)


@given(streams, st.lists(st.integers(0, 400)))
@example(b"data: a\r\ndata: b\r\n\r\n", list(range(40)))
@example(b"\xef\xbb\xbfdata: a\r\n\r\ndata: b\r\r", list(range(40)))
def test_any_division_gives_the_same(stream: bytes, cuts: list[int]) -> None:
    whole = EventParser(20)
    expected = whole.feed(stream)
    parser = EventParser(20)
    found: list[Event] = []
    places = sorted({cut for cut in cuts if cut < len(stream)})
    for start, end in zip([0, *places], [*places, len(stream)], strict=True):
        found += parser.feed(stream[start:end])
    assert found == expected
    assert (parser.last_id, parser.retry) == (whole.last_id, whole.retry)


def test_an_event_is_there_with_the_byte_that_completes_it() -> None:
    parser = EventParser(MAX)
    assert parser.feed(b"data: a\r") == []
    assert parser.feed(b"\r") == [Event(b"a", 1)]
    assert parser.feed(b"\n") == []
    assert parser.feed(b"data: b\n\n") == [Event(b"b", 1)]


@pytest.mark.parametrize(
    "stream",
    [
        b"data: " + b"x" * 5000 + b"\n\n",
        b"data: x\n" * 3000 + b"\n",
        b"data\n" * 5000 + b"\n",
        b": " + b"x" * 5000 + b"\ndata: " + b"y" * 1001 + b"\n\n",
    ],
)
def test_too_long_is_bounded_counted_and_over_with_its_event(stream: bytes) -> None:
    parser = EventParser(MAX)
    events = []
    for at in range(0, len(stream), 100):
        events += parser.feed(stream[at : at + 100])
        assert len(parser._line) + len(parser._data) < 3 * MAX
    (event,) = events
    assert event.size > MAX
    assert len(event.data) <= MAX + 2
    assert parser.feed(b"data: good\n\n") == [Event(b"good", 4)]


def test_exactly_as_long_as_it_may_be() -> None:
    (event,) = EventParser(MAX).feed(b"data:" + b"x" * MAX + b"\n\n")
    assert event == Event(b"x" * MAX, MAX)
    two = b"x" * (MAX // 2)
    (event,) = EventParser(MAX + 1).feed(b"data: " + two + b"\ndata: " + two + b"\n\n")
    assert event == Event(two + b"\n" + two, MAX + 1)


def event(data: bytes) -> Event:
    return Event(data, len(data))


def test_json_events_are_checked_and_may_have_lines() -> None:
    some = [event(b'{"a":1}'), event(b"{"), event(b" "), event(b"[1,\n2]"), Event(b"9" * 10, 9999)]
    parsed = records_of(some, "json", MAX, 7)
    assert parsed.records.items() == [b'{"a":1}', b"[1,\n2]"]
    assert parsed.records.layout is Layout.SIZED
    assert [(one.index, one.reason) for one in parsed.refused] == [
        (8, "malformed"), (10, "too_large")]  # fmt: skip
    assert records_of([event(b"1"), event(b"2")], "json", MAX, 0).records.layout is Layout.LINES


def test_text_and_bytes_events() -> None:
    some = [event(b"a\nb"), event(b""), event(b"c")]
    assert records_of(some, "text", MAX, 0).records.items() == [b"a\nb", b"c"]
    assert records_of(some, "bytes", MAX, 0).records.items() == [b"a\nb", b"", b"c"]


def test_of_a_very_long_one_the_beginning_is_kept() -> None:
    size = 2 * KEPT_BYTES
    (refused,) = records_of([event(b"x" * size)], "text", KEPT_BYTES, 0).refused
    assert refused.payload == b"x" * KEPT_BYTES
