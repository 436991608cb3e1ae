"""Any bytes, cut anywhere: the readers of bodies do and raise only what they say."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import sys
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingestd.codecs.compression import Corrupt, Inflater, TooMuch
from ingestd.codecs.framing import Framer
from ingestd.codecs.lines import json_fault, parse_lines
from ingestd.http.problem import Problem
from ingestd.sources.http.decode import DocumentCodec, LinesCodec, ValueCodec, WholeCodec
from ingestd.sources.http.endpoints.base import BodyLimits
from tests.attacks.smuggling import CHUNKED, HOST, LINE
from tests.sources.source_tools import MemoryIntake, check, connected, serving

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

RECORD_MAX = 40
DEPTH_MAX = 3
quick = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
lines = st.one_of(
    json_values.map(lambda value: json.dumps(value).encode()),
    json_values.map(lambda value: json.dumps(value, ensure_ascii=False).encode()),
    st.sampled_from([b"", b" ", b"\r", b"1\r", b"1 2", b'1"a"', b"[1,", b"2]", b"[[[[1]]]]",
                     b"\xef\xbb\xbf1", b'"' + b"x" * 50 + b'"', b'{"a":[{"b":[]}]}', b"NaN", b"01",
                     b"\xff",                      b'"]]]]"', b'"[[[["', b"\0"]),
    st.binary(max_size=12),
)  # fmt: skip
bodies = st.lists(lines, max_size=12).map(b"\n".join)
cuts = st.lists(st.integers(0, 400), max_size=12)


def outcome(call, *arguments):
    """What it returns, or which of the errors that it may raise it raised."""
    try:
        return call(*arguments)
    except (Problem, Corrupt, TooMuch) as error:
        return error


def cut(data: bytes, at: list[int]) -> list[bytes]:
    ends = sorted({min(one, len(data)) for one in at} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(ends)]


# -- without a socket ------------------------------------------------------------------------------


@quick
@given(body=bodies, form=st.sampled_from(["json", "text", "bytes"]), first=st.integers(0, 5))
def test_lines(body, form, first):
    """Every line is a record, a refused one or blank; records come out as they came, in order."""
    parsed = parse_lines(body, form, RECORD_MAX, first, DEPTH_MAX)
    check(parsed.records)
    given_lines = (body if body[-1:] == b"\n" else body + b"\n").split(b"\n")[:-1]
    if form != "bytes":
        given_lines = [line.removesuffix(b"\r") for line in given_lines]
        blanks = b" \t\r" if form == "json" else b""
        given_lines = [
            line for line in given_lines if line.strip(blanks) or (blanks == b"" and line)
        ]
    items = iter(parsed.records.items())
    refused = {one.index - first: one for one in parsed.refused}
    assert parsed.total == len(given_lines)
    for index, line in enumerate(given_lines):
        if index in refused:
            assert line.startswith(refused[index].payload.removesuffix(b"\r")[:RECORD_MAX])
        else:
            assert next(items).removesuffix(b"\r") == line.removesuffix(b"\r")
            if form == "json":
                assert json_fault(line, DEPTH_MAX) == ""


@quick
@given(body=bodies, at=cuts, form=st.sampled_from(["json", "text", "bytes"]))
def test_framing(body, at, form):
    """However a stream is cut, it holds the same records and the same faults."""
    whole = Framer(form, RECORD_MAX, DEPTH_MAX)
    parts = Framer(form, RECORD_MAX, DEPTH_MAX)
    one = [parsed for parsed in (whole.feed(body), whole.end()) if parsed]
    two = [parsed for parsed in (*map(parts.feed, cut(body, at)), parts.end()) if parsed]
    for parsed in one + two:
        check(parsed.records)

    def seen(parsed):
        items = [item for each in parsed for item in each.records.items()]
        return items, [(r.index, r.reason) for each in parsed for r in each.refused]

    assert seen(one) == seen(two)


JSON_CODECS = (LinesCodec("json"), DocumentCodec(), ValueCodec())
CODECS = (*JSON_CODECS, LinesCodec("text"), LinesCodec("bytes"), WholeCodec())


@quick
@given(
    body=bodies | json_values.map(lambda value: json.dumps(value).encode()),
    codec=st.sampled_from(CODECS),
    records_max=st.integers(1, 12),
)
def test_bodies(body, codec, records_max):
    """A body is parsed or refused, and what is refused has a reason that a client can read."""
    bounds = BodyLimits(records_max, RECORD_MAX, DEPTH_MAX)
    found = outcome(codec.decode, body, bounds)
    if isinstance(found, Problem):
        assert found.kind.status in {400, 413}
        assert json.loads(found.body())["detail"]
        return
    (part,) = found
    parsed = part.parsed
    check(parsed.records)
    assert 1 <= parsed.records.count <= parsed.total <= records_max
    assert all(len(item) <= RECORD_MAX for item in parsed.records.items())
    assert len({one.index for one in parsed.refused}) == len(parsed.refused)
    if codec in JSON_CODECS:
        assert all(json_fault(item, DEPTH_MAX) == "" for item in parsed.records.items())


@quick
@given(body=bodies, records_max=st.integers(1, 12), codec=st.sampled_from(JSON_CODECS))
def test_the_quick_way_is_the_other_way(body, records_max, codec):
    """What is parsed without going to a thread is what a thread would have found."""
    bounds = BodyLimits(records_max, RECORD_MAX, DEPTH_MAX)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ingestd.sources.http.decode.QUICK_BYTES", 0)
        patch.setattr("ingestd.sources.http.decode.PIECE_BYTES", 16)
        quickly = outcome(codec.decode_quickly, body, bounds)
    if quickly is None:
        return
    slowly = outcome(codec.decode, body, bounds)
    if isinstance(quickly, Problem):
        assert quickly.body() == slowly.body()
    else:
        assert quickly == slowly


@quick
@given(
    bodies=st.lists(bodies, min_size=1, max_size=4),
    encoding=st.sampled_from(["gzip", "deflate", "zstd"]),
    at=cuts,
    damage=st.none() | st.tuples(st.integers(0, 400), st.integers(0, 255)),
    shorter=st.integers(0, 3),
    bytes_max=st.integers(0, 300),
    ratio_max=st.integers(0, 5),
)
def test_inflating(bodies, encoding, at, damage, shorter, bytes_max, ratio_max):
    """However a compressed body is cut or damaged: what was in it, or one of three errors."""
    pack = {"gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstd.compress}[encoding]
    if encoding == "deflate":
        bodies = bodies[:1]
    wire = b"".join(map(pack, bodies))
    wire = wire[: len(wire) - shorter]
    if damage is not None:
        place, byte = damage[0] % max(1, len(wire)), damage[1]
        wire = wire[:place] + bytes([byte]) + wire[place + 1 :]

    def run(pieces):
        inflater = Inflater(encoding, bytes_max, ratio_max)
        out = b"".join(part for piece in pieces for part in inflater.feed(piece))
        assert len(out) <= bytes_max
        inflater.finish()
        return out

    whole, parts = outcome(run, [wire]), outcome(run, cut(wire, at))
    if isinstance(whole, bytes) or isinstance(parts, bytes):
        assert whole == parts
        if damage is None and not shorter:
            assert whole == b"".join(bodies)
    elif damage is None and not shorter:
        assert type(whole) is type(parts) is TooMuch


@quick
@given(wire=st.binary(max_size=200), encoding=st.sampled_from(["gzip", "deflate", "zstd"]))
def test_inflating_anything(wire, encoding):
    inflater = Inflater(encoding, 10_000, 100)
    seen = outcome(lambda: [sum(map(len, inflater.feed(wire))), inflater.finish()])
    assert str(seen) if isinstance(seen, Exception) else seen[0] <= 10_000


# -- over a socket ---------------------------------------------------------------------------------


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(
    body=bodies, chunks=cuts, segments=cuts, extension=st.sampled_from([b"", b";a=b", b';a="x"'])
)
def test_any_chunking_is_the_whole_body(body, chunks, segments, extension):
    """A body in chunks of any sizes, in segments of any sizes, is the body in one piece."""

    async def both():
        one, two = (
            MemoryIntake(record_bytes_max=RECORD_MAX),
            MemoryIntake(record_bytes_max=RECORD_MAX),
        )
        async with serving(one) as source, connected(source) as client:
            client.post(body)
            whole = await client.reply()
        framed = b"".join(
            b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk)
            for chunk in cut(body, chunks)
            if chunk
        )
        request = LINE + HOST + CHUNKED + b"\r\n" + framed + b"0\r\n\r\n"
        async with serving(two) as source, connected(source) as client:
            for segment in cut(request, segments):
                client.send(segment)
                await client.writer.drain()
                await asyncio.sleep(0)
            parts = await client.reply()
            client.post(b"1")  # and the connection goes on
            assert (await client.reply()).status == 202
        assert (parts.status, parts.body) == (whole.status, whole.body)
        assert two.items[:-1] == one.items
        assert two.refused == one.refused

    asyncio.run(both())
