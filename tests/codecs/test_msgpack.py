"""MessagePack: ends are found however the bytes come, and every value has a JSON text."""

from __future__ import annotations

import itertools
import json
import math
import re
from datetime import UTC

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestd.codecs import msgpack as codec
from ingestd.codecs.compression import TooMuch
from ingestd.codecs.fluent import RecordBounds, RecordList, TooManyRecords, parse_body, parse_events
from ingestd.codecs.msgpack import (
    MessagePackFault,
    Scanner,
    encode_json,
    end_of,
    spans,
    to_object,
)
from tests.peak import peak

BOUNDS = RecordBounds(1000, 10_000, 10, 100_000, 100)
NOW = msgpack.ExtType(0, (1_764_412_619).to_bytes(4, "big") + (7).to_bytes(4, "big"))
START = msgpack.ExtType(0, b"\xff\xff\xff\xff\0\0\0\0")
END = msgpack.ExtType(0, b"\xff\xff\xff\xfe\0\0\0\0")

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=300)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20))
    | st.datetimes(timezones=st.just(UTC))
)
keys = st.text(max_size=3) | st.integers(0, 300) | st.none()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(keys, inner, max_size=20),
    max_leaves=30,
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def pack(value: object) -> bytes:
    return msgpack.packb(value, datetime=True)


def text_of(packed: bytes) -> bytes:
    assert end_of(packed) == len(packed)
    return encode_json(to_object(packed, 0, len(packed)))


def parse(*packed: bytes, bounds: RecordBounds = BOUNDS) -> list[object]:
    return [json.loads(item) for item in parse_body(b"".join(packed), bounds).records.items()]


# -- ends ------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(found=st.lists(values, min_size=1, max_size=5), cuts=st.lists(st.integers(1, 50)))
def test_ends_are_found_in_bytes_that_come_in_any_pieces(found, cuts):
    packed = [pack(value) for value in found]
    ends = list(itertools.accumulate(map(len, packed)))
    whole = b"".join(packed)
    assert [end for _, end in spans(whole)] == ends
    assert [end_of(whole, at) for at in (0, *ends[:-1])] == ends
    scanner, buffer, at, seen = Scanner(0, len(whole)), bytearray(), 0, []
    for size in itertools.chain(cuts, itertools.repeat(7)):
        buffer += whole[at : at + size]
        at += size
        while scanner.run(buffer):
            seen.append(scanner.at)
            scanner = Scanner(scanner.at, len(whole))
            if scanner.at == len(whole):
                break
        if at >= len(whole):
            break
    assert seen == ends


def test_many_values_are_found_together_and_large_ones_by_themselves():
    sizes = [3, 200_000, 5, 70_000, *range(2500), 66_000]
    whole = b"".join(pack("x" * size) for size in sizes)
    assert [len(to_object(whole, *span)) for span in spans(whole)] == sizes


def test_ends_are_found_where_msgspec_tells_them_in_other_words(monkeypatch):
    monkeypatch.setattr(codec, "_MORE", re.compile("other words"))
    packed = [pack({"n": n, "list": [n] * 20}) for n in range(500)]
    whole = b"".join(packed)
    assert [end - at for at, end in spans(whole)] == list(map(len, packed))
    assert end_of(whole) == len(packed[0])


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\x91\xc1",
        b"\x92\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xffabc",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x00",
        b"\xdd\x00",
        b"\xd7\x00abc",
        b"\x91" * 2000 + b"\x01",
        b"\xdd\x00\x0f\xff\xff" * 500,
    ],
)
def test_what_is_no_value_is_refused_and_takes_nothing(data):
    with peak() as most:
        with pytest.raises(MessagePackFault):
            list(spans(data))
        with pytest.raises(MessagePackFault):
            end_of(data)
    assert most.bytes < 1_000_000


def test_a_length_beyond_the_bound_is_refused_before_the_bytes_come():
    with pytest.raises(MessagePackFault, match="beyond 1000"):
        Scanner(0, 1000).run(b"\xdb\x00\x00\x10\x00")
    assert not Scanner(0, 5000).run(b"\xdb\x00\x00\x10\x00")
    with pytest.raises(MessagePackFault, match="600 levels"):
        Scanner(0, 5000).run(b"\x91" * 700)


