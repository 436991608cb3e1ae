"""Messages as records, framing of connections, and datagrams."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import tracemalloc
from datetime import UTC, datetime
from time import process_time, tzset
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingestd.base.clock import SystemClock
from ingestd.base.envelope import EnvelopeRuns
from ingestd.base.errors import AddressError, Overloaded
from ingestd.codecs.lines import KEPT_BYTES
from ingestd.sources.base import SourceContext
from ingestd.sources.syslog import SyslogSettings, SyslogSourceKind
from ingestd.sources.syslog.codec import RecordMaker, SyslogCodec
from ingestd.sources.syslog.parser import FACILITIES, SEVERITIES, MessageParser
from ingestd.sources.syslog.source import SyslogSource
from tests.peak import peak
from tests.sources.test_tcp import KeyedIntake, connected, drain, eventually

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC).timestamp()


def parser(zone: str = "UTC", now: float = NOW) -> MessageParser:
    return MessageParser(zone, lambda: now)


def parse(message: bytes | str, **more: Any) -> dict[str, Any]:
    raw = message.encode() if isinstance(message, str) else message
    (found,) = parser(**more).parse(raw + b"\n")
    return json.loads(found + b"}")


def some(record: dict[str, Any]) -> dict[str, Any]:
    """The fields that say something, without those that are the same for all."""
    left_out = ("facility_code", "severity_code", "format")
    return {k: v for k, v in record.items() if v not in (None, {}) and k not in left_out}


# -- messages --------------------------------------------------------------------------------------


def test_rfc5424_with_everything() -> None:
    message = (
        "<165>1 2003-10-11T22:14:15.003Z mymachine.example.com evntslog 42 ID47 "
        '[exampleSDID@32473 iut="3" eventSource="App\\"lication\\]" eventID="1\\\\011"][x] '
        '\ufeffAn "event" of C:\\dir\té end'
    )
    assert parse(message) == {
        "format": "rfc5424",
        "facility": "local4",
        "facility_code": 20,
        "severity": "notice",
        "severity_code": 5,
        "timestamp": "2003-10-11T22:14:15.003Z",
        "hostname": "mymachine.example.com",
        "appname": "evntslog",
        "procid": "42",
        "msgid": "ID47",
        "structured_data": {
            "exampleSDID@32473": {
                "iut": "3", "eventSource": 'App"lication]', "eventID": "1\\011",
            },
            "x": {},
        },
        "message": 'An "event" of C:\\dir\té end',
    }  # fmt: skip


def test_rfc5424_with_nothing() -> None:
    record = parse("<0>1 - - - - - -")
    assert record["format"] == "rfc5424"
    assert some(record) == {"facility": "kern", "severity": "emerg", "message": ""}
    assert (record["timestamp"], record["structured_data"]) == (None, {})


DEVICES = [
    # RFC 3164
    ("<34>Oct 11 22:14:15 mymachine su: 'su root' failed",
     {"timestamp": "2026-10-11T22:14:15Z", "hostname": "mymachine", "appname": "su",
      "message": "'su root' failed"}),
    ("<13>Feb  5 17:32:18 10.0.0.99 Use the BFG!",
     {"timestamp": "2026-02-05T17:32:18Z", "hostname": "10.0.0.99", "message": "Use the BFG!"}),
    ("<86>Nov 29 11:00:00 web1 sshd[4242]: Accepted",
     {"timestamp": "2026-11-29T11:00:00Z", "hostname": "web1", "appname": "sshd",
      "procid": "4242", "message": "Accepted"}),
    # no host: logger --rfc3164 into a socket, some appliances
    ("<13>Nov 29 11:00:00 root: hello",
     {"timestamp": "2026-11-29T11:00:00Z", "appname": "root", "message": "hello"}),
    ("<13>Nov 29 11:00:00 app[7]: hello",
     {"timestamp": "2026-11-29T11:00:00Z", "appname": "app", "procid": "7", "message": "hello"}),
    # an IPv6 host
    ("<13>Nov 29 11:00:00 fe80::1 app: hello",
     {"timestamp": "2026-11-29T11:00:00Z", "hostname": "fe80::1", "appname": "app",
      "message": "hello"}),
    # no time: Python's SysLogHandler
    ("<14>just text", {"message": "just text"}),
    ("<14>app: text", {"appname": "app", "message": "text"}),
    ("<14>GET http://x/ 12:30 a: b", {"message": "GET http://x/ 12:30 a: b"}),
    # rsyslog's forward format
    ("<13>2026-11-29T11:00:00.123456+01:00 web1 app[1]: hi",
     {"timestamp": "2026-11-29T11:00:00.123456+01:00", "hostname": "web1", "appname": "app",
      "procid": "1", "message": "hi"}),
    ("<13>2026-11-29 11:00:00,123 web1 app: hi",
     {"timestamp": "2026-11-29T11:00:00.123Z", "hostname": "web1", "appname": "app",
      "message": "hi"}),
    # Cisco: IOS, NX-OS, ASA
    ("<189>123: *Nov 29 10:00:00.123: %SYS-5-CONFIG_I: Configured from console",
     {"timestamp": "2026-11-29T10:00:00.123Z", "msgid": "SYS-5-CONFIG_I",
      "structured_data": {"cisco": {"sequence": "123"}}, "message": "Configured from console"}),
    ("<189>45: rtr1: Nov 29 10:00:00.123 UTC: %LINK-3-UPDOWN: down",
     {"timestamp": "2026-11-29T10:00:00.123Z", "hostname": "rtr1", "msgid": "LINK-3-UPDOWN",
      "structured_data": {"cisco": {"sequence": "45"}}, "message": "down"}),
    ("<187>%PIX-4-106023 description", {"msgid": "PIX-4-106023", "message": "description"}),
    ("<190>sw01.pdx01: 2017 Jul 28 14:42:46 UTC: %AUTHPRIV-6-SYSTEM_MSG: pam_unix: x",
     {"timestamp": "2017-07-28T14:42:46Z", "hostname": "sw01.pdx01",
      "msgid": "AUTHPRIV-6-SYSTEM_MSG", "message": "pam_unix: x"}),
    ("<166>Nov 29 2026 10:00:00 fw : %ASA-6-302013: Built",
     {"timestamp": "2026-11-29T10:00:00Z", "hostname": "fw", "msgid": "ASA-6-302013",
      "message": "Built"}),
    ("<166>:Nov 29 10:00:00 UTC: %ASA-session-6-302013: Built",
     {"timestamp": "2026-11-29T10:00:00Z", "msgid": "ASA-session-6-302013", "message": "Built"}),
    # Meraki, Fortinet
    ("<134>1 1563249630.774247831 MX84 events type=x",
     {"timestamp": "2019-07-16T04:00:30.774247831Z", "hostname": "MX84",
      "message": "events type=x"}),
    ('<189>date=2026-11-29 time=10:00:00 devname="FW"',
     {"message": 'date=2026-11-29 time=10:00:00 devname="FW"'}),
    ("<189>Nov 29 10:00:00 rtr1 %SYS-5-CONFIG_I: Configured",
     {"timestamp": "2026-11-29T10:00:00Z", "hostname": "rtr1", "msgid": "SYS-5-CONFIG_I",
      "message": "Configured"}),
    # what is no tag behind a host; names that are nil
    ("<13>Nov 29 11:00:00 web1 http://x/ is down",
     {"timestamp": "2026-11-29T11:00:00Z", "hostname": "web1", "message": "http://x/ is down"}),
    ("<13>Nov 29 11:00:00 web1 12:30 is late",
     {"timestamp": "2026-11-29T11:00:00Z", "hostname": "web1", "message": "12:30 is late"}),
    ("<13>Nov 29 11:00:00 web1 a=b: c",
     {"timestamp": "2026-11-29T11:00:00Z", "hostname": "web1", "message": "a=b: c"}),
    ("<13>Nov 29 11:00:00 - app[]: (x)",
     {"timestamp": "2026-11-29T11:00:00Z", "appname": "app", "message": "(x)"}),
    ('<13>1 2026-12-31T23:59:60Z h a p m [x "y] z',
     {"timestamp": "2026-12-31T23:59:60Z", "hostname": "h", "appname": "a", "procid": "p",
      "msgid": "m", "message": '[x "y] z'}),
    # no priority, or none that there is
    ("Nov 29 11:00:00 web1 app: hi",
     {"timestamp": "2026-11-29T11:00:00Z", "hostname": "web1", "appname": "app", "message": "hi"}),
    ("nothing: at all", {"message": "nothing: at all"}),
    ("<999>hello", {"message": "<999>hello"}),
    ("<007>hello", {"message": "<007>hello"}),
    ("<>", {"message": "<>"}),
    # digits of other scripts
    ("<\u0663>hello", {"message": "<\u0663>hello"}),
    ("<1\u0663>Nov 29 11:00:00 h a: x", {"message": "<1\u0663>Nov 29 11:00:00 h a: x"}),
    ("<13>2026-11-29T11:00:00.\u0661 h a: x", {"message": "2026-11-29T11:00:00.\u0661 h a: x"}),
    # clocks that are not set
    ("<13>0001-01-01T00:00:00 h a: x",
     {"timestamp": "0001-01-01T00:00:00Z", "hostname": "h", "appname": "a", "message": "x"}),
    ("<13>1 9999-12-31T23:59:59 h a - - - x",
     {"timestamp": "9999-12-31T23:59:59Z", "hostname": "h", "appname": "a", "message": "x"}),
    ("<13>0000-00-00T00:00:00 h a: x", {"message": "0000-00-00T00:00:00 h a: x"}),
    # days that are none, structured data that is none: nothing of it is lost
    ("<13>Feb 31 11:00:00 web1 app: hi", {"message": "Feb 31 11:00:00 web1 app: hi"}),
    ("<13>Feb 31 11:00:00 web1 app:hi", {"message": "Feb 31 11:00:00 web1 app:hi"}),
    ("<13>1 - h a p m [x y]", {"hostname": "h", "appname": "a", "procid": "p", "msgid": "m",
                               "message": "[x y]"}),
    ("<13>1 2026-02-31T11:00:00Z h a p m - x",
     {"timestamp": "2026-02-31T11:00:00Z", "hostname": "h", "appname": "a", "procid": "p",
      "msgid": "m", "message": "x"}),
    ("<13>1 soon h a p m - x", {"message": "1 soon h a p m - x"}),
    ('<13>1 - h a p m [x y="1" x', {"hostname": "h", "appname": "a", "procid": "p", "msgid": "m",
                                    "message": '[x y="1" x'}),
    ('<13>1 - h a p m [x y="a]b"] x',
     {"hostname": "h", "appname": "a", "procid": "p", "msgid": "m",
      "structured_data": {"x": {"y": "a]b"}}, "message": "x"}),
    ('<13>1 - h - - - [x y="1" y="2" z="3"] x',
     {"hostname": "h", "structured_data": {"x": {"y": ["1", "2"], "z": "3"}}, "message": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "fields"), DEVICES)
def test_what_devices_send(message: str, fields: dict[str, Any]) -> None:
    record = some(parse(message))
    record.pop("facility", None)
    record.pop("severity", None)
    assert record == fields


@pytest.mark.parametrize("zone", ["", "America/New_York", "Pacific/Apia"])
@pytest.mark.parametrize("time", ["0001-01-01T00:00:00", "9999-12-31T23:59:59"])
@pytest.mark.parametrize("machine", ["UTC", "America/New_York", "Asia/Tokyo"])
def test_the_first_and_the_last_year(
    time: str, zone: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", machine)
    tzset()
    try:
        record = parse(f"<13>{time} h a: x", zone=zone)
    finally:
        monkeypatch.undo()
        tzset()
    assert (record["timestamp"][:19], record["message"]) == (time, "x")


@pytest.mark.parametrize("unit", [b":", b"a:", b":1", b"a", b".", b"[", b"[a]", b"%A-1-", b"\\"])
def test_long_messages_take_no_long_time(unit: bytes) -> None:
    """The time is linear in a message; that of a pattern which goes back is minutes here."""
    begun = process_time()
    for head in (b"<13>", b"<13>Nov 29 11:00:00 ", b"<13>1 - h a p m ", b"<13>%A-1-"):
        parse(head + unit * (64 * 1024 // len(unit)))
    assert process_time() - begun < 2


@pytest.mark.parametrize("unit", [b"\0", b"\x1b[0m", b"[x]", b"\xff", b'"'])
def test_what_a_message_takes_while_it_is_parsed_is_bounded(unit: bytes) -> None:
    message = b"<13>1 - h a p m " + (b"- " if unit != b"[x]" else b"")
    message += unit * (256 * 1024 // len(unit))
    with peak() as found:
        parse(message)
    assert found.bytes < 40 * len(message)


def test_what_is_known_of_hosts_is_bounded() -> None:
    """Also within one block."""
    mine = parser()
    block = b"".join([b"<13>Nov 29 11:00:00 h%d tag: x\n" % number for number in range(50_000)])
    with peak() as found:
        mine.parse(block)
        del block
        kept, _ = tracemalloc.get_traced_memory()
    assert kept < found.bytes / 4


def test_every_priority_has_its_names() -> None:
    for code in range(192):
        record = parse(f"<{code}>x")
        names = FACILITIES[code // 8], SEVERITIES[code % 8]
        assert (record["facility"], record["severity"]) == names
        assert (record["facility_code"], record["severity_code"]) == (code // 8, code % 8)


@pytest.mark.parametrize(
    ("now", "time", "expected"),
    [
        ("2026-01-01T00:10", "Dec 31 23:59:00", "2025-12-31T23:59:00+01:00"),
        ("2026-12-31T23:50", "Jan  1 00:10:00", "2027-01-01T00:10:00+01:00"),
        ("2026-07-01T12:00", "Jul  2 00:00:00", "2026-07-02T00:00:00+02:00"),
        ("2026-07-01T12:00", "Nov  2 00:00:00", "2025-11-02T00:00:00+01:00"),
        ("2025-01-01T12:00", "Feb 29 00:00:00", "2024-02-29T00:00:00+01:00"),
    ],
)
def test_a_time_without_a_year_is_the_nearest(now: str, time: str, expected: str) -> None:
    at = datetime.fromisoformat(now).replace(tzinfo=UTC).timestamp() - 3600
    assert parse(f"<1>{time} h a: x", zone="Europe/Berlin", now=at)["timestamp"] == expected


def test_bytes_that_are_no_utf8_are_kept_beside() -> None:
    line = b"<13>Nov 29 11:00:00 h a: caf\xe9 \x00 x"
    record = parse(line)
    assert record["message"] == "caf\ufffd \x00 x"
    assert base64.b64decode(record["raw_base64"]) == line
    whole = parser().parse(line + b"\n<13>good \xc3\xa9\n")
    assert "raw_base64" not in json.loads(whole[1] + b"}")


def test_control_characters_are_escaped() -> None:
    text = "".join(map(chr, (*range(1, 10), *range(11, 32)))) + "\x7f"
    assert parse(f"<13>1 - h a p m - {text}")["message"] == text


ESCAPES = {chr(n): f"\\u{n:04x}" for n in range(32)} | {"\t": "\\t", "\r": "\\r"}
ESCAPES |= {'"': '\\"', "\\": "\\\\"}
ANY_TEXT = st.text(st.sampled_from('"\\\0\x01\b\t\f\r\x1f \x7f[]=aü\u2028\ufeff😀'), max_size=20)


@settings(max_examples=200)
@given(st.lists(ANY_TEXT, min_size=1, max_size=4), st.sampled_from(("", "\0", "\x01")))
def test_texts_are_written_the_same_to_the_byte(texts: list[str], stand_in: str) -> None:
    """Character by character, whether or not a block holds one that needs the slow way."""
    escapes = {**ESCAPES, stand_in: r"\n"}
    for head in ("<13>1 - h a p m - ", "<13>Nov 29 11:00:00 host tag: "):
        block = "".join(f"{head}x{text}\n" for text in texts)
        for one, text in zip(parser().parse(block.encode(), stand_in.encode()), texts, strict=True):
            written = "".join(escapes.get(char, char) for char in text)
            assert one.decode().endswith(f'"message":"x{written}"')


TEXT = st.binary(max_size=200).map(lambda b: b.replace(b"\n", b""))
MESSAGES = st.one_of(
    TEXT,
    st.builds(lambda n, b: b"<%d>%b" % (n, b), st.integers(0, 200), TEXT),
    st.builds(lambda b: b"<13>1 2026-11-29T11:00:00Z h a p m " + b, TEXT),
    st.builds(lambda b: b'<13>1 - h a p m [a b="' + b + b'"] ' + b, TEXT),
    st.builds(lambda b: b"<13>Nov 29 11:00:00 host tag: " + b, TEXT),
    st.sampled_from([message.encode() for message, _ in DEVICES]),
)


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.lists(MESSAGES.filter(bool), min_size=1, max_size=5))
def test_any_bytes_are_records_and_the_usual_way_is_the_exact_one(messages: list[bytes]) -> None:
    """Each message is one JSON object; the pattern for all finds what the one for each finds."""
    mine = parser()
    found = mine.parse(b"\n".join([*messages, b""]))
    assert len(found) == len(messages)
    for message, one in zip(messages, found, strict=True):
        record = json.loads(one + b"}")
        assert b"\n" not in one
        text = message.decode(errors="replace")
        exact = mine.understand(text)
        if exact["timestamp"] or not record["timestamp"]:
            for field in ("format", "hostname", "appname", "procid", "msgid", "message"):
                assert record[field] == exact[field], field
            assert record["structured_data"] == exact["structured_data"]


# -- framing ---------------------------------------------------------------------------------------


class Feed:
    """A codec whose records are the messages."""

    def __init__(self, bound: int = 1000) -> None:
        self.faults = 0
        self.codec = SyslogCodec(RecordMaker(parser(), bound), b'"peer"', self._fault)
        self.messages: list[str] = []
        self.refused: list[tuple[str, bytes]] = []

    def _fault(self) -> None:
        self.faults += 1

    def take(self, frames: Any) -> None:
        assert not frames.fault
        for received in frames.received:
            for item in received.parsed.records.items():
                record = msgspec.json.decode(item)
                assert record["peer"] == "peer"
                self.messages.append(record["message"])
            self.refused += [(one.reason, one.payload) for one in received.parsed.refused]

    def feed(self, *pieces: bytes) -> Feed:
        for piece in pieces:
            self.take(self.codec.feed(piece))
        return self

    def end(self, why: str | None = None) -> Feed:
        self.take(self.codec.end(why))
        assert self.codec.held == 0
        return self


def counted(*messages: bytes) -> bytes:
    return b"".join(b"%d %b" % (len(one), one) for one in messages)


def in_pieces(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


STREAMS = [
    (b"<1>a\n<1>b\r\n\n<1>c\n", ["a", "b", "c"]),
    (b"<1>a\n<1>c", ["a", "c"]),
    (b"2026-11-29 is no length\n", ["2026-11-29 is no length"]),
    (b"12 monkeys\n", ["12 monkeys"]),
    (counted(b"<1>a", b"<1>b\nsecond line", b"<1>c"), ["a", "b\nsecond line", "c"]),
    (counted(b"<1>a\n", b"<1>b\0"), ["a", "b"]),
    (b"4 <1>a\n4 <1>b\n", ["a", "b"]),
    (b"<1>a\nmore\0<1>b\0", ["a\nmore", "b"]),
    (b"<1>a\0\n<1>b\0\n", ["a", "b"]),
    (b"\xef\xbb\xbf<1>a\n", ["a"]),
    (b"", []),
    (b"\n\0 \n", []),
]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("stream", "messages"), STREAMS)
def test_framing(stream: bytes, messages: list[str], size: int) -> None:
    if size < 1000 and stream == b"<1>a\nmore\0<1>b\0":
        messages = ["a", "more", "b"]  # its LF is all that there is to see at first
    found = Feed().feed(*in_pieces(stream, size)).end()
    assert (found.messages, found.refused, found.faults) == (messages, [], 0)


@pytest.mark.parametrize("size", [1, 1000])
def test_counted_messages_keep_their_nuls_and_lines(size: int) -> None:
    messages = ["a\nb", "c\0d", "\x01\0\ne", "f"]
    stream = counted(*[f"<1>{one}".encode() for one in messages], b"<1>\xff\0\n!")
    found = Feed().feed(*in_pieces(stream, size)).end()
    assert found.messages == [*messages, "\ufffd\0\n!"]


def test_messages_with_all_control_characters_are_kept_but_for_their_nuls() -> None:
    text = "".join(map(chr, range(32))) + "x"
    assert Feed().feed(counted(f"<1>{text}".encode())).messages == [text.replace("\0", "\n")]


def test_one_byte_pieces_of_nuls() -> None:
    found = Feed().feed(*in_pieces(b"<1>a\0<1>b\nc\0", 1)).end()
    assert found.messages == ["a", "b\nc"]


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_a_wrong_length_costs_no_more_than_what_it_covers(size: int) -> None:
    stream = b"4 <1>abc\n4 <1>b5 <1>c\n" + counted(b"<1>d") + b"x\n" + counted(b"<1>e")
    found = Feed().feed(*in_pieces(stream, size)).end()
    assert found.messages == ["a", "bc", "b", "c", "d", "x", "e"]
    assert found.faults == 2
    found = Feed().feed(*in_pieces(b"9 <1>a4 <1>b4 <1>c", size)).end()
    assert found.messages == ["a4 <1>", "b4 <1>c"]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_messages_that_are_too_long(size: int) -> None:
    long = b"<1>" + b"x" * 200
    good = b"<1>good"
    found = Feed(160).feed(*in_pieces(counted(good, long, good), size)).end()
    # The others are too large for that bound as JSON.
    assert ([reason for reason, _ in found.refused], found.messages) == (["too_large"] * 3, [])
    found = Feed(400)
    long = b"<1>" + b"x" * 500
    found.feed(*in_pieces(counted(good, long, good), size)).end()
    assert found.messages == ["good", "good"]
    assert long.startswith(found.refused[0][1])
    found = Feed(400).feed(*in_pieces(b"\n".join([good, long, good, b""]), size)).end()
    assert (found.messages, len(found.refused)) == (["good", "good"], 1)
    huge = Feed(400).feed(b"999999999 <1>a", *[b"y" * 1000] * 70)
    assert (huge.codec.held, len(huge.refused)) == (0, 1)


@pytest.mark.parametrize("size", [1, 1000, 10**6])
def test_the_beginning_of_a_long_message_is_kept_whatever_its_pieces(size: int) -> None:
    """Its first 64 KiB; and a line that has no length is one, however long it is."""
    long = b"<1>" + b"x" * 2000 + b" 5 <1>no" * 9000
    stream = counted(b"<1>a", long, b"<1>b") + b"no length " + long + b"\n" + counted(b"<1>c")
    found = Feed(1000).feed(*in_pieces(stream, size)).end()
    assert (found.messages, found.faults) == (["a", "b", "c"], 1)
    payloads = [long[:KEPT_BYTES], (b"no length " + long)[:KEPT_BYTES]]
    assert found.refused == [("too_large", payload) for payload in payloads]


@pytest.mark.parametrize(
    ("why", "refused"), [(None, []), ("it was cut", [("unfinished", b"no length <1>b")])]
)
def test_a_line_without_a_length_that_does_not_end(why: str | None, refused: list[Any]) -> None:
    found = Feed().feed(counted(b"<1>a"), b"no length ", b"<1>b").end(why)
    assert found.messages == ["a", *([] if why else ["no length <1>b"])]
    assert found.refused == refused


@pytest.mark.parametrize("stream", [b"<1>a\n<1>begun", counted(b"<1>a") + b"100 <1>begun", b"12"])
def test_what_was_begun_is_kept_as_unfinished(stream: bytes) -> None:
    found = Feed().feed(stream).end("it was cut")
    assert [reason for reason, _ in found.refused] == ["unfinished"]
    assert found.messages == (["a"] if b"a" in stream else [])


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(MESSAGES, st.binary(max_size=30)), max_size=6), st.data())
def test_any_stream_is_taken_whole(parts: list[bytes], data: st.DataObject) -> None:
    """No bytes make an error, nothing is held in the end, and frames are those of any division."""
    sizes = data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)))
    stream = b"".join(
        b"%d %b" % (len(one), one) if is_counted else one + b"\n"
        for one, is_counted in zip(parts, sizes, strict=True)
    )
    size = data.draw(st.integers(1, 50))
    Feed().feed(*in_pieces(stream, size)).end()
    if b"\0" not in stream:
        one, other = Feed(300), Feed(300)
        one.feed(*in_pieces(stream, size)).end()
        other.feed(*in_pieces(stream, 10_000)).end()
        assert (one.messages, one.refused) == (other.messages, other.refused)


@pytest.mark.parametrize(
    "stream",
    [
        b"\n".join([b"x"] * 3000),
        b"<1>\n" * 3000,
        b"3 abc" * 3000,
        b"1 a\n" * 3000,
        b"4 <1>b" * 3000,
    ],
)
def test_what_becomes_of_tiny_messages_is_known_before(stream: bytes) -> None:
    """An object is a hundred times as large as the shortest message."""
    codec = Feed(10**6).codec
    codec.feed(b"4 <1>b" if stream[:1].isdigit() else b"<")
    made = 0
    for piece in in_pieces(stream, 4096):
        cost = codec.cost(piece)
        assert not codec.is_quick(piece)
        frames = codec.feed(piece)
        size = sum(len(one.parsed.records.payload) for one in frames.received)
        assert size <= cost
        made += size
    assert made > 20 * len(stream)
    assert codec.is_quick(b"x" * 10_000)


@pytest.mark.parametrize(
    ("begun", "lie"),
    [
        (b"", b"099999 "),
        (b"", b"9999999999 "),
        (b"0", b"99999 "),
        (b"9", b"99999 9999 "),
        (b"no length ", b"99999 9999\n"),
        (b"100000 <1>", b"x" * 10 + b"\n99999 9999\n"),
    ],
)
def test_what_is_no_length_hides_no_messages(begun: bytes, lie: bytes) -> None:
    codec = Feed(10_000).codec
    codec.feed(b"4 <1>b" + begun)
    piece = lie + b"\n" + b"1 a" * 10_000
    cost = codec.cost(piece)
    frames = codec.feed(piece)
    assert sum(len(one.parsed.records.payload) for one in frames.received) <= cost


def test_raw_records_are_the_messages() -> None:
    codec = SyslogCodec(RecordMaker(None, 1000), b'"p"', lambda: None)
    (received,) = codec.feed(counted(b"<1>a", b"<1>b\nc")).received
    assert received.parsed.records.items() == [b"<1>a", b"<1>b#012c"]


# -- the source ------------------------------------------------------------------------------------


def source_of(intake: KeyedIntake, **more: Any) -> SyslogSource:
    more.setdefault("listen", ("tcp://127.0.0.1:0", "udp://127.0.0.1:0"))
    context = SourceContext(
        "syslog", {"default": intake}, "default", SystemClock(), 0, None, (),
        lambda: False, lambda *_: None,
    )  # type: ignore[arg-type]  # fmt: skip
    return SyslogSource(SyslogSettings(**more), context)


def udp(source: SyslogSource) -> tuple[str, int]:
    host, _, port = source.addresses[-1].removeprefix("udp://").rpartition(":")
    return host, int(port)


async def test_messages_over_tcp_and_udp() -> None:
    intake = KeyedIntake()
    source = source_of(intake)
    await source.start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        async with connected(source) as (_, writer):
            writer.write(counted(b"<13>over tcp") + b"18 <13>")
            for text in (b"<13>one\n", b"<13>two\nlines\0", b"", b"\n", b"caf\xe9"):
                sender.sendto(text, udp(source))
            items = [json.loads(item) for item in await intake.until(4)]
            assert sorted(one["message"] for one in items) == [
                "caf\ufffd", "one", "over tcp", "two\nlines",
            ]  # fmt: skip
            assert {one["peer"] for one in items} == {"127.0.0.1"}
            numbers = source.numbers()
            assert (numbers["datagrams"], numbers["datagrams_dropped"]) == (5, 0)
            envelopes = [EnvelopeRuns(r.envelopes, r.count) for r in intake.runs if r.envelopes]
            assert {one.of(0).attributes["peer"] for one in envelopes} == {"127.0.0.1"}
            sender.sendto(b"<13>the last one", udp(source))
            await drain(source)
    await source.close()
    assert json.loads(intake.items[-1])["message"] == "the last one"
    assert (source.numbers()["records"], source.numbers()["invalid"]) == (5, 1)
    assert [one.reason for one in intake.refused] == ["unfinished"]


async def test_datagrams_beyond_the_queue_are_dropped_and_counted() -> None:
    intake = KeyedIntake()
    intake.gate.clear()
    source = source_of(intake, listen=("udp://127.0.0.1:0",), udp_queue_bytes_max=65536)
    await source.start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for number in range(500):
            sender.sendto(b"<13>%d " % number + b"x" * 1000, udp(source))
            await asyncio.sleep(0)
        await eventually(lambda: source.totals.datagrams == 500)
        dropped = source.numbers()["datagrams_dropped"]
        assert 400 < dropped < 480
        intake.errors = [Overloaded(what="it", retry_after=0.01)]
        intake.gate.set()
        await intake.until(500 - int(dropped))
    await drain(source)
    await source.close()
    assert len(intake.items) == 500 - dropped
    assert len(intake.appends) <= 4


async def test_datagrams_that_are_lost_leave_their_place() -> None:
    intake = KeyedIntake()
    source = source_of(intake, listen=("udp://127.0.0.1:0",), udp_queue_bytes_max=65536)
    await source.start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for number in range(1, 6):
            intake.errors = [RuntimeError("a fault")]
            sender.sendto(b"<13>" + b"x" * 30_000, udp(source))
            await eventually(lambda n=number: source.totals.datagrams == n and not intake.errors)
        sender.sendto(b"<13>good", udp(source))
        await intake.until(1)
    assert source.numbers()["datagrams_dropped"] == 0
    await source.close()


async def test_the_kernel_counts_what_it_drops() -> None:
    source = source_of(KeyedIntake(), listen=("udp://127.0.0.1:0",), udp_buffer=4096)
    await source.start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(100):  # while the loop has no turn
            sender.sendto(b"x" * 1000, udp(source))
        await eventually(lambda: source.totals.datagrams)
    assert source.numbers()["datagrams"] + source.numbers()["datagrams_dropped"] == 100
    await source.close()


async def test_an_address_that_is_taken() -> None:
    first = source_of(KeyedIntake(), listen=("udp://127.0.0.1:0",))
    await first.start()
    second = source_of(KeyedIntake(), listen=first.addresses)
    with pytest.raises(AddressError, match=r"syslog\.listen"):
        await second.start()
    await first.close()


@pytest.mark.parametrize(
    ("settings", "form", "problem"),
    [
        ({}, "json", ""),
        ({}, "text", "parsed records are json"),
        ({"records": "raw"}, "text", ""),
        ({"records": "raw"}, "bytes", ""),
        ({"records": "raw"}, "json", "raw records are text"),
        ({"listen": "udp://0.0.0.0:514"}, "json", "0.0.0.0:514 is reachable"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], form: str, problem: str) -> None:
    own = SyslogSettings(**settings)
    kind = SyslogSourceKind()
    found = list(kind.problems(own, formats={"default": form}, default="default", runs=True))
    assert (not found and not problem) or problem in found[0][1]


def test_a_zone_that_is_none() -> None:
    with pytest.raises(ValueError, match="no time zone"):
        SyslogSettings(timezone="Mars/Olympus")
