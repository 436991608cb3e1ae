"""Bodies: what is a record, what is refused, and that good ones are not copied."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.record import Layout
from ingestd.codecs.lines import KEPT_BYTES, parse_lines
from ingestd.http import problem
from ingestd.http.problem import Problem
from ingestd.sources.http.endpoints.base import BodyLimits
from ingestd.sources.http.endpoints.records import (
    DocumentCodec,
    LinesCodec,
    WholeCodec,
    codec_of,
)
from tests.sources.source_tools import check

BOUNDS = BodyLimits(records_max=1000, record_bytes_max=64)


def read(body, content_type="", form="json", bounds=BOUNDS):
    ((parsed, *_),) = codec_of(content_type, form).decode(body, bounds)
    check(parsed.records)
    return parsed


def refusal(*args, **kwargs):
    with pytest.raises(Problem) as caught:
        read(*args, **kwargs)
    return caught.value.kind.status, caught.value.kind.slug


@pytest.mark.parametrize(
    ("content_type", "form", "reading"),
    [
        ("", "json", LinesCodec),
        ("application/x-www-form-urlencoded", "json", LinesCodec),
        ("application/x-ndjson", "json", LinesCodec),
        ("Application/JSONL ; charset=UTF-8", "json", LinesCodec),
        ("application/json", "json", DocumentCodec),
        ('application/json;charset="utf-8"', "json", DocumentCodec),
        ("text/plain; charset=us-ascii", "text", LinesCodec),
        ("", "text", LinesCodec),
        ("application/x-www-form-urlencoded", "text", LinesCodec),
        ("application/octet-stream", "bytes", WholeCodec),
        ("", "bytes", WholeCodec),
    ],
)
def test_types_that_a_pipeline_takes(content_type, form, reading):
    assert type(codec_of(content_type, form)) is reading


@pytest.mark.parametrize(
    ("content_type", "form"),
    [
        ("text/plain", "json"),
        ("application/octet-stream", "json"),
        ("application/json; charset=latin-1", "json"),
        ("application/json; charset=\udcff", "json"),
        ("\udcff", "json"),
        ("application/x-ndjson", "text"),
        ("application/json", "text"),
        ("application/json", "bytes"),
        ("text/plain", "bytes"),
        ("multipart/form-data; boundary=x", "json"),
        ("application/jsonx", "json"),
        ("/", "text"),
    ],
)
def test_types_that_it_does_not_take(content_type, form):
    with pytest.raises(Problem) as caught:
        codec_of(content_type, form)
    assert caught.value.kind.slug == "unsupported-media-type"
    assert json.loads(caught.value.body())["status"] == 415


@pytest.mark.parametrize(
    ("body", "items"),
    [
        (b'{"a":1}\n', [b'{"a":1}']),
        (b'{"a":1}', [b'{"a":1}']),
        (b"1\n2\n3", [b"1", b"2", b"3"]),
        (b"1\r\n2\r\n", [b"1", b"2"]),
        (b"1\r", [b"1"]),
        (b"\xef\xbb\xbf1\n2\n", [b"1", b"2"]),
        (b"\n\n1\n \t\r\n\r\n2\n\n\n", [b"1", b"2"]),
        (b' {"a": 1} \n2\n', [b' {"a": 1} ', b"2"]),
        (b'"\xc3\xa9"\n', [b'"\xc3\xa9"']),
        (b'"\\ud83d\\ude00"\n', [b'"\\ud83d\\ude00"']),
        (b"null\ntrue\n-0.5e-7\n[]\n", [b"null", b"true", b"-0.5e-7", b"[]"]),
    ],
)
def test_json_lines(body, items):
    parsed = read(body)
    assert parsed.records.items() == items
    assert parsed.records.layout is Layout.LINES
    assert not parsed.refused


MALFORMED = [
    b"nope",
    b"1 2",
    b"1,2",
    b'{"a":1}}',
    b"[1,]",
    b"{'a':1}",
    b"01",
    b"+1",
    b"1.",
    b".5",
    b"NaN",
    b"Infinity",
    b"True",
    b'"\t"',
    b'"\x00"',
    b"\x00",
    b'"\\x41"',
    b'"\\u12"',
    b'"open',
    b'"\xff"',
    b'"\xed\xa0\x80"',
    b'"\xc0\xaf"',
    b"{",
    b"]",
    b"\x0c1",
    b"// 1",
    b'{"a" 1}',
    b'{1:"a"}',
    b'\xef\xbb\xbf"not at the start"',
]


@pytest.mark.parametrize("bad", MALFORMED)
def test_a_malformed_line_is_refused_beside_good_ones(bad):
    parsed = read(b"[1]\n" + bad + b'\n"last"\n')
    assert parsed.records.items() == [b"[1]", b'"last"']
    (one,) = parsed.refused
    assert (one.index, one.reason, one.payload) == (1, "malformed", bad)
    assert one.detail
    assert "\n" not in one.detail


@pytest.mark.parametrize("bad", MALFORMED)
def test_a_malformed_body_is_400(bad):
    bad = bad.removeprefix(b"\xef\xbb\xbf") if bad[:3] == b"\xef\xbb\xbf" else bad
    if bad == b'"not at the start"':
        bad = b"\xef\xbb\xbf1"  # a JSON text has no mark
    else:
        assert refusal(bad) == (400, "malformed")
    assert refusal(bad, "application/json") == (400, "malformed")
    assert refusal(b"[" + bad.replace(b"1,2", b"{,}") + b"}", "application/json") == (
        400,
        "malformed",
    )


LONE = [
    b'"\\ud83d"',
    b'{"\\uDC00":\n1}',
    b'[1, "\\ud83d\\u0041 \\\\"]',
    b'"\\ud83d' + b"x" * 99 + b'"',
]


@pytest.mark.parametrize("bad", LONE)
def test_half_a_surrogate_pair_costs_its_element_alone(bad):
    """JavaScript writes it where a text was cut; as a line it costs its line alone."""
    body = b' [ "\\ud83d\\ude00" ,1,\n%b , "\\\\ud83d",%b,1]' % (bad, bad)
    parsed = read(body, "application/json", bounds=BodyLimits(10, 100))
    assert parsed.records.items() == [b'"\\ud83d\\ude00"', b"1", b'"\\\\ud83d"', b"1"]
    reason = "too_large" if len(bad) > 100 else "malformed"
    assert [(one.index, one.reason, one.payload) for one in parsed.refused] == [
        (2, reason, bad),
        (4, reason, bad),
    ]
    assert refusal(b"[%b]" % bad, "application/json")[0] in (400, 413)
    assert refusal(body + b"]", "application/json") == (400, "malformed")


def test_many_halves_of_surrogate_pairs_are_listed_up_to_the_bound():
    body = b"[%b]" % b",".join([*[b'"\\ud83d"'] * 5000, *[b"1"] * 5000])
    parsed = read(body, "application/json", bounds=BodyLimits(10_000, 100))
    assert (parsed.records.count, len(parsed.refused), parsed.invalid) == (5000, 100, 5000)
    assert DocumentCodec().decode_quickly(body, BOUNDS) is None  # it takes long


def test_nesting_beyond_the_stack_is_malformed():
    deep = b"[" * 200_000 + b"]" * 200_000
    bounds = BodyLimits(10, 10**6)
    assert (
        read(b"1\n" + deep, bounds=bounds).refused[0].detail
        == "nested deeper than json_depth_max = 128"
    )
    assert refusal(deep, "application/json", bounds=bounds) == (400, "malformed")


def test_values_over_several_lines_are_not_one_record_a_line():
    # Taken together these lines are values, and as many as there are lines.
    parsed = read(b"[1,\n2]\n3 4\n5\n")
    assert parsed.records.items() == [b"5"]
    assert [one.index for one in parsed.refused] == [0, 1, 2]
    assert refusal(b"{\n}\n") == (400, "malformed")


@pytest.mark.parametrize("body", [b"", b"\n", b"\r\n\r\n", b" \n\t\n", b"\xef\xbb\xbf", b"  "])
def test_nothing_at_all_is_400(body):
    assert refusal(body) == (400, "empty")
    assert refusal(body.strip(b"\xef\xbb\xbf"), "application/json") == (400, "empty")


def test_a_type_of_another_format_is_told_which_one_that_is():
    for content_type, form, taker in (
        ("text/plain", "json", "text"),
        ("application/octet-stream", "text", "bytes"),
        ("application/json", "text", "json"),
    ):
        with pytest.raises(Problem) as caught:
            codec_of(content_type, form)
        detail = json.loads(caught.value.body())["detail"]
        assert detail.endswith(f'; a pipeline with format = "{taker}" takes it')
    with pytest.raises(Problem) as caught:
        codec_of("text/csv", "json")
    assert b"a pipeline with format" not in caught.value.body()


def test_json_over_several_lines_is_told_the_type_that_it_needs():
    for pretty in (b'{\n  "a": 1\n}\n', b'[\n  {\n    "a": 1\n  }\n]', b'[{\n"a": 1}]'):
        with pytest.raises(Problem) as caught:
            read(pretty)
        detail = json.loads(caught.value.body())["detail"]
        assert detail.endswith("send JSON over several lines with Content-Type: application/json")
        assert read(pretty, "application/json").records.items()
    for other in (b"{", b"x\ny\n", b'{"a"\n: 1}'):
        with pytest.raises(Problem) as caught:
            read(other)
        assert b"Content-Type" not in caught.value.body()


def test_nothing_acceptable_lists_why():
    with pytest.raises(Problem) as caught:
        read(b"x\n\ny\n" * 200)
    problem = json.loads(caught.value.body())
    assert len(problem["errors"]) == 100
    assert problem["errors"][1]["index"] == 1
    assert "399 more" in problem["detail"]


def test_a_good_body_is_its_own_payload():
    body = b'{"a":1}\n' * 1000
    assert read(body).records.payload is body
    assert read(body, form="text").records.payload is body
    large = b'{"a":"' + b"x" * 50 + b'"}\n'
    large *= 30_000
    bounds = BodyLimits(30_000, 64)
    assert read(large, bounds=bounds).records.payload is large
    assert read(large, form="text", bounds=bounds).records.payload is large


def test_lines_that_are_too_large_are_refused_beside_good_ones():
    long = b'"' + b"x" * 63 + b'"'
    fits = b'"' + b"x" * 62 + b'"'
    for end in (b"\n", b"\r\n"):
        parsed = read(end.join([b"1", long, fits, b""]))
        assert parsed.records.items() == [b"1", fits]
        (one,) = parsed.refused
        assert (one.index, one.reason, one.payload) == (1, "too_large", long)
        assert "65 bytes" in one.detail
    assert refusal(long) == (413, "record-too-large")


def test_of_a_huge_line_the_beginning_is_kept():
    parsed = read(b"1\n" + b"x" * 10**6, bounds=BodyLimits(10, 10**5))
    assert parsed.refused[0].payload == b"x" * KEPT_BYTES


def test_errors_in_a_large_body_have_their_own_index():
    lines = [b'{"n":%d,"pad":"%s"}' % (n, b"x" * 500) for n in range(4000)]
    for bad in (3, 1700, 3999):
        lines[bad] = b"bad"
    parsed = read(b"\n".join(lines), bounds=BodyLimits(4000, 10**4))
    assert [one.index for one in parsed.refused] == [3, 1700, 3999]
    assert parsed.records.count == 3997
    assert b"bad" not in parsed.records.items()


def test_too_many_records_are_413_and_blank_lines_are_none():
    bounds = BodyLimits(3, 10**7)
    assert read(b"\n\n1\n\n\n2\r\n\r\n3\n\n", bounds=bounds).records.count == 3
    assert refusal(b"1\n2\n3\n4", bounds=bounds) == (413, "too-many-records")
    assert refusal(b"1\n2\n3\nbad", bounds=bounds) == (413, "too-many-records")
    assert refusal(b"[1,2,3,4]", "application/json", bounds=bounds) == (413, "too-many-records")
    assert read(b"\n" * 10**6 + b"1\n2\n3\n", bounds=bounds).records.count == 3
    assert refusal(b"1\n" * 10**6, bounds=bounds) == (413, "too-many-records")


def test_a_body_of_commas_is_refused_quickly():
    body = b"[" + b",".join([b"1"] * 2_000_000) + b"]"
    start = time.process_time()
    assert refusal(body, "application/json") == (413, "too-many-records")
    assert time.process_time() - start < 1
    nested = b"[" + b"[" * 100_000 + b"," * 1_500_000
    assert refusal(nested, "application/json") == (400, "malformed")
    assert refusal(b"[" + b"," * 1_500_000, "application/json") == (400, "malformed")
    assert refusal(b'["\xff"' + b",1" * 1_500_000 + b"]", "application/json") == (400, "malformed")
    few = b"[" + b",".join([b"[" + b"1," * 999 + b"1]"] * 1000) + b"]"
    assert (
        read(few + b" ", "application/json", bounds=BodyLimits(1000, 10**4)).records.count == 1000
    )
    assert refusal(few, "application/json", bounds=BodyLimits(999, 10**4)) == (
        413,
        "too-many-records",
    )


@pytest.mark.parametrize(
    ("body", "items", "layout"),
    [
        (b'{"a":1}', [b'{"a":1}'], Layout.LINES),
        (b' {"a":1}\r\n', [b'{"a":1}'], Layout.LINES),
        (b'{\n"a":1}', [b'{\n"a":1}'], Layout.SIZED),
        (b'"x"', [b'"x"'], Layout.LINES),
        (b"[1, 2 ,3]", [b"1", b"2", b"3"], Layout.LINES),
        (b"\n[1,\n[2,\n3]]\n", [b"1", b"[2,\n3]"], Layout.SIZED),
        (b"[\n1,\n2\n]", [b"1", b"2"], Layout.LINES),
        (b"[[]]", [b"[]"], Layout.LINES),
    ],
)
def test_json_documents(body, items, layout):
    records = read(body, "application/json").records
    assert (records.items(), records.layout) == (items, layout)


def test_json_documents_that_hold_nothing_or_too_much():
    assert refusal(b"[]", "application/json") == (400, "empty")
    assert refusal(b"[1] 2", "application/json") == (400, "malformed")
    assert refusal(b"1\n2", "application/json") == (400, "malformed")
    assert refusal(b'"%s"' % (b"x" * 63), "application/json") == (413, "record-too-large")
    parsed = read(b'[1,"%s",{}]' % (b"x" * 63), "application/json")
    assert parsed.records.items() == [b"1", b"{}"]
    assert (parsed.refused[0].index, parsed.refused[0].reason) == (1, "too_large")
    assert refusal(b'["%s"]' % (b"x" * 63), "application/json") == (413, "record-too-large")


def test_text_lines_are_any_bytes():
    body = b"\xef\xbb\xbfone\r\n\r\n\n\xff\x00two\n  \nthree\rfour\n\r\r\nlast"
    items = [b"one", b"\xff\x00two", b"  ", b"three\rfour", b"\r", b"last"]
    assert read(body, "text/plain", "text").records.items() == items
    parsed = read(b"a\n" + b"x" * 65 + b"\nb", form="text")
    assert parsed.records.items() == [b"a", b"b"]
    assert parsed.refused[0].reason == "too_large"


def test_bytes_are_one_record_as_it_is():
    body = b"\xef\xbb\xbf\r\n\x00\xff\n\n"
    assert read(body, "application/octet-stream", "bytes").records.items() == [body]
    assert refusal(b"", "application/octet-stream", "bytes") == (400, "empty")
    assert refusal(b"x" * 65, "application/octet-stream", "bytes") == (413, "record-too-large")


def test_lines_of_a_bytes_pipeline_keep_everything():
    assert parse_lines(b"a\r\n\n\x00", "bytes", 9).records.items() == [b"a\r", b"", b"\x00"]


def _valid(line):
    """Python's own reader, made as strict as the RFC."""
    try:
        json.loads(line.decode(), parse_constant=lambda _: 1 / 0)
    except (ValueError, ZeroDivisionError, RecursionError):
        return False
    return b"\\u" not in line.lower()