@given(st.binary(max_size=200))
def test_any_bytes_are_values_or_refused(data):
    try:
        found = list(spans(data))
    except MessagePackFault:
        return
    assert [0, *(end for _, end in found)][:-1] == [at for at, _ in found]
    for span in found:
        json.loads(encode_json(to_object(data, *span)))


# -- JSON ------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(values)
def test_every_value_has_a_json_text(value):
    text = text_of(pack(value))
    assert b"\n" not in text
    json.loads(text)


@settings(max_examples=60)
@given(plain)
def test_what_json_has_is_the_same_in_json(value):
    assert json.loads(text_of(pack(value))) == value


@pytest.mark.parametrize(
    ("packed", "expected"),
    [
        (pack({"a": math.nan, "b": -math.inf}), {"a": None, "b": None}),
        (pack({"a": b"caf\xc3\xa9", "b": b"\xff\xfe"}), {"a": "café", "b": "data:;base64,//4="}),
        (b"\x82\xa1a\xa2\xffx\xa1b\xc4\x01\xff", {"a": "\ufffdx", "b": "data:;base64,/w=="}),
        (b"\x81\x81\xa1k\x01\x02", {'{"k":1}': 2}),
        (pack({1: 1, None: 2, (1, b"x"): 4, b"b": 5, 1.5: 6}),
         {"1": 1, "null": 2, '[1,"x"]': 4, "b": 5, "1.5": 6}),
        (pack({True: 3}), {"true": 3}),
        (b"\x82\xa1a\x01\xa1a\x02", {"a": 2}),
        (pack([2**64 - 1, -(2**63)]), [2**64 - 1, -(2**63)]),
        (pack(msgpack.Timestamp(1, 5000)), "1970-01-01T00:00:01.000005Z"),
        (b"\xd7\xff" + b"\xff" * 8, {"ext": -1, "data": "data:;base64,//////////8="}),
        (pack({"a": msgpack.ExtType(5, b"\xc4"), "b": b"\0"}),
         {"a": {"ext": 5, "data": "data:;base64,xA=="}, "b": "\0"}),
    ],
)  # fmt: skip
def test_what_json_has_not_is_shown_as_documented(packed, expected):
    assert json.loads(text_of(packed)) == expected


def test_a_timestamp_is_the_same_key_beside_a_bin():
    key = b"\xd6\xff\0\0\0\x05"
    for value in (b"\xa1x", b"\xc4\x01x", b"\xa1\xff"):
        (text,) = parse_body(b"\x81" + key + value, BOUNDS).records.items()
        assert list(json.loads(text)) == ["1970-01-01T00:00:05Z"]


@pytest.mark.parametrize(
    "time", [b"\xcd\xd7\0", b"\xce\xd7\0\0\0", NOW, [NOW, {}]], ids=["16", "32", "ext", "pair"]
)
def test_a_bin_is_text_behind_any_time(time):
    packed = time if isinstance(time, bytes) else pack(time)
    gathered = RecordList(BOUNDS)
    data = b"\x92" + packed + b"\x81\xa1a\xc4\x01x"
    parse_events(data, [(0, len(data))], b'"t"', gathered)
    (text,) = gathered.parsed().records.items()
    assert json.loads(text)["record"] == {"a": "x"}


def test_an_event_time_is_a_number_with_all_its_digits():
    assert text_of(pack(NOW)) == b"1764412619.000000007"
    late = msgpack.ExtType(0, (1).to_bytes(4, "big") + (2**32 - 1).to_bytes(4, "big"))
    assert text_of(pack(late)) == b"5.294967295"


# -- bodies ----------------------------------------------------------------------------------------


def test_an_array_is_one_record_an_element_and_anything_else_one_record():
    assert parse(pack([{"n": 1}, 2, [3]])) == [{"n": 1}, 2, [3]]
    assert parse(pack({"n": 1})) == [{"n": 1}]
    assert parse(pack({"n": 1}), pack([2, 3]), pack(None)) == [{"n": 1}, [2, 3], None]
    assert parse(pack([])) == parse(b"") == []