tokens = st.sampled_from([b"1", b"{", b"}", b"[", b"]", b",", b":", b'"a"', b" ", b"\n", b"\r\n"])
soup = st.lists(tokens | st.binary(max_size=3), max_size=30).map(b"".join)


@given(soup)
def test_whatever_comes_each_line_is_judged_alone(body):
    parsed = parse_lines(body, "json", 10**6)
    check(parsed.records)
    lines = [line.removesuffix(b"\r") for line in (body + b"\n").split(b"\n")]
    lines = [line for line in lines if line.strip(b" \t\r")]
    assert parsed.records.items() == [line for line in lines if _valid(line.strip(b" \t\r"))]
    assert [one.payload for one in parsed.refused] == [
        line for line in lines if not _valid(line.strip(b" \t\r"))
    ]


def test_a_content_type_is_read_in_one_go_and_has_a_bound():
    """Thousands of semicolons took the standard library's parser 38 ms on the event loop."""
    assert type(codec_of("application/json" + ";" * 1000, "json")) is DocumentCodec
    with pytest.raises(Problem) as caught:
        codec_of("application/json" + ";" * 8000, "json")
    assert caught.value.kind is problem.MEDIA_TYPE
    with pytest.raises(Problem, match="latin-1"):
        codec_of("application/json" + ";" * 900 + " charset = latin-1", "json")