def test_events_are_what_fluent_bit_writes_as_json():
    body = [
        [[NOW, {}], {"log": "a"}],
        [NOW, {}],
        [[NOW, {"stream": "x"}], {"log": "b", "date": "mine"}],
        [[START, {"schema": "otlp"}], {"resource": {"name": "api"}}],
        [[NOW, {}], {"log": "c"}],
        [[END, {}], {}],
        [[NOW, {}], {"log": "d"}],
    ]
    date = 1_764_412_619.000000007
    group = {"group_attributes": {"resource": {"name": "api"}}}
    expected = [
        {"date": date, "log": "a"},
        {"date": date},
        {"__internal__": {"log_metadata": {"stream": "x"}}, "log": "b", "date": "mine"},
        {"date": date, "__internal__": group, "log": "c"},
        {"date": date, "log": "d"},
    ]
    assert parse(*map(pack, body)) == expected
    assert parse(pack(body[0])) == expected[:1]  # one event is no array of two records
    assert parse(pack(body)) == expected


def test_records_beyond_their_bounds_are_invalid_and_their_neighbours_accepted():
    deep: object = 0
    for _ in range(11):
        deep = [deep]
    parsed = parse_body(pack([1, "x" * 20_000, "\0" * 9000, deep, [NOW, 1], 2]), BOUNDS)
    assert parsed.records.items() == [b"1", b"2"]
    found = [(one.index, one.reason) for one in parsed.refused]
    assert found == [(1, "too_large"), (2, "too_large"), (3, "malformed"), (4, "malformed")]
    few = parse_body(pack([[NOW, 1]] * 300), BOUNDS)
    assert (len(few.refused), few.unlisted, few.total) == (100, 200, 300)


maps = st.dictionaries(
    st.text(max_size=3) | st.just(1),
    scalars | st.dictionaries(st.text(max_size=3), scalars) | st.lists(scalars, max_size=3),
)


@settings(max_examples=150)
@given(st.lists(maps | st.just([NOW, {"a": 1}]), max_size=6), st.sampled_from([1, 8, 40, 400]))
def test_an_array_of_maps_is_read_at_once_as_one_by_one(found, most):
    body = pack(found)
    bounds = BOUNDS._replace(record_bytes_max=most, records_max=5, bytes_max=600)
    outcomes = []
    for at_once in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not at_once:
                patch.setattr("ingestd.codecs.fluent._plain_lines", lambda *_: None)
            try:
                outcomes.append(parse_body(body, bounds))
            except (TooMuch, TooManyRecords, MessagePackFault) as error:
                outcomes.append(repr(error))
    assert outcomes[0] == outcomes[1]


def test_bodies_beyond_their_bounds_are_refused_whole():
    with pytest.raises(TooManyRecords):
        parse_body(pack([1] * 1001), BOUNDS)
    with pytest.raises(TooManyRecords):
        parse_body(b"\x01" * 1001, BOUNDS)
    with pytest.raises(TooMuch):
        parse_body(pack(["x" * 9000] * 12), BOUNDS)
    with pytest.raises(MessagePackFault):
        parse_body(pack([1, 2])[:-1], BOUNDS)


def test_events_of_a_message_carry_tag_time_metadata_and_group():
    events = [
        [[START, {}], {"resource": 1}],
        [1_764_412_619, {"log": b"caf\xc3\xa9"}],
        [[1.5, {"m": 1}], {}],
        [[END, {}], {}],
        [NOW, {}],
        ["x", {}],
        [1, 2],
        3,
    ]
    data = b"".join(map(pack, events))
    gathered = RecordList(BOUNDS)
    parse_events(data, spans(data), b'"app.web"', gathered)
    parsed = gathered.parsed()
    group = {"resource": 1}
    assert [json.loads(item) for item in parsed.records.items()] == [
        {"tag": "app.web", "time": 1764412619, "record": {"log": "café"}, "group": group},
        {"tag": "app.web", "time": 1.5, "record": {}, "metadata": {"m": 1}, "group": group},
        {"tag": "app.web", "time": 1764412619.000000007, "record": {}},
    ]
    assert [one.index for one in parsed.refused] == [3, 4, 5]


@pytest.mark.parametrize(
    "body",
    [
        pack([{"a": [None] * 100}] * 900),
        pack([{"k": 1}] * 1000),
        pack([{str(n): n for n in range(1000)}] * 20),
    ],
)
def test_many_small_values_take_little_memory(body):
    bounds = BOUNDS._replace(bytes_max=10**7, record_bytes_max=10**6)
    with peak() as most:
        parse_body(body, bounds)
    assert most.bytes < 200_000 + 30 * len(body)
